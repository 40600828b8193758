"""Random lives of leases, with crashes, repeated calls, stale calls and two accountants on one file, never spend past
the budget, never charge less than what an observer outside saw granted, and never refund (P1, P2, P3, P5); and the
same machine finds accountants that are broken on purpose."""

from __future__ import annotations

import itertools
import shutil
import sqlite3
import tempfile
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from bookkeeping import TRAIN, VALIDATION, Desk, desk_at, desk_with_digits, evaluation, training
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from cluster.accounting.costs import FINE, step_cost
from cluster.accounting.leases import Answer, Leases, Shortage
from cluster.accounting.verify import verify
from cluster.errors import PurserError, UsageError

LEASES = tuple("abcdef")
ACCOUNTS = (TRAIN, VALIDATION)
EVERY_LEASE, EITHER_DESK = st.sampled_from(LEASES), st.integers(0, 1)


def without_waiting(connection: Any, _record: object) -> None:
    connection.execute("PRAGMA synchronous=OFF")


class LeaseMachine(RuleBasedStateMachine):
    """Two accountants on one file, and an observer who believes only the answers that it got."""

    kind_of_leases = Leases

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        desk_with_digits(self.folder / "ledger.db").ledger._engine.dispose()
        self.living: set[str] = set()
        self.desks = [self.sit_down(), self.sit_down()]
        self.auditor = sqlite3.connect(self.folder / "ledger.db", isolation_level=None)  # reads behind everyone's back
        self.auditor.row_factory = sqlite3.Row
        self.fine = {a: step_cost(c.mechanism, self.desks[0].account(a).order) for a, c in self.charges(1, 1).items()}
        self.budget = {a: self.desks[0].account(a).budget_cost for a in ACCOUNTS}
        self.reserved: dict[str, dict[str, Any]] = {}
        self.attempts: dict[str, list[tuple[str, int, Any]]] = {}  # lease → (nonce, done, what `open` answered)
        self.over: set[tuple[str, int]] = set()  # (lease, epoch) that must never be granted anything again
        self.granted: dict[tuple[str, int, str, int], Any] = {}
        self.settled: set[str] = set()
        self.nonces = itertools.count()
        self.spent = dict.fromkeys(ACCOUNTS, 0)

    def sit_down(self) -> Desk:
        desk = desk_at(self.folder / "ledger.db")
        desk.ledger._engine.dispose()
        sa.event.listen(desk.ledger._engine, "connect", without_waiting)  # power cuts are not what is tested here
        return replace(desk, leases=self.kind_of_leases(desk.books, self.living.__contains__))

    def teardown(self) -> None:
        self.auditor.close()
        for desk in self.desks:
            desk.ledger._engine.dispose()
        shutil.rmtree(self.folder)

    @staticmethod
    def charges(steps: int, evaluations: int) -> dict[str, Any]:
        wanted = {TRAIN: training(steps), VALIDATION: evaluation(max(1, evaluations))}
        return wanted if evaluations else {TRAIN: wanted[TRAIN]}

    def leases(self, desk: int) -> Leases:
        return self.desks[desk].leases

    def rows(self, account: str) -> list[dict[str, Any]]:
        rows = self.auditor.execute("SELECT * FROM entries WHERE account = ? ORDER BY seq", [account])
        return [dict(row) for row in rows]

    def totals(self) -> list[tuple[Any, ...]]:
        last = "SELECT seq, spent_after, reserved_after, hash FROM entries WHERE account = ? ORDER BY seq DESC LIMIT 1"
        return [tuple(self.auditor.execute(last, [account]).fetchone()) for account in ACCOUNTS]

    def running(self) -> list[str]:
        """Leases whose newest attempt may still authorise."""
        return sorted(lease for lease, tried in self.attempts.items() if (lease, tried[-1][2].epoch) not in self.over)

    def end(self, lease: str) -> None:
        self.over.update((lease, attempt.epoch) for _, _, attempt in self.attempts.get(lease, []))

    # What holders do

    @initialize(others=st.integers(0, 540), steps=st.integers(40, 120))
    def others_hold_much_and_a_run_begins(self, others, steps):
        """Otherwise most examples end before the budget is short or a block is authorised."""
        self.living |= {"others", "a"}
        if others:
            assert self.leases(0).reserve("others", "others", [training(others)]).fits
        if self.leases(0).reserve("a", "a", [training(steps), evaluation(3)]).fits:
            self.reserved["a"] = self.charges(steps, 3)
            self.attempts["a"] = [("first", 0, self.leases(1).open("a", "first"))]

    @rule(lease=EVERY_LEASE, desk=EITHER_DESK, steps=st.integers(1, 300), evaluations=st.integers(0, 5))
    def reserve(self, lease, desk, steps, evaluations):
        charges = self.charges(steps, evaluations)
        if lease in self.reserved:
            before = self.totals()
            if charges == self.reserved[lease]:
                assert self.leases(desk).reserve(lease, lease, list(charges.values())).fits
            elif set(charges) == set(self.reserved[lease]):
                with pytest.raises(UsageError):
                    self.leases(desk).reserve(lease, lease, list(charges.values()))
            assert self.totals() == before
        elif self.leases(desk).reserve(lease, lease, list(charges.values())).fits:
            self.reserved[lease] = charges
            self.living.add(lease)

    @precondition(lambda self: self.reserved)
    @rule(data=st.data(), desk=EITHER_DESK)
    def reserve_again(self, data, desk):
        lease = data.draw(st.sampled_from(sorted(self.reserved)))
        before = self.totals()
        assert self.leases(desk).reserve(lease, lease, list(self.reserved[lease].values())).fits
        assert self.totals() == before

    @precondition(lambda self: set(self.reserved) - self.settled)
    @rule(data=st.data(), desk=EITHER_DESK)
    def begin_or_crash_and_begin_again(self, data, desk):
        lease = data.draw(st.sampled_from(sorted(set(self.reserved) - self.settled)))
        done = data.draw(st.integers(0, self.reserved[lease][TRAIN].steps))
        if lease in self.running():
            self.run_next_blocks(desk, lease, data.draw(st.integers(0, 2)))
        nonce = f"nonce-{next(self.nonces)}"
        self.end(lease)
        attempt = self.leases(desk).open(lease, nonce, done)
        assert (lease, attempt.epoch) not in self.over
        assert all(attempt.epoch != old.epoch for _, _, old in self.attempts.get(lease, []))
        assert 0 <= attempt.steps[TRAIN] <= self.reserved[lease][TRAIN].steps - done
        self.attempts.setdefault(lease, []).append((nonce, done, attempt))
        self.living.add(lease)

    @precondition(lambda self: set(self.attempts) - self.settled)
    @rule(data=st.data(), desk=EITHER_DESK)
    def open_again_with_the_same_nonce(self, data, desk):
        lease = data.draw(st.sampled_from(sorted(set(self.attempts) - self.settled)))
        nonce, done, attempt = data.draw(st.sampled_from(self.attempts[lease]))
        before = self.totals()
        assert self.leases(desk).open(lease, nonce, done) == attempt
        assert self.totals() == before

    @precondition(lambda self: self.running())
    @rule(data=st.data(), desk=EITHER_DESK, count=st.integers(1, 3))
    def run_blocks(self, data, desk, count):
        self.run_next_blocks(desk, data.draw(st.sampled_from(self.running())), count)

    def run_next_blocks(self, desk, lease, count):
        """The newest attempt of a lease asks for its next blocks, on every account in turn."""
        epoch = self.attempts[lease][-1][2].epoch
        for account in self.reserved[lease]:
            for _ in range(count):
                paid = sum(key[:3] == (lease, epoch, account) for key in self.granted)
                self.ask(desk, lease, epoch, account, paid + 1)

    @precondition(lambda self: self.attempts)
    @rule(data=st.data(), desk=EITHER_DESK, block=st.integers(-1, 6))
    def ask_for_any_block_in_any_attempt(self, data, desk, block):
        """Late, repeated, early and stale calls."""
        lease = data.draw(st.sampled_from(sorted(self.attempts)))
        attempt = data.draw(st.sampled_from(self.attempts[lease]))[2]
        epoch = attempt.epoch + data.draw(st.sampled_from([0, 0, 0, 1, -1]))
        self.ask(desk, lease, epoch, data.draw(st.sampled_from(sorted(self.reserved[lease]))), block)

    def ask(self, desk, lease, epoch, account, block):
        key = (lease, epoch, account, block)
        before = self.totals()
        try:
            grant = self.leases(desk).authorise(lease, epoch, account, block)
        except PurserError:
            grant = None
        else:
            assert (lease, epoch) not in self.over or grant is None, "an attempt that is over was granted a block"
        if grant is None:
            assert self.totals() == before
        elif key in self.granted:
            assert grant == self.granted[key]
            assert self.totals() == before
        else:
            assert 0 <= grant.start < grant.stop
            self.granted[key] = grant

    @precondition(lambda self: self.reserved)
    @rule(data=st.data(), desk=EITHER_DESK, kind=st.sampled_from(["settle", "release", "expire"]))
    def close(self, data, desk, kind):
        lease = data.draw(st.sampled_from(sorted(self.reserved)))
        if lease in self.running():
            self.run_next_blocks(desk, lease, data.draw(st.integers(0, 2)))
        self.end(lease)
        first = self.leases(desk).close(lease, kind, "stopped")
        before = self.totals()
        assert self.leases(1 - desk).close(lease, kind, "stopped") == first
        assert self.totals() == before
        if kind == "settle":
            self.settled.add(lease)

    @rule(data=st.data(), desk=EITHER_DESK)
    def holders_die(self, data, desk):
        dead = data.draw(st.sets(EVERY_LEASE, max_size=2))
        self.living -= dead
        expired = set(self.leases(desk).expire_dead())
        assert not expired & self.living
        for lease in expired:
            self.end(lease)

    # What must hold whatever they do

    @invariant()
    def the_books_are_right(self):
        for name in ACCOUNTS:
            rows = self.rows(name)
            spent, reserved = rows[-1]["spent_after"], rows[-1]["reserved_after"]
            assert reserved >= 0
            assert spent + reserved <= self.budget[name]
            ran = sum(g.stop - g.start for (_, _, account, _), g in self.granted.items() if account == name)
            assert spent >= Fraction(self.fine[name] * ran, FINE), "steps were granted that nobody paid"
            assert spent == sum(row["cost"] for row in rows if row["kind"] == "authorise")
            assert spent >= self.spent[name], "something that was authorised was refunded"
            self.spent[name] = spent
            verdict = verify(name, rows)
            assert verdict.valid, verdict.why


