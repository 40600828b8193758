"""The ledger's file: appended to and never changed (P5), durable (P2), written by one at a time (P1), and refused where
it cannot be opened or trusted (P4)."""

from __future__ import annotations

import math
import os
import sqlite3
from contextlib import closing

import pytest
import sqlalchemy as sa
from bookkeeping import (
    DELTA,
    EPSILON,
    TRAIN,
    VALIDATION,
    Desk,
    desk_at,
    desk_with_digits,
    digits,
    evaluation,
    plans,
    run_attempt,
    training,
    url,
)

from cluster.accounting import ledger as ledger_module
from cluster.accounting.ledger import Ledger, canonical, hidden
from cluster.errors import PurserError, UsageError


@pytest.fixture
def file(tmp_path):
    return tmp_path / "ledger.db"


@pytest.fixture
def desk(file) -> Desk:
    """A ledger with some spending in it."""
    desk = desk_with_digits(file)
    desk.leases.reserve("lease", "run", [training(), evaluation()])
    run_attempt(desk, "lease", "nonce", 1)
    return desk


@pytest.mark.parametrize("table", ["entries", "secrets"])
@pytest.mark.parametrize("act", ["UPDATE {} SET {} = 'x'", "DELETE FROM {}"])
def test_update_and_delete_are_refused(desk, file, table, act):
    statement = act.format(table, "key" if table == "entries" else "value")
    with closing(sqlite3.connect(file)) as connection, pytest.raises(sqlite3.IntegrityError, match="append-only"):
        connection.execute(statement)
    with pytest.raises(PurserError, match="nothing was changed"), desk.ledger.writing() as connection:
        connection.exec_driver_sql(statement)
    assert desk.verdict().valid


@pytest.mark.parametrize("table", ["entries", "secrets"])
def test_replacing_a_row_is_refused(desk, file, table):
    """REPLACE deletes what it replaces without firing a trigger on DELETE."""
    with closing(sqlite3.connect(file)) as connection, pytest.raises(sqlite3.IntegrityError):
        connection.execute(f"INSERT OR REPLACE INTO {table} SELECT * FROM {table}")


def test_one_key_is_never_used_twice(desk):
    before, key = desk.totals(), desk.rows()[3]["key"]
    with pytest.raises(PurserError, match="already used"), desk.ledger.writing() as connection:
        desk.ledger.append(connection, account=VALIDATION, kind="refuse", key=key, body={})
    assert desk.totals() == before


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_number_without_a_value_enters_a_body(desk, value):
    before = desk.totals()
    with pytest.raises(ValueError, match="JSON"), desk.ledger.writing() as connection:
        desk.ledger.append(connection, account=TRAIN, kind="refuse", key="k", body={"deep": [{"epsilon": value}]})
    assert desk.totals() == before
    with pytest.raises(ValueError, match="JSON"):
        canonical(value)


def test_a_failed_transaction_leaves_nothing(desk):
    before = desk.totals()

    def write_half():
        with desk.ledger.writing() as connection:
            desk.ledger.append(connection, account=TRAIN, kind="refuse", key="k1", body={})
            desk.ledger.append(connection, account=VALIDATION, kind="refuse", key="k2", body={})
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert desk.totals() == before


def test_a_read_only_file_is_not_waited_for(tmp_path, monkeypatch):
    file = tmp_path / "ledger.db"
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("CREATE TABLE something (x)")
    waits = []
    monkeypatch.setattr(ledger_module.time, "sleep", waits.append)
    reader = sqlite3.connect(f"file:{file}?mode=ro", uri=True)
    with closing(reader), pytest.raises(sqlite3.OperationalError, match="readonly"):
        ledger_module._durable(reader, None)
    assert not waits


def test_the_file_survives_a_power_cut(desk):
    """Durable means that a commit waits for the disk (P2): write-ahead log, full synchronisation."""
    with desk.ledger.reading() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2


