"""Records: from a declared source to one partition's units, inside the boundary.

Preparation is fixed by declared ranges and categories: nothing is fitted, counted or learnt here (P11), and nothing
that was read may appear in an error (P13): columns are named, values never. Each caller reads one partition.
"""

from __future__ import annotations

import hashlib
import hmac
import importlib.util
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cluster.errors import UsageError
from training.config import Data, Feature, Groups, Job, Label, Model

DIGITS = "sklearn:digits"
_PIXELS = {f"pixel_{i}": Feature(range=(0.0, 16.0)) for i in range(64)}
_CLASSES = Label(column="digit", categories=tuple("0123456789"))


@dataclass(frozen=True)
class Table:
    """A source as text: column names, which are public, and columns of cells, which are not."""

    names: tuple[str, ...]
    columns: tuple[Sequence[str], ...]

    def rows(self) -> Iterator[bytes]:
        """Each record as canonical bytes: its cells in the source's column order, each after its length."""
        for cells in zip(*self.columns, strict=True):
            yield b"".join(b"%d:%s" % (len(cell), cell) for cell in map(str.encode, cells))


@dataclass(frozen=True)
class Encoded:
    """One partition's records on one rank, grouped by unit. Arrays: float32 [records, width], int64 [records],
    int64 [units + 1], and int64 [records] where the evaluation has groups."""

    features: np.ndarray
    labels: np.ndarray
    offsets: np.ndarray
    groups: np.ndarray | None = None


def declared(data: Data, field: str = "data.source") -> Data:
    """`data` with the columns that a bundled source brings along.

    Args:
        field: of the job that names the source, for errors.

    Raises:
        UsageError: no such file, or a table without declared features or label.
    """
    if data.source == DIGITS:
        return data.model_copy(update={"features": data.features or _PIXELS, "label": data.label or _CLASSES})
    if ":" in data.source:
        raise UsageError(f"{field}: {data.source!r} was given; write a path to a .csv or .tsv file, or {DIGITS}.")
    if not Path(data.source).is_file():
        raise UsageError(f"{field}: {data.source} does not exist or is no file; name a .csv or .tsv file.")
    if not data.features:
        raise UsageError(
            "data.features: it is missing; declare a range or the categories of each column to learn from."
        )
    if data.label is None:
        raise UsageError("data.label: it is missing; declare the column to predict and its categories.")
    return data


def image_of(model: Model, data: Data) -> tuple[int, int, int] | None:
    """The (channels, height, width) that a cnn sees its features as; None for other models.

    Raises:
        UsageError: a cnn without an image shape that matches the features.
    """
    if model.kind != "cnn":
        return None
    shape = model.image or ((1, 8, 8) if data.source == DIGITS else None)
    if shape is None or math.prod(shape) != data.width or min(shape[1:]) < 4:
        raise UsageError(
            f"model.image: {list(shape) if shape else None} was given; a cnn needs [channels, height, width], at least "
            f"4 by 4, whose product is the {data.width} features of a record."
        )
    return shape


def read(data: Data, unit: str = "row", field: str = "data.source") -> Table:
    """Read the source as text.

    Args:
        unit: the privacy unit, whose column must be there unless it is a row.
        field: of the job that names the source, for errors.

    Raises:
        UsageError: the file is missing, is no table, or lacks a declared column.
    """
    if data.source == DIGITS:
        package = importlib.util.find_spec("sklearn")  # found, not imported: the import takes a second
        if package is None or package.origin is None:
            raise UsageError(f"{field}: {DIGITS} comes with scikit-learn; run pip install scikit-learn.")
        path = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
        names: tuple[str, ...] | None = (*_PIXELS, _CLASSES.column)
    else:
        path, names = Path(data.source), None
    table = _read_text(path, names, field)
    wanted = {f"data.features.{column}": column for column in data.features}
    if data.label is not None:
        wanted["data.label.column"] = data.label.column
    if unit != "row":
        wanted["privacy.unit"] = unit
    for name, column in wanted.items():
        if column not in table.names:  # those that it has are not said: the first line of a file may be a record
            raise UsageError(f"{name}: {field} has no column {column!r}; check the header line of {path.name}.")
    return table


def read_public(job: Job) -> tuple[Data, Table]:
    """The file that the job declares public and is judged on: how it is read, and its content.

    Raises:
        UsageError: it is no table with the job's columns, or an empty one.
    """
    field, source = "evaluation.source", job.evaluation.source
    data = declared(declared(job.data).model_copy(update={"source": source}), field)
    table = read(data, field=field)
    check_groups(job, table, field)
    if not table.columns[0]:
        raise UsageError(f"{field}: {Path(data.source).name} holds no records; name a file with some.")
    return data, table


def check_groups(job: Job, table: Table, field: str) -> None:
    """Check that a table that a model is judged on has the column of the declared groups.

    Raises:
        UsageError: it has not.
    """
    groups = job.evaluation.groups
    if groups is not None and groups.column not in table.names:
        raise UsageError(f"evaluation.groups.column: {field} has no column {groups.column!r}; check its header line.")


