"""Texts that their owner declares public: read for a released model, and refused where the books know them as private.

Only a whole file can be compared: by its fingerprint with the sources of the ledger, and by its path with the run's own
source. Whether single records of it are in a dataset is not asked: the answer would tell who is. So whoever gives
prompts answers for them: they must be nobody's secret.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cluster.accounting.books import Books
from cluster.errors import UsageError
from cluster.files import sha256
from training import sources
from training.preparation import fingerprint_of
from training.released import Released


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
    """The texts in `column` of a file that is no private source.

    Raises:
        UsageError: it is one, or no such file.
    """
    private = source.private_source
    if private is not None and (_same(path, private) or path.resolve().is_relative_to(private.resolve())):
        raise UsageError(
            f"{option}: {path.name} is what {source.run} was trained on, so it is not public; name another."
        )
    if not path.is_file():
        raise UsageError(f"{option}: {path} does not exist or is no file; name a file of texts.")
    given = sources.find(str(path), option)
    if books.registered(fingerprint_of(given, books.source_key())):
        raise UsageError(
            f"{option}: {path.name} is the source of a dataset in this ledger, so it is not public; name a file of "
            "texts that are nobody's secret."
        )
    given.check_columns({"--column": column})
    texts = tuple(text or "" for batch in given.batches(0) for text in batch.column(column).to_pylist())
    given.check_records(len(texts))
    return Prompts(texts, path.name, sha256(path))


def _same(one: Path, other: Path) -> bool:
    return other.exists() and one.samefile(other)
