"""The accountant actor and the client that fails closed: the only file of this room that imports Ray.

A plain class over the books, decorated at one place. Its threads serve many callers at once; whoever waits for a
commit shares it, see `Ledger.write`. It holds nothing that the ledger does not, but for heartbeats: it may die and
restart at any moment. Enforcement inside Ray is cooperative: who runs code in the cluster could write to the ledger
itself (see README).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayActorError, RayTaskError

from cluster.accounting import remote
from cluster.accounting.answers import Answer
from cluster.accounting.books import Account, Books
from cluster.accounting.leases import PROTOCOL, Attempt, Grant, Leases
from cluster.accounting.ledger import Ledger
from cluster.accounting.mechanisms import Charge
from cluster.accounting.presence import BEAT, GRACE, Presence
from cluster.background import repeated
from cluster.environment import ACCOUNTANT, NAMESPACE, code_hash
from cluster.errors import PurserError, Unreachable, UsageError
from cluster.monitoring import PERIOD, REACHABLE, Meters, Monitor

THREADS = 64  # callers served at once; they mostly wait for a commit


class Accountant:
    """What the actor serves; see `Leases` and `Books` for the meaning of each call.

    Made without a look at the ledger: an actor that cannot be made is never restarted, a database comes back.
    """

    def __init__(self, url: str, grace: float = GRACE) -> None:
        self._url, self._grace = url, grace
        self._opening = threading.Lock()
        self._opened: tuple[Books, Leases, Presence, Monitor] | None = None
        self._swept = time.monotonic()
        self._meters = Meters()
        self._beside = ExitStack()
        if ray.is_initialized() and ray.get_runtime_context().get_actor_id():
            self._beside.enter_context(repeated(self._tell, PERIOD, at_once=True))

    def _desk(self) -> tuple[Books, Leases, Presence, Monitor]:
        if self._opened is None:
            with self._opening:
                if self._opened is None:
                    books = Books(Ledger(self._url))
                    presence = Presence(books.ledger, grace=self._grace)
                    leases = Leases(books, presence.is_alive)
                    self._opened = books, leases, presence, Monitor(self._meters, books, leases, presence)
        return self._opened

    def _tell(self) -> None:
        try:
            self._desk()[3].tell()
        except PurserError:
            self._meters.set(REACHABLE, 0)

    @property
    def _books(self) -> Books:
        return self._desk()[0]

    @property
    def _leases(self) -> Leases:
        return self._desk()[1]

    def describe(self) -> dict[str, Any]:
        """Protocol version and ledger identity, which clients check before anything else; then for people where the
        ledger is, its file where it is one, and the hash of the code that serves it."""
        ledger = self._books.ledger
        return {
            "protocol": PROTOCOL,
            "ledger": ledger.identity,
            "place": ledger.place,
            "file": self._url if ledger.embedded else None,
            "code": code_hash(),
        }

    def books(self, act: str, *arguments: Any) -> Any:
        """What `Books` answers to `act`, one of `remote.BOOKS`; whole, since an iterator does not travel."""
        _check_act(act, remote.BOOKS)
        answer = getattr(self._books, act)(*arguments)
        return list(answer) if isinstance(answer, Iterator) else answer

    def leases(self, act: str, *arguments: Any) -> Any:
        """What `Leases` answers to `act`, one of `remote.LEASES`."""
        _check_act(act, remote.LEASES)
        return getattr(self._leases, act)(*arguments)

    def beat(self, holder: str) -> None:
        """`holder` lives; and now and then, those who do not lose what they had reserved."""
        self._desk()[2].beat(holder)
        if time.monotonic() - self._swept > self._grace / 4:
            self._swept = time.monotonic()
            self._leases.expire_dead()

    def fits(self, charges: Sequence[Charge]) -> Answer:
        """Read only: would these be granted now?"""
        return self._leases.fits(charges)

    def reserve(self, lease: str, by: str, charges: Sequence[Charge], instead_of: str | None) -> Answer:
        """Reserve on all accounts or none; leases of dead holders are closed first where room is short."""
        if not self._leases.fits(charges).fits:
            self._leases.expire_dead()
        return self._leases.reserve(lease, by, charges, instead_of)

    def open(self, lease: str, nonce: str, done: int, judged: int) -> Attempt:
        """Begin a new attempt."""
        return self._leases.open(lease, nonce, done, judged)

    def authorise(self, lease: str, epoch: int, account: str, block: int) -> tuple[int, int, int] | None:
        """Charge a block before it runs; a plain tuple, since this is the call that is made all the time."""
        with self._meters.timed():
            grant = self._leases.authorise(lease, epoch, account, block)
        return None if grant is None else (grant.start, grant.stop, grant.cost)

    def epoch(self, lease: str) -> int:
        """The epoch that a lease is at."""
        return self._leases.epoch(lease)

    def close(self, lease: str, kind: str, status: str, epoch: int | None = None) -> dict[str, int]:
        """Settle or release a lease."""
        return self._leases.close(lease, kind, status, epoch)

    def show(self, account: str) -> Account:
        """An account as it stands."""
        return self._books.show(account)

    def charged(self, lease: str, account: str) -> list[dict[str, Any]]:
        """See `Books.charged`."""
        return self._books.charged(lease, account)

    def partition_key(self, dataset: str) -> str:
        """The hidden partition key; only for workers inside the boundary."""
        return self._books.partition_key(dataset)

    def source_key(self) -> str:
        """The hidden key of source HMACs; only for workers inside the boundary."""
        return self._books.source_key()

    def __repr__(self) -> str:
        return "Accountant(purser)"


def _check_act(act: str, known: frozenset[str]) -> None:
    if act not in known:
        raise UsageError(f"accountant: it has no act {act!r}; it answers {', '.join(sorted(known))}.")


def start(
    url: str,
    served: type[Accountant] = Accountant,
    variables: Mapping[str, str] | None = None,
    **options: Any,
) -> AccountantClient:
    """Find or make the accountant of this Ray cluster: named, detached, on the head node, restarted without end.

    Args:
        variables: of its process's environment, beside those of this job's processes.

    Raises:
        UsageError: one is there already, but of another version or over another ledger.
    """
    ledger = Ledger(url)
    actor = ray.remote(served).options(
        name=ACCOUNTANT,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        max_concurrency=THREADS,
        max_restarts=-1,
        max_task_retries=-1,  # safe: every act has an idempotency key
        num_cpus=0,
        resources={"node:__internal_head__": 0.001},
        runtime_env={"env_vars": dict(variables)} if variables else None,
    )
    actor.remote(url, **options)
    return connect(ledger.identity)


def connect(ledger: str | None = None) -> AccountantClient:
    """The client of this cluster's accountant, after checking that it speaks our protocol, and keeps `ledger`."""
    handle = found()
    if handle is None:
        raise UsageError(
            "accountant: none runs in this Ray cluster; `purser accountant start` on its head node starts one, and "
            "nothing was charged."
        )
    client = AccountantClient(handle)
    described = client.describe()
    spoken, kept = described.get("protocol"), described.get("ledger")
    if spoken != PROTOCOL or ledger not in (None, kept):
        raise UsageError(
            f"accountant: the one in this cluster speaks protocol {spoken} over ledger {kept}; this job needs protocol "
            f"{PROTOCOL} over {ledger or kept}. `purser accountant start` replaces one of another version. Nothing was "
            "charged."
        )
    return client


