"""Texts that their owner declares public: read for a released model, and refused where the books know them as private.

Only a whole file can be compared: by its fingerprint with the sources of the ledger, and by its path with the run's own
source. Whether single records of it are in a dataset is not asked: the answer would tell who is. So whoever gives
prompts answers for them: they must be nobody's secret.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from cluster.accounting.books import Books
from cluster.errors import UsageError
from training import data
from training.config import Data
from training.data import Table
from training.released import Released

FORMATS = (".csv", ".tsv", ".jsonl")


@dataclass(frozen=True)
class Prompts:
    """Public texts, in the order of their file, with the file's name and SHA-256."""

    texts: tuple[str, ...]
    file: str
    sha256: str

    def said(self) -> dict[str, str]:
        """What a statement says of them."""
        return {"file": self.file, "sha256": self.sha256, "declared": "public, by whoever gave them"}


def read_prompts(path: Path, column: str, source: Released, books: Books, option: str = "--prompts") -> Prompts:
    """The texts in `column` of a CSV, TSV or JSON lines file that is no private source.

    Raises:
        UsageError: it is one, or no such file.
    """
    if not path.is_file():
        raise UsageError(f"{option}: {path} does not exist or is no file; name a {', '.join(FORMATS)} file.")
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"{option}: {path.name} was given; its name must end in one of {', '.join(FORMATS)}.")
    private = source.private_source
    if private is not None and (_same(path, private) or path.resolve().is_relative_to(private.resolve())):
        raise UsageError(
            f"{option}: {path.name} is what {source.run} was trained on, so it is not public; name another."
        )
    table = _table(path, option)
    if books.registered(data.fingerprint(table, books.source_key())):
        raise UsageError(
            f"{option}: {path.name} is the source of a dataset in this ledger, so it is not public; name a file of "
            "texts that are nobody's secret."
        )
    if column not in table.names:
        raise UsageError(f"--column: {path.name} has no column {column!r}; name the one that holds the texts.")
    texts = tuple(table.columns[table.names.index(column)])
    if not texts:
        raise UsageError(f"{option}: {path.name} holds no texts; name a file with some.")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Prompts(texts, path.name, digest)


def _same(one: Path, other: Path) -> bool:
    return other.exists() and one.samefile(other)


def _table(path: Path, option: str) -> Table:
    if path.suffix.lower() != ".jsonl":
        return data.read(Data(source=str(path)), field=option)
    records = None
    # What the library says of a line holds the line; it is not even chained to the error below.
    with contextlib.suppress(OSError, ValueError, RecursionError), path.open(encoding="utf-8-sig") as file:
        records = [json.loads(line) for line in file]
    names = tuple(records[0]) if records and isinstance(records[0], dict) else ()
    if records is None or not all(isinstance(record, dict) and tuple(record) == names for record in records):
        raise UsageError(
            f"{option}: {path.name} cannot be used: it must hold one JSON object in each line, all with the same "
            "keys in one order."
        )
    return Table(names, tuple([_cell(record[name]) for record in records] for name in names))


def _cell(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
