"""The ledger's sessions on a server: whatever the defaults, a race is won by one (P1) and a commit is durable (P2); a
connection that is lost leaves nothing half done, and a password is told nowhere (P13)."""

from __future__ import annotations

import logging
import threading
import time
import traceback
from urllib.parse import quote

import psycopg
import psycopg.sql
import pytest
import sqlalchemy as sa
from bookkeeping import TRAIN, VALIDATION, fill, training
from crashes import Faults, lost_on, outcome, together
from postgresql import SERVICE

from cluster.accounting import databases
from cluster.accounting.ledger import Ledger, init
from cluster.errors import PurserError, Unreachable, UsageError


@pytest.fixture(scope="module")
def database():
    return "postgresql"


@pytest.fixture
def desk(started):
    return started


# Whatever the server's defaults are


DEFAULTS = {
    "repeatable read": {"default_transaction_isolation": "repeatable read"},
    "serializable": {"default_transaction_isolation": "serializable", "default_transaction_deferrable": "on"},
    "not durable": {"synchronous_commit": "off"},
    "impatient and foreign": {
        "lock_timeout": "1ms",
        "idle_in_transaction_session_timeout": "1ms",
        "client_encoding": "latin1",
        "DateStyle": "German",
        "standard_conforming_strings": "off",
    },
}


@pytest.fixture(params=["role", "database", "url"])
def set_defaults(request, place):
    """Set defaults of the service's sessions: for its role, for the database, or in the ledger's URL."""
    done = []

    def set_them(defaults):
        if request.param == "url":
            options = " ".join(f"-c {name}={value}" for name, value in defaults.items()).replace("e r", "e\\ r")
            place.url += f"?options={quote(options)}"
            return
        whom = (
            f"ROLE {SERVICE} IN DATABASE {place.database}" if request.param == "role" else f"DATABASE {place.database}"
        )
        place.server.sql("postgres", *(f"ALTER {whom} SET {name} = '{value}'" for name, value in defaults.items()))
        done.append(f"ALTER {whom} RESET ALL")

    yield set_them
    place.server.sql("postgres", *done)


