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
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from cluster.accounting.books import Account, Books
from cluster.accounting.costs import affordable_steps, block_cost, price
from cluster.accounting.mechanisms import STEPS_BOUNDS, Charge, whole
from cluster.errors import PurserError, UsageError

CLOSING = ("settle", "release", "expire")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


@dataclass(frozen=True)
class Shortage:
    """What one account lacks for a request, in units of cost."""

    account: str
    asked: int
    remaining: int
    reserved: int


@dataclass(frozen=True)
class Answer:
    """Whether a request fits. `may_fit_later`: others' reservations, if released, could still make room."""

    fits: bool
    shortages: tuple[Shortage, ...] = ()

    @property
    def may_fit_later(self) -> bool:
        """Whether releasing every reservation would be enough."""
        return all(s.asked <= s.remaining + s.reserved for s in self.shortages)


@dataclass(frozen=True)
class Attempt:
    """One worker group's right to run: `steps` per account that may still be authorised under `epoch`."""

    lease: str
    attempt: int
    epoch: int
    steps: dict[str, int]


@dataclass(frozen=True)
class Grant:
    """A block that is paid for: steps `start` to `stop` of this attempt, counted from 0."""

    start: int
    stop: int
    cost: int


@dataclass(frozen=True)
class _State:
    charge: Charge
    by: str
    epoch: int
    attempts: int
    reserved: int
    settled: bool
    running: dict[str, Any] | None  # what the newest `open` granted, unless the lease was closed since
    rows: list[dict[str, Any]]


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
        with self.ledger.reading() as connection:
            return self._fits(connection, charges)

    def _fits(self, connection: sa.Connection, charges: Sequence[Charge]) -> Answer:
        shortages = []
        for charge in charges:
            account = self.books.read(connection, charge.account)
            asked = account.price(charge)
            if asked > account.remaining_cost:
                shortages.append(Shortage(account.account, asked, account.remaining_cost, account.reserved_cost))
        return Answer(not shortages, tuple(shortages))

    def reserve(self, lease: str, by: str, charges: Sequence[Charge]) -> Answer:
        """Reserve the whole price of `charges`, on all accounts or on none; a refusal is written once per lease.

        Raises:
            UsageError: two charges on one account, or a lease of this name with other charges.
        """
        if not isinstance(lease, str) or not NAME.fullmatch(lease):
            raise UsageError(f"lease: {lease!r} was given; a name is of letters, digits, '.', '_' and '-'.")
        ordered = sorted(charges, key=lambda charge: charge.account)
        if len({charge.account for charge in ordered}) != len(ordered) or not ordered:
            raise UsageError(f"lease {lease}: it needs one charge for each of its accounts.")
        with self.ledger.writing() as connection:
            taken = self.ledger.accounts_of_lease(connection, lease)
            if taken:
                held = [self._state(connection, lease, account).charge for account in taken]
                if held != ordered:
                    raise UsageError(f"lease {lease}: it is taken, with other charges; use a new name.")
                return Answer(True)
            answer = self._fits(connection, ordered)
            for charge in ordered:
                account = self.books.read(connection, charge.account)
                cost = account.price(charge)
                body = {**charge.to_json(), "by": by, "epoch": 0}
                if answer.fits:
                    self.ledger.append(
                        connection,
                        account=charge.account,
                        kind="reserve",
                        key=_key("reserve", lease, charge.account),
                        lease=lease,
                        cost=cost,
                        reserved=cost,
                        lease_reserved=cost,
                        body=body,
                    )
                elif charge.account == answer.shortages[0].account:
                    key = f"refuse:{lease}"
                    if not self.ledger.by_key(connection, key):
                        self.ledger.append(
                            connection,
                            account=charge.account,
                            kind="refuse",
                            key=key,
                            lease=lease,
                            cost=cost,
                            body={**body, "remaining": account.remaining_cost},
                        )
            return answer

    def open(self, lease: str, nonce: str, done: int = 0) -> Attempt:
        """Begin a new attempt of `lease` and fence every earlier one off.

        Tops the reservation up by what a dead attempt burnt; what cannot be afforded is cut from the plan.

        Args:
            nonce: drawn by the caller and held in its memory only: one epoch is never given to two processes.
            done: steps already in the checkpoint that this attempt starts from.

        Raises:
            UsageError: the lease is settled, or `done` is no number of steps of its plan.
        """
        with self.ledger.writing() as connection:
            accounts = self._accounts(connection, lease)
            steps: dict[str, int] = {}
            attempt = epoch = 0
            for name in accounts:
                state = self._state(connection, lease, name)
                if state.settled:
                    raise UsageError(f"lease {lease}: it is settled; start a new run.")
                if name.endswith("/train"):
                    whole("done", done, 0, state.charge.steps)
                key = _key("open", lease, name, nonce)
                again = self.ledger.by_key(connection, key)
                if again:
                    body = json.loads(again["body"])
                    steps[name], attempt, epoch = body["steps"], again["attempt"], body["epoch"]
                    continue
                account = self.books.read(connection, name)
                wanted = state.charge.steps - done if name.endswith("/train") else state.charge.steps
                have = state.reserved + account.remaining_cost
                granted = wanted if state.reserved and not state.attempts else 0
                if not granted:
                    granted = affordable_steps(state.charge, account.order, have, max(0, wanted))
                top_up = max(0, price(state.charge, account.order, granted) - state.reserved)
                attempt, epoch = state.attempts + 1, state.epoch + 1
                self.ledger.append(
                    connection,
                    account=name,
                    kind="open",
                    key=key,
                    lease=lease,
                    cost=top_up,
                    reserved=top_up,
                    lease_reserved=state.reserved + top_up,
                    attempt=attempt,
                    body={"by": state.by, "epoch": epoch, "done": done, "steps": granted},
                )
                steps[name] = granted
            return Attempt(lease, attempt, epoch, steps)

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
        with self.ledger.writing() as connection:
            state = self._state(connection, lease, account)
            if state.running is None or epoch != state.running["epoch"]:
                raise PurserError(
                    f"lease {lease}: this attempt is over (epoch {epoch}, the ledger is at {state.epoch}); "
                    "another attempt began or the lease was closed. Nothing was charged."
                )
            granted = state.running["steps"]
            key = _key("authorise", lease, account, state.attempts, block)
            start, stop = (block - 1) * state.charge.block, min(block * state.charge.block, granted)
            again = self.ledger.by_key(connection, key)
            if again:
                return Grant(start, stop, again["cost"])
            paid = [
                row["block"] for row in state.rows if row["kind"] == "authorise" and row["attempt"] == state.attempts
            ]
            if block != len(paid) + 1:
                raise PurserError(f"lease {lease}: block {block} was asked for out of turn; next is {len(paid) + 1}.")
            if start >= stop:
                return None
            cost = block_cost(state.charge.mechanism, self.books.read(connection, account).order, start, stop)
            if cost > state.reserved:
                raise PurserError(f"lease {lease}: block {block} costs more than is reserved; nothing was charged.")
            self.ledger.append(
                connection,
                account=account,
                kind="authorise",
                key=key,
                lease=lease,
                cost=cost,
                spent=cost,
                reserved=-cost,
                lease_reserved=state.reserved - cost,
                attempt=state.attempts,
                block=block,
                body={
                    "by": state.by,
                    "epoch": epoch,
                    "mechanism": state.charge.to_json()["mechanism"],
                    "steps": stop - start,
                },
            )
            return Grant(start, stop, cost)

    def close(self, lease: str, kind: str, status: str) -> dict[str, int]:
        """End `lease` and release what is still reserved; returns what it authorised, per account.

        `settle` ends it for good. `release` (a run that stopped or failed) and `expire` (a holder that died) end the
        attempt, so that it can authorise no more; `open` may begin another. Closing is the act of the lease's holder,
        who outlives its worker groups; workers never close.
        """
        if kind not in CLOSING:
            raise UsageError(f"lease {lease}: {kind!r} does not close a lease; {', '.join(CLOSING)} do.")
        with self.ledger.writing() as connection:
            return self._close(connection, lease, kind, status)

    def _close(self, connection: sa.Connection, lease: str, kind: str, status: str) -> dict[str, int]:
        spent = {}
        for account in self._accounts(connection, lease):
            state = self._state(connection, lease, account)
            spent[account] = sum(row["cost"] for row in state.rows if row["kind"] == "authorise")
            if state.settled or (kind != "settle" and state.rows[-1]["kind"] in CLOSING):
                continue
            self.ledger.append(
                connection,
                account=account,
                kind=kind,
                key=_key(kind, lease, account, state.epoch + 1),
                lease=lease,
                cost=state.reserved,
                reserved=-state.reserved,
                lease_reserved=0,
                body={"by": state.by, "epoch": state.epoch + 1, "status": status},
            )
        return spent

    def settled(self, lease: str) -> bool:
        """Whether `lease` was ended for good."""
        with self.ledger.reading() as connection:
            accounts = self.ledger.accounts_of_lease(connection, lease)
            return any(self._state(connection, lease, account).settled for account in accounts)

    def expire_dead(self) -> list[str]:
        """Close the leases whose holder no longer lives; returns their names."""
        if self._is_alive is None:
            return []
        with self.ledger.reading() as connection:
            if not self._dead(connection):
                return []
        with self.ledger.writing() as connection:  # asked again under the lock: a run may have been resumed in between
            dead = self._dead(connection)
            for lease in dead:
                self._close(connection, lease, "expire", "its holder died")
            return dead

    def _dead(self, connection: sa.Connection) -> list[str]:
        assert self._is_alive is not None
        holders = self.ledger.holders(connection)
        return [lease for lease, body in holders.items() if not self._is_alive(json.loads(body)["by"])]

    def _accounts(self, connection: sa.Connection, lease: str) -> list[str]:
        accounts = self.ledger.accounts_of_lease(connection, lease)
        if not accounts:
            raise UsageError(f"lease {lease}: it was never reserved in this ledger.")
        return accounts

    def _state(self, connection: sa.Connection, lease: str, account: str) -> _State:
        rows = [row for row in self.ledger.of_lease(connection, lease, account) if row["kind"] != "refuse"]
        if not rows:
            raise UsageError(f"lease {lease}: it holds nothing on {account}.")
        bodies = [json.loads(row["body"]) for row in rows]
        first = {key: bodies[0][key] for key in ("account", "mechanism", "steps", "block")}
        acts = [i for i, row in enumerate(rows) if row["kind"] in ("open", *CLOSING)]
        return _State(
            charge=Charge.from_json(first),
            by=bodies[0]["by"],
            epoch=max(body["epoch"] for body in bodies),
            attempts=sum(row["kind"] == "open" for row in rows),
            reserved=rows[-1]["lease_reserved_after"],
            settled=any(row["kind"] == "settle" for row in rows),
            running=bodies[acts[-1]] if acts and rows[acts[-1]]["kind"] == "open" else None,
            rows=rows,
        )


def _key(kind: str, lease: str, *parts: object) -> str:
    return ":".join((kind, lease, *map(str, parts)))


def explain(shortages: Sequence[Shortage], accounts: Sequence[Account]) -> str:
    """Say what was asked for, what remains, and what others hold, in ε-free units and shares of the budget."""
    said = []
    for shortage in shortages:
        budget = next(a.budget_cost for a in accounts if a.account == shortage.account)
        share = f"{shortage.asked / budget:.1%} of the budget was asked, {shortage.remaining / budget:.1%} remains"
        others = f" ({shortage.reserved / budget:.1%} is reserved by others)" if shortage.reserved else ""
        said.append(f"{shortage.account}: {share}{others}")
    return "; ".join(said)