LIGHT = settings(
    max_examples=60,
    stateful_step_count=25,
    deadline=None,
    phases=[Phase.generate],  # shrinking twenty acts on a real file takes minutes; the printed ones can be replayed
    suppress_health_check=list(HealthCheck),
    database=None,
)

TestLeaseMachine = LeaseMachine.TestCase
TestLeaseMachine.settings = LIGHT


class ForgetsReservations(Leases):
    """Admits against what is spent only, as a budget without leases would."""

    def _fits(self, connection, charges):
        short = []
        for charge in charges:
            account = self.books.read(connection, charge.account)
            left = account.budget_cost - account.spent_cost
            if account.price(charge) > left:
                short.append(Shortage(account.account, account.price(charge), left, 0))
        return Answer(not short, tuple(short))


class NoFence(Leases):
    """Lets any process that knows the lease authorise, whatever its epoch."""

    def authorise(self, lease, epoch, account, block):
        with self.ledger.reading() as connection:
            now = self._state(connection, lease, account).epoch
        return super().authorise(lease, now, account, block)


class Refunds(Leases):
    """Gives back the last block when a lease is closed, on the holder's word that it never ran."""

    def close(self, lease, kind, status):
        spent = super().close(lease, kind, status)
        with self.ledger.writing() as connection:
            key = f"refund:{lease}"
            if spent[TRAIN] and not self.ledger.by_key(connection, key):
                self.ledger.append(connection, account=TRAIN, kind="release", key=key, spent=-1, body={"epoch": 0})
        return spent


