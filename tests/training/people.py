"""Made-up people for the tests of data: jobs over them, their tables in files, and a plain loader that says what must
come out of any preparation."""

from __future__ import annotations

import hashlib
import hmac
import itertools
import math
import traceback
from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv

from training.config import Job
from training.data import declared
from training.jobfile import parse
from training.preparation import prepare
from training.shards import Prepared

KEY, OTHER_KEY, SOURCE_KEY = "11" * 32, "22" * 32, "33" * 32
SECRET = "Ada-Lovelace-HIV"


def job_of(source="nowhere.csv", *, unit="row", most=1, fraction=0.2, features=None, **more):
    """A job over columns id (0 to 1000, which names a record), colour and label."""
    return parse(
        Job,
        {
            "account": "people",
            "privacy": {"epsilon": 3.0, "delta": 1e-6, "unit": unit, "units": 1000, "max_records_per_unit": most},
            "data": {
                "source": str(source),
                "validation_fraction": fraction,
                "features": features or {"id": {"range": [0, 1000]}, "colour": {"categories": ["red", "green"]}},
                "label": {"column": "label", "categories": ["no", "yes"]},
            },
            "model": {"kind": "linear"},
            "training": {"expected_batch_size": 50},
            **more,
        },
    )


def text_job(source, *, kind="causal-lm", unit="row", most=1, label=True, **text):
    """A job over texts in column `note`, by the tokenizer of bytes."""
    causal = kind == "causal-lm"
    return parse(
        Job,
        {
            "account": "notes",
            "privacy": {"epsilon": 3.0, "delta": 1e-6, "unit": unit, "units": 1000, "max_records_per_unit": most},
            "data": {
                "source": str(source),
                "text": {"column": "note", "max_length": 12, **text},
                **({} if causal or not label else {"label": {"column": "label", "categories": ["no", "yes"]}}),
            },
            "model": {"kind": kind, "path": "tiny:llama" if causal else "tiny:bert"},
            "training": {"expected_batch_size": 50},
            "evaluation": {"metric": "loss"},
        },
    )


@dataclass(frozen=True)
class Table:
    """Columns of text, as a file holds them."""

    names: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def write(self, path):
        """As CSV, or by the path's suffix as Parquet or JSON lines; returns the path."""
        columns = [pa.array([row[i] for row in self.rows], pa.string()) for i in range(len(self.names))]
        table = pa.table(columns, names=list(self.names))
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            pq.write_table(table, path)
        elif path.suffix == ".jsonl":
            import json

            path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
        else:
            pacsv.write_csv(table, path)
        return path


def table_of(rows, names=("id", "colour", "label")):
    """A table of whatever `rows` hold, as text."""
    return Table(tuple(names), [tuple(map(str, row)) for row in rows])


def prepared(job, key=KEY, **options):
    """What is prepared for `job`, opened."""
    return Prepared.at(prepare(job, SOURCE_KEY, key, **options))


def placed(job, world=2, key=KEY):
    """(partition, rank) → the shard that is found there."""
    made = prepared(job, key)
    places = itertools.product(("train", "validation"), range(world))
    return {(partition, rank): made.shard(partition, rank, world) for partition, rank in places}


def ids(shard):
    """The names of a shard's records."""
    return np.rint((shard.features[:][:, 0].numpy() + 0.5) * 1000).astype(int).tolist()


# -- what must come out: straight from the promises, one record at a time --


def reference_rows(table):
    """Each record's bytes: its cells, each after its length."""
    for row in table.rows:
        yield b"".join(b"%d:%s" % (len(cell), cell) for cell in map(str.encode, row))


def reference_fingerprint(table, key):
    """Over all records, whatever their order."""
    digests = sorted(hashlib.sha256(row).digest() for row in reference_rows(table))
    return hmac.new(bytes.fromhex(key), b"source\0" + b"".join(digests), hashlib.sha256).hexdigest()


def reference(job, table, key, partition, rank, world):
    """(features, labels, offsets) of the units of `partition` that fall to `rank` of `world`."""
    data, secret = declared(job.data), bytes.fromhex(key)

    def tag(purpose, content):
        return hmac.new(secret, purpose + b"\0" + content, hashlib.sha256).digest()

    units, tags, seen = defaultdict(list), {}, Counter()
    for i, row in enumerate(reference_rows(table)):
        marked = row + b"\x1e%d" % seen[row]
        seen[row] += 1
        tags[i] = tag(b"record", marked)
        unit = marked if job.privacy.unit == "row" else table.rows[i][table.names.index(job.privacy.unit)].encode()
        if unit:
            units[tag(b"unit", unit)].append(i)
    order, offsets = [], [0]
    for unit in sorted(units):
        in_validation = int.from_bytes(unit[:8], "big") < int(data.validation_fraction * 2**64)
        if in_validation == (partition == "validation") and int.from_bytes(unit[8:16], "big") % world == rank:
            order += sorted(units[unit], key=tags.__getitem__)[: job.privacy.max_records_per_unit]
            offsets.append(len(order))
    features = [[x for name, f in data.features.items() for x in _numbers(_cell(table, i, name), f)] for i in order]
    labels = [_place(_cell(table, i, data.label.column), data.label.categories, 0) for i in order]
    return np.array(features, np.float32).reshape(-1, data.width), labels, offsets


def _cell(table, i, name):
    return table.rows[i][table.names.index(name)]


def _place(cell, categories, otherwise):
    return categories.index(cell.strip()) if cell.strip() in categories else otherwise


def _numbers(cell, feature):
    if feature.categories is not None:
        return [float(category == cell.strip()) for category in feature.categories]
    low, high = feature.range
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    value = (low + high) / 2 if math.isnan(value) else min(high, max(low, value))
    return [(value - low) / (high - low) - 0.5]


def whole_chain(error):
    """Everything that a logger could print of an error: every message, argument and chained exception."""
    said, rest = "", [error]
    while rest:
        e = rest.pop()
        said += f"{e!s} {e!r} {e.args!r} " + "".join(traceback.format_exception(e, chain=False))
        rest += [chained for chained in (e.__cause__, e.__context__) if chained is not None]
    return said
