"""An observer of one ledger: makes calls to three accountants, crashes them around their commits, believes only the
answers that it got, and holds each against all others and against the entries themselves."""

from __future__ import annotations

import itertools
import json
import sqlite3
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar
from unittest import mock

import sqlalchemy as sa
from bookkeeping import DELTA, EPSILON, TRAIN, Desk, digits, evaluation, plans, training
from crashes import Faults, Killed, Outcome, outcome, together
from hypothesis.stateful import RuleBasedStateMachine, invariant
from places import Places

from cluster.accounting import databases, ledger
from cluster.accounting.costs import FINE, price, step_cost
from cluster.accounting.leases import CLOSING
from cluster.accounting.mechanisms import Charge
from cluster.accounting.verify import verify
from cluster.accounting.views import Draft
from cluster.errors import PurserError, UsageError

Row = dict[str, Any]
Rows = dict[str, list[Row]]


@dataclass(frozen=True)
class Call:
    """One request of a client's, which may be made again at any later time, to any accountant."""

    what: str
    lease: str
    arguments: tuple[Any, ...]

    @property
    def leases(self) -> set[str]:
        """Those that it may change: a reservation may take another's place."""
        return {self.lease, *([self.instead_of] if self.instead_of else [])}

    @property
    def instead_of(self) -> str | None:
        return self.arguments[2] if self.what == "reserve" and len(self.arguments) > 2 else None

    def make(self, desk: Desk) -> Any:
        if self.what == "create":
            return create(desk, *self.arguments)
        if self.what == "fail":
            return desk.ledger.write(lambda draft: fail(draft, *self.arguments))
        return getattr(desk.leases, self.what)(self.lease, *self.arguments)


def create(desk: Desk, name: str, sources: tuple[str, ...]) -> Any:
    dataset = digits(name, sources=sources)
    return desk.books.create(dataset, EPSILON, DELTA, plans(dataset), 8)


def fail(draft: Draft, how: str) -> None:
    """An act that has a bug, or is refused when it has written half of what it wanted."""
    if how != "refused":
        draft.append(account=TRAIN, kind="refuse", key="never there", body={})
        draft.hide("partition:never there")
    raise RuntimeError if how == "a bug" else UsageError


def epoch_of(row: Row) -> int:
    return json.loads(row["body"])["epoch"]


def without_waiting(connection: Any, _record: object) -> None:
    if isinstance(connection, sqlite3.Connection):
        connection.execute("PRAGMA synchronous=OFF")  # power cuts are not what is tested here