class ChargesTwice(Leases):
    """Has no idempotency: a repeated call, sent because an answer was lost, pays once more."""

    def authorise(self, lease, epoch, account, block):
        grant = super().authorise(lease, epoch, account, block)
        with self.ledger.writing() as connection:
            last = self.ledger.last(connection, account)
            if grant and last["kind"] == "authorise" and last["reserved_after"] >= grant.cost:
                self.ledger.append(
                    connection,
                    account=account,
                    kind="authorise",
                    key=f"again:{last['seq']}",
                    cost=grant.cost,
                    spent=grant.cost,
                    reserved=-grant.cost,
                    lease=lease,
                    lease_reserved=max(0, last["lease_reserved_after"] - grant.cost),
                    body={"epoch": epoch, "by": "", "mechanism": None, "steps": 0},
                    attempt=last["attempt"],
                    block=0,
                )
        return grant


@pytest.mark.parametrize("broken", [ForgetsReservations, NoFence, Refunds, ChargesTwice])
def test_the_machine_catches_a_broken_accountant(broken):
    machine = type("BrokenMachine", (LeaseMachine,), {"kind_of_leases": broken})
    found = settings(
        LIGHT,
        derandomize=True,
        max_examples=400,
        report_multiple_bugs=False,
    )
    with pytest.raises((AssertionError, BaseExceptionGroup)):
        run_state_machine_as_test(machine, settings=found)
