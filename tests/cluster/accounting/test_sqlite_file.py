"""The embedded ledger's file: durable (P2), its owner's alone, and refused or failed on in one clear sentence where it
cannot be opened, trusted or written (P4)."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa
from bookkeeping import CHEAP, TRAIN, charged, evaluation, run_attempt, training
from places import SqlitePlaces
from postgresql import ordinary_user
from racers import apart, fill_the_disk, make_ledgers_on_a_full_disk, read_and_write_as

from cluster.accounting import databases
from cluster.accounting.ledger import Ledger
from cluster.accounting.mechanisms import Charge
from cluster.errors import PurserError, UsageError


@pytest.fixture
def place(tmp_path):
    places = SqlitePlaces(tmp_path)
    yield places.digits()
    places.give_back()


@pytest.fixture
def desk(place):
    """A ledger with some spending in it."""
    desk = place.desk()
    desk.leases.reserve("lease", "run", [training(), evaluation()])
    run_attempt(desk, "lease", "nonce", 1)
    return desk


# Append-only


@pytest.mark.parametrize("table", ["entries", "secrets"])
@pytest.mark.parametrize(
    "act", ["UPDATE {0} SET {1} = 'x'", "DELETE FROM {0}", "INSERT OR REPLACE INTO {0} SELECT * FROM {0}"]
)
def test_triggers_refuse_whatever_is_no_insert(place, desk, table, act):
    """REPLACE, too: it deletes what it replaces without firing a trigger on DELETE."""
    before = place.contents()
    statement = act.format(table, "key" if table == "entries" else "value")
    with closing(sqlite3.connect(place.file)) as connection:
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            connection.execute(statement)
        connection.commit()
    assert place.contents() == before
    assert desk.verdict().valid


# Durable, and locked


def test_the_file_survives_a_power_cut(desk):
    """Durable means that a commit waits for the disk: write-ahead log, full synchronisation, for readers' connections
    and writers' alike, which are the same."""

    def pragmas(view):
        return [view.scalar(sa.text(f"PRAGMA {name}")) for name in ("journal_mode", "synchronous", "busy_timeout")]

    wanted = ["wal", 2, 1000 * databases.PATIENCE]
    with desk.ledger.reading() as view, desk.ledger.reading() as second:
        assert pragmas(view) == pragmas(second) == wanted
    assert desk.ledger.write(pragmas) == wanted


def test_writers_hold_the_lock_from_their_first_statement_and_readers_none(place, desk):
    def write(_draft):
        with closing(sqlite3.connect(place.file, timeout=0)) as other:
            with pytest.raises(sqlite3.OperationalError, match="locked"):
                other.execute("BEGIN IMMEDIATE")
            assert place.desk().account().spent_cost > 0  # a reader neither waits nor is refused

    desk.ledger.write(write)
    with desk.ledger.reading() as view, closing(sqlite3.connect(place.file, timeout=0)) as other:
        view.last(TRAIN)
        other.execute("BEGIN IMMEDIATE")


def test_a_lock_that_is_never_let_go_ends_in_a_clear_error(place, desk, monkeypatch):
    """Somebody's forgotten `sqlite3` shell, in the middle of a transaction."""
    monkeypatch.setattr(databases, "PATIENCE", 0)
    waiting, before = place.desk(), desk.totals()
    with closing(sqlite3.connect(place.file, isolation_level=None)) as shell:
        shell.execute("BEGIN IMMEDIATE")
        with pytest.raises(PurserError, match=r"SQLITE_BUSY.*nothing was changed"):
            waiting.leases.reserve("late", "run", [training()])
        assert waiting.totals() == before
    assert waiting.leases.reserve("late", "run", [training()]).fits


# Opening


@pytest.mark.parametrize("kind", ["absent folder", "a folder", "no database", "cut database", "below a file"])
def test_a_file_that_cannot_hold_the_ledger_is_refused(kind, place, tmp_path):
    file = tmp_path / "ledger.db"
    if kind == "absent folder":
        file = tmp_path / "absent" / "ledger.db"
    elif kind == "a folder":
        file.mkdir()
    elif kind == "no database":
        file.write_text("name,age\n" * 1000)
    elif kind == "cut database":
        file.write_bytes(b"\0" * 4096 + place.file.read_bytes()[4096:])
    else:
        file.write_text("")
        file = file / "ledger.db"
    with pytest.raises(UsageError, match="PURSER_LEDGER") as raised:
        Ledger(f"sqlite:///{file}")
    assert str(file) in str(raised.value)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that not even root can write to")
