"""Datasets and accounts: who granted which (ε, δ) over which data, and what has become of it.

An account is bound to one dataset and one partition for ever: its order, budget and declared facts stand in its first
entry. A job that says otherwise is refused (P4). No data passes through here, only HMACs and declared numbers.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cluster.accounting import orders
from cluster.accounting.costs import budget_cost, epsilon_of, price
from cluster.accounting.ledger import Ledger
from cluster.accounting.mechanisms import Charge, from_json, number, to_json, whole
from cluster.accounting.schema import HMAC_KEY
from cluster.accounting.verify import Verdict, verify
from cluster.accounting.views import Draft, View
from cluster.errors import UsageError

PARTITIONS = ("train", "validation")
_FACTS = ""  # where an account's first entry is remembered, among leases, which all have names


@dataclass(frozen=True)
class Dataset:
    """What the owner declared when the dataset was made. Public, but for nothing: `sources` are HMACs under the
    ledger's own key."""

    name: str
    unit: str
    units: int
    max_records_per_unit: int
    validation_fraction: float
    sources: tuple[str, ...]

    def accounts(self) -> tuple[str, ...]:
        """The names of its accounts: one per partition, each with the whole (ε, δ)."""
        return tuple(f"{self.name}/{partition}" for partition in PARTITIONS)


@dataclass(frozen=True)
class Account:
    """One account as its last entry leaves it. Costs are RDP at `order` in units of 1e-12."""

    account: str
    epsilon: float
    delta: float
    order: int
    budget_cost: int
    spent_cost: int
    reserved_cost: int
    dataset: Dataset
    head: dict[str, Any]

    @property
    def remaining_cost(self) -> int:
        """What may still be reserved."""
        return self.budget_cost - self.spent_cost - self.reserved_cost

    def as_json(self) -> dict[str, Any]:
        """The contract's keys."""
        names = (
            "account",
            "epsilon",
            "delta",
            "order",
            "budget_cost",
            "spent_cost",
            "reserved_cost",
            "remaining_cost",
            "head",
        )
        return {name: getattr(self, name) for name in names}

    def epsilon_of(self, cost: int) -> float:
        """The ε that the books charge for `cost` on this account."""
        return epsilon_of(cost, self.delta, self.order)

    def price(self, charge: Charge) -> int:
        """What the whole of `charge` costs on this account."""
        return price(charge, self.order)


