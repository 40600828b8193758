"""The accountant's figures for Prometheus: what each is called, what it means, and how it is read from the books.

They leave by Ray's own way, from the accountant's process and no other. What is told is what the ledger tells anyone:
totals, and how many leases, refusals and steps there were. Nothing else may be told here, and no tag may name a lease,
a trial or a person (P13). A selection is one lease with one block of one step, however many candidates it has.

No admission waits for this: a timer reads what the ledger has got meanwhile. Ray forgets a gauge that was not set for
twenty seconds, so that an accountant which is gone is absent, and one that lives has to say so.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cluster.accounting.books import Account, Books
from cluster.accounting.leases import Leases
from cluster.accounting.presence import Presence
from cluster.accounting.verify import SHORT

PERIOD = 5.0  # seconds between two looks at the ledger; Ray exports every ten
OPEN, STALE = "open", "stale"
GAUGE, COUNTER, HISTOGRAM = "Gauge", "Counter", "Histogram"
_SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0]


@dataclass(frozen=True)
class Figure:
    """One metric. A counter begins at 0 with the accountant's process; a gauge tells what the ledger says."""

    kind: str
    name: str
    tags: tuple[str, ...]
    says: str

    @property
    def exported(self) -> tuple[str, ...]:
        """What Prometheus calls it: Ray puts its own name before, and the kind's endings after."""
        endings = {GAUGE: ("",), COUNTER: ("_total",), HISTOGRAM: ("_bucket", "_sum", "_count")}
        return tuple(f"ray_{self.name}{ending}" for ending in endings[self.kind])

    def made_by(self, registry: Any) -> Any:
        """Its instrument, in `ray.util.metrics` or what is like it."""
        more = {"boundaries": _SECONDS} if self.kind == HISTOGRAM else {}
        return getattr(registry, self.kind)(self.name, description=self.says, tag_keys=self.tags, **more)


_ACCOUNT = ("account", "partition")
EPSILON = Figure(GAUGE, "purser_epsilon", _ACCOUNT, "epsilon that the owner granted, for ever")
DELTA = Figure(GAUGE, "purser_delta", _ACCOUNT, "delta that the owner granted, for ever")
BUDGET = Figure(GAUGE, "purser_budget_cost", _ACCOUNT, "what the account may spend in all, in units of cost")
SPENT = Figure(GAUGE, "purser_spent_cost", _ACCOUNT, "what was authorised, in units of cost; never falls")
RESERVED = Figure(GAUGE, "purser_reserved_cost", _ACCOUNT, "what open leases hold, in units of cost")
LEASES = Figure(GAUGE, "purser_leases", (*_ACCOUNT, "status"), "leases with a reservation, by their holder's life")
HEAD = Figure(GAUGE, "purser_ledger_head", _ACCOUNT, "sequence number of the account's newest entry")
# As a label, every commit would begin a new series.
HEAD_HASH = Figure(GAUGE, "purser_ledger_head_hash", _ACCOUNT, "first 13 hexadecimal digits of that entry's hash")
REACHABLE = Figure(GAUGE, "purser_ledger_reachable", (), "1 if the accountant could read its ledger, 0 if not")
REFUSALS = Figure(COUNTER, "purser_refusals", _ACCOUNT, "leases refused for want of budget")
STEPS = Figure(COUNTER, "purser_authorised_steps", _ACCOUNT, "steps authorised, those of dead attempts included")
FAILURES = Figure(COUNTER, "purser_ledger_write_failures", (), "transactions that the ledger's database failed")
LATENCY = Figure(HISTOGRAM, "purser_authorise_seconds", (), "seconds until a block was on disk, or was not allowed")
FIGURES = (
    *(EPSILON, DELTA, BUDGET, SPENT, RESERVED, LEASES, HEAD, HEAD_HASH, REACHABLE),
    *(REFUSALS, STEPS, FAILURES, LATENCY),
)


class Meters:
    """An instrument for every figure.

    Args:
        registry: where they are made; by default `ray.util.metrics`, which outside of a Ray process records nothing.
    """

    def __init__(self, registry: Any = None) -> None:
        if registry is None:
            from ray.util import metrics

            registry = metrics
        self._made = {figure: figure.made_by(registry) for figure in FIGURES}

    def set(self, figure: Figure, value: float, **tags: str) -> None:
        """Let a gauge say `value`."""
        self._made[figure].set(value, tags=tags)

    def add(self, figure: Figure, value: int, **tags: str) -> None:
        """Let a counter go up by `value`."""
        if value:
            self._made[figure].inc(value, tags=tags)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """An authorisation, however it ends."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._made[LATENCY].observe(time.perf_counter() - began)


class Monitor:
    """Tells of one ledger what is in it, and counts what comes into it from the monitor's making on."""

    def __init__(self, meters: Meters, books: Books, leases: Leases, presence: Presence) -> None:
        self._meters, self._books, self._leases, self._presence = meters, books, leases, presence
        self._seen = {name: books.show(name).head["seq"] for name in books.names()}
        self._failures = 0

    def tell(self) -> None:
        """Look at the ledger once, and set every figure.

        Raises:
            PurserError: it cannot be read; what was told before ages, and is forgotten.
        """
        failures = self._books.ledger.failures
        self._meters.add(FAILURES, failures - self._failures)
        self._failures = failures
        for name in self._books.names():
            self._tell(self._books.show(name))
        self._meters.set(REACHABLE, 1)

    def _tell(self, account: Account) -> None:
        dataset, _, partition = account.account.rpartition("/")
        tags = {"account": dataset, "partition": partition}
        figures = {
            EPSILON: account.epsilon,
            DELTA: account.delta,
            BUDGET: account.budget_cost,
            SPENT: account.spent_cost,
            RESERVED: account.reserved_cost,
            HEAD: account.head["seq"],
            HEAD_HASH: int(account.head["hash"][:SHORT], 16),
        }
        for figure, value in figures.items():
            self._meters.set(figure, value, **tags)
        silent = [self._presence.is_silent(hold.by) for hold in self._leases.holds(account.account)]
        self._meters.set(LEASES, silent.count(False), status=OPEN, **tags)
        self._meters.set(LEASES, silent.count(True), status=STALE, **tags)
        self._count(account, tags)

    def _count(self, account: Account, tags: Mapping[str, str]) -> None:
        with self._books.ledger.reading() as view:
            new = view.since(account.account, self._seen.get(account.account, 0))
        self._meters.add(REFUSALS, sum(row["kind"] == "refuse" for row in new), **tags)
        steps = sum(json.loads(row["body"])["steps"] for row in new if row["kind"] == "authorise")
        self._meters.add(STEPS, steps, **tags)
        self._seen[account.account] = new[-1]["seq"] if new else account.head["seq"]