class Observer(RuleBasedStateMachine):
    """See the top of this file; what is asked, and when, is left to who inherits from it."""

    places: ClassVar[Places]
    kinds: ClassVar[dict[str, Any]] = {}
    engines: ClassVar[dict[tuple[str, int], sa.Engine]]  # made once: most of sitting down is compiling statements

    def __init__(self) -> None:
        super().__init__()
        self.kept = len(self.places.taken)
        self.place = self.places.digits()
        self.living: set[str] = set()
        self.seats = [self.sit_down(number) for number in range(3)]
        # What was asked and answered
        self.calls: list[Call] = []
        self.answers: dict[Call, Any] = {}
        self.reserved: dict[str, tuple[Charge, ...]] = {}
        self.attempts: dict[str, dict[str, Any]] = {}  # lease → nonce → what `open` answered
        self.fence: dict[str, int] = {}  # lease → the first epoch that may still be granted anything
        self.granted: dict[tuple[str, int, str, int], Any] = {}
        self.settled: set[str] = set()
        self.uncertain: set[str] = set()  # leases with a call of which nobody knows what came of it
        self.nonces = itertools.count()
        # What an auditor saw
        self.checked: Rows = {}
        self.rows: Rows = {}
        self.look()

    def sit_down(self, number: int) -> tuple[Desk, Faults]:
        """A new process: it knows nothing, and has no connection yet."""

        def engine(url: sa.URL) -> sa.Engine:
            key = str(url), number
            if key not in self.engines:
                self.engines[key] = databases.engine(url)
                sa.event.listen(self.engines[key], "connect", without_waiting)
                self.engines[key].dialect.commit = self.engines[key].dialect.do_commit
            self.engines[key].dialect.do_commit = self.engines[key].dialect.commit
            return self.engines[key]

        with mock.patch.object(ledger, "databases", mock.Mock(wraps=databases, engine=engine)):
            desk = self.place.desk(self.living.__contains__, **self.kinds)
        return desk, Faults(desk)

    def teardown(self) -> None:
        self.places.give_back(self.kept)

    # Looking at the entries behind everyone's back

    def look(self) -> Rows:
        rows = self.place.read("SELECT * FROM entries ORDER BY account, seq")
        self.rows = {name: list(group) for name, group in itertools.groupby(rows, lambda row: row["account"])}
        return self.rows

    def of(self, lease: str, *kinds: str) -> list[Row]:
        """The entries of a lease, of these kinds or of all, account by account."""
        return [
            row
            for rows in self.rows.values()
            for row in rows
            if row["lease"] == lease and (row["kind"] in kinds if kinds else row["kind"] != "refuse")
        ]

    # Making calls

    def ask(self, call: Call, seat: int, fault: str = "", retry: str = "later") -> Outcome:
        """Make one call, maybe with a crash; do it again at once, or leave it for later."""
        if call not in self.calls:
            self.calls.append(call)
        clear = call.leases - self.uncertain
        (done,) = self.perform(seat, fault, call)
        if done is None and retry != "later":
            (done,) = self.perform(seat if retry == "here" else seat + 1, "", call)
            self.uncertain -= clear
        return done or Outcome()

    def perform(self, seat: int, fault: str, *calls: Call) -> list[Outcome | None]:
        """What came of `calls`, which wait for one commit; None where the crash left nobody to tell."""
        desk, faults = self.seats[seat % 3]
        before = self.rows
        epochs = {call.lease: max((epoch_of(row) for row in self.of(call.lease)), default=0) for call in calls}
        faults.next = [fault] if fault else []
        if len(calls) == 1:
            done = [outcome(lambda: calls[0].make(desk))]
        else:
            done = together(desk.ledger, *(lambda c=call: c.make(desk) for call in calls))
        fired, faults.next = bool(fault) and not faults.next, []
        killed = any(isinstance(entry.error, Killed) for entry in done)
        told: list[Outcome | None] = [
            None if fired and (killed or isinstance(entry.error, PurserError)) else entry for entry in done
        ]
        if killed:
            desk.ledger.close()
            self.seats[seat % 3] = self.sit_down(seat % 3)
        self.look()
        if fired and fault.endswith("before") and all(entry is None for entry in told):
            assert self.rows == before, "a commit that failed left something"
        alone = before if len(calls) == 1 else None
        for call, entry in zip(calls, told, strict=True):
            if entry is None:
                self.uncertain |= call.leases
            else:
                self.learn(call, entry, alone, epochs[call.lease])
        return told

    def learn(self, call: Call, done: Outcome, before: Rows | None, epoch: int) -> None:
        """Hold an answer against all that was answered before; `before`: the heads, where nobody else wrote."""
        if call.what == "fail":
            assert isinstance(done.error, RuntimeError if call.arguments == ("a bug",) else UsageError), done.error
            return
        if done.error is not None and not isinstance(done.error, PurserError):
            raise done.error
        getattr(self, f"learn_{call.what}")(call, done, before, epoch)
        if done.error is not None or (call in self.answers and call.what != "close"):
            assert before is None or self.rows == before, f"{call}: asked again or refused, it changed the books"
        if done.error is None and not (call.what == "reserve" and not done.value.fits):
            first = self.answers.setdefault(call, done.value)
            assert call.what == "close" or done.value == first, "asked again, it was answered otherwise"

    def learn_reserve(self, call: Call, done: Outcome, before: Rows | None, epoch: int) -> None:
        lease, charges = call.lease, call.arguments[1]
        known = self.reserved.get(lease)
        if call.instead_of and done.error is None:
            new = known is None and lease not in self.uncertain
            self.learn_instead_of(call.instead_of, charges, done, before if new else None)
        if done.error is not None:
            assert isinstance(done.error, UsageError), done.error
            assert lease in self.uncertain or (known is not None and known != charges), "a good name was refused"
        elif done.value.fits:
            assert known is None or known == charges, "a lease was granted twice"
            self.reserved[lease] = charges
        else:
            assert known is None, "what was reserved is refused when it is asked again"

    def learn_instead_of(self, held: str, charges: tuple[Charge, ...], done: Outcome, before: Rows | None) -> None:
        """Whatever was answered, the other lease is over; and the room that it held was there for this one."""
        assert held in self.uncertain or self.of(held, "settle"), "what was to make room still holds it"
        self.over(held)
        self.settled.add(held)
        if before is None:
            return
        fit = []
        for charge in charges:
            rows = before[charge.account]
            opened = json.loads(rows[0]["body"])
            last, room = rows[-1], replay(rows).get(held, 0)
            left = opened["budget_cost"] - last["spent_after"] - last["reserved_after"] + room
            fit.append(price(charge, opened["order"]) <= left)
        assert done.value.fits == all(fit), "what was held back was not there for whom it was held"

    def learn_open(self, call: Call, done: Outcome, before: Rows | None, epoch: int) -> None:
        lease, nonce = call.lease, call.arguments[0]
        if done.error is not None:
            assert isinstance(done.error, UsageError), done.error
            assert lease in self.settled | self.uncertain or lease not in self.reserved, "a good attempt was refused"
            return
        assert lease not in self.settled, "a settled lease was opened"
        tried, attempt = self.attempts.setdefault(lease, {}), done.value
        if nonce in tried:
            assert attempt == tried[nonce], "one nonce was given two attempts"
            return
        assert all(attempt.epoch != other.epoch for other in tried.values()), "one epoch was given to two processes"
        if lease not in self.uncertain:
            assert attempt.epoch >= self.fence.get(lease, 0), "an epoch that is over was given out"
        tried[nonce] = attempt
        self.fence[lease] = max(self.fence.get(lease, 0), attempt.epoch)

    def learn_authorise(self, call: Call, done: Outcome, before: Rows | None, _epoch: int) -> None:
        lease, (epoch, account, block) = call.lease, call.arguments
        key = (lease, epoch, account, block)
        attempt = next((a for a in self.attempts.get(lease, {}).values() if a.epoch == epoch), None)
        size = next((c.block for c in self.reserved.get(lease, ()) if c.account == account), 0)
        over = epoch < self.fence.get(lease, 0)
        if done.error is not None:
            paid = sum(known[:3] == key[:3] for known in self.granted)
            good = attempt and size and not over and 1 <= block <= paid + 1 and lease not in self.uncertain
            assert not good, f"a block that was paid for was refused: {done.error}"
        elif done.value is not None:
            grant = done.value
            assert not over, "an attempt that is over was granted a block"
            assert attempt or lease in self.uncertain, "an attempt that nobody began was granted a block"
            assert self.granted.setdefault(key, grant) == grant, "one block was granted twice"
            assert 0 <= grant.start < grant.stop
            assert not attempt or grant.stop <= attempt.steps[account], "more was granted than the attempt may run"
            rows = [row for row in self.of(lease, "authorise") if (row["account"], row["block"]) == (account, block)]
            assert [row["cost"] for row in rows if epoch_of(row) == epoch] == [grant.cost], "granted, and not written"
        elif before is not None:
            assert self.rows == before, "nothing was granted, and something charged"

    def learn_close(self, call: Call, done: Outcome, before: Rows | None, epoch: int) -> None:
        lease, (_, _, meant) = call.lease, call.arguments
        if done.error is not None:
            assert lease not in self.reserved, "a lease that is there could not be closed"
            return
        rows, spent = self.of(lease), dict.fromkeys(done.value, 0)
        for row in self.of(lease, "authorise"):
            spent[row["account"]] += row["cost"]
        newest = max((attempt.epoch for attempt in self.attempts.get(lease, {}).values()), default=0)
        if before is not None:
            assert done.value == spent
        if before is not None and meant is not None and meant < newest:
            assert self.rows == before, "a late word closed a newer attempt"
        elif before is not None and meant in (None, epoch):
            assert rows[-1]["kind"] in CLOSING, "it was not closed"
        if meant is None or rows[-1]["kind"] in CLOSING:
            self.over(lease)
        if self.of(lease, "settle"):
            self.settled.add(lease)

    def learn_create(self, call: Call, done: Outcome, before: Rows | None, epoch: int) -> None:
        name, sources = call.arguments
        if done.error is not None:
            assert isinstance(done.error, UsageError), done.error
            assert name in self.datasets() or self.sources() & set(sources), "a good dataset was refused"
        else:
            assert call not in self.answers, "one dataset was made twice"

    def over(self, lease: str) -> None:
        newest = max((attempt.epoch for attempt in self.attempts.get(lease, {}).values()), default=0)
        self.fence[lease] = max(self.fence.get(lease, 0), newest + 1)

    def datasets(self) -> set[str]:
        return {name.partition("/")[0] for name in self.rows}

    def sources(self) -> set[str]:
        return {row["key"][len("source:") :] for rows in self.rows.values() for row in rows if row["kind"] == "source"}

    def running(self) -> list[str]:
        """Leases whose newest attempt may still authorise, as far as anybody was told."""
        newest = {lease: max(a.epoch for a in tried.values()) for lease, tried in self.attempts.items() if tried}
        return sorted(lease for lease, epoch in newest.items() if epoch >= self.fence[lease])

    def newest(self, lease: str) -> Any:
        return max(self.attempts[lease].values(), key=lambda attempt: attempt.epoch)

    # What must hold whatever they do

    @invariant()
    def the_books_are_right(self):
        for name in set(self.checked) - set(self.rows):
            raise AssertionError(f"{name} is gone")
        for name, rows in self.rows.items():
            before = self.checked.get(name, [])
            assert rows[: len(before)] == before, "an entry was changed or removed"
            if len(rows) > len(before):
                self.check(name, rows, before)
        self.checked = self.rows

    def check(self, name: str, rows: list[Row], before: list[Row]) -> None:
        budget = json.loads(rows[0]["body"])["budget_cost"]
        order = json.loads(rows[0]["body"])["order"]
        spent, reserved = rows[-1]["spent_after"], rows[-1]["reserved_after"]
        assert reserved >= 0
        assert spent + reserved <= budget, "more is spent and reserved than was granted"
        assert spent >= (before[-1]["spent_after"] if before else 0), "something that was authorised was refunded"
        mechanism = (training(1) if name.endswith("/train") else evaluation()).mechanism
        ran = sum(g.stop - g.start for (_, _, account, _), g in self.granted.items() if account == name)
        assert spent >= Fraction(step_cost(mechanism, order) * ran, FINE), "steps were granted that nobody paid"
        assert spent == sum(row["cost"] for row in rows if row["kind"] == "authorise"), "something was charged twice"
        assert spent >= sum(g.cost for (_, _, account, _), g in self.granted.items() if account == name)
        refused = [row["lease"] for row in rows if row["kind"] == "refuse"]
        assert len(refused) == len(set(refused)), "one lease was refused twice"
        verdict = verify(name, rows)
        assert verdict.valid, verdict.why
        held = replay(rows)
        desk = self.seats[len(rows) % 3][0]
        shown = desk.books.show(name)
        assert (shown.spent_cost, shown.reserved_cost) == (spent, reserved)
        assert shown.head == {"seq": rows[-1]["seq"], "hash": rows[-1]["hash"]}
        assert {hold.lease: hold.reserved_cost for hold in desk.leases.holds(name)} == held


def replay(rows: list[Row]) -> dict[str, int]:
    """What each lease holds, from the entries' kinds and costs alone; and whether the totals in them say the same."""
    spent, held = 0, dict[str, int]()
    for row in rows:
        lease, cost = row["lease"], row["cost"]
        if row["kind"] in ("reserve", "open"):
            held[lease] = held.get(lease, 0) + cost
        elif row["kind"] == "authorise":
            held[lease], spent = held[lease] - cost, spent + cost
        elif row["kind"] in CLOSING:
            assert held[lease] == cost, "it released something else than what was held"
            held[lease] = 0
        assert (row["spent_after"], row["reserved_after"]) == (spent, sum(held.values())), "totals do not follow"
        assert all(left >= 0 for left in held.values()), "more was authorised than was reserved"
    return {lease: left for lease, left in held.items() if left}