def test_a_folder_that_cannot_be_written_is_refused():
    with pytest.raises(UsageError, match="PURSER_LEDGER"):
        Ledger("sqlite:////proc/ledger.db")


def test_the_file_is_the_owner_s_alone(tmp_path):
    old = os.umask(0o022)
    try:
        ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db")
        ledger.write(lambda draft: draft.hide("anything"))
        assert {part.stat().st_mode & 0o077 for part in tmp_path.glob("ledger.db*")} == {0}
        ledger.close()
    finally:
        os.umask(old)


def test_a_read_only_connection_is_not_waited_for(tmp_path, monkeypatch):
    file = tmp_path / "ledger.db"
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("CREATE TABLE something (x)")
    waits = []
    monkeypatch.setattr(databases.time, "sleep", waits.append)
    reader = sqlite3.connect(f"file:{file}?mode=ro", uri=True)
    with closing(reader), pytest.raises(sqlite3.OperationalError, match="readonly"):
        databases._durable_sqlite(reader, None)
    assert not waits


# What an ordinary user may not write


@pytest.fixture
def shared_folder():
    """A folder that another user can get to; pytest's own are its user's alone."""
    folder = Path(tempfile.mkdtemp(prefix="purser-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("a folder", "UsageError: PURSER_LEDGER"),
        ("a folder with a ledger", "UsageError: PURSER_LEDGER"),
        ("a file", "PurserError: ledger: "),
        ("another user's file", "UsageError: PURSER_LEDGER"),
    ],
)
def test_what_may_not_be_written_is_said_and_works_once_it_may(what, said, place, shared_folder, tmp_path):
    """As an ordinary user: root may write everywhere."""
    file, user = shared_folder / "ledger.db", ordinary_user()
    if what != "a folder":
        file.write_bytes(place.file.read_bytes())
        file.chmod(0o600 if what == "another user's file" else 0o444)
        if what == "another user's file" and user is None:
            pytest.skip("needs two users: run the tests as root")
    if what == "a file" and user is not None:
        shutil.chown(shared_folder, user)
        shutil.chown(file, user)
    if what.startswith("a folder") and user is None:
        shared_folder.chmod(0o555)
    before = file.read_bytes() if file.exists() else None

    def try_it():
        return apart(read_and_write_as, user, f"sqlite:///{file}", f"sqlite:///{tmp_path}/warm.db")

    last = try_it()[-1]
    assert last.startswith(said), last
    assert str(file) in last
    assert (file.read_bytes() if file.exists() else None) == before
    shared_folder.chmod(0o755)
    if what != "a folder":
        for part in shared_folder.iterdir():  # SQLite gave its -wal and -shm the mode of the file
            part.chmod(0o600)
        for part in (shared_folder, *shared_folder.iterdir()) if user else ():
            shutil.chown(part, user)
        assert try_it() == ["Account", "True"]


# A disk that is full


def test_a_full_disk_is_said_and_nothing_is_half_written(place):
    """No block is granted, those before stay, and with room it goes on."""
    desk = place.desk()
    desk.leases.reserve("lease", "run", [Charge(TRAIN, CHEAP, 1000, 1)])
    desk.ledger.close()
    errors, granted = apart(fill_the_disk, place.file)
    assert len(granted) > 3
    for said in errors:
        assert said.startswith("PurserError: ledger: ")
        assert "nothing was changed" in said
        assert str(place.file) in said
    rows = [row for row in place.rows(TRAIN) if row["kind"] == "authorise"]
    assert [row["cost"] for row in rows] == granted
    assert charged(rows) == desk.account().spent_cost
    assert desk.all_valid()


def test_a_ledger_that_the_disk_has_no_room_for_is_not_half_made(tmp_path):
    made = apart(make_ledgers_on_a_full_disk, tmp_path)
    assert len(made) == 4
    for kind, said, identity in made:
        assert f"{kind}: {said}".startswith(("UsageError: PURSER_LEDGER: ", "PurserError: ledger: "))
        assert len(identity) == 16
