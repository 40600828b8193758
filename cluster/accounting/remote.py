"""The books and leases of a cluster as a command on it sees them: the same classes, answered by the accountant.

A command that runs on a cluster holds no ledger and no URL of one. No rule may be written here: what is asked is what
`Books` and `Leases` answer beside the ledger. No Ray here: whoever makes these says how the accountant is asked.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cluster.accounting.answers import Answer
from cluster.accounting.books import Account, Books, Dataset
from cluster.accounting.leases import Attempt, Grant, Hold, Leases
from cluster.accounting.mechanisms import Charge
from cluster.accounting.verify import Verdict

# What the accountant answers beside its own calls; nothing else of `Books` and `Leases` can be asked for.
BOOKS = frozenset(
    {
        *("create", "exists", "names", "registered", "show", "last_run", "history", "charged", "verify"),
        *("partition_key", "source_key"),
    }
)
LEASES = frozenset({"close", "known", "settled", "holds", "expire_dead"})


class RemoteBooks(Books):
    """`Books` of the accountant's ledger.

    Args:
        accountant: an `AccountantClient`.
        described: what it says of itself.
    """

    def __init__(self, accountant: Any, described: Mapping[str, Any]) -> None:
        self._ask, self._described = accountant.books, described

    @property
    def place(self) -> str:
        """See `Books.place`."""
        return f"{self._described['place']} (by the cluster's accountant)"

    @property
    def identity(self) -> str:
        """See `Books.identity`."""
        return str(self._described["ledger"])

    @property
    def embedded(self) -> bool:
        """Never: accounts of a cluster are their owners' to make."""
        return False

    def create(
        self,
        dataset: Dataset,
        epsilon: float,
        delta: float,
        plans: Mapping[str, Sequence[Charge]],
        trials: int,
        nonce: str = "",
    ) -> list[Account]:
        """See `Books.create`."""
        # Drawn here: a call whose answer was lost with the actor is made again.
        nonce = nonce or secrets.token_hex(8)
        return list(self._ask("create", dataset, epsilon, delta, dict(plans), trials, nonce))

    def partition_key(self, dataset: str) -> str:
        """See `Books.partition_key`."""
        return str(self._ask("partition_key", dataset))

    def source_key(self) -> str:
        """See `Books.source_key`."""
        return str(self._ask("source_key"))

    def registered(self, source: str) -> bool:
        """See `Books.registered`."""
        return bool(self._ask("registered", source))

    def exists(self, dataset: str) -> bool:
        """See `Books.exists`."""
        return bool(self._ask("exists", dataset))

    def names(self) -> list[str]:
        """See `Books.names`."""
        return list(self._ask("names"))

    def show(self, account: str) -> Account:
        """See `Books.show`."""
        shown: Account = self._ask("show", account)
        return shown

    def last_run(self, account: str) -> tuple[str, int] | None:
        """See `Books.last_run`."""
        run: tuple[str, int] | None = self._ask("last_run", account)
        return run

    def history(self, account: str) -> Iterator[dict[str, Any]]:
        """See `Books.history`."""
        yield from self._ask("history", account)

    def charged(self, lease: str, account: str) -> list[dict[str, Any]]:
        """See `Books.charged`."""
        return list(self._ask("charged", lease, account))

    def verify(self, account: str, head: tuple[int, str] | None = None) -> Verdict:
        """See `Books.verify`."""
        verdict: Verdict = self._ask("verify", account, head)
        return verdict


class RemoteLeases(Leases):
    """`Leases` of the accountant's ledger."""

    def __init__(self, books: RemoteBooks, accountant: Any) -> None:
        self.books, self._accountant, self._ask = books, accountant, accountant.leases

    def fits(self, charges: Sequence[Charge]) -> Answer:
        """See `Leases.fits`."""
        answer: Answer = self._accountant.fits(charges)
        return answer

    def reserve(self, lease: str, by: str, charges: Sequence[Charge], instead_of: str | None = None) -> Answer:
        """See `Leases.reserve`."""
        answer: Answer = self._accountant.reserve(lease, by, charges, instead_of)
        return answer

    def open(self, lease: str, nonce: str, done: int = 0, judged: int = 0) -> Attempt:
        """See `Leases.open`."""
        attempt: Attempt = self._accountant.open(lease, nonce, done, judged)
        return attempt

    def authorise(self, lease: str, epoch: int, account: str, block: int) -> Grant | None:
        """See `Leases.authorise`."""
        grant: Grant | None = self._accountant.authorise(lease, epoch, account, block)
        return grant

    def epoch(self, lease: str) -> int:
        """See `Leases.epoch`."""
        return int(self._accountant.epoch(lease))

    def close(self, lease: str, kind: str, status: str, epoch: int | None = None) -> dict[str, int]:
        """See `AccountantClient.close`; an `epoch` of the caller's stands as it is."""
        if epoch is None:
            return dict(self._accountant.close(lease, kind, status))
        return dict(self._ask("close", lease, kind, status, epoch))

    def known(self, lease: str) -> bool:
        """See `Leases.known`."""
        return bool(self._ask("known", lease))

    def settled(self, lease: str) -> bool:
        """See `Leases.settled`."""
        return bool(self._ask("settled", lease))

    def holds(self, account: str) -> list[Hold]:
        """See `Leases.holds`."""
        return list(self._ask("holds", account))

    def expire_dead(self) -> list[str]:
        """See `Leases.expire_dead`."""
        return list(self._ask("expire_dead"))
