"""How fast the accountant is: `python -m tests.benchmarks.accountant [--quick] [--json]`.

authorise_overhead_ratio      durable authorise through the actor, against a bare Ray actor call plus a bare SQLite
                              commit of as wide a row; medians, taken in turns
admissions_per_s_64_clients   durable authorisations per second, 64 asyncio tasks in two processes
bare_calls_per_s_64_clients   the same with an actor that does nothing: the ceiling that Ray's RPC sets
bare_threaded_per_s           the same with an actor that does nothing in as many threads as the accountant has
admissions_ratio              the first of the three against the second: the median over rounds that take all in turn
group_commit_gain_5ms         admissions per second at a commit of 5 ms (a networked database), against the same
                              accountant committing one request at a time
million_entries_open_s        opening a ledger of a million entries, to the first answer
million_entries_admit_ratio   median authorise on it (no Ray), against an almost empty ledger
reservations_per_s_64_clients two-account reservations per second, as the second line
"""

from __future__ import annotations

import asyncio
import itertools
import os
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import ray

from cluster.accounting.actor import THREADS, Accountant, start
from cluster.accounting.books import Books, Dataset
from cluster.accounting.leases import Leases
from cluster.accounting.ledger import Ledger
from cluster.accounting.mechanisms import Charge, DiscreteGaussian, PoissonSubsampledGaussian
from cluster.accounting.schema import GENESIS, HASHED, canonical, entry_hash
from cluster.environment import ACCOUNTANT, NAMESPACE
from tests.actors import end_accountant
from tests.benchmarks import main

CLIENTS, PROCESSES = 64, 2
STEP = PoissonSubsampledGaussian(sample_rate=1e-4, noise_multiplier=50.0)  # so cheap that millions of steps fit
TRAIN, VALIDATION = "bench/train", "bench/validation"
COLUMNS = (*HASHED, "hash")


def charges(steps: int = 100_000) -> list[Charge]:
    """One run of many blocks of one step each, and its evaluation."""
    return [Charge(TRAIN, STEP, steps, 1), Charge(VALIDATION, DiscreteGaussian(1000.0, 1), 1, 1)]


def books_at(file: Path) -> Books:
    """A new ledger with one dataset."""
    books = Books(Ledger(f"sqlite:///{file}"))
    dataset = Dataset("bench", "row", 1_000_000, 1, 0.2, ("source",))
    books.create(dataset, 8.0, 1e-8, {c.account: [c] for c in charges()}, 8)
    return books


class Bare:
    """An actor that does nothing."""

    def nothing(self, *_arguments: object) -> None:
        """Answer."""


class SlowCommit(Accountant):
    """An accountant whose database takes 5 ms to commit; `alone` serves one request per commit."""

    def __init__(self, url: str, alone: bool = False) -> None:
        super().__init__(url)
        ledger = self._books.ledger
        commit = ledger._engine.dialect.do_commit

        def slowly(connection: Any) -> None:
            time.sleep(0.005)
            commit(connection)

        ledger._engine.dialect.do_commit = slowly  # type: ignore[method-assign]
        if alone:
            serve = ledger._serve
            ledger._serve = lambda requests: [serve([r]) for r in requests] and None  # type: ignore[method-assign]


class Client:
    """One process of asyncio tasks, each with one call under way at a time."""

    async def run(self, handle: Any, method: str, calls: list[list[tuple[Any, ...]]]) -> tuple[float, float]:
        """Make every task's calls in turn; returns when the first began and the last ended."""

        async def task(mine: list[tuple[Any, ...]]) -> None:
            for arguments in mine:
                await getattr(handle, method).remote(*arguments)

        began = time.time()
        await asyncio.gather(*map(task, calls))
        return began, time.time()