class Books:
    """Datasets and accounts of one ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    @property
    def place(self) -> str:
        """Where they are kept, for people: without a password."""
        return self.ledger.place

    @property
    def identity(self) -> str:
        """See `Ledger.identity`."""
        return self.ledger.identity

    @property
    def embedded(self) -> bool:
        """Whether accounts are made as a job needs them: nobody else's books are in the file."""
        return self.ledger.embedded

    def create(
        self,
        dataset: Dataset,
        epsilon: float,
        delta: float,
        plans: Mapping[str, Sequence[Charge]],
        trials: int,
        nonce: str = "",
    ) -> list[Account]:
        """Make `dataset` and its accounts, all or none; the order of each is chosen from `plans` (account → the
        charge of each candidate run). Who asks again after an uncertain answer gives the same `nonce`.

        Raises:
            UsageError: bad numbers, an account that exists already, or a source that belongs to another dataset.
        """
        number("privacy.epsilon", epsilon, 1e-3, 100.0)
        number("privacy.delta", delta, 1e-30, 1.0)
        whole("privacy.units", dataset.units, 2, 10**12)
        whole("privacy.max_records_per_unit", dataset.max_records_per_unit, 1, 1_000_000)
        number("data.validation_fraction", dataset.validation_fraction, 0.01, 0.9)
        if delta * dataset.units >= 1:
            raise UsageError(
                f"privacy.delta: {delta:g} was given; it must be below 1/units = {1 / dataset.units:.3g}, "
                "or one unit could be published whole."
            )
        named = all(isinstance(name, str) and name.isprintable() and ":" not in name for name in dataset.accounts())
        if not named:
            raise UsageError(f"account: {dataset.name!r} was given; a name has no ':' and nothing unprintable in it.")
        chosen = {a: orders.choose(orders.order_table(epsilon, delta, plans[a], trials)) for a in dataset.accounts()}
        nonce = nonce or secrets.token_hex(8)  # an uncertain commit is done again, and must know its own work
        return self.ledger.write(lambda draft: self._create(draft, dataset, epsilon, delta, chosen, nonce))

    def _create(
        self, draft: Draft, dataset: Dataset, epsilon: float, delta: float, chosen: Mapping[str, int], nonce: str
    ) -> list[Account]:
        names = dataset.accounts()
        made = draft.by_key(f"account:{names[0]}")
        if made and json.loads(made["body"]).get("nonce") == nonce:
            return [self.read(draft, account) for account in names]
        for source in dataset.sources:
            owner = draft.by_key(f"source:{source}")
            if owner and owner["account"] != names[0]:
                other = owner["account"].rpartition("/")[0]
                raise UsageError(
                    f"data.source: it already belongs to the dataset {other}; a second budget for the same data "
                    f"would double its epsilon. Use account: {other}."
                )
        for account in names:
            if draft.last(account):
                raise UsageError(f"account: {account} exists already; `purser budget show {account}` shows it.")
        for account in names:
            body = {
                "epsilon": epsilon,
                "delta": delta,
                "order": chosen[account],
                "budget_cost": budget_cost(epsilon, delta, chosen[account]),
                "dataset": asdict(dataset),
                "by": "owner",
                "nonce": nonce,
            }
            draft.append(account=account, kind="account", key=f"account:{account}", body=body)
        for source in dataset.sources:
            draft.append(account=names[0], kind="source", key=f"source:{source}", body={"by": "owner"})
        draft.hide(f"partition:{dataset.name}")
        return [self.read(draft, account) for account in names]

    def check(self, dataset: Dataset, epsilon: float, delta: float) -> list[Account]:
        """The accounts of `dataset`, after checking that the job says what the owner said.

        Raises:
            UsageError: the first field that differs, with both values; nothing is charged.
        """
        accounts = self.check_terms(dataset, epsilon, delta)
        if dataset.sources != accounts[0].dataset.sources:
            raise UsageError(
                f"data.source: its content is not what account {dataset.name} was made for; bring the original back, "
                "or make a new account for new people only."
            )
        return accounts

    def check_terms(self, dataset: Dataset, epsilon: float, delta: float) -> list[Account]:
        """`check` of what is declared, without a look at the sources."""
        accounts = [self.show(account) for account in dataset.accounts()]
        first = accounts[0]
        said = {"privacy.epsilon": (epsilon, first.epsilon), "privacy.delta": (delta, first.delta)}
        for field in ("unit", "units", "max_records_per_unit"):
            said[f"privacy.{field}"] = (getattr(dataset, field), getattr(first.dataset, field))
        said["data.validation_fraction"] = (dataset.validation_fraction, first.dataset.validation_fraction)
        for field, (job, account) in said.items():
            if job != account:
                raise UsageError(
                    f"{field}: the job says {job}, but account {dataset.name} was made with {account}, which is fixed; "
                    f"write {account} in the job."
                )
        return accounts

    def partition_key(self, dataset: str) -> str:
        """The hidden key by which units of `dataset` fall into partitions; stays inside the boundary."""
        return self.ledger.secret(f"partition:{dataset}")

    def source_key(self) -> str:
        """The hidden key of source HMACs, one for the ledger, so that one source is one key in every dataset."""
        return self.ledger.secret(HMAC_KEY)

    def registered(self, source: str) -> bool:
        """Whether a dataset of this ledger was made for the source with this HMAC."""
        with self.ledger.reading() as view:
            return view.by_key(f"source:{source}") is not None

    def exists(self, dataset: str) -> bool:
        """Whether a dataset of this name has accounts."""
        with self.ledger.reading() as view:
            return view.by_key(f"account:{dataset}/{PARTITIONS[0]}") is not None

    def names(self) -> list[str]:
        """Every account."""
        with self.ledger.reading() as view:
            return view.accounts()

    def resolve(self, name: str) -> str:
        """An account's full name; a dataset's name alone means its train account.

        Raises:
            UsageError: no such account, with those that are there.
        """
        known = self.names()
        for candidate in (name, f"{name}/{PARTITIONS[0]}"):
            if candidate in known:
                return candidate
        there = ", ".join(known) if known else "none yet; `purser budget create JOB` makes one"
        raise UsageError(f"ACCOUNT: {name!r} is not in this ledger; there are: {there}.")

    def show(self, account: str) -> Account:
        """One account as it stands."""
        with self.ledger.reading() as view:
            return self.read(view, account)

    def read(self, view: View, account: str) -> Account:
        """One account as it stands inside a transaction of the caller's."""
        memo = view.memo(account)
        if (first := memo.get(_FACTS)) is None:
            row = view.by_key(f"account:{account}")
            if row is None:
                raise UsageError(f"account: {account} is not in this ledger; `purser budget create JOB` makes it.")
            first = memo[_FACTS] = json.loads(row["body"])
        last = view.last(account)
        assert last is not None
        return Account(
            account=account,
            epsilon=first["epsilon"],
            delta=first["delta"],
            order=first["order"],
            budget_cost=first["budget_cost"],
            spent_cost=last["spent_after"],
            reserved_cost=last["reserved_after"],
            dataset=Dataset(**{**first["dataset"], "sources": tuple(first["dataset"]["sources"])}),
            head={"seq": last["seq"], "hash": last["hash"]},
        )

    def last_run(self, account: str) -> tuple[str, int] | None:
        """The lease that was last reserved on `account`, and the price of its whole plan."""
        with self.ledger.reading() as view:
            newest = view.last_reserve(account)
        return None if newest is None else (newest["lease"], newest["cost"])

    def history(self, account: str) -> Iterator[dict[str, Any]]:
        """Every entry of `account`, oldest first, with its mechanism, steps and author drawn out of the body.

        All hashed columns are kept, so that a reader can recompute the chain from what is printed.
        """
        with self.ledger.reading() as view:
            yield from map(_printed, view.of_account(account))

    def charged(self, lease: str, account: str) -> list[dict[str, Any]]:
        """The `authorise` entries of `lease` on `account`, as the history prints them."""
        with self.ledger.reading() as view:
            return [_printed(row) for row in view.of_lease(lease, account) if row["kind"] == "authorise"]

    def verify(self, account: str, head: tuple[int, str] | None = None) -> Verdict:
        """Walk the chain of `account`; see `verify.verify`."""
        with self.ledger.reading() as view:
            return verify(account, view.of_account(account), head)


def _printed(row: Mapping[str, Any]) -> dict[str, Any]:
    body = json.loads(row["body"])
    mechanism = body.get("mechanism")
    return {
        **row,
        "body": body,
        "mechanism": to_json(from_json(mechanism)) if mechanism else None,
        "steps": body.get("steps"),
        "by": body.get("by"),
    }
