"""Shared by the tests of the accounting room: a small data set's books in a real SQLite file, a forger's tools."""

from __future__ import annotations

import functools
import sqlite3
import tempfile
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.accounting.books import Account, Books, Dataset
from cluster.accounting.leases import Leases
from cluster.accounting.ledger import GENESIS, Ledger, entry_hash
from cluster.accounting.mechanisms import Charge, DiscreteGaussian, PoissonSubsampledGaussian
from cluster.accounting.verify import Verdict, verify

TRAIN, VALIDATION = "digits/train", "digits/validation"
STEP = PoissonSubsampledGaussian(sample_rate=0.25, noise_multiplier=8.0)
HISTOGRAM = DiscreteGaussian(scale=5.0, l2_sensitivity=1)
EPSILON, DELTA = 3.0, 1e-4


def digits(name: str = "digits", **changes: Any) -> Dataset:
    """The declared facts of the data set, with changes."""
    facts = {
        "unit": "row",
        "units": 1797,
        "max_records_per_unit": 1,
        "validation_fraction": 0.2,
        "sources": (f"hmac-of-{name}",),
    }
    return Dataset(name, **{**facts, **changes})


def plans(dataset: Dataset) -> dict[str, list[Charge]]:
    """The planned job of each partition: 80 steps of training, one evaluation."""
    train, validation = dataset.accounts()
    return {train: [Charge(train, STEP, 80, 20)], validation: [Charge(validation, HISTOGRAM, 1, 1)]}


def training(steps: int = 80) -> Charge:
    """A charge of training steps, in blocks of 20; seven of 80 steps fit in the budget."""
    return Charge(TRAIN, STEP, steps, 20)


def evaluation(times: int = 1) -> Charge:
    """A charge of noised evaluations, one per block."""
    return Charge(VALIDATION, HISTOGRAM, times, 1)


@dataclass(frozen=True)
class Desk:
    """One opened ledger with everything that works on it."""

    ledger: Ledger
    books: Books
    leases: Leases

    def account(self, name: str = TRAIN) -> Account:
        return self.books.show(name)

    def rows(self, account: str = TRAIN) -> list[dict[str, Any]]:
        with self.ledger.reading() as connection:
            return list(self.ledger.of_account(connection, account))

    def totals(self) -> list[tuple[int, int, int]]:
        """(entries, spent, reserved) of both accounts: equal before and after an act that must change nothing."""
        return [(a.head["seq"], a.spent_cost, a.reserved_cost) for a in map(self.account, (TRAIN, VALIDATION))]

    def verdict(self, account: str = TRAIN, head: tuple[int, str] | None = None) -> Verdict:
        with self.ledger.reading() as connection:
            return verify(account, self.ledger.of_account(connection, account), head)

    def all_valid(self) -> bool:
        return all(self.verdict(account).valid for account in (TRAIN, VALIDATION))


def url(file: Path) -> str:
    return f"sqlite:///{file}"


def desk_at(file: Path, is_alive: Callable[[str], bool] | None = None) -> Desk:
    """Open the ledger in `file`; it is made where it is missing."""
    ledger = Ledger(url(file))
    books = Books(ledger)
    return Desk(ledger, books, Leases(books, is_alive))


@functools.cache
def _made_once() -> bytes:
    """The file of a new ledger with the accounts of `digits`: choosing their orders takes longer than most tests."""
    with tempfile.TemporaryDirectory() as folder:
        desk = desk_at(Path(folder) / "ledger.db")
        desk.books.create(digits(), EPSILON, DELTA, plans(digits()), 8)
        desk.ledger._engine.dispose()  # the last connection to close moves the write-ahead log into the file
        return (Path(folder) / "ledger.db").read_bytes()


def desk_with_digits(file: Path, is_alive: Callable[[str], bool] | None = None) -> Desk:
    """A new ledger in `file` that holds the accounts of `digits`."""
    file.write_bytes(_made_once())
    return desk_at(file, is_alive)


def run_attempt(desk: Desk, lease: str, nonce: str, blocks: int, done: int = 0) -> int:
    """Open an attempt of `lease`, authorise its first `blocks` training blocks, and return its epoch."""
    epoch = desk.leases.open(lease, nonce, done).epoch
    for block in range(1, blocks + 1):
        assert desk.leases.authorise(lease, epoch, TRAIN, block)
    return epoch


def fill(desk: Desk, leaving: int = 0) -> int:
    """Reserve whole runs until fewer than one, plus `leaving`, fit; returns how many it reserved."""
    count = desk.account().remaining_cost // desk.account().price(training()) - leaving
    for number in range(count):
        assert desk.leases.reserve(f"filler-{number}", "other", [training()]).fits
    return count


def copy_database(source: Path, target: Path) -> None:
    """What an operator's backup does: a consistent copy of one moment, write-ahead log included."""
    with closing(sqlite3.connect(source)) as old, closing(sqlite3.connect(target)) as new:
        new.execute("PRAGMA synchronous=OFF")
        old.backup(new)


def forge(file: Path, *statements: str, values: Mapping[str, Any] | None = None) -> None:
    """Change the file behind the ledger's back, as whoever owns the file can: drop the triggers, then run SQL."""
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("PRAGMA synchronous=OFF")  # a forgery need not survive a power cut, and there are hundreds
        for table in ("entries", "secrets"):
            for act in ("update", "delete"):
                connection.execute(f"DROP TRIGGER IF EXISTS {table}_no_{act}")
        for statement in statements:
            connection.execute(statement, values or {})


def rewrite_chain(desk: Desk, file: Path, seq: int, change: Mapping[str, Any], account: str = TRAIN) -> None:
    """Alter entry `seq` and recompute every hash from it on, so that the chain is whole in itself again."""
    previous = GENESIS
    for row in desk.rows(account):
        row["prev_hash"] = previous
        if row["seq"] == seq:
            row.update(change)
        row["hash"] = previous = entry_hash(row)
        columns = ", ".join(f"{name} = :{name}" for name in row)
        forge(file, f"UPDATE entries SET {columns} WHERE account = :account AND seq = :seq", values=row)
