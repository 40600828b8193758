"""Preparation: a source, once, into shards that workers map into memory. Inside the boundary; no Ray.

Two passes. The first takes the source in, file by file: each record's text and digest; from the digests come the
fingerprint, and of equal records the ordinals that tell them apart as units. The second takes so many pieces of that
text, one by one or wherever `parallel` runs them: each record's keyed hashes say which partition is its place, and the
records of one partition at a time become numbers in an uncompressed Arrow file. Then one index per partition puts
records in the order of their units, cuts units to their declared size, and where they are packed says which records of
one unit share a row.

Where a unit goes depends on its own identity and the dataset's hidden key alone: adding or removing one unit moves no
other. A row's identity is its bytes and its ordinal among equal rows. A record without a unit (null or empty) is left
out: it is nobody's to whom anything was promised. A unit with too many records keeps those with the smallest keyed
hashes. Nothing is fitted (P11); how many there are of anything is written inside the folder and nowhere else (P13).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster import environment
from cluster.accounting.books import PARTITIONS
from cluster.errors import UsageError
from cluster.files import write_whole
from training import identity, sources
from training.config import Job
from training.encoding import Encoding

MANIFEST = "manifest.json"  # of a prepared folder, written last
INDEX = ("order", "offsets", "shares")  # of a partition, each a file of numbers
ROWS = "rows"  # of a packed partition, one more: where each row begins in the order
VERSION = 1  # of the files that are written
LARGE = 2**20  # bytes of a source from which on it is worth other processes
GREAT = 2**30  # from which on even taking it in, some 100 MB a second, is
PIECES = 64  # of a large source; the same for all, so that whoever counts them learns nothing of its size
SETTLED = 2 * 10**9  # ns after which a file that is changed again shows it by its time

Work = Callable[["Recipe", int], None]
Everywhere = Callable[[Work, "Recipe", int], None]


def one_by_one(work: Work, recipe: Recipe, count: int) -> None:
    """All pieces of `work`, in this process."""
    for number in range(count):
        work(recipe, number)


@dataclass(frozen=True)
class Recipe:
    """All that decides what one preparation makes of its source, and where it makes it.

    Attributes:
        key: the dataset's hidden partition key.
        encodings: partition → how its records become numbers.
        draft: the folder that becomes the prepared one when it is whole.
        pieces: how many the second pass is cut into.
    """

    job: Job
    source: sources.Source
    key: str
    encodings: dict[str, Encoding]
    draft: Path
    pieces: int


def prepare(job: Job, source_key: str, key: str, everywhere: Everywhere = one_by_one) -> Path:
    """The folder with the job's records as its model reads them; made where it is not there yet.

    Args:
        source_key: the ledger's, of fingerprints.
        key: the dataset's hidden partition key.
        everywhere: runs the pieces of a large source's work.

    Raises:
        UsageError: the source cannot be used, or changes while it is read.
    """
    source, encoding = sources.private(job), Encoding.of(job)
    mark = fingerprint_of(source, source_key)
    name = digest(job, encoding, mark, key)
    base = _inside("prepared", job.account)
    with (base / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one at a time: another's draft is then nobody's
        folder, draft = base / name, base / ".draft"
        if (folder / MANIFEST).exists():
            return folder
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        draft.mkdir(mode=0o700)
        large = source.size >= LARGE
        encodings = {"train": replace(encoding, groups=None), "validation": encoding}
        if job.evaluation.on == "public":  # its groups are columns of the public file
            encodings["validation"] = encodings["train"]
        recipe = Recipe(job, source, key, encodings, draft, PIECES if large else 1)
        try:
            _make(recipe, mark, name, source_key, everywhere if large else one_by_one)
            os.rename(draft, folder)
        finally:  # the text of records is in it
            shutil.rmtree(draft, ignore_errors=True)
    return folder


def digest(job: Job, encoding: Encoding, mark: str, key: str) -> str:
    """Of all that decides what is prepared: the name of the folder. Keyed, as the fingerprint `mark` is. Hexadecimal.

    Args:
        encoding: of the job, groups included.
    """
    groups = encoding.groups if job.evaluation.on == "validation" else None
    facts = {
        "version": VERSION,
        "source": mark,
        "unit": [job.privacy.unit, job.privacy.max_records_per_unit, job.data.validation_fraction],
        "data": encoding.data.model_dump(mode="json", include={"features", "text", "label"}),
        "order": list(encoding.data.features),
        "groups": groups and groups.model_dump(mode="json"),
        "model": [encoding.causal, encoding.digest],
    }
    return hmac.new(bytes.fromhex(key), json.dumps(facts, sort_keys=True).encode(), hashlib.sha256).hexdigest()


def fingerprint_of(source: sources.Source, key: str) -> str:
    """The fingerprint of `source`: read, or remembered of files that have not changed since (path, size and time)."""
    facts = json.dumps([source.place, source.names, *([f.path, f.size, f.changed] for f in source.files)])
    name = hmac.new(bytes.fromhex(key), f"files\0{VERSION}\0{facts}".encode(), hashlib.sha256).hexdigest()
    kept = _inside("prepared", ".fingerprints") / name
    if kept.exists():
        return kept.read_text(encoding="utf-8")
    found = identity.digests(source)
    mark = identity.fingerprint(found, identity.in_order(found)[0], key)
    if time.time_ns() - max(file.changed for file in source.files) > SETTLED:
        write_whole(kept, mark).chmod(0o600)
    return mark


def _inside(*names: str) -> Path:
    """A folder in the home that only its owner may open."""
    folder = environment.home()
    for name in names:
        folder = folder / name
        folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _make(recipe: Recipe, mark: str, name: str, source_key: str, everywhere: Everywhere) -> None:
    draft, files = recipe.draft, len(recipe.source.files)
    spread = files > 1 and recipe.source.size >= GREAT
    (everywhere if spread else one_by_one)(take_in, recipe, files)
    found = np.concatenate([np.load(draft / f"digests-{number}.npy") for number in range(files)])
    order, ordinals = identity.in_order(found)
    if identity.fingerprint(found, order, source_key) != mark:
        raise UsageError(f"{recipe.source.field}: its content changed while it was read; start again.")
    np.save(draft / "ordinals.npy", ordinals)
    del found, order, ordinals
    everywhere(encode, recipe, recipe.pieces)
    manifest = {
        "version": VERSION,
        "fingerprint": mark,
        "preparation": name,
        "causal": recipe.encodings["train"].causal,
        "tokenizer": recipe.encodings["train"].digest,
        "partitions": {partition: _index(recipe, partition) for partition in PARTITIONS},
    }
    for path in draft.iterdir():
        if path.name.startswith(("text-", "digests-", "ordinals", "tags-", ".")):
            path.unlink()
        else:
            path.chmod(0o600)
    write_whole(draft / MANIFEST, json.dumps(manifest, indent=1)).chmod(0o600)


# -- the first pass --


def take_in(recipe: Recipe, number: int) -> None:
    """The text and the digests of one file of the source."""
    found = [np.zeros((0, 32), np.uint8)]
    schema = pa.schema([(name, pa.string()) for name in recipe.source.names])
    with pa.ipc.new_file(str(recipe.draft / f"text-{number}.arrow"), schema) as file:
        for batch in recipe.source.batches(number):
            found.append(identity.digests_of(batch))
            file.write_batch(batch)
    np.save(recipe.draft / f"digests-{number}.npy", np.concatenate(found))


# -- the second --


def encode(recipe: Recipe, piece: int) -> None:
    """One piece's records, in an Arrow file of each partition, and what puts them in order beside it."""
    tags: dict[str, list[np.ndarray]] = {partition: [np.zeros((0, 3), np.uint64)] for partition in PARTITIONS}
    with contextlib.ExitStack() as stack:
        files = {
            partition: stack.enter_context(
                pa.ipc.new_file(str(recipe.draft / f"{partition}-{piece}.arrow"), encoding.schema)
            )
            for partition, encoding in recipe.encodings.items()
        }
        for batch, ordinals in _piece(recipe, piece):
            words, kept = _tags(recipe, batch, ordinals)
            in_validation = words[:, 0] < np.uint64(int(recipe.job.data.validation_fraction * 2**64))
            for partition, encoding in recipe.encodings.items():
                mine = np.flatnonzero(kept & (in_validation == (partition == "validation")))
                tags[partition].append(words[mine])
                files[partition].write_batch(encoding.encoded(batch.take(pa.array(mine))))
    for partition, found in tags.items():
        np.save(recipe.draft / f"tags-{partition}-{piece}.npy", np.concatenate(found))