def per_second(handle: Any, method: str, calls: list[list[tuple[Any, ...]]]) -> float:
    """Calls per second of all clients together."""
    clients = [ray.remote(Client).options(num_cpus=0).remote() for _ in range(PROCESSES)]
    ray.get([c.__ray_ready__.remote() for c in clients])
    share = len(calls) // PROCESSES
    spans = ray.get([c.run.remote(handle, method, calls[i * share : (i + 1) * share]) for i, c in enumerate(clients)])
    for client in clients:
        ray.kill(client)
    return sum(map(len, calls)) / (max(s[1] for s in spans) - min(s[0] for s in spans))


def accountant(folder: Path, served: type[Accountant] = Accountant, **options: Any) -> Any:
    """A fresh accountant over a fresh ledger; returns its client."""
    end_accountant()
    file = Path(tempfile.mkdtemp(dir=folder)) / "ledger.db"
    books_at(file).ledger.close()
    return start(f"sqlite:///{file}", served, **options)


def opened(client: Any, leases: int) -> list[tuple[str, int]]:
    """That many leases with an attempt each, as (name, epoch)."""
    made = []
    for number in range(leases):
        name = f"lease-{number}"
        assert client.reserve(name, "bench", [charges(2000)[0]]).fits
        made.append((name, client.open(name, "nonce", 0).epoch))
    return made


