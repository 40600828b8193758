"""What a file declares of itself: the names of its columns and, in a Parquet schema, their types; nothing of its rows.

Of a CSV or TSV the first line alone is read, of JSON lines the keys of the first one; no value is looked at, kept or
told (P11, P13). The first line of a CSV may be a record all the same: no error here holds any of it.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TextIO

from cluster.errors import UsageError

MOST = 1 << 20  # characters of a first line; what is longer is no header


@dataclass(frozen=True)
class Column:
    """A column by its name; of kind `number`, `word` or `neither` where a schema says so, else `unknown`."""

    name: str
    kind: Literal["number", "word", "neither", "unknown"] = "unknown"


def columns_of(data: Path, known: Sequence[str] = ()) -> list[Column]:
    """The columns of a file, or of a folder of one format, by its first file.

    Args:
        known: columns that the caller names. Whoever can name one has seen the header; where none is named, a first
            line with a number in it is taken for a record.

    Raises:
        UsageError: it is not there, of another format, or has no header.
    """
    file = _first(data)
    found, bad = None, ""
    try:
        found = READERS[ending(file)](file)
    except (OSError, EOFError, zlib.error):
        bad = "it cannot be read"
    except (ValueError, RecursionError, csv.Error):
        bad = "its first line is no header" if ending(file) != ".jsonl" else "its first line is no JSON object"
    if found is None:  # raised out here, so that no library's own message, which may print a line, is chained to it
        raise UsageError(f"DATA: {file.name} cannot be used: {bad}; name a whole file of {NAMES}.")
    _check_header(file, [column.name for column in found], known)
    return found


def ending(file: Path) -> str:
    """What says the format: of `people.csv.gz` it is `.csv`; a Parquet file is compressed inside, never as a whole."""
    plain = Path(file.name.lower().removesuffix(".gz"))
    return file.suffix.lower() if plain.suffix == ".parquet" else plain.suffix


def _first(data: Path) -> Path:
    if data.is_dir():
        inside = sorted(one for one in data.iterdir() if one.is_file() and one.name[0] not in "._")
        endings = {ending(one) for one in inside}
        if len(endings) != 1 or not endings <= set(READERS):
            raise UsageError(
                f"DATA: the folder {data.name} must hold files of one format ({NAMES}) and no others; move the rest "
                "out of it."
            )
        return inside[0]
    if not data.is_file():
        raise UsageError(f"DATA: {data} does not exist; name a file of {NAMES}, or a folder of such files.")
    if ending(data) not in READERS:
        raise UsageError(f"DATA: {data.name} was given; its name must end in {NAMES}.")
    return data


def _check_header(file: Path, names: Sequence[str], known: Sequence[str]) -> None:
    if not names:
        raise UsageError(f"DATA: {file.name} declares no columns; give it a header line, or a schema that has some.")
    if not all(name.strip() for name in names) or len(set(names)) < len(names):
        raise UsageError(
            f"DATA: {file.name} has a column without a name, or two of one name, in its header; give each its own, and "
            "a header line to a file that has none."
        )
    numbers = [_is_number(name) for name in names]
    if ending(file) in (".csv", ".tsv") and (all(numbers) or (any(numbers) and not set(known) & set(names))):
        raise UsageError(
            f"DATA: {file.name} seems to have no header line, since its first line holds numbers; add one, or, if they "
            "are names of columns, name another column by --label or --unit."
        )


def _is_number(name: str) -> bool:
    """Whether it reads like a value: a number, a date, a time, whatever has no letter in it."""
    try:
        float(name)
    except ValueError:
        return not any(letter.isalpha() for letter in name)
    return True


def _opened(file: Path) -> TextIO:
    if file.suffix.lower() == ".gz":
        return gzip.open(file, "rt", encoding="utf-8-sig", newline="")
    return file.open(encoding="utf-8-sig", newline="")


def _of_text(file: Path, delimiter: str) -> list[Column]:
    with _opened(file) as stream:
        line = stream.readline(MOST)
    if len(line) == MOST or "\0" in line:
        raise ValueError
    lines = csv.reader(io.StringIO(line, newline=""), delimiter=delimiter, strict=True)
    return [Column(name) for name in next(lines, [])]


def _of_csv(file: Path) -> list[Column]:
    return _of_text(file, ",")


def _of_tsv(file: Path) -> list[Column]:
    return _of_text(file, "\t")


def _of_json_lines(file: Path) -> list[Column]:
    with _opened(file) as stream:
        record = json.loads(stream.readline())
    if not isinstance(record, dict):
        raise ValueError
    "".join(record).encode()  # half a character is no name
    return [Column(name) for name in record]


def _of_parquet(file: Path) -> list[Column]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    failed = False
    try:
        schema = pq.read_schema(file)
    except pa.ArrowException:
        failed = True
    if failed:
        raise UsageError(f"DATA: {file.name} is no Parquet file that can be read; write it again, or name another.")
    return [Column(field.name, _kind(field.type)) for field in schema]


def _kind(of: object) -> Literal["number", "word", "neither"]:
    from pyarrow import types

    if types.is_integer(of) or types.is_floating(of) or types.is_decimal(of):
        return "number"
    if types.is_string(of) or types.is_large_string(of) or types.is_boolean(of) or types.is_dictionary(of):
        return "word"
    return "neither"


READERS: dict[str, Callable[[Path], list[Column]]] = {
    ".csv": _of_csv,
    ".tsv": _of_tsv,
    ".jsonl": _of_json_lines,
    ".parquet": _of_parquet,
}
NAMES = ".csv, .tsv, .jsonl (each may be gzipped, .csv.gz) or .parquet"
