"""The life of a lease: one charge however often a call is repeated (P1), charged and durable before it runs (P2), never
refunded once authorised, and fenced off before anything is released (P3)."""

from __future__ import annotations

import math

import pytest
from bookkeeping import STEP, TRAIN, VALIDATION, evaluation, fill, run_attempt, training

from cluster.accounting.costs import affordable_steps, block_cost, price
from cluster.accounting.leases import CLOSING
from cluster.accounting.mechanisms import Charge
from cluster.errors import PurserError, UsageError

ORDER = 6
RUN = price(training(), ORDER)
BLOCK = block_cost(STEP, ORDER, 0, 20)


def charged(desk, account=TRAIN):
    return sum(row["cost"] for row in desk.rows(account) if row["kind"] == "authorise")


# Running


def test_blocks_are_paid_one_by_one_before_they_run(place, desk, leases):
    leases.reserve("lease", "run", [training(50), evaluation()])
    attempt = leases.open("lease", "nonce")
    assert attempt.steps == {TRAIN: 50, VALIDATION: 1}
    other = place.desk()
    for block, (start, stop) in enumerate([(0, 20), (20, 40), (40, 50)], start=1):
        grant = leases.authorise("lease", attempt.epoch, TRAIN, block)
        assert (grant.start, grant.stop) == (start, stop)
        assert grant.cost == block_cost(STEP, ORDER, start, stop)
        assert other.account().spent_cost == charged(other)  # on disk, and seen by another, when the answer came
        assert other.account().spent_cost >= block_cost(STEP, ORDER, 0, stop)
    assert leases.authorise("lease", attempt.epoch, TRAIN, 4) is None
    assert desk.account().spent_cost == price(training(50), ORDER)
    assert desk.account().reserved_cost == 0
    assert leases.authorise("lease", attempt.epoch, VALIDATION, 1)
    assert leases.authorise("lease", attempt.epoch, VALIDATION, 2) is None
    assert desk.all_valid()


def test_every_call_may_be_repeated(place, desk, leases):
    """A client that lost an answer calls again, maybe through another accountant: same answer, same totals."""
    other = place.desk().leases

    def twice(call):
        first, before = call(leases), desk.totals()
        for who in (leases, other):
            assert call(who) == first
        assert desk.totals() == before
        return first

    twice(lambda who: who.reserve("lease", "run", [training(), evaluation()]))
    attempt = twice(lambda who: who.open("lease", "nonce"))
    for account, block in ((TRAIN, 1), (TRAIN, 2), (VALIDATION, 1)):
        twice(lambda who, a=account, b=block: who.authorise("lease", attempt.epoch, a, b))
    twice(lambda who: who.authorise("lease", attempt.epoch, TRAIN, 1))  # an old block, too
    twice(lambda who: who.authorise("lease", attempt.epoch, VALIDATION, 2))
    for kind in ("release", "settle"):
        spent = twice(lambda who, k=kind: who.close("lease", k, "completed"))
        assert spent == {TRAIN: price(training(40), ORDER), VALIDATION: desk.account(VALIDATION).price(evaluation())}
    twice(lambda who: who.reserve("lease", "run", [training(), evaluation()]))
    assert desk.account().spent_cost == price(training(40), ORDER)
    assert desk.all_valid()


@pytest.mark.parametrize("block", [0, -1, 3, 4, 1000])
def test_a_block_out_of_turn_is_refused(desk, leases, block):
    leases.reserve("lease", "run", [training()])
    epoch = run_attempt(desk, "lease", "nonce", 1)
    before = desk.totals()
    with pytest.raises(PurserError, match="block"):
        leases.authorise("lease", epoch, TRAIN, block)
    assert desk.totals() == before


