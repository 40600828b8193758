"""What a person reads of the books: who holds what, how many more runs fit, and a history like a bank statement."""

from __future__ import annotations

import io
from dataclasses import asdict

import pytest
from rich.console import Console

from cluster import display
from cluster.accounting.books import Books, Dataset
from cluster.accounting.leases import Leases
from cluster.accounting.ledger import Ledger
from cluster.accounting.mechanisms import Charge, DiscreteGaussian, PoissonSubsampledGaussian

TRAIN, VALIDATION = "people/train", "people/validation"
RUN = [
    Charge(TRAIN, PoissonSubsampledGaussian(0.25, 8.0), 80, 20),
    Charge(VALIDATION, DiscreteGaussian(5.0, 1), 1, 1),
]


@pytest.fixture
def leases(tmp_path):
    books = Books(Ledger(f"sqlite:///{tmp_path}/ledger.db"))
    dataset = Dataset("people", "person", 5000, 3, 0.2, ("source",))
    books.create(dataset, 3.0, 1e-5, {charge.account: [charge] for charge in RUN}, 8)
    return Leases(books)


def text(*shown):
    console = Console(width=160, record=True, file=io.StringIO())
    for one in shown:
        console.print(one)
    return console.export_text()


def card(leases):
    account = leases.books.show(TRAIN)
    return text(display.account_card(account, leases.books.last_run(TRAIN), leases.holds(TRAIN)))


def test_the_card_of_a_new_account_claims_nothing(leases):
    said = card(leases)
    assert "(3, 1e-05) for each value of person" in said
    assert "like the last one" not in said
    assert "0.0%" in said


def test_the_card_says_who_holds_what_and_what_still_fits(leases):
    whole = leases.books.show(TRAIN).price(RUN[0])
    for number in range(2):
        assert leases.reserve(f"sweep-0{number}", "sweep", RUN).fits
    epoch = leases.open("sweep-00", "nonce").epoch
    paid = leases.authorise("sweep-00", epoch, TRAIN, 1).cost
    account = leases.books.show(TRAIN)
    assert [asdict(hold) for hold in leases.holds(TRAIN)] == [
        {"lease": "sweep-01", "by": "sweep", "reserved_cost": whole},
        {"lease": "sweep-00", "by": "sweep", "reserved_cost": whole - paid},
    ]
    said = card(leases)
    assert f"{whole / account.budget_cost:.1%} by sweep-01 (of sweep)" in said
    assert f"{(whole - paid) / account.budget_cost:.1%} by sweep-00 (of sweep)" in said
    fit = account.remaining_cost // whole
    assert f"{fit} more run{'s' * (fit != 1)} like the last one, sweep-01" in said
    assert leases.reserve("next", "next", [RUN[0]]).fits == (fit > 0), "what is promised to fit does"


def test_many_holders_are_counted_not_listed(leases):
    small = [Charge(TRAIN, RUN[0].mechanism, 1, 1)]
    for number in range(12):
        assert leases.reserve(f"run-{number}", f"run-{number}", small).fits
    said = card(leases)
    assert said.count(" by run-") == 10
    assert "and 2 more" in said
    leases.close("run-11", "release", "stopped")
    assert "by run-11" not in card(leases)


def test_the_history_reads_like_a_bank_statement_and_its_balance_is_the_accounts(leases):
    leases.reserve("run", "run", RUN)
    epoch = leases.open("run", "nonce").epoch
    leases.authorise("run", epoch, TRAIN, 1)
    leases.close("run", "release", "stopped")
    assert not leases.reserve("huge", "huge", [Charge(TRAIN, RUN[0].mechanism, 8000, 20)]).fits
    account = leases.books.show(TRAIN)
    rows = list(leases.books.history(TRAIN))
    said = text(display.history_table(rows, account.budget_cost))
    for words in (
        "account opened with (3, 1e-05) at order",
        "a source was bound to it",
        "reserved 80 steps of DP-SGD, noise multiplier 8",
        "attempt 1 began",
        "released: stopped",
        "refused 8000 steps",
    ):
        assert words in said
    spent, left = account.spent_cost / account.budget_cost, account.remaining_cost / account.budget_cost
    assert f"{spent:.2%}" in said
    assert f"{left:.2%}" in said.strip().splitlines()[-2], "the last balance"
    moved = sum(row["cost"] for row in rows if row["kind"] == "authorise")
    assert moved == account.spent_cost