def timed(act: Callable[[], Any]) -> float:
    """Seconds that one call takes."""
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def overhead(folder: Path, rounds: int) -> float:
    """See `authorise_overhead_ratio`."""
    client = accountant(folder)
    ((lease, epoch),) = opened(client, 1)
    handle = ray.get_actor(ACCOUNTANT, namespace=NAMESPACE)
    bare = ray.remote(Bare).options(num_cpus=0).remote()
    row = (TRAIN, "authorise", "x" * 40, lease, "x" * 300, "x" * 64, "x" * 64)
    with closing(sqlite3.connect(folder / "bare.db", isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=FULL")
        database.execute("CREATE TABLE rows (a, b, c, d, e, f, g)")

        def commit() -> None:
            database.execute("BEGIN IMMEDIATE")
            database.execute("INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?, ?)", row)
            database.execute("COMMIT")

        times: dict[str, list[float]] = {"call": [], "commit": [], "authorise": []}
        for block in range(1, rounds + 1):
            call = (lease, epoch, TRAIN, block)
            times["call"].append(timed(lambda call=call: ray.get(bare.nothing.remote(*call))))  # type: ignore[misc]
            times["commit"].append(timed(commit))
            times["authorise"].append(
                timed(lambda call=call: ray.get(handle.authorise.remote(*call)))  # type: ignore[misc]
            )
    ray.kill(bare)
    median = {name: statistics.median(taken[rounds // 10 :]) for name, taken in times.items()}
    return median["authorise"] / (median["call"] + median["commit"])


def throughput(folder: Path, calls: int, served: type[Accountant] = Accountant, **options: Any) -> float:
    """Durable authorisations per second from 64 clients, each with a lease of its own."""
    leases = opened(accountant(folder, served, **options), CLIENTS)
    handle = ray.get_actor(ACCOUNTANT, namespace=NAMESPACE)
    return per_second(
        handle, "authorise", [[(lease, epoch, TRAIN, n) for n in range(1, calls + 1)] for lease, epoch in leases]
    )


def reservations(folder: Path, calls: int) -> float:
    """Two-account reservations per second from 64 clients."""
    accountant(folder)
    handle = ray.get_actor(ACCOUNTANT, namespace=NAMESPACE)
    plan = charges(10)
    return per_second(handle, "reserve", [[(f"{c}-{n}", "bench", plan) for n in range(calls)] for c in range(CLIENTS)])


def bare_throughput(calls: int, threads: int = 1) -> float:
    """No-op calls per second from 64 clients."""
    bare = ray.remote(Bare).options(num_cpus=0, max_concurrency=threads).remote()
    rate = per_second(bare, "nothing", [[("lease", 1, TRAIN, n) for n in range(calls)] for _ in range(CLIENTS)])
    ray.kill(bare)
    return rate


def million(folder: Path, count: int = 1_000_000) -> tuple[float, float]:
    """(seconds to open a ledger of `count` entries and answer, median authorise on it against one of a few entries)."""
    small, large = folder / "small.db", folder / "large.db"
    for file in (small, large):
        leases = Leases(books_at(file))
        leases.reserve("old", "bench", [Charge(TRAIN, STEP, count, 1)])
        leases.open("old", "nonce")
        leases.ledger.close()
    grow(large, count)
    medians = {}
    for file in (small, large):
        began = time.perf_counter()
        books = Books(Ledger(f"sqlite:///{file}"))
        assert books.show(TRAIN).remaining_cost > 0
        leases = Leases(books)
        assert leases.fits(charges()).fits
        taken = time.perf_counter() - began
        leases.reserve("new", "bench", charges())
        epoch = leases.open("new", "nonce").epoch
        numbers = itertools.count(1)
        times = [
            timed(lambda: leases.authorise("new", epoch, TRAIN, next(numbers)))  # noqa: B023
            for _ in range(500)
        ]
        medians[file] = statistics.median(times)
    return taken, medians[large] / medians[small]


def grow(file: Path, count: int) -> None:
    """Add `count` blocks to the lease `old`, hash-chained as the ledger itself would, but in one transaction."""
    with closing(sqlite3.connect(file)) as database:
        triggers = database.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
        for name, _ in triggers:
            database.execute(f"DROP TRIGGER {name}")
        database.row_factory = sqlite3.Row
        last = dict(database.execute("SELECT * FROM entries WHERE account = ? ORDER BY seq DESC", [TRAIN]).fetchone())
        body = canonical({"by": "bench", "epoch": 1, "granted": count, "mechanism": None, "steps": 1})

        def rows() -> Any:
            row = {**last, "kind": "authorise", "body": body, "cost": 1}
            previous = last["hash"] or GENESIS
            for block in range(1, count + 1):
                row.update(
                    seq=last["seq"] + block,
                    key=f"authorise:old:{TRAIN}:1:{block}",
                    attempt=1,
                    block=block,
                    spent_after=block,
                    reserved_after=last["reserved_after"] - block,
                    lease_reserved_after=last["lease_reserved_after"] - block,
                    prev_hash=previous,
                )
                row["hash"] = previous = entry_hash(row)
                yield tuple(row[name] for name in COLUMNS)

        marks = ", ".join("?" * len(COLUMNS))
        database.executemany(f"INSERT INTO entries ({', '.join(COLUMNS)}) VALUES ({marks})", rows())
        for _, sql in triggers:
            database.execute(sql)
        database.commit()


def measure(quick: bool) -> dict[str, float]:
    """All of it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        opening, admitting = million(folder)
        ray.init(address="local", namespace=NAMESPACE, num_cpus=2, include_dashboard=False, logging_level="ERROR")
        try:
            calls = 40 if quick else 150
            rounds = [
                (throughput(folder, calls), bare_throughput(calls), bare_throughput(calls, THREADS))
                for _ in range(3 if quick else 7)
            ]
            admissions, bare, threaded = map(statistics.median, zip(*rounds, strict=True))
            result = {
                "authorise_overhead_ratio": overhead(folder, 400 if quick else 2000),
                "admissions_per_s_64_clients": admissions,
                "bare_calls_per_s_64_clients": bare,
                "bare_threaded_per_s": threaded,
                "admissions_ratio": statistics.median(mine / theirs for mine, theirs, _ in rounds),
                "group_commit_gain_5ms": throughput(folder, 20, SlowCommit)
                / throughput(folder, 3 if quick else 10, SlowCommit, alone=True),
                "million_entries_open_s": opening,
                "million_entries_admit_ratio": admitting,
                "reservations_per_s_64_clients": reservations(folder, calls // 4),
            }
            end_accountant()
        finally:
            ray.shutdown()
    return result


if __name__ == "__main__":
    main(measure, __doc__)