@pytest.mark.parametrize("block", [True, 1.0, "1", None, math.nan])
def test_a_block_or_epoch_that_is_no_whole_number_is_refused(desk, leases, block):
    """1.0 would be stored as 1 and hashed as 1.0: the chain would be broken for ever."""
    leases.reserve("lease", "run", [training()])
    epoch = leases.open("lease", "nonce").epoch
    before = desk.totals()
    with pytest.raises(UsageError, match="block"):
        leases.authorise("lease", epoch, TRAIN, block)
    with pytest.raises(UsageError, match="epoch"):
        leases.authorise("lease", block, TRAIN, 1)
    assert desk.totals() == before


def test_nothing_is_authorised_before_an_attempt_begins(desk, leases):
    leases.reserve("lease", "run", [training()])
    before = desk.totals()
    for epoch in (0, 1):
        with pytest.raises(PurserError, match="over"):
            leases.authorise("lease", epoch, TRAIN, 1)
    with pytest.raises(UsageError):
        leases.authorise("nobody", 1, TRAIN, 1)
    with pytest.raises(UsageError):
        leases.authorise("lease", 1, VALIDATION, 1)
    assert desk.totals() == before


@pytest.mark.parametrize("end", [*CLOSING, "new attempt"])
def test_an_attempt_that_is_over_can_authorise_nothing(desk, leases, end):
    """The fence: whatever was released cannot be spent by the process that lost it, also by repeating a paid block."""
    leases.reserve("lease", "run", [training(), evaluation()])
    epoch = run_attempt(desk, "lease", "old", 1)
    if end == "new attempt":
        leases.open("lease", "new", 20)
    else:
        leases.close("lease", end, "over")
    before = desk.totals()
    for account, block in ((TRAIN, 1), (TRAIN, 2), (VALIDATION, 1)):
        for guess in (epoch - 1, epoch, epoch + 5):
            with pytest.raises(PurserError, match="over"):
                leases.authorise("lease", guess, account, block)
    if end != "new attempt":  # the epoch that the closing itself took belongs to nobody
        with pytest.raises(PurserError):
            leases.authorise("lease", epoch + 1, TRAIN, 2)
    assert desk.totals() == before


@pytest.mark.parametrize("end", ["release", "expire"])
def test_a_paid_block_is_not_granted_again_after_the_end(desk, leases, end):
    leases.reserve("lease", "run", [training()])
    epoch = run_attempt(desk, "lease", "old", 1)
    leases.close("lease", end, "over")
    with pytest.raises(PurserError):
        leases.authorise("lease", epoch + 1, TRAIN, 1)


def test_an_old_nonce_opens_no_new_attempt(desk, leases):
    leases.reserve("lease", "run", [training()])
    old = leases.open("lease", "old")
    new = leases.open("lease", "new")
    assert new.epoch > old.epoch
    before = desk.totals()
    assert leases.open("lease", "old") == old
    assert desk.totals() == before
    with pytest.raises(PurserError, match="over"):
        leases.authorise("lease", old.epoch, TRAIN, 1)
    assert leases.authorise("lease", new.epoch, TRAIN, 1)


def test_steps_that_run_again_after_a_crash_are_charged_again(desk, leases):
    """The first attempt pays 60 steps, and its checkpoint holds 20: the second pays for 60 more."""
    leases.reserve("lease", "run", [training(), evaluation()])
    run_attempt(desk, "lease", "first", 3)
    second = leases.open("lease", "second", done=20)
    assert second.steps == {TRAIN: 60, VALIDATION: 1}
    assert desk.account().reserved_cost == price(training(60), ORDER)
    for block in (1, 2, 3):
        grant = leases.authorise("lease", second.epoch, TRAIN, block)
        assert (grant.start, grant.stop) == (20 * block - 20, 20 * block)
    assert leases.authorise("lease", second.epoch, TRAIN, 4) is None
    assert desk.account().spent_cost == charged(desk) == 2 * price(training(60), ORDER)
    assert leases.close("lease", "settle", "completed")[TRAIN] == charged(desk)
    assert desk.account().reserved_cost == 0
    assert desk.all_valid()