def test_writers_hold_the_lock_from_their_first_statement_and_readers_none(desk, file):
    with desk.ledger.writing(), closing(sqlite3.connect(file, timeout=0)) as other:
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")
        assert desk_at(file).account().spent_cost > 0  # a reader neither waits nor is refused
    with desk.ledger.reading() as connection, closing(sqlite3.connect(file, timeout=0)) as other:
        desk.ledger.last(connection, TRAIN)
        other.execute("BEGIN IMMEDIATE")


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "ledger",
        "relative.db",
        "sqlite://",
        "sqlite:///relative.db",
        "sqlite:///:memory:",
        "postgresql://purser:hunter2@db/books",
        "mysql+nonsense://h/d",
    ],
)
def test_a_ledger_that_is_no_absolute_sqlite_file_is_refused(bad, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="PURSER_LEDGER") as raised:
        Ledger(bad)
    assert "hunter2" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_a_malformed_port_is_a_usage_error():
    with pytest.raises(UsageError, match="PURSER_LEDGER"):
        Ledger("postgresql://db:port/books")


@pytest.mark.parametrize("kind", ["absent folder", "a folder", "no database", "cut database", "below a file"])
def test_a_file_that_cannot_hold_the_ledger_is_refused(kind, tmp_path):
    place = tmp_path / "ledger.db"
    if kind == "absent folder":
        place = tmp_path / "absent" / "ledger.db"
    elif kind == "a folder":
        place.mkdir()
    elif kind == "no database":
        place.write_text("name,age\n" * 1000)
    elif kind == "cut database":
        desk_with_digits(place).ledger._engine.dispose()
        place.write_bytes(b"\0" * 4096 + place.read_bytes()[4096:])
    else:
        place.write_text("")
        place = place / "ledger.db"
    with pytest.raises(UsageError, match="PURSER_LEDGER"):
        Ledger(url(place))


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that not even root can write to")
def test_a_folder_that_cannot_be_written_is_refused():
    with pytest.raises(UsageError, match="PURSER_LEDGER"):
        Ledger("sqlite:////proc/ledger.db")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="PURSER_LEDGER"):
        Ledger(url(tmp_path / "ledger.db"))


def test_identity_belongs_to_the_file_and_gives_nothing_away(desk, file, tmp_path):
    assert desk_at(file).ledger.identity == desk.ledger.identity
    assert Ledger(url(tmp_path / "other.db")).identity != desk.ledger.identity
    assert desk.ledger.identity not in desk.ledger.secret("ledger:hmac")
    with pytest.raises(UsageError, match="ledger"):
        desk.ledger.secret("partition:nobody")


def test_the_file_is_the_owner_s_alone(tmp_path):
    old = os.umask(0o022)
    try:
        Ledger(url(tmp_path / "ledger.db"))
    finally:
        os.umask(old)
    assert (tmp_path / "ledger.db").stat().st_mode & 0o077 == 0


def test_opening_again_changes_nothing(desk, file):
    before, keys = desk.totals(), (desk.books.source_key(), desk.books.partition_key("digits"))
    again = desk_at(file)
    assert again.totals() == before
    assert (again.books.source_key(), again.books.partition_key("digits")) == keys


def test_secrets_are_made_once(desk):
    with desk.ledger.writing() as connection:
        made = desk.ledger.secret("partition:new", connection=connection)
        assert desk.ledger.secret("partition:new", connection=connection) == made
    assert desk.ledger.secret("partition:new") == made
    with desk.ledger.reading() as connection:
        values = connection.execute(sa.select(hidden.c.value)).scalars().all()
    assert len(set(values)) == len(values) == 4
    assert all(len(value) == 64 for value in values)


def test_a_new_ledger_knows_no_account(tmp_path):
    desk = desk_at(tmp_path / "ledger.db")
    assert desk.books.names() == []
    verdict = desk.verdict()
    assert (verdict.valid, verdict.first_bad_seq, verdict.head) == (False, 1, None)


def test_two_data_sets_are_two_chains(desk):
    desk.books.create(digits("letters"), EPSILON, DELTA, plans(digits("letters")), 8)
    for account in desk.books.names():
        assert desk.verdict(account).valid
    assert desk.books.names() == ["digits/train", "digits/validation", "letters/train", "letters/validation"]
