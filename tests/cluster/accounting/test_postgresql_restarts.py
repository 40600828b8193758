"""PostgreSQL stopped and started under load, and its disk full: what was granted is in the books once, and nothing else
is (P1, P2)."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import threading
import time

import pytest
import sqlalchemy as sa
from bookkeeping import CHEAP, TRAIN, charged, evaluation, run_attempt, training
from crashes import outcome
from places import PostgresqlPlaces
from postgresql import Postgres, as_ordinary_user
from racers import authorise_until_told, processes

from cluster.accounting.ledger import Ledger
from cluster.accounting.mechanisms import Charge
from cluster.errors import PurserError, Unreachable

PROCESSES, THREADS = 2, 4


@pytest.fixture(scope="module")
def server():
    """A server of this module's own, which it may stop."""
    server = Postgres()
    yield server
    server.end()


@pytest.fixture(scope="module")
def stoppable_places(server):
    return PostgresqlPlaces(server)


@pytest.fixture
def place(stoppable_places):
    place = stoppable_places.digits()
    yield place
    place.close()
    stoppable_places.give_back()


def growing(desk):
    """Wait until somebody has been granted something more."""
    spent, deadline = desk.account().spent_cost, time.monotonic() + 60
    while desk.account().spent_cost == spent:
        assert time.monotonic() < deadline, "nobody goes on"
        time.sleep(0.01)


def insist(call):
    """Do the same again for as long as the ledger cannot be reached, as the client does; counts the tries."""
    tries = 0
    while True:
        done = outcome(call)
        if not isinstance(done.error, Unreachable):
            return done.get(), tries
        tries += 1
        time.sleep(0.01)


def test_stopped_and_started_under_load_no_grant_is_lost_or_doubled(place, server, soak):
    """Processes with an accountant each, and threads that share one and its commits; the server ends sessions first
    (fast), or is as good as unplugged (immediate)."""
    desk, context = place.desk(), processes()
    stop, answers, threads_stop = context.Event(), context.Queue(), threading.Event()
    racing = [
        context.Process(target=authorise_until_told, args=(place.url, f"process-{number}", stop, answers))
        for number in range(PROCESSES)
    ]
    shared, granted, tried = place.desk(), {}, []

    def run(name):
        insist(lambda: shared.leases.reserve(name, name, [Charge(TRAIN, CHEAP, 100_000, 1)]))
        epoch = insist(lambda: shared.leases.open(name, name))[0].epoch
        costs = granted[name] = []
        while not threads_stop.is_set():
            block = len(costs) + 1
            grant, tries = insist(lambda b=block: shared.leases.authorise(name, epoch, TRAIN, b))
            costs.append(grant.cost)
            tried.append(tries)
        insist(lambda: shared.leases.close(name, "settle", "completed"))

    threads = [threading.Thread(target=run, args=(f"thread-{number}",), daemon=True) for number in range(THREADS)]
    for worker in (*racing, *threads):
        worker.start()
    try:
        for mode in ("fast", "immediate", "fast", "immediate") * (25 if soak else 1):
            growing(desk)
            server.stop(mode)
            with pytest.raises(Unreachable):
                desk.account()
            server.start()
        growing(desk)
    finally:
        stop.set()
        threads_stop.set()
        told = [answers.get(timeout=60) for _ in racing]
        for worker in (*racing, *threads):
            worker.join(60)
        for process in racing:
            process.kill()
    for name, tries, costs in told:
        granted[name] = costs
        assert tries > 0, "it met a server that was away"
    assert sum(tried) > 0
    rows = place.rows(TRAIN)
    for name, costs in granted.items():
        paid = [row for row in rows if row["lease"] == name and row["kind"] == "authorise"]
        assert [row["cost"] for row in paid] == costs, "block by block, each once"
        assert [row["block"] for row in paid] == list(range(1, len(costs) + 1))
        assert len([row for row in rows if row["lease"] == name and row["kind"] in ("reserve", "open", "settle")]) == 3
    assert desk.account().spent_cost == charged(rows) == sum(sum(costs) for costs in granted.values())
    assert desk.account().reserved_cost == 0
    assert desk.all_valid()


def test_a_ledger_that_was_opened_before_goes_on_after(place, server):
    desk = place.desk()
    desk.leases.reserve("lease", "run", [training(), evaluation()])
    epoch = run_attempt(desk, "lease", "nonce", 1)
    totals = desk.totals()
    server.stop("immediate")
    try:
        for call in (
            lambda: Ledger(place.url),
            desk.account,
            lambda: desk.leases.authorise("lease", epoch, TRAIN, 2),
            lambda: desk.leases.fits([training()]),
            lambda: list(desk.books.history(TRAIN)),
            lambda: desk.books.verify(TRAIN),
            lambda: desk.ledger.identity,
        ):
            with pytest.raises(Unreachable, match=r"postgresql://service@.*nothing is granted"):
                call()
    finally:
        server.start()
    assert desk.totals() == totals, "what was answered before the plug was pulled is there"
    assert desk.leases.authorise("lease", epoch, TRAIN, 2)
    assert desk.all_valid()


def test_a_server_that_stops_in_the_middle_of_a_decision_keeps_nothing_of_it(place, server):
    desk = place.desk()
    before = place.contents()

    def decide(draft):
        draft.append(account=TRAIN, kind="refuse", key="half", body={})
        draft.flush()
        server.stop("fast")
        server.start()
        draft.append(account=TRAIN, kind="refuse", key="other half", body={})

    with pytest.raises(Unreachable):
        desk.ledger.write(decide)
    assert place.contents() == before
    assert desk.leases.reserve("lease", "run", [training()]).fits
    assert desk.all_valid()


def limit_files(process, size):
    """No file that `process` writes may become longer than `size` bytes, or "unlimited"; as the server's own user."""
    subprocess.run(["prlimit", f"--pid={process}", f"--fsize={size}:"], check=True, cwd="/", **as_ordinary_user())


@pytest.mark.skipif(shutil.which("prlimit") is None, reason="needs prlimit, of util-linux")
def test_a_full_disk_of_the_server_is_said_and_nothing_is_half_written(place):
    """The kernel refuses to let the table grow: a limit on the size of files, for the writer's session alone."""
    desk = place.desk()
    assert desk.leases.reserve("lease", "run", [Charge(TRAIN, CHEAP, 1000, 1)]).fits
    epoch = desk.leases.open("lease", "nonce").epoch
    granted = []

    def authorise(block):
        done = outcome(lambda: desk.leases.authorise("lease", epoch, TRAIN, block))
        granted.extend([done.value.cost] if done.value else [])
        return done

    assert all(authorise(block).get() for block in range(1, 201))
    place.server.sql(place.database, "VACUUM FULL entries")  # no room is left by what earlier tests removed
    (size,) = place.read("SELECT pg_relation_size('entries') AS n, pg_switch_wal() <> '0/0' AS fresh_log")
    session = desk.ledger.write(lambda draft: draft.scalar(sa.text("SELECT pg_backend_pid()")))
    limit_files(session, size["n"])
    try:
        refused = next(done for done in map(authorise, itertools.count(201)) if done.error)
        assert type(refused.error) is PurserError
        assert "nothing was changed" in str(refused.error)
        assert desk.account().spent_cost == sum(granted)
        assert desk.all_valid()
    finally:
        limit_files(session, "unlimited")
    assert authorise(len(granted) + 1).get()
    assert desk.account().spent_cost == sum(granted) == charged(place.rows(TRAIN))
    assert desk.all_valid()