def test_what_a_top_up_cannot_afford_is_cut_from_the_plan(desk, leases):
    leases.reserve("lease", "run", [training()])
    fill(desk)
    run_attempt(desk, "lease", "first", 4)
    left = desk.account().remaining_cost
    assert 0 < left < RUN
    second = leases.open("lease", "second", done=0)
    assert second.steps[TRAIN] == affordable_steps(training(), ORDER, left) < 80
    authorised = 0
    for block in range(1, 10):
        grant = leases.authorise("lease", second.epoch, TRAIN, block)
        if grant is None:
            break
        authorised += grant.stop - grant.start
    assert authorised == second.steps[TRAIN]
    account = desk.account()
    assert account.spent_cost + account.reserved_cost <= account.budget_cost
    assert desk.all_valid()


def test_with_nothing_left_a_new_attempt_may_run_nothing(desk, leases):
    most = affordable_steps(training(10_000), ORDER, desk.account().budget_cost)
    leases.reserve("lease", "run", [Charge(TRAIN, STEP, most, most)])
    first = leases.open("lease", "first")
    assert leases.authorise("lease", first.epoch, TRAIN, 1)
    second = leases.open("lease", "second")
    assert second.steps[TRAIN] == 0
    assert leases.authorise("lease", second.epoch, TRAIN, 1) is None


def test_an_attempt_from_the_end_of_the_plan_needs_nothing(desk, leases):
    leases.reserve("lease", "run", [training(), evaluation()])
    run_attempt(desk, "lease", "first", 4)
    second = leases.open("lease", "second", done=80)
    assert second.steps == {TRAIN: 0, VALIDATION: 1}
    assert leases.authorise("lease", second.epoch, TRAIN, 1) is None
    assert leases.authorise("lease", second.epoch, VALIDATION, 1)


def test_a_released_lease_can_be_opened_again_if_there_is_room(desk, leases):
    leases.reserve("lease", "run", [training()])
    run_attempt(desk, "lease", "first", 1)
    leases.close("lease", "release", "stopped")
    assert desk.account().reserved_cost == 0
    second = leases.open("lease", "second", done=20)
    assert second.steps == {TRAIN: 60}
    assert desk.account().reserved_cost == price(training(60), ORDER)
    leases.close("lease", "expire", "died")
    fill(desk)
    leases.reserve("more", "other", [training(20)])
    third = leases.open("lease", "third", done=20)
    assert third.steps[TRAIN] < 60
    assert desk.account().remaining_cost >= 0
    assert desk.all_valid()


@pytest.mark.parametrize("done", [-1, -(10**6), 81, math.nan, 0.5, True, "20", None])
def test_a_checkpoint_from_outside_the_plan_is_refused(desk, leases, done):
    """A negative one would ask for more steps than were reserved, and overspend."""
    leases.reserve("lease", "run", [training(), evaluation()])
    before = desk.totals()
    with pytest.raises(UsageError, match="done"):
        leases.open("lease", "nonce", done)
    assert desk.totals() == before


# Ending


@pytest.mark.parametrize("kind", CLOSING)
def test_what_was_authorised_is_never_refunded(desk, leases, kind):
    leases.reserve("lease", "run", [training(), evaluation()])
    run_attempt(desk, "lease", "first", 2)
    run_attempt(desk, "lease", "second", 1, done=20)
    spent = desk.account().spent_cost
    assert spent == charged(desk) > 0
    said = leases.close("lease", kind, "stopped")
    assert said == {TRAIN: spent, VALIDATION: 0}
    assert desk.account().spent_cost == spent
    assert desk.account().reserved_cost == desk.account(VALIDATION).reserved_cost == 0
    assert desk.all_valid()


