"""Reserving: all or none over accounts, once however often it is asked, refused in one entry that says why (P1, P4)."""

from __future__ import annotations

import pytest
from bookkeeping import STEP, TRAIN, VALIDATION, evaluation, fill, training

from cluster.accounting.answers import explain
from cluster.accounting.costs import affordable_steps, block_cost, price
from cluster.accounting.mechanisms import Charge, PoissonSubsampledGaussian
from cluster.errors import UsageError

ORDER = 6
RUN = price(training(), ORDER)
BLOCK = block_cost(STEP, ORDER, 0, 20)


def kinds(desk, account=TRAIN):
    return [row["kind"] for row in desk.rows(account)]


def test_reserve_holds_the_whole_price_on_every_account(desk, leases):
    answer = leases.reserve("lease", "run", [training(), evaluation(2)])
    assert answer.fits
    assert not answer.shortages
    assert desk.account().reserved_cost == RUN
    assert desk.account(VALIDATION).reserved_cost == desk.account(VALIDATION).price(evaluation(2))
    assert [desk.account(a).spent_cost for a in (TRAIN, VALIDATION)] == [0, 0]


@pytest.mark.parametrize("charges", [[training(), evaluation(99)], [training(8000), evaluation()]])
def test_reserve_is_all_or_none(desk, leases, charges):
    (_, *before), (_, *before_validation) = desk.totals()
    answer = leases.reserve("lease", "run", charges)
    assert not answer.fits
    assert len(answer.shortages) == 1
    (_, *after), (_, *after_validation) = desk.totals()
    assert (after, after_validation) == (before, before_validation)
    with pytest.raises(UsageError, match="never reserved"):
        leases.open("lease", "nonce")


def test_a_refusal_is_one_entry_per_lease_and_says_why(desk, leases):
    for _ in range(3):
        answer = leases.reserve("lease", "run", [training(8000), evaluation(99)])
    assert {shortage.account for shortage in answer.shortages} == {TRAIN, VALIDATION}
    refusals = [row for a in (TRAIN, VALIDATION) for row in desk.rows(a) if row["kind"] == "refuse"]
    assert len(refusals) == 1
    assert refusals[0]["lease"] == "lease"
    said = explain(answer.shortages, [desk.account(TRAIN), desk.account(VALIDATION)])
    assert TRAIN in said
    assert "100.0% remains" in said
    assert desk.all_valid()


def test_a_refused_lease_may_be_reserved_when_room_appears(desk, leases):
    fill(desk)
    answer = leases.reserve("late", "run", [training()])
    assert not answer.fits
    assert answer.may_fit_later
    leases.close("filler-0", "release", "stopped")
    assert leases.reserve("late", "run", [training()]).fits
    assert leases.open("late", "nonce").steps == {TRAIN: 80}
    assert kinds(desk).count("refuse") == 1
    assert desk.all_valid()


def test_what_never_fits_is_told_from_what_may_fit_later(desk, leases):
    fill(desk, leaving=1)
    assert not leases.fits([training(8000)]).may_fit_later
    assert leases.fits([training(160)]).may_fit_later


def test_seven_runs_fit_and_the_eighth_does_not(desk, leases):
    assert fill(desk) == 7
    assert not leases.fits([training()]).fits
    assert not leases.reserve("eighth", "run", [training()]).fits
    assert desk.account().reserved_cost == 7 * RUN <= desk.account().budget_cost


def test_the_budget_can_be_filled_to_its_last_step(desk, leases):
    most = affordable_steps(training(10_000), ORDER, desk.account().budget_cost)
    assert not leases.fits([training(most + 1)]).fits
    assert leases.reserve("lease", "run", [training(most)]).fits


@pytest.mark.parametrize(("short", "fits"), [(0, True), (1, False)])
def test_the_last_unit_of_the_budget_counts(desk, leases, short, fits):
    others = desk.account().budget_cost - RUN + short
    desk.ledger.write(
        lambda draft: draft.append(
            account=TRAIN,
            kind="reserve",
            key="reserve:others",
            lease="others",
            cost=others,
            reserved=others,
            lease_reserved=others,
            body={"by": "others"},
        )
    )
    assert leases.fits([training()]).fits is fits
    assert leases.reserve("lease", "run", [training()]).fits is fits
    assert desk.account().remaining_cost == (0 if fits else RUN - 1)
    assert desk.all_valid()


def test_fits_writes_nothing(desk, leases):
    before = desk.totals()
    assert leases.fits([training(), evaluation()]).fits
    assert not leases.fits([training(8000)]).fits
    assert desk.totals() == before


@pytest.mark.parametrize("other", [training(40), Charge(TRAIN, STEP, 80, 10), evaluation()])
def test_the_same_lease_with_other_charges_is_refused(desk, leases, other):
    leases.reserve("lease", "run", [training(), evaluation(2)])
    before = desk.totals()
    charges = [other] if other.account == TRAIN else [training(), other]
    with pytest.raises(UsageError, match="other charges"):
        leases.reserve("lease", "run", charges)
    assert desk.totals() == before


@pytest.mark.parametrize("more", [[evaluation()], [training(), evaluation()], [training(), evaluation(99)]])
def test_a_lease_cannot_grow_onto_another_account(desk, leases, more):
    for lease, first in (("trained", training()), ("evaluated", evaluation())):
        leases.reserve(lease, "run", [first])
        before = desk.totals()
        with pytest.raises(UsageError, match="other charges"):
            leases.reserve(lease, "run", more if more != [first] else [training()])
        assert desk.totals() == before
        assert leases.reserve(lease, "run", [first]).fits
    assert desk.all_valid()


@pytest.mark.parametrize("charges", [[], [training(), training(40)], [training(), evaluation(), evaluation(2)]])
def test_one_charge_per_account_and_at_least_one(desk, leases, charges):
    before = desk.totals()
    with pytest.raises(UsageError, match="one charge"):
        leases.reserve("lease", "run", charges)
    assert desk.totals() == before


def test_an_unknown_account_is_refused(desk, leases):
    before = desk.totals()
    with pytest.raises(UsageError, match="nobody/train"):
        leases.reserve("lease", "run", [training(), Charge("nobody/train", STEP, 80, 20)])
    assert desk.totals() == before


@pytest.mark.parametrize("name", ["", ":", "a:b", "a/b", " ", "a\n", "-a", "a" * 201, None, 7])
def test_a_lease_needs_a_plain_name(desk, leases, name):
    """Names are parts of keys: with a ':' in it, one lease's key could be another's."""
    before = desk.totals()
    with pytest.raises(UsageError, match="lease"):
        leases.reserve(name, "run", [training()])
    assert desk.totals() == before


@pytest.mark.parametrize("by", ["", "a/b", "../../etc/passwd", "a\0b", "a\nb", "a" * 300, None, 7])
def test_a_holder_needs_a_plain_name(desk, leases, by):
    """It is the name of a lock file: one that is none stops the sweep, and nobody's reservation is ever released."""
    before = desk.totals()
    with pytest.raises(UsageError, match="by"):
        leases.reserve("lease", by, [training()])
    assert desk.totals() == before


def test_a_price_beyond_64_bits_is_refused(desk, leases):
    huge = Charge(TRAIN, PoissonSubsampledGaussian(1.0, 0.1), 10_000_000, 1000)
    before = desk.totals()
    with pytest.raises(UsageError, match="steps"):
        leases.reserve("lease", "run", [huge])
    assert desk.totals() == before
