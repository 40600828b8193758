"""Shared by the tests of the accounting room: a small data set, its charges, and a desk at which its books are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.accounting.books import Account, Books, Dataset
from cluster.accounting.leases import Leases
from cluster.accounting.ledger import Ledger
from cluster.accounting.mechanisms import Charge, DiscreteGaussian, PoissonSubsampledGaussian
from cluster.accounting.verify import Verdict

TRAIN, VALIDATION = "digits/train", "digits/validation"
STEP = PoissonSubsampledGaussian(sample_rate=0.25, noise_multiplier=8.0)
CHEAP = PoissonSubsampledGaussian(sample_rate=0.01, noise_multiplier=20.0)  # hundreds of thousands of steps fit
HISTOGRAM = DiscreteGaussian(scale=5.0, l2_sensitivity=1)
EPSILON, DELTA = 3.0, 1e-4
KINDS = ("sqlite", "postgresql")

Row = dict[str, Any]
Contents = tuple[list[Row], list[Row]]  # what both tables hold


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


def training(steps: int = 80, account: str = TRAIN) -> Charge:
    """A charge of training steps, in blocks of 20; seven of 80 steps fit in the budget."""
    return Charge(account, STEP, steps, 20)


def evaluation(times: int = 1, account: str = VALIDATION) -> Charge:
    """A charge of noised evaluations, one per block."""
    return Charge(account, HISTOGRAM, times, 1)


@dataclass(frozen=True)
class Desk:
    """One opened ledger with everything that works on it."""

    ledger: Ledger
    books: Books
    leases: Leases

    def account(self, name: str = TRAIN) -> Account:
        return self.books.show(name)

    def rows(self, account: str = TRAIN) -> list[Row]:
        with self.ledger.reading() as view:
            return list(view.of_account(account))

    def totals(self) -> list[tuple[int, int, int]]:
        """(entries, spent, reserved) of both accounts: equal before and after an act that must change nothing."""
        return [(a.head["seq"], a.spent_cost, a.reserved_cost) for a in map(self.account, (TRAIN, VALIDATION))]

    def verdict(self, account: str = TRAIN, head: tuple[int, str] | None = None) -> Verdict:
        return self.books.verify(account, head)

    def all_valid(self) -> bool:
        return all(self.verdict(account).valid for account in (TRAIN, VALIDATION))


def desk_at(
    url: str,
    is_alive: Callable[[str], bool] | None = None,
    ledger: type[Ledger] = Ledger,
    leases: type[Leases] = Leases,
) -> Desk:
    """Sit down at the ledger called `url`; a SQLite file is made where it is missing."""
    opened = ledger(url)
    books = Books(opened)
    return Desk(opened, books, leases(books, is_alive))


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


def charged(rows: Sequence[Row]) -> int:
    """What these entries authorised in all."""
    return sum(row["cost"] for row in rows if row["kind"] == "authorise")