def test_a_settled_lease_is_over_for_good(desk, leases):
    leases.reserve("lease", "run", [training()])
    run_attempt(desk, "lease", "first", 1)
    assert not leases.settled("lease")
    leases.close("lease", "release", "stopped")
    assert not leases.settled("lease")
    leases.close("lease", "settle", "completed")
    assert leases.settled("lease")
    before = desk.totals()
    for nonce in ("first", "second"):
        with pytest.raises(UsageError, match="settled"):
            leases.open("lease", nonce)
    for kind in CLOSING:
        leases.close("lease", kind, "again")
    assert desk.totals() == before


@pytest.mark.parametrize("kind", ["reserve", "refund", "", "open"])
def test_only_closing_kinds_close(desk, leases, kind):
    leases.reserve("lease", "run", [training()])
    before = desk.totals()
    with pytest.raises(UsageError, match="does not close"):
        leases.close("lease", kind, "stopped")
    with pytest.raises(UsageError, match="never reserved"):
        leases.close("nobody", "settle", "stopped")
    assert desk.totals() == before


def test_only_the_leases_of_the_dead_expire(place):
    living = {"alive"}
    desk = place.desk(is_alive=living.__contains__)
    for lease, by in (("a", "alive"), ("b", "dead"), ("c", "dead"), ("d", "alive"), ("e", "dead"), ("f", "dead")):
        assert desk.leases.reserve(lease, by, [training(40), evaluation()]).fits
    run_attempt(desk, "b", "nonce", 1)
    run_attempt(desk, "d", "nonce", 1)
    desk.leases.close("e", "settle", "completed")
    desk.leases.close("f", "release", "stopped")
    spent = desk.account().spent_cost
    assert sorted(desk.leases.expire_dead()) == ["b", "c"]
    assert desk.account().spent_cost == spent
    left_of_d = price(training(40), ORDER) - BLOCK
    assert desk.account().reserved_cost == price(training(40), ORDER) + left_of_d
    assert desk.leases.expire_dead() == []
    living.clear()
    assert sorted(desk.leases.expire_dead()) == ["a", "d"]
    assert desk.account().reserved_cost == desk.account(VALIDATION).reserved_cost == 0
    assert desk.all_valid()


def test_where_nobody_can_tell_who_lives_nothing_expires(desk, leases):
    leases.reserve("lease", "run", [training()])
    before = desk.totals()
    assert leases.expire_dead() == []
    assert desk.totals() == before


def test_an_expired_holder_that_was_only_slow_is_fenced_off(place):
    desk = place.desk(is_alive=lambda by: False)
    desk.leases.reserve("lease", "slow", [training()])
    epoch = run_attempt(desk, "lease", "nonce", 1)
    assert desk.leases.expire_dead() == ["lease"]
    fill(desk)
    with pytest.raises(PurserError, match="over"):
        desk.leases.authorise("lease", epoch, TRAIN, 2)
    account = desk.account()
    assert account.spent_cost + account.reserved_cost <= account.budget_cost


# Evaluations on the way


def test_an_attempt_is_granted_the_evaluations_that_are_before_it(desk, leases):
    """Two rungs and the end; the checkpoint of the second attempt has one of the rungs behind it."""
    one = desk.account(VALIDATION).price(evaluation())
    leases.reserve("lease", "run", [training(), evaluation(3)])
    first = leases.open("lease", "first")
    assert first.steps == {TRAIN: 80, VALIDATION: 3}
    assert leases.authorise("lease", first.epoch, VALIDATION, 1)
    second = leases.open("lease", "second", done=40, judged=1)
    assert second.steps == {TRAIN: 40, VALIDATION: 2}
    assert desk.account(VALIDATION).reserved_cost == 2 * one
    assert leases.authorise("lease", second.epoch, VALIDATION, 1)
    assert leases.authorise("lease", second.epoch, VALIDATION, 2)
    assert leases.authorise("lease", second.epoch, VALIDATION, 3) is None
    account = desk.account(VALIDATION)
    assert (account.spent_cost, account.reserved_cost) == (3 * one, 0)
    assert desk.all_valid()


