"""The life of a lease: reserve → open → authorise block by block → settle; or release, or expire.

The Rényi filter lives here: nothing is reserved or authorised unless spent + reserved stays within the account's
budget at its one order (Feldman and Zrnic 2021; concurrent interaction: Haney et al. 2023). A block is charged and
durable before it runs (P2); what was authorised is never refunded, what was only reserved may be (P3). Every act has
an idempotency key, so that a retried call after an uncertain commit changes nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cluster.accounting.answers import Answer, Shortage
from cluster.accounting.books import Books
from cluster.accounting.costs import affordable_steps, block_cost, price
from cluster.accounting.mechanisms import STEPS_BOUNDS, Charge, whole
from cluster.accounting.views import Draft, View
from cluster.errors import PurserError, UsageError

PROTOCOL = 5  # of the calls between a run and its accountant; both sides must speak the same
CLOSING = ("settle", "release", "expire")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


@dataclass(frozen=True)
class Attempt:
    """One worker group's right to run: `steps` per account that may still be authorised under `epoch`, each of them as
    `charges` say and not otherwise."""

    lease: str
    attempt: int
    epoch: int
    steps: dict[str, int]
    charges: dict[str, Charge]


@dataclass(frozen=True)
class Grant:
    """A block that is paid for: steps `start` to `stop` of this attempt, counted from 0."""

    start: int
    stop: int
    cost: int


@dataclass(frozen=True)
class Hold:
    """What one lease holds of an account."""

    lease: str
    by: str
    reserved_cost: int


@dataclass(frozen=True)
class _State:
    """A lease on one account, as its first and its newest entry tell; `running`: an attempt may authorise."""

    charge: Charge
    mechanism: dict[str, Any]
    order: int
    by: str
    epoch: int
    attempt: int
    granted: int
    paid: int
    reserved: int
    running: bool
    settled: bool


class Leases:
    """Every act on leases of one set of books.

    Args:
        books: the accounts.
        is_alive: tells of a holder (the `by` of a reservation) whether it still lives; None where nobody can tell.
    """

    def __init__(self, books: Books, is_alive: Callable[[str], bool] | None = None) -> None:
        self.books = books
        self.ledger = books.ledger
        self._is_alive = is_alive

    def fits(self, charges: Sequence[Charge]) -> Answer:
        """Ask without asking for anything: would a reservation of `charges` be granted now? Writes nothing."""
        with self.ledger.reading() as view:
            return self._fits(view, charges)

    def _fits(self, view: View, charges: Sequence[Charge]) -> Answer:
        shortages = []
        for charge in charges:
            account = self.books.read(view, charge.account)
            asked = account.price(charge)
            if asked > account.remaining_cost:
                shortages.append(Shortage(account.account, asked, account.remaining_cost, account.reserved_cost))
        return Answer(not shortages, tuple(shortages))

    def reserve(self, lease: str, by: str, charges: Sequence[Charge], instead_of: str | None = None) -> Answer:
        """Reserve the whole price of `charges`, on all accounts or on none; a refusal is written once per lease.

        Args:
            instead_of: a lease that is settled in the same transaction, so that nobody else can take the room that it
                held; also where the answer is a refusal.

        Raises:
            UsageError: two charges on one account, a lease of this name with other charges, or no lease `instead_of`.
        """
        for field, name in (("lease", lease), ("by", by)):  # parts of keys, and names of files
            if not isinstance(name, str) or not NAME.fullmatch(name):
                raise UsageError(f"{field}: {name!r} was given; a name is of letters, digits, '.', '_' and '-'.")
        ordered = sorted(charges, key=lambda charge: charge.account)
        if len({charge.account for charge in ordered}) != len(ordered) or not ordered:
            raise UsageError(f"lease {lease}: it needs one charge for each of its accounts.")

        def act(draft: Draft) -> Answer:
            if instead_of is not None:
                self._close(draft, instead_of, "settle", f"it made room for {lease}")
            return self._reserve(draft, lease, by, ordered)

        return self.ledger.write(act)

    def _reserve(self, draft: Draft, lease: str, by: str, charges: Sequence[Charge]) -> Answer:
        taken = draft.accounts_of_lease(lease)
        if taken:
            if [self._state(draft, lease, account).charge for account in taken] != charges:
                raise UsageError(f"lease {lease}: it is taken, with other charges; use a new name.")
            return Answer(True)
        answer = self._fits(draft, charges)
        if not answer.fits:
            short = answer.shortages[0]
            key = f"refuse:{lease}"
            if draft.by_key(key) is None:
                charge = next(charge for charge in charges if charge.account == short.account)
                body = {**charge.to_json(), "by": by, "epoch": 0, "remaining": short.remaining}
                draft.append(account=short.account, kind="refuse", key=key, lease=lease, cost=short.asked, body=body)
            return answer
        for charge in charges:
            cost = self.books.read(draft, charge.account).price(charge)
            draft.append(
                account=charge.account,
                kind="reserve",
                key=_key("reserve", lease, charge.account),
                lease=lease,
                cost=cost,
                reserved=cost,
                lease_reserved=cost,
                body={**charge.to_json(), "by": by, "epoch": 0},
            )
        return answer

    def open(self, lease: str, nonce: str, done: int = 0, judged: int = 0) -> Attempt:
        """Begin a new attempt of `lease` and fence every earlier one off.

        Tops the reservation up by what a dead attempt burnt; what cannot be afforded is cut from the plan.

        Args:
            nonce: drawn by the caller and held in its memory only: one epoch is never given to two processes.
            done: steps already in the checkpoint that this attempt starts from.
            judged: evaluations that were released on the way there, and are not made again.

        Raises:
            UsageError: the lease is settled, or `done` or `judged` is no number of steps of its plan.
        """
        return self.ledger.write(lambda draft: self._open(draft, lease, nonce, done, judged))

    def _open(self, draft: Draft, lease: str, nonce: str, done: int, judged: int) -> Attempt:
        states = {name: self._state(draft, lease, name) for name in self._accounts(draft, lease)}
        for name, state in states.items():
            if state.settled:
                raise UsageError(f"lease {lease}: it is settled; start a new run.")
            field, behind = ("done", done) if name.endswith("/train") else ("judged", judged)
            whole(field, behind, 0, state.charge.steps)
        steps: dict[str, int] = {}
        attempt = epoch = 0
        for name, state in states.items():
            key = _key("open", lease, name, nonce)
            again = draft.by_key(key)
            if again:
                body = json.loads(again["body"])
                steps[name], attempt, epoch = body["granted"], again["attempt"], body["epoch"]
                continue
            account = self.books.read(draft, name)
            wanted = state.charge.steps - (done if name.endswith("/train") else judged)
            have = state.reserved + account.remaining_cost
            granted = wanted if state.reserved and not state.attempt else 0
            if not granted:
                granted = affordable_steps(state.charge, account.order, have, wanted)
            top_up = max(0, price(state.charge, account.order, granted) - state.reserved)
            attempt, epoch = state.attempt + 1, state.epoch + 1
            draft.append(
                account=name,
                kind="open",
                key=key,
                lease=lease,
                cost=top_up,
                reserved=top_up,
                lease_reserved=state.reserved + top_up,
                attempt=attempt,
                body={"by": state.by, "epoch": epoch, "done": done, "judged": judged, "granted": granted},
            )
            steps[name] = granted
        return Attempt(lease, attempt, epoch, steps, {name: state.charge for name, state in states.items()})

    def authorise(self, lease: str, epoch: int, account: str, block: int) -> Grant | None:
        """Charge the next block before it runs; None when the attempt's plan is at its end.

        By (epoch, block) and never by parameters: what a block is was fixed when the lease was reserved. The same
        call again returns the same grant.

        Raises:
            PurserError: the epoch is over (another attempt began, or the lease was closed), or the block is out of
                turn.
        """
        whole("block", block, 1, STEPS_BOUNDS[1])
        whole("epoch", epoch, 0, STEPS_BOUNDS[1])
        return self.ledger.write(lambda draft: self._authorise(draft, lease, epoch, account, block))

    def _authorise(self, draft: Draft, lease: str, epoch: int, account: str, block: int) -> Grant | None:
        state = self._state(draft, lease, account)
        if not state.running or epoch != state.epoch:
            raise PurserError(
                f"lease {lease}: this attempt is over (epoch {epoch}, the ledger is at {state.epoch}); "
                "another attempt began or the lease was closed. Nothing was charged."
            )
        key = _key("authorise", lease, account, state.attempt, block)
        start, stop = (block - 1) * state.charge.block, min(block * state.charge.block, state.granted)
        if block <= state.paid:
            again = draft.by_key(key)
            assert again is not None
            return Grant(start, stop, again["cost"])
        if block != state.paid + 1:
            raise PurserError(f"lease {lease}: block {block} was asked for out of turn; next is {state.paid + 1}.")
        if start >= stop:
            return None
        cost = block_cost(state.charge.mechanism, state.order, start, stop)
        if cost > state.reserved:
            raise PurserError(f"lease {lease}: block {block} costs more than is reserved; nothing was charged.")
        draft.append(
            account=account,
            kind="authorise",
            key=key,
            lease=lease,
            cost=cost,
            spent=cost,
            reserved=-cost,
            lease_reserved=state.reserved - cost,
            attempt=state.attempt,
            block=block,
            body={
                "by": state.by,
                "epoch": epoch,
                "granted": state.granted,
                "mechanism": state.mechanism,
                "steps": stop - start,
            },
        )
        draft.memo(account)[lease] = replace(state, paid=block, reserved=state.reserved - cost)
        return Grant(start, stop, cost)

    def epoch(self, lease: str) -> int:
        """The epoch that `lease` is at, by which `close` tells a late call from a timely one."""
        with self.ledger.reading() as view:
            return max(self._state(view, lease, account).epoch for account in self._accounts(view, lease))

    def close(self, lease: str, kind: str, status: str, epoch: int | None = None) -> dict[str, int]:
        """End `lease` and release what is still reserved; returns what it authorised, per account.

        `settle` ends it for good. `release` (a run that stopped or failed) and `expire` (a holder that died) end the
        attempt, so that it can authorise no more; `open` may begin another. Closing is the act of the lease's holder,
        who outlives its worker groups; workers never close.

        Args:
            epoch: what `epoch` answered when the holder decided to close: a call that was delayed until after a newer
                attempt began closes nothing. None closes whatever is there.
        """
        if kind not in CLOSING:
            raise UsageError(f"lease {lease}: {kind!r} does not close a lease; {', '.join(CLOSING)} do.")
        return self.ledger.write(lambda draft: self._close(draft, lease, kind, status, epoch))

    def _close(self, draft: Draft, lease: str, kind: str, status: str, epoch: int | None = None) -> dict[str, int]:
        spent = {}
        for account in self._accounts(draft, lease):
            state = self._state(draft, lease, account)
            spent[account] = draft.charged(lease, account)
            closed = bool(state.epoch) and not state.running
            late = epoch is not None and epoch != state.epoch
            if state.settled or late or (closed and kind != "settle"):
                continue
            draft.append(
                account=account,
                kind=kind,
                key=_key(kind, lease, account, state.epoch + 1),
                lease=lease,
                cost=state.reserved,
                reserved=-state.reserved,
                lease_reserved=0,
                attempt=state.attempt,
                body={"by": state.by, "epoch": state.epoch + 1, "status": status},
            )
        return spent

    def known(self, lease: str) -> bool:
        """Whether `lease` was ever reserved."""
        with self.ledger.reading() as view:
            return bool(view.accounts_of_lease(lease))

    def settled(self, lease: str) -> bool:
        """Whether `lease` was ended for good."""
        with self.ledger.reading() as view:
            return any(self._state(view, lease, account).settled for account in view.accounts_of_lease(lease))

    def holds(self, account: str) -> list[Hold]:
        """Who holds what of `account`, last reserved first."""
        with self.ledger.reading() as view:
            held = list(view.holders(account))
        return [Hold(row["lease"], json.loads(row["body"])["by"], row["lease_reserved_after"]) for row in held]

    def expire_dead(self) -> list[str]:
        """Close the leases whose holder no longer lives; returns their names."""
        if self._is_alive is None:
            return []
        with self.ledger.reading() as view:
            if not self._dead(view):
                return []
        return self.ledger.write(self._expire_dead)

    def _expire_dead(self, draft: Draft) -> list[str]:
        dead = self._dead(draft)  # asked again under the lock: a run may have been resumed in between
        for lease in dead:
            self._close(draft, lease, "expire", "its holder died")
        return dead

    def _dead(self, view: View) -> list[str]:
        assert self._is_alive is not None
        held = {row["lease"]: json.loads(row["body"])["by"] for name in view.accounts() for row in view.holders(name)}
        living = {by: self._is_alive(by) for by in sorted(set(held.values()))}
        return [lease for lease, by in held.items() if not living[by]]

    def _accounts(self, view: View, lease: str) -> list[str]:
        accounts = view.accounts_of_lease(lease)
        if not accounts:
            raise UsageError(f"lease {lease}: it was never reserved in this ledger.")
        return accounts

    def _state(self, view: View, lease: str, account: str) -> _State:
        memo = view.memo(account)
        known: _State | None = memo.get(lease)
        if known is not None:
            return known
        first, newest = view.by_key(_key("reserve", lease, account)), view.newest(lease, account)
        if first is None or newest is None:
            raise UsageError(f"lease {lease}: it holds nothing on {account}.")
        made, now = json.loads(first["body"]), json.loads(newest["body"])
        state = _State(
            charge=Charge.from_json({key: made[key] for key in ("account", "mechanism", "steps", "block")}),
            mechanism=made["mechanism"],
            order=self.books.read(view, account).order,
            by=made["by"],
            epoch=now["epoch"],
            attempt=newest["attempt"] or 0,
            granted=now.get("granted", 0),
            paid=newest["block"] or 0,
            reserved=newest["lease_reserved_after"],
            running=newest["kind"] in ("open", "authorise"),
            settled=newest["kind"] == "settle",
        )
        memo[lease] = state
        return state


def _key(kind: str, lease: str, *parts: object) -> str:
    return ":".join((kind, lease, *map(str, parts)))