def _read_text(path: Path, names: tuple[str, ...] | None, field: str) -> Table:
    import pyarrow as pa
    import pyarrow.csv as pacsv

    bad = "two of its columns have one name"
    try:
        with pa.input_stream(str(path), compression="detect") as stream:
            content = pa.py_buffer(stream.read())
        parse = pacsv.ParseOptions(delimiter="\t" if ".tsv" in path.suffixes else ",")
        columns = names or tuple(pacsv.open_csv(content, parse_options=parse).schema.names)
        if len(set(columns)) == len(columns):
            as_text = pacsv.ConvertOptions(
                column_types=dict.fromkeys(columns, pa.string()), strings_can_be_null=False, null_values=[]
            )
            header = pacsv.ReadOptions(column_names=list(names) if names else None)
            table = pacsv.read_csv(content, read_options=header, parse_options=parse, convert_options=as_text)
            return Table(columns, tuple(column.to_pylist() for column in table.columns))
    except (pa.ArrowException, OSError, ValueError):
        bad = "it is no table of text with a header line and as many cells in every row"
    # Raised out here, so that the library's own message, which prints cells, is not even chained to it.
    raise UsageError(f"{field}: {path.name} cannot be used: {bad}.")


def fingerprint(table: Table, key: str) -> str:
    """HMAC of the source's records under the ledger's hidden key, whatever their order. Hexadecimal.

    Keyed, so that who reads the ledger cannot test guesses of the content.
    """
    digests = sorted(hashlib.sha256(row).digest() for row in table.rows())
    return hmac.new(bytes.fromhex(key), b"source\0" + b"".join(digests), hashlib.sha256).hexdigest()


def load(job: Job, table: Table, key: str, partition: str, rank: int, world: int) -> Encoded:
    """The units of `partition` that fall to `rank` of `world`, encoded.

    Where a unit goes depends on its own identity and the dataset's hidden key alone: adding or removing one unit
    moves no other. A row's identity is its bytes and its ordinal among equal rows. A unit with too many records keeps
    those with the smallest keyed hashes.
    """
    data = declared(job.data)
    secret = bytes.fromhex(key)
    rows = list(table.rows())
    column = None if job.privacy.unit == "row" else _column(table, job.privacy.unit)
    threshold = int(data.validation_fraction * 2**64)

    units: defaultdict[bytes, list[int]] = defaultdict(list)
    tags: dict[int, bytes] = {}
    seen: Counter[bytes] = Counter()
    for i, row in enumerate(rows):
        tags[i] = _tag(secret, b"record", row + b"\x1e%d" % seen[row])
        identity = row + b"\x1e%d" % seen[row] if column is None else column[i].encode()
        seen[row] += 1
        units[_tag(secret, b"unit", identity)].append(i)

    chosen: list[list[int]] = []
    for tag in sorted(units):
        in_validation = int.from_bytes(tag[:8], "big") < threshold
        if in_validation == (partition == "validation") and int.from_bytes(tag[8:16], "big") % world == rank:
            records = sorted(units[tag], key=lambda i: tags[i])
            chosen.append(records[: job.privacy.max_records_per_unit])
    order = [i for records in chosen for i in records]
    offsets = np.concatenate([[0], np.cumsum([len(records) for records in chosen], dtype=np.int64)]).astype(np.int64)
    return _encoded(data, table, order, offsets, job.evaluation.groups if partition == "validation" else None)


def load_public(job: Job) -> Encoded:
    """Every record of the file that the job declares public, each a unit of its own; see `read_public`."""
    data, table = read_public(job)
    count = len(table.columns[0])
    return _encoded(data, table, range(count), np.arange(count + 1), job.evaluation.groups)


def _encoded(data: Data, table: Table, order: Sequence[int], offsets: np.ndarray, groups: Groups | None) -> Encoded:
    """The records at `order`, as numbers."""
    assert data.label is not None
    features = [_encode(_column(table, name), feature, order) for name, feature in data.features.items()]
    labels = _places(_column(table, data.label.column), data.label.categories, 0, order)
    of = None
    if groups is not None:
        of = _places(_column(table, groups.column), groups.categories, len(groups.categories), order)
    return Encoded(np.concatenate(features, axis=1), labels, offsets, of)


def _places(cells: Sequence[str], categories: Sequence[str], otherwise: int, order: Sequence[int]) -> np.ndarray:
    """Of each cell, the place of its category; `otherwise` where it is none of them."""
    place = {category: i for i, category in enumerate(categories)}
    return np.array([place.get(cells[i].strip(), otherwise) for i in order], dtype=np.int64)


def _tag(secret: bytes, purpose: bytes, content: bytes) -> bytes:
    return hmac.new(secret, purpose + b"\0" + content, hashlib.sha256).digest()


def _column(table: Table, name: str) -> Sequence[str]:
    if name not in table.names:
        raise UsageError(
            f"privacy.unit: the source has no column {name!r}; it has {', '.join(table.names)}, or use row."
        )
    return table.columns[table.names.index(name)]


def _encode(cells: Sequence[str], feature: Feature, order: Sequence[int]) -> np.ndarray:
    if feature.categories is not None:
        found = _places(cells, feature.categories, -1, order)
        return (found[:, None] == np.arange(len(feature.categories))[None, :]).astype(np.float32)
    assert feature.range is not None
    low, high = feature.range
    values = np.array([_number(cells[i], (low + high) / 2) for i in order], dtype=np.float64)
    # Centred on the declared middle: from [0, 1], much of each clipped gradient would only say what all records share.
    return ((np.clip(values, low, high) - low) / (high - low) - 0.5).astype(np.float32)[:, None]


def _number(cell: str, otherwise: float) -> float:
    """A cell as a number; what is none counts as the middle of the declared range, silently: an error would tell."""
    try:
        value = float(cell)
    except ValueError:
        return otherwise
    return otherwise if math.isnan(value) else value