def test_a_rung_that_is_judged_again_is_charged_again(desk, leases):
    """Its report was lost, so that the checkpoint is from before it."""
    leases.reserve("lease", "run", [training(), evaluation(3)])
    first = leases.open("lease", "first")
    assert leases.authorise("lease", first.epoch, VALIDATION, 1)
    second = leases.open("lease", "second", done=0, judged=0)
    assert second.steps[VALIDATION] == 3
    assert desk.account(VALIDATION).reserved_cost == 3 * desk.account(VALIDATION).price(evaluation())


def test_evaluations_that_cannot_be_afforded_again_are_cut(desk, leases):
    one, account = desk.account(VALIDATION).price(evaluation()), desk.account(VALIDATION)
    most = account.remaining_cost // one
    leases.reserve("lease", "run", [training(), evaluation(most)])
    first = leases.open("lease", "first")
    for block in (1, 2, 3):
        assert leases.authorise("lease", first.epoch, VALIDATION, block)
    assert leases.open("lease", "second", judged=1).steps[VALIDATION] == most - 3, "most - 1 are before it"
    account = desk.account(VALIDATION)
    assert account.spent_cost + account.reserved_cost <= account.budget_cost
    assert desk.all_valid()


@pytest.mark.parametrize("judged", [-1, 4, True, 0.5, "1", None])
def test_more_evaluations_than_are_planned_cannot_be_behind(desk, leases, judged):
    """A negative number would ask for more than was reserved."""
    leases.reserve("lease", "run", [training(), evaluation(3)])
    before = desk.totals()
    with pytest.raises(UsageError, match="judged"):
        leases.open("lease", "nonce", 0, judged)
    assert desk.totals() == before


# One lease in place of another


def held(desk):
    """A hold on what would pay for the next run, and everything else taken by others."""
    assert desk.leases.reserve("hold", "sweep", [training(80), evaluation()]).fits
    fill(desk)


def test_a_hold_makes_room_for_what_it_was_held_for(place, desk, leases):
    """The rest of the budget is others': outside the transaction there is never room for the new lease."""
    held(desk)
    assert not leases.fits([training(70), evaluation()]).fits
    for who in (leases, leases, place.desk().leases):  # the call may be repeated
        assert who.reserve("final", "sweep", [training(70), evaluation()], "hold").fits
    assert leases.settled("hold")
    rows = [row for row in desk.rows() if row["lease"] in ("hold", "final")]
    assert [(row["kind"], row["lease"]) for row in rows] == [
        ("reserve", "hold"),
        ("settle", "hold"),
        ("reserve", "final"),
    ]
    assert rows[2]["seq"] == rows[1]["seq"] + 1, "nothing came in between"
    assert rows[2]["reserved_after"] == rows[1]["reserved_after"] + price(training(70), ORDER)
    assert desk.all_valid()


def test_a_hold_that_is_closed_first_loses_its_room(desk, leases):
    """Broken on purpose: two transactions, and another job between them."""
    held(desk)
    leases.close("hold", "settle", "for the final run")
    assert leases.reserve("thief", "other", [training(80)]).fits
    assert not leases.reserve("final", "sweep", [training(70), evaluation()]).fits


def test_what_is_dearer_than_its_hold_is_refused_and_the_hold_is_over(desk, leases):
    held(desk)
    assert not leases.reserve("final", "sweep", [training(400), evaluation()], "hold").fits
    assert leases.settled("hold")
    assert not leases.known("final")
    assert desk.all_valid()


def test_a_swap_that_fails_changes_nothing(desk, leases):
    held(desk)
    leases.reserve("taken", "other", [evaluation()])
    before = desk.totals()
    with pytest.raises(UsageError, match="taken"):
        leases.reserve("taken", "sweep", [training(70)], "hold")
    with pytest.raises(UsageError, match="never reserved"):
        leases.reserve("final", "sweep", [training(70)], "nobody")
    assert desk.totals() == before