def _piece(recipe: Recipe, piece: int) -> Iterator[tuple[pa.RecordBatch, np.ndarray]]:
    """The piece's batches of text, each with its records' ordinals; all pieces together are the source."""
    ordinals = np.load(recipe.draft / "ordinals.npy", mmap_mode="r")
    first = count = 0
    for number in range(len(recipe.source.files)):
        file = pa.ipc.open_file(pa.memory_map(str(recipe.draft / f"text-{number}.arrow")))
        for i in range(file.num_record_batches):
            batch = file.get_batch(i)
            if count % recipe.pieces == piece:
                yield batch, ordinals[first : first + len(batch)]
            first, count = first + len(batch), count + 1


def _tags(recipe: Recipe, batch: pa.RecordBatch, ordinals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each record the start of its unit's keyed hash and of its own, and whether it has a unit.

    Arrays: uint64 [records, 3], of which the first decides the partition, the second the rank; bool [records].
    """
    secret, unit = bytes.fromhex(recipe.key), recipe.job.privacy.unit
    rows = [b"%s\x1e%d" % one for one in zip(identity.rows_of(batch), ordinals.tolist(), strict=True)]
    words = np.zeros((len(rows), 3), np.uint64)
    if unit == "row":  # a unit has one record, so that nothing hangs on the record's own hash
        words[:, :2] = identity.keyed_hashes(secret, b"unit", rows)
        return words, np.ones(len(rows), bool)
    units = pc.fill_null(batch.column(unit), "").cast(pa.binary()).to_pylist()
    words[:, :2] = identity.keyed_hashes(secret, b"unit", units)
    words[:, 2] = identity.keyed_hashes(secret, b"record", rows)[:, 0]
    return words, np.array([one != b"" for one in units], bool)


def _index(recipe: Recipe, partition: str) -> dict[str, Any]:
    """Write the order of a partition's records: by unit, in each by its record's hash, no more than are declared.

    Returns:
        Its facts for the manifest: the files that hold its records, and their columns.
    """
    files, tags = {}, [np.zeros((0, 3), np.uint64)]
    for piece in range(recipe.pieces):
        tags.append(np.load(recipe.draft / f"tags-{partition}-{piece}.npy"))
        name = f"{partition}-{piece}.arrow"
        if len(tags[-1]):
            files[name] = len(tags[-1])
        else:
            (recipe.draft / name).unlink()
    words = np.concatenate(tags)
    order = np.lexsort(words.T[::-1])
    words = words[order, :2]
    begins = np.flatnonzero(np.r_[True, (words[1:] != words[:-1]).any(axis=1)][: len(words)])
    sizes = np.diff(np.append(begins, len(words)))
    kept = np.arange(len(words)) - np.repeat(begins, sizes) < recipe.job.privacy.max_records_per_unit
    sizes = np.minimum(sizes, recipe.job.privacy.max_records_per_unit)
    order, offsets = order[kept].astype(np.int64), np.append(0, np.cumsum(sizes)).astype(np.int64)
    text = recipe.job.data.text
    if partition == "train" and text is not None and text.packing == "unit":  # a model is judged record by record
        again, rows, offsets = packed(_lengths(recipe, files)[order], offsets, text.max_length)
        order = order[again]
        np.save(recipe.draft / f"{partition}-{ROWS}.npy", rows)
    for name, array in zip(INDEX, (order, offsets, words[begins, 1]), strict=True):
        np.save(recipe.draft / f"{partition}-{name}.npy", array)
    return {"files": files, "columns": {field.name: _kind(field.type) for field in recipe.encodings[partition].schema}}


def _lengths(recipe: Recipe, files: Iterable[str]) -> np.ndarray:
    """How many tokens each record has. Array: int64 [records]."""
    found = [np.zeros(0, np.int64)]
    for name in files:
        file = pa.ipc.open_file(pa.memory_map(str(recipe.draft / name)))
        found += [file.get_batch(i).column("length").to_numpy() for i in range(file.num_record_batches)]
    return np.concatenate(found)


def packed(lengths: np.ndarray, offsets: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Records of one unit into rows of `room` tokens: each into the first where it fits, or one of its own. How a unit
    is packed depends on nothing but the lengths of its own records.

    Args:
        lengths: of the records in the order of their units, none above `room`. [records]
        offsets: where each unit begins among them, and where the last ends. [units + 1]

    Returns:
        Arrays, int64: the records, those of a row together [records]; where each row begins among these, and the last
        ends [rows + 1]; where each unit begins among the rows, and the last ends [units + 1].
    """
    order: list[int] = []
    rows, units = [0], [0]
    sizes, ends = lengths.tolist(), offsets.tolist()
    for first, last in itertools.pairwise(ends):
        mine: list[list[int]] = []
        left: list[int] = []
        for record in range(first, last):
            at = next((i for i, room_left in enumerate(left) if sizes[record] <= room_left), len(mine))
            if at == len(mine):
                mine.append([])
                left.append(room)
            mine[at].append(record)
            left[at] -= sizes[record]
        for row in mine:
            order += row
            rows.append(len(order))
        units.append(len(rows) - 1)
    return np.array(order, np.int64), np.array(rows, np.int64), np.array(units, np.int64)


def _kind(column: pa.DataType) -> tuple[str, int]:
    """A column's numpy type, and how many numbers a record has in it: 0 where it is one number, and no list."""
    listed = pa.types.is_fixed_size_list(column)
    return str((column.value_type if listed else column).to_pandas_dtype().__name__), column.list_size if listed else 0
