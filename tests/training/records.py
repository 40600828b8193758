"""Books with the charges of a run in them, and the statement of that run: what the tests of statements begin with."""

from __future__ import annotations

from typing import Any

from cluster.accounting.books import Books
from cluster.accounting.leases import Leases
from cluster.accounting.ledger import Ledger
from training.config import Job
from training.jobfile import parse
from training.statement import Statement, statement

JOB = parse(
    Job,
    {
        "account": "people",
        "privacy": {"epsilon": 3.0, "delta": 1e-4, "unit": "person", "units": 2000, "max_records_per_unit": 2},
        "data": {
            "source": "people.csv",
            "features": {"age": {"range": [0, 120]}},
            "label": {"column": "label", "categories": ["no", "yes"]},
        },
        "model": {"kind": "linear"},
        "training": {
            "steps": 50,
            "block": 20,
            "expected_batch_size": 200,
            "noise_multiplier": 6.0,
            "max_grad_norm": 0.5,
        },
    },
)
RUN = "people-20260101-000000-abcd"
METRICS = {"correct": 310, "wrong": 95, "accuracy": 0.765, "accuracy_error": 0.021}


def books_at(file: Any) -> Books:
    """A ledger on which another run was charged before, and ours for two of its three blocks and an evaluation."""
    books = Books(Ledger(f"sqlite:///{file}"))
    train, validation = JOB.accounts
    plans = dict(zip(JOB.accounts, ([charge] for charge in JOB.charges()), strict=True))
    books.create(JOB.dataset(["ab" * 32]), 3.0, 1e-4, plans, 8)
    leases = Leases(books)
    for lease, blocks in (("earlier", 1), (RUN, 2)):
        assert leases.reserve(lease, lease, JOB.charges()).fits
        epoch = leases.open(lease, "nonce", 0).epoch
        for block in range(1, blocks + 1):
            assert leases.authorise(lease, epoch, train, block)
    assert leases.authorise(RUN, epoch, validation, 1)
    leases.close(RUN, "settle", "completed")
    return books


def entries_of(books: Books, lease: str = RUN) -> dict[str, list[dict[str, Any]]]:
    """What `lease` was charged."""
    return {name: books.charged(lease, name) for name in JOB.accounts}


def said_of(books: Books, job: Job = JOB, lease: str = RUN, metrics: Any = METRICS, **more: Any) -> Statement:
    """The statement of the run."""
    accounts = [books.show(name) for name in JOB.accounts]
    return statement(job, lease, accounts, entries_of(books, lease), metrics, "none in this run.", **more)
