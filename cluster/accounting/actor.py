"""The accountant actor and the client that fails closed: the only file of this room that imports Ray.

A plain class over the books, decorated at one place. It is single-threaded: calls are served one at a time, each
durable before it answers. The actor holds no state that the ledger does not: it may die and restart at any moment.
Enforcement inside Ray is cooperative: who runs code in the cluster could write to the ledger itself (see README).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayActorError, RayTaskError

from cluster.accounting.books import Account, Books
from cluster.accounting.leases import Answer, Attempt, Grant, Leases
from cluster.accounting.ledger import Ledger
from cluster.accounting.mechanisms import Charge
from cluster.environment import ACCOUNTANT, NAMESPACE, is_alive
from cluster.errors import PurserError, Unreachable, UsageError

PROTOCOL = 1


class Accountant:
    """What the actor serves; see `Leases` and `Books` for the meaning of each call."""

    def __init__(self, url: str) -> None:
        self._books = Books(Ledger(url))
        self._leases = Leases(self._books, is_alive)

    def describe(self) -> dict[str, Any]:
        """Protocol version and ledger identity, which clients check before anything else."""
        return {"protocol": PROTOCOL, "ledger": self._books.ledger.identity}

    def fits(self, charges: Sequence[Charge]) -> Answer:
        """Read only: would these be granted now?"""
        return self._leases.fits(charges)

    def reserve(self, lease: str, by: str, charges: Sequence[Charge]) -> Answer:
        """Reserve on all accounts or none; leases of dead holders are closed first where room is short."""
        if not self._leases.fits(charges).fits:
            self._leases.expire_dead()
        return self._leases.reserve(lease, by, charges)

    def open(self, lease: str, nonce: str, done: int) -> Attempt:
        """Begin a new attempt."""
        return self._leases.open(lease, nonce, done)

    def authorise(self, lease: str, epoch: int, account: str, block: int) -> Grant | None:
        """Charge a block before it runs."""
        return self._leases.authorise(lease, epoch, account, block)

    def close(self, lease: str, kind: str, status: str) -> dict[str, int]:
        """Settle or release a lease."""
        return self._leases.close(lease, kind, status)

    def show(self, account: str) -> Account:
        """An account as it stands."""
        return self._books.show(account)

    def charged(self, lease: str, account: str) -> list[dict[str, Any]]:
        """The `authorise` entries of `lease` on `account`, as the history prints them."""
        return [row for row in self._books.history(account) if row["lease"] == lease and row["kind"] == "authorise"]

    def partition_key(self, dataset: str) -> str:
        """The hidden partition key; only for workers inside the boundary."""
        return self._books.partition_key(dataset)

    def source_key(self) -> str:
        """The hidden key of source HMACs; only for workers inside the boundary."""
        return self._books.source_key()

    def __repr__(self) -> str:
        return "Accountant(purser)"


def start(url: str) -> AccountantClient:
    """Find or make the accountant of this Ray cluster: named, detached, on the head node, restarted without end.

    Raises:
        UsageError: one is there already, but of another version or over another ledger.
    """
    actor = ray.remote(Accountant).options(
        name=ACCOUNTANT,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        max_restarts=-1,
        max_task_retries=-1,  # safe: every act has an idempotency key
        num_cpus=0,
        resources={"node:__internal_head__": 0.001},
    )
    actor.remote(url)
    return connect(Ledger(url).identity)


def connect(ledger: str) -> AccountantClient:
    """The client of this cluster's accountant, after checking that it keeps `ledger` and speaks our protocol."""
    try:
        handle = ray.get_actor(ACCOUNTANT, namespace=NAMESPACE)
    except ValueError:
        raise UsageError(
            "accountant: none runs in this Ray cluster; start runs with `purser train` or `tune`."
        ) from None
    client = AccountantClient(handle)
    described = client.describe()
    if described != {"protocol": PROTOCOL, "ledger": ledger}:
        raise UsageError(
            f"accountant: the one in this cluster speaks protocol {described.get('protocol')} over ledger "
            f"{described.get('ledger')}; this job needs protocol {PROTOCOL} over {ledger}. Nothing was charged."
        )
    return client


class AccountantClient:
    """Calls the accountant, retries the same call with the same key, and fails closed.

    Raises (every method): `Unreachable` after `patience` seconds without an answer; the caller must not go on.
    """

    def __init__(self, handle: Any, patience: float = 60.0) -> None:
        self._handle = handle
        self._patience = patience

    def _call(self, method: str, *args: object) -> Any:
        deadline = time.monotonic() + self._patience
        while True:
            try:
                left = max(0.1, deadline - time.monotonic())
                return ray.get(getattr(self._handle, method).remote(*args), timeout=left)
            except RayTaskError as error:
                cause = error.cause
                if isinstance(cause, PurserError):
                    raise type(cause)(*cause.args) from None
                raise PurserError(
                    f"accountant: {method} failed ({type(cause).__name__}); nothing was granted."
                ) from None
            except (ActorDiedError, ActorUnavailableError, RayActorError, GetTimeoutError):
                if time.monotonic() >= deadline:
                    raise Unreachable(
                        f"accountant: it did not answer {method} within {self._patience:.0f} s; the run stops, since "
                        "nothing may run that is not charged. Start it again with --resume."
                    ) from None
                time.sleep(0.2)

    def describe(self) -> dict[str, Any]:
        """Protocol version and ledger identity."""
        return dict(self._call("describe"))

    def fits(self, charges: Sequence[Charge]) -> Answer:
        """See `Leases.fits`."""
        answer: Answer = self._call("fits", charges)
        return answer

    def reserve(self, lease: str, by: str, charges: Sequence[Charge]) -> Answer:
        """See `Leases.reserve`."""
        answer: Answer = self._call("reserve", lease, by, charges)
        return answer

    def open(self, lease: str, nonce: str, done: int) -> Attempt:
        """See `Leases.open`."""
        attempt: Attempt = self._call("open", lease, nonce, done)
        return attempt

    def authorise(self, lease: str, epoch: int, account: str, block: int) -> Grant | None:
        """See `Leases.authorise`."""
        grant: Grant | None = self._call("authorise", lease, epoch, account, block)
        return grant

    def close(self, lease: str, kind: str, status: str) -> dict[str, int]:
        """See `Leases.close`."""
        return dict(self._call("close", lease, kind, status))

    def show(self, account: str) -> Account:
        """See `Books.show`."""
        shown: Account = self._call("show", account)
        return shown

    def charged(self, lease: str, account: str) -> list[dict[str, Any]]:
        """See `Accountant.charged`."""
        return list(self._call("charged", lease, account))

    def partition_key(self, dataset: str) -> str:
        """See `Books.partition_key`."""
        return str(self._call("partition_key", dataset))

    def source_key(self) -> str:
        """See `Books.source_key`."""
        return str(self._call("source_key"))
