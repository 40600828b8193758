"""Real processes on one ledger: racing accountants never spend past the budget (P1), what a killed process was granted
is in the books once (P2), and its reservation is released only after it died (P3). The race that the lock prevents is
shown, on both databases."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import threading
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa
from bookkeeping import TRAIN, VALIDATION, charged, desk_at, evaluation, training
from broken import WithoutLock
from crashes import child, outcome
from postgresql import OWNER
from racers import (
    PROCESSES,
    init_for_the_first_time,
    killed_in_the_commit,
    open_for_the_first_time,
    open_one_lease,
    race,
    reserve_open_and_pay,
    run_a_whole_lease,
)

from cluster.accounting import databases
from cluster.accounting.costs import block_cost, price
from cluster.accounting.ledger import Ledger
from cluster.environment import HOME, LEDGER, is_alive
from cluster.errors import PurserError

RUN = price(training(), 6)
JOB = Path(__file__).resolve().parents[3] / "infra" / "jobs" / "digits.yaml"


@pytest.mark.parametrize("room", [1, 3])
def test_exactly_the_affordable_number_of_processes_wins(place, desk, room):
    while desk.account().remaining_cost // RUN > room:
        assert desk.leases.reserve(f"earlier-{desk.account().head['seq']}", "other", [training()]).fits
    outcomes = race(reserve_open_and_pay, place.url)
    winners = {name for name, fits in outcomes if fits}
    assert len(outcomes) == PROCESSES
    assert len(winners) == room
    account = desk.account()
    assert 0 <= account.remaining_cost < RUN
    assert account.spent_cost == room * block_cost(training().mechanism, 6, 0, 20)
    assert desk.account(VALIDATION).spent_cost == room * desk.account(VALIDATION).price(evaluation())
    for name in (TRAIN, VALIDATION):
        assert desk.verdict(name).valid
        paid = [row["lease"] for row in desk.rows(name) if row["kind"] == "authorise"]
        assert sorted(paid) == sorted(winners)
    refused = [row["lease"] for row in desk.rows() if row["kind"] == "refuse"]
    assert len(refused) == PROCESSES - room


def test_one_lease_opened_by_eight_processes_is_run_by_one(place, desk):
    """The split brain: every worker group was restarted, and takes itself for the only one."""
    desk.leases.reserve("lease", "run", [training(40)])
    outcomes = race(open_one_lease, place.url)
    epochs = sorted(epoch for epoch, _ in outcomes)
    assert len(set(epochs)) == PROCESSES, "no epoch is given to two"
    rows = [row for row in desk.rows() if row["kind"] == "authorise"]
    assert sum(cost for _, granted in outcomes for cost in granted) == charged(rows) == desk.account().spent_cost
    assert [epoch for epoch, granted in outcomes if granted] == epochs[-1:], "only the newest may run"
    assert len(rows) == 2
    assert desk.all_valid()


def test_two_runs_at_once_are_charged_to_the_last_block(place, desk):
    """Two embedded commands on one file, or two accountants of different clusters on one database."""
    outcomes = race(run_a_whole_lease, place.url, 60, count=2)
    assert desk.account().spent_cost == sum(sum(costs) for _, costs in outcomes)
    assert desk.account().reserved_cost == 0
    for name, costs in outcomes:
        rows = [row for row in desk.rows() if row["lease"] == name and row["kind"] == "authorise"]
        assert [row["cost"] for row in rows] == costs
    assert desk.all_valid()


def test_two_commands_at_once_make_one_dataset(purser):
    """`purser budget create` twice, on a ledger that nobody has made yet."""
    ended = []
    threads = [threading.Thread(target=lambda: ended.append(purser("budget", "create", JOB))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert sorted(done.code for done in ended) == [0, 2], ended
    assert "exists already" in next(done.err for done in ended if done.code == 2)
    assert purser("budget", "verify", "digits", "--json").json["valid"]


def test_eight_processes_make_one_file(tmp_path):
    outcomes = race(open_for_the_first_time, tmp_path)
    assert len(outcomes) == PROCESSES
    assert len(set(outcomes)) == 1


def test_eight_processes_make_one_database(postgresql):
    database = postgresql.create()
    url = postgresql.url(database)
    outcomes = race(init_for_the_first_time, postgresql.url(database, OWNER), url)
    assert set(outcomes) == {Ledger(url).identity}
    postgresql.drop(database)


def test_opening_a_new_ledger_waits_for_whoever_is_making_it(tmp_path):
    """Two first commands at once: one holds the new file's write lock while the other opens it."""
    file = tmp_path / "ledger.db"
    with closing(sqlite3.connect(file, isolation_level=None, check_same_thread=False)) as maker:
        maker.execute("BEGIN IMMEDIATE")
        done = threading.Timer(0.2, lambda: maker.execute("COMMIT"))
        done.start()
        try:
            assert Ledger(f"sqlite:///{file}").identity
        finally:
            done.join()