def found() -> Any:
    """The handle of this cluster's accountant, or None where there is none."""
    try:
        return ray.get_actor(ACCOUNTANT, namespace=NAMESPACE)
    except ValueError:
        return None


def stop() -> bool:
    """End this cluster's accountant and wait until its name is free; whether there was one. The ledger has it all."""
    handle = found()
    if handle is not None:
        ray.kill(handle)
    while found() is not None:
        time.sleep(0.05)
    return handle is not None


class AccountantClient:
    """Calls the accountant, retries the same call with the same key, and fails closed.

    Raises (every method): `Unreachable` after `patience` seconds without an answer; the caller must not go on.
    """

    def __init__(self, handle: Any, patience: float = 60.0) -> None:
        self._handle = handle
        self._patience = patience
        self.described: dict[str, Any] | None = None

    def _call(self, method: str, *args: object) -> Any:
        deadline = time.monotonic() + self._patience
        while True:
            try:
                left = max(0.1, deadline - time.monotonic())
                return ray.get(getattr(self._handle, method).remote(*args), timeout=left)
            except RayTaskError as error:
                cause = error.cause
                if not isinstance(cause, PurserError):
                    raise PurserError(
                        f"accountant: {method} failed ({type(cause).__name__}); nothing was granted."
                    ) from None
                if not isinstance(cause, Unreachable) or time.monotonic() >= deadline:
                    raise type(cause)(*cause.args) from None
            except (ActorDiedError, ActorUnavailableError, RayActorError, GetTimeoutError) as error:
                if isinstance(error, ActorDiedError):
                    self._succeed()
                if time.monotonic() >= deadline:
                    raise Unreachable(
                        f"accountant: it did not answer {method} within {self._patience:.0f} s; the run stops, since "
                        "nothing may run that is not charged. Start it again with --resume."
                    ) from None
            time.sleep(0.2)

    def _succeed(self) -> None:
        """Turn to the accountant that has replaced ours, where it keeps the same ledger in the same words."""
        successor = found()
        if successor is None or self.described is None:
            return
        try:
            described = ray.get(successor.describe.remote(), timeout=10.0)
        except (RayActorError, RayTaskError, GetTimeoutError):  # the call that waits comes back here
            return
        if all(described.get(key) == self.described.get(key) for key in ("protocol", "ledger")):
            self._handle = successor

    def holding(self, holder: str) -> AbstractContextManager[None]:
        """Send heartbeats for the leases of `holder` for as long as the block runs and this process lives."""
        # One that is lost is made up for by the next.
        return repeated(lambda: self._handle.beat.remote(holder), BEAT, at_once=True)

    def describe(self) -> dict[str, Any]:
        """See `Accountant.describe`."""
        self.described = dict(self._call("describe"))
        return self.described

    def books(self, act: str, *arguments: Any) -> Any:
        """What the `Books` of the accountant answer to `act`."""
        return self._call("books", act, *arguments)

    def leases(self, act: str, *arguments: Any) -> Any:
        """What the `Leases` of the accountant answer to `act`."""
        return self._call("leases", act, *arguments)

    def fits(self, charges: Sequence[Charge]) -> Answer:
        """See `Leases.fits`."""
        answer: Answer = self._call("fits", charges)
        return answer

    def reserve(self, lease: str, by: str, charges: Sequence[Charge], instead_of: str | None = None) -> Answer:
        """See `Leases.reserve`."""
        answer: Answer = self._call("reserve", lease, by, charges, instead_of)
        return answer

    def open(self, lease: str, nonce: str, done: int, judged: int = 0) -> Attempt:
        """See `Leases.open`."""
        attempt: Attempt = self._call("open", lease, nonce, done, judged)
        return attempt

    def authorise(self, lease: str, epoch: int, account: str, block: int) -> Grant | None:
        """See `Leases.authorise`."""
        grant = self._call("authorise", lease, epoch, account, block)
        return None if grant is None else Grant(*grant)

    def epoch(self, lease: str) -> int:
        """See `Leases.epoch`."""
        return int(self._call("epoch", lease))

    def close(self, lease: str, kind: str, status: str) -> dict[str, int]:
        """See `Leases.close`; should this call be delayed until after a newer attempt began, it closes nothing."""
        return dict(self._call("close", lease, kind, status, self.epoch(lease)))

    def show(self, account: str) -> Account:
        """See `Books.show`."""
        shown: Account = self._call("show", account)
        return shown

    def charged(self, lease: str, account: str) -> list[dict[str, Any]]:
        """See `Books.charged`."""
        return list(self._call("charged", lease, account))

    def partition_key(self, dataset: str) -> str:
        """See `Books.partition_key`."""
        return str(self._call("partition_key", dataset))

    def source_key(self) -> str:
        """See `Books.source_key`."""
        return str(self._call("source_key"))
