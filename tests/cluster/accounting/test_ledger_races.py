"""Real processes on one ledger: racing accountants never spend past the budget (P1), what a killed process was granted
is on disk (P2), and its reservation is released only after it died (P3). The race that the lock prevents is shown."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa
from bookkeeping import TRAIN, VALIDATION, desk_at, desk_with_digits, evaluation, run_attempt, training

from cluster.accounting.costs import block_cost, price
from cluster.accounting.ledger import Ledger
from cluster.environment import HOME, LEDGER, is_alive
from cluster.errors import PurserError

PROCESSES = 8
RUN = price(training(), 6)


def reserve_open_and_pay(file, name, barrier, answers):
    """What each racing process does: reserve a whole run on both accounts; whoever wins pays for its first block."""
    desk = desk_at(file)
    charges = [training(), evaluation()]
    barrier.wait(60)
    answer = desk.leases.reserve(name, name, charges)
    if answer.fits:
        epoch = run_attempt(desk, name, name, 1)
        assert desk.leases.authorise(name, epoch, VALIDATION, 1)
    answers.put((name, answer.fits))


def open_for_the_first_time(folder, name, barrier, answers):
    """Five ledgers that nobody has made yet, each opened by all processes at once."""
    identities = []
    for number in range(5):
        barrier.wait(60)
        try:
            identities.append(Ledger(f"sqlite:///{folder}/{number}.db").identity)
        except PurserError as error:
            identities.append(f"{name}: {error}")
    answers.put(tuple(identities))


def race(target, place):
    """Run `target` in eight fresh processes that start together; returns what each put into the queue."""
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(PROCESSES), context.Queue()
    processes = [
        context.Process(target=target, args=(place, f"racer-{number}", barrier, answers)) for number in range(PROCESSES)
    ]
    for process in processes:
        process.start()
    try:
        return [answers.get(timeout=60) for _ in processes]
    finally:
        for process in processes:
            process.join(60)
            process.kill()


def test_exactly_the_affordable_number_of_processes_wins(tmp_path):
    file = tmp_path / "ledger.db"
    desk = desk_with_digits(file)
    room = 3
    while desk.account().remaining_cost // RUN > room:
        assert desk.leases.reserve(f"earlier-{desk.account().head['seq']}", "other", [training()]).fits
    outcomes = race(reserve_open_and_pay, file)
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


def test_eight_processes_make_one_ledger(tmp_path):
    outcomes = race(open_for_the_first_time, tmp_path)
    assert len(outcomes) == PROCESSES
    assert len(set(outcomes)) == 1


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


def test_default_transactions_overspend_and_that_is_why_there_is_a_lock(tmp_path):
    """The barrier between check and insert only makes certain what timing makes likely: Python's sqlite3 begins a
    transaction at the first write, so that both clients read before either writes."""
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'default.db'}")
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE spent (cost INTEGER)")
    barrier = threading.Barrier(2, timeout=60)
    assert check_then_insert(engine.begin, lambda: None, barrier.wait) == 12
    engine.dispose()


def test_the_ledgers_transactions_do_not(tmp_path):
    """The same clients under the ledger's own transaction; they cannot meet inside it, so they meet before."""
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    with ledger.writing() as connection:
        connection.exec_driver_sql("CREATE TABLE spent (cost INTEGER)")
    barrier = threading.Barrier(2, timeout=60)
    assert check_then_insert(ledger.writing, barrier.wait, lambda: None) == 6


def test_a_second_writer_cannot_read_the_totals_while_the_first_decides(tmp_path):
    """Deterministic proof of the same: between a writer's check and its insert, another's check has not begun."""
    file = tmp_path / "ledger.db"
    desk = desk_with_digits(file)
    with desk.ledger.writing() as connection:
        desk.ledger.last(connection, TRAIN)
        with closing(sqlite3.connect(file, timeout=0)) as other, pytest.raises(sqlite3.OperationalError):
            other.execute("BEGIN IMMEDIATE")


HOLDER = """
import sys, time
from pathlib import Path
from bookkeeping import desk_at, evaluation, run_attempt, training
from cluster.environment import Alive, is_alive
name = "digits-1"
alive = Alive(name)
desk = desk_at(Path(sys.argv[1]), is_alive)
assert desk.leases.reserve(name, name, [training(), evaluation()]).fits
epoch = run_attempt(desk, name, "nonce", 2)
assert desk.leases.expire_dead() == []
print("granted", epoch, flush=True)
time.sleep(60)
"""


def test_a_killed_run_keeps_what_it_was_granted_and_frees_the_rest(tmp_path, monkeypatch):
    monkeypatch.setenv(HOME, str(tmp_path))
    monkeypatch.delenv(LEDGER, raising=False)
    desk = desk_with_digits(tmp_path / "ledger.db", is_alive)
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[3])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "ledger.db")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as run:
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