# Why there is a lock


@pytest.fixture
def spent(place):
    """A naive budget of 10 beside the ledger, that the service's role may use."""
    grant = ["GRANT ALL ON spent TO service"] if place.kind == "postgresql" else []
    place.forge("CREATE TABLE spent (cost INTEGER)", *grant)
    yield place
    place.forge("DROP TABLE spent")


def check_then_insert(transaction, meet_before, meet_between):
    """Two clients ask for 6 of a budget of 10 at once; returns what the table then holds."""

    def client():
        meet_before()
        with transaction() as connection:
            spent = connection.exec_driver_sql("SELECT COALESCE(SUM(cost), 0) FROM spent").scalar()
            meet_between()
            if spent + 6 <= 10:
                connection.exec_driver_sql("INSERT INTO spent VALUES (6)")

    clients = [threading.Thread(target=client) for _ in range(2)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join(60)
    with transaction() as connection:
        return connection.exec_driver_sql("SELECT SUM(cost) FROM spent").scalar()


def test_default_transactions_overspend_and_that_is_why_there_is_a_lock(spent):
    """The barrier between check and insert only makes certain what timing makes likely: Python's sqlite3 begins a
    transaction at the first write, and PostgreSQL's READ COMMITTED locks nothing that was read, so that both clients
    read before either writes."""
    engine = sa.create_engine(spent.url.replace("postgresql:", "postgresql+psycopg:"))
    barrier = threading.Barrier(2, timeout=60)
    assert check_then_insert(engine.begin, lambda: None, barrier.wait) == 12
    engine.dispose()


def test_the_ledgers_transactions_do_not(spent):
    """The same clients under the ledger's own transaction; they cannot meet inside it, so they meet before."""
    engine = databases.engine(databases.parse(spent.url))
    barrier = threading.Barrier(2, timeout=60)
    assert check_then_insert(engine.begin, barrier.wait, lambda: None) == 6
    engine.dispose()


def decide_at_once(place, kind, seconds):
    """Two accountants are asked for a run each while one still decides; returns whether the other had read its
    totals and decided within `seconds`, and what came of both."""
    first, second = place.desk(ledger=kind), place.desk(ledger=kind)
    inside, answers = threading.Event(), []
    books = second.leases._fits
    second.leases._fits = lambda view, charges: (books(view, charges), inside.set())[0]
    thread = threading.Thread(
        target=lambda: answers.append(outcome(lambda: second.leases.reserve("second", "second", [training()])))
    )
    decide, met = first.leases._fits, []

    def slowly(view, charges):
        answer = decide(view, charges)
        thread.start()
        met.append(inside.wait(seconds))
        return answer

    first.leases._fits = slowly
    answers.append(outcome(lambda: first.leases.reserve("first", "first", [training()])))
    thread.join(60)
    return met == [True], answers


def test_a_second_writer_does_not_decide_while_the_first_does(place, desk):
    together, answers = decide_at_once(place, Ledger, seconds=0.3)
    assert not together
    assert all(answer.get().fits for answer in answers)
    assert desk.account().reserved_cost == 2 * RUN
    assert desk.all_valid()


def test_without_the_lock_both_decide_on_the_same_totals_and_are_caught(place, desk, monkeypatch):
    """Broken on purpose. One place in the chain cannot be taken twice, so that even this overspends nothing; but who
    comes second is told of a database error where it ought to get its run."""
    monkeypatch.setattr(databases, "PATIENCE", 1)
    together, answers = decide_at_once(place, WithoutLock, seconds=30)
    assert together
    assert sum(isinstance(answer.error, PurserError) for answer in answers) == 1
    assert desk.account().reserved_cost == RUN
    assert desk.all_valid()


# Killed


@pytest.mark.parametrize("when", ["before", "after"])
def test_whoever_is_killed_in_a_commit_is_in_the_books_once_or_not_at_all(place, desk, when):
    """kill -9 between the commit and the reply: the caller does the same again, and gets the same answer."""

    def calls():
        yield "reserve", "lease", "run", [training(), evaluation()]
        yield "open", "lease", "nonce", 0
        for block in (1, 2):
            yield "authorise", "lease", desk.leases.epoch("lease"), TRAIN, block
        yield "close", "lease", "release", "stopped", desk.leases.epoch("lease")
        yield "open", "lease", "another nonce", 20
        yield "close", "lease", "settle", "completed", None

    for name, *arguments in calls():
        before = place.contents()[0]
        killed_in_the_commit(place.url, when, name, *arguments)
        after = place.contents()[0]
        assert (after == before) is (when == "before"), "it is there, whole, or nothing of it is"
        other = place.desk()
        answer = getattr(other.leases, name)(*arguments)
        again = place.contents()[0]
        assert (again == after) is (when == "after"), "done again, it changes nothing"
        assert getattr(desk.leases, name)(*arguments) == answer
        assert place.contents()[0] == again
    assert [row["kind"] for row in desk.rows()[2:]] == [
        "reserve",
        "open",
        "authorise",
        "authorise",
        "release",
        "open",
        "settle",
    ]
    assert desk.account().spent_cost == price(training(40), 6)
    assert desk.all_valid()


HOLDER = """
import sys, time
from bookkeeping import desk_at, evaluation, run_attempt, training
from cluster.environment import Alive, is_alive
name = "digits-1"
alive = Alive(name)
desk = desk_at(sys.argv[1], is_alive)
assert desk.leases.reserve(name, name, [training(), evaluation()]).fits
epoch = run_attempt(desk, name, "nonce", 2)
assert desk.leases.expire_dead() == []
print("granted", epoch, flush=True)
time.sleep(60)
"""


def test_a_killed_run_keeps_what_it_was_granted_and_frees_the_rest(place, tmp_path, monkeypatch):
    """On one machine the kernel tells at once, whichever database holds the books."""
    monkeypatch.setenv(HOME, str(tmp_path))
    monkeypatch.setenv(LEDGER, place.url)
    desk = desk_at(place.url, is_alive)
    script = child(HOLDER, place.url, **{HOME: str(tmp_path), LEDGER: place.url})
    with subprocess.Popen(**script, stdout=subprocess.PIPE) as run:
        try:
            said = run.stdout.readline().split()
            assert said[:1] == ["granted"]
            assert is_alive("digits-1")
            assert desk.leases.expire_dead() == [], "a living run keeps its reservation"
            assert desk.account().spent_cost == price(training(40), 6)
            assert desk.account().reserved_cost == RUN - price(training(40), 6)
        finally:
            run.send_signal(signal.SIGKILL)
            run.wait(60)
    assert desk.account().spent_cost == price(training(40), 6), "what was granted is on disk"
    assert desk.leases.expire_dead() == ["digits-1"]
    assert desk.account().spent_cost == price(training(40), 6), "and is never refunded"
    assert desk.account().reserved_cost == desk.account(VALIDATION).reserved_cost == 0
    resumed = desk.leases.open("digits-1", "another process", done=20)
    assert resumed.steps == {TRAIN: 60, VALIDATION: 1}
    assert all(desk.verdict(name).valid for name in (TRAIN, VALIDATION))
    desk.ledger.close()