@pytest.mark.parametrize("defaults", DEFAULTS.values(), ids=DEFAULTS)
def test_defaults_change_nothing(place, set_defaults, defaults):
    """The second waits for the lock while the first decides: a snapshot from before that would show the old totals."""
    set_defaults(defaults)
    seats = [place.desk() for _ in range(4)]
    with seats[0].ledger.reading() as view:
        assert view.scalar(sa.text("SHOW server_version"))
    fill(seats[0], leaving=1)
    barrier, answers = threading.Barrier(len(seats), timeout=60), []

    def reserve(number):
        barrier.wait()
        answers.append(outcome(lambda: seats[number].leases.reserve(f"r-{number}", f"r-{number}", [training()])))

    threads = [threading.Thread(target=reserve, args=(number,)) for number in range(len(seats))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(answer.get().fits for answer in answers) == [False, False, False, True]
    assert len([row for row in place.rows(TRAIN) if row["kind"] == "refuse"]) == 3
    assert seats[0].all_valid()
    shown = seats[1].ledger.write(
        lambda draft: {
            what: draft.scalar(sa.text(f"SHOW {what}"))
            for what in (
                "synchronous_commit",
                "transaction_isolation",
                "transaction_read_only",
                "lock_timeout",
                "idle_in_transaction_session_timeout",
            )
        }
    )
    assert shown == {
        "synchronous_commit": "on",
        "transaction_isolation": "read committed",
        "transaction_read_only": "off",
        "lock_timeout": "1min",
        "idle_in_transaction_session_timeout": "1min",
    }


class WithSnapshots(Ledger):
    """Broken on purpose: takes the isolation that a careful administrator set as the default."""

    def __init__(self, url):
        super().__init__(url)
        self._engine = self._engine.execution_options(isolation_level="REPEATABLE READ")


def decided_behind_another(place, kind):
    """A writer waits for the lock while the last of the budget goes to another; returns what it is told."""
    first, second = place.desk(), place.desk(ledger=kind)
    fill(first, leaving=1)
    answers = []
    thread = threading.Thread(
        target=lambda: answers.append(outcome(lambda: second.leases.reserve("second", "second", [training()])))
    )
    decide = first.leases._fits

    def slowly(view, charges):
        thread.start()
        while not place.read("SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"):
            time.sleep(0.002)
        return decide(view, charges)

    first.leases._fits = slowly
    assert first.leases.reserve("first", "first", [training()]).fits
    thread.join(60)
    assert first.all_valid()
    return answers[0]


def test_who_waited_for_the_lock_sees_what_was_written_meanwhile(place):
    answer = decided_behind_another(place, Ledger).get()
    assert not answer.fits
    assert answer.shortages[0].remaining < answer.shortages[0].asked


def test_who_waited_with_an_old_snapshot_is_caught(place):
    assert isinstance(decided_behind_another(place, WithSnapshots).error, PurserError)


def test_a_connection_that_was_read_from_writes_like_any_other(place, desk):
    """Readers' transactions are snapshots and read-only; the pool hands the same connections to writers."""
    for number in range(3):
        with desk.ledger.reading() as first, desk.ledger.reading() as second:
            assert {view.scalar(sa.text("SHOW transaction_isolation")) for view in (first, second)} == {
                "repeatable read"
            }
            assert {view.scalar(sa.text("SHOW transaction_read_only")) for view in (first, second)} == {"on"}
        desk.ledger.close()
        desk.account()
        shown = desk.ledger.write(
            lambda draft: [draft.scalar(sa.text(f"SHOW transaction_{what}")) for what in ("isolation", "read_only")]
        )
        assert shown == ["read committed", "off"]
        assert desk.leases.reserve(f"lease-{number}", "run", [training(2)]).fits


def test_a_reader_can_write_nothing(desk):
    with pytest.raises(PurserError), desk.ledger.reading() as view:
        view.scalar(sa.text("INSERT INTO secrets VALUES ('a', 'b') RETURNING name"))


def test_a_server_that_forgets_is_refused(place, desk, postgresql):
    with postgresql.setting("fsync", "off"):
        for what in (Ledger, init):
            with pytest.raises(UsageError, match="fsync"):
                what(place.url)
        desk.ledger.close()  # an accountant that is at work finds out when it connects again
        before = place.contents()
        with pytest.raises(UsageError, match="fsync"):
            desk.leases.authorise("lease", 1, TRAIN, 2)
        with pytest.raises(UsageError, match="fsync"):
            desk.account()
        assert place.contents() == before
    assert desk.leases.authorise("lease", 1, TRAIN, 2)


# Waiting


def test_a_lock_that_is_never_let_go_ends_in_a_clear_error(place, desk, impatient):
    waiting, before = place.desk(), place.contents()
    with psycopg.connect(place.url, autocommit=True) as forgotten:
        forgotten.execute(f"SELECT pg_advisory_lock({databases.WRITERS})")
        with pytest.raises(PurserError, match=r"55P03.*nothing was changed"):
            waiting.leases.reserve("late", "run", [training()])
        assert waiting.account() == desk.account(), "reading waits for nobody"
    assert place.contents() == before
    assert waiting.leases.reserve("late", "run", [training()]).fits


def test_a_writer_that_falls_asleep_loses_the_lock_and_commits_nothing(place, desk, impatient):
    """A stopped process, or one whose machine is cut off, must not keep all others waiting."""
    sleepy, other, before = place.desk(), place.desk(), place.contents()

    def sleep(draft):
        draft.append(account=TRAIN, kind="refuse", key="half asleep", body={})
        draft.flush()
        place.read("SELECT 1")
        while place.read("SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND granted AND objsubid = 1"):
            time.sleep(0.01)
        draft.append(account=VALIDATION, kind="refuse", key="awake", body={})

    with pytest.raises(Unreachable):
        sleepy.ledger.write(sleep)
    assert place.contents() == before
    assert other.leases.reserve("other", "run", [training(20)]).fits
    assert sleepy.leases.reserve("awake", "run", [training(20)]).fits
    assert desk.all_valid()


# Lost connections


def test_connections_that_were_cut_between_two_calls_are_not_noticed(place, desk):
    """The pool's and the one that the writer keeps: a restarted server, or a firewall that forgets idle connections."""
    for block in (2, 3):
        place.end_sessions()
        assert desk.leases.authorise("lease", 1, TRAIN, block)
        place.end_sessions()
        assert desk.account().spent_cost > 0
    assert desk.all_valid()


def test_a_connection_that_is_cut_inside_a_transaction_leaves_nothing(place, desk):
    before = place.contents()

    def cut(draft):
        draft.append(account=TRAIN, kind="refuse", key="half", body={})
        draft.flush()
        place.end_sessions()
        draft.append(account=VALIDATION, kind="refuse", key="other half", body={})

    with pytest.raises(Unreachable, match="nothing is granted"):
        desk.ledger.write(cut)
    assert place.contents() == before

    def read():
        with desk.ledger.reading() as view:
            view.last(TRAIN)
            place.end_sessions()
            view.last(TRAIN)

    with pytest.raises(Unreachable):
        read()
    assert desk.leases.authorise("lease", 1, TRAIN, 2)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_connection_that_is_cut_in_a_commit_counts_once(place, desk, when):
    """A real loss, not a pretended one: the server ends the session, and the driver finds out."""
    faults = Faults(desk)

    def commit(connection):
        desk.ledger._engine.dialect.do_commit = faults.do_commit
        if when == "after":
            faults.do_commit(connection)
        place.end_sessions()
        connection.execute("SELECT 1")

    desk.ledger._engine.dialect.do_commit = commit
    before = len(place.rows(TRAIN))
    with pytest.raises(Unreachable):
        desk.leases.authorise("lease", 1, TRAIN, 2)
    assert len(place.rows(TRAIN)) == before + (when == "after")
    grant = desk.leases.authorise("lease", 1, TRAIN, 2)
    assert place.rows(TRAIN)[-1]["cost"] == grant.cost
    assert len(place.rows(TRAIN)) == before + 1
    assert desk.all_valid()


def test_what_is_pretended_in_other_tests_is_what_a_loss_looks_like(desk):
    assert isinstance(databases.failure(sa.make_url("postgresql://h/d"), lost_on(desk), "written"), Unreachable)


def test_nobody_waits_for_ever_when_a_shared_commit_is_cut(place, desk):
    for name in "abcdef":
        assert desk.leases.reserve(name, name, [training(20)]).fits
    calls = [lambda n=name: desk.leases.open(n, n) for name in "abcdef"]

    def cut():
        desk.ledger.write(lambda _draft: place.end_sessions())

    done = together(desk.ledger, *calls[:3], cut, *calls[3:])
    assert all(isinstance(entry.error, Unreachable) for entry in done)
    assert all(entry.get().epoch == 1 for entry in together(desk.ledger, *calls))
    assert desk.all_valid()


# Secrets


def test_a_password_is_never_told(place, postgresql, caplog, monkeypatch):
    """In no message, no representation, no log and no traceback."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(databases, "PATIENCE", 1)
    secret = "hunter2"
    url = place.url.replace("service@", f"service:{secret}@")
    ledger = Ledger(url)
    said = [ledger.place, repr(ledger), ledger.identity, repr(ledger._engine), repr(ledger._engine.url)]
    ledger.write(lambda draft: draft.hide("partition:more"))
    empty = postgresql.create()

    def locked():
        with psycopg.connect(place.url, autocommit=True) as forgotten:
            forgotten.execute(f"SELECT pg_advisory_lock({databases.WRITERS})")
            ledger.write(lambda draft: None)

    for failing in (
        lambda: Ledger(url.replace("service:", "nobody:")),
        lambda: Ledger(url.replace(place.database, "no_such_database")),
        lambda: Ledger(url.replace(place.database, empty)),
        lambda: Ledger(url.replace(f":{postgresql.port}", ":1")),
        lambda: Ledger(url + f"?password={secret}&sslmode=nonsense"),
        lambda: Ledger(url + "?sslmode=require"),
        lambda: init(url, "nobody"),
        lambda: init(url.replace(place.database, empty)),
        lambda: ledger.write(lambda draft: draft._connection.exec_driver_sql("DELETE FROM entries")),
        lambda: ledger.write(lambda draft: place.end_sessions()),
        locked,
    ):
        with pytest.raises(PurserError) as raised:
            failing()
        said += [str(raised.value), repr(raised.value), "".join(traceback.format_exception(raised.value))]
    said += [record.getMessage() for record in caplog.records]
    ledger.close()
    postgresql.drop(empty)
    assert len(said) > 30
    assert not [text for text in said if secret in text]
