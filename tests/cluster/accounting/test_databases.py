"""Where a ledger may live, by URL: what is refused says so without a secret in it (P4, P13), and an error that a retry
may mend is told from one that it will not."""

from __future__ import annotations

import socket
import sqlite3

import psycopg
import pytest
import sqlalchemy as sa

from cluster.accounting import databases
from cluster.accounting.ledger import Ledger, init
from cluster.errors import PurserError, Unreachable, UsageError


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "ledger",
        "relative.db",
        "sqlite://",
        "sqlite:///relative.db",
        "sqlite:///:memory:",
        "sqlite:///file:/tmp/x.db?uri=true",
        "postgresql://",
        "postgresql://purser:hunter2@db",
        "postgresql://purser:hunter2@db/",
        "postgresql://db:port/books",
        "postgres://purser:hunter2@db/books",
        "mysql://purser:hunter2@db/books",
        "mysql+nonsense://purser:hunter2@h/d",
        "oracle://purser:hunter2@h/d?password=hunter2",
    ],
)
@pytest.mark.parametrize("what", [Ledger, init])
def test_what_is_no_ledger_s_url_is_refused(bad, what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="PURSER_LEDGER") as raised:
        what(bad)
    assert "hunter2" not in str(raised.value)
    assert "postgresql://user@host/database" in str(raised.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "bad",
    [
        "sqlite:///{0}/what?.db",
        "sqlite:///{0}/ledger.db?mode=ro",
        "sqlite:///{0}/ledger.db?mode=ro&uri=true",
        "sqlite:///{0}/ledger.db?timeout=soon",
        "sqlite+pysqlcipher://:hunter2@/{0}/ledger.db",
        "sqlite+aiosqlite:///{0}/ledger.db",
        "sqlite+nonsense:///{0}/ledger.db",
        "sqlite://purser:hunter2@db/{0}/ledger.db",
        "sqlite:///{0}/led\0ger.db",
    ],
)
@pytest.mark.filterwarnings("ignore:Query string")
def test_a_file_s_url_that_says_more_than_its_path_is_refused(bad, tmp_path):
    """Half of these open another file than the one that was meant, and so another, empty budget."""
    with pytest.raises(UsageError, match="PURSER_LEDGER") as raised:
        Ledger(bad.format(tmp_path))
    assert "hunter2" not in str(raised.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("url", "driver", "shown"),
    [
        ("sqlite:////a/b.db", "sqlite", "sqlite:////a/b.db"),
        ("postgresql://u@h/d", "postgresql+psycopg", "postgresql://u@h/d"),
        ("postgresql+psycopg2://u@h/d", "postgresql+psycopg", "postgresql://u@h/d"),
        ("postgresql://u:hunter2@h:5/d", "postgresql+psycopg", "postgresql://u:***@h:5/d"),
        ("postgresql://u@h/d?password=hunter2&sslmode=require", "postgresql+psycopg", "postgresql://u@h/d"),
        ("postgresql://:hunter2@h/d", "postgresql+psycopg", "postgresql://:***@h/d"),
    ],
)
def test_a_url_is_shown_without_password_and_driver(url, driver, shown):
    parsed = databases.parse(url)
    assert parsed.drivername == driver
    assert databases.shown(parsed) == shown


@pytest.mark.parametrize("password", ["hunt@er2", "hunt@er2@er2", "@er2"])
def test_a_password_with_an_at_sign_in_it_is_not_shown(password):
    try:
        said = databases.shown(databases.parse(f"postgresql://purser:{password}@db/books"))
    except UsageError as error:
        said = str(error)
    assert "er2" not in said


def test_init_with_a_role_is_for_databases_that_know_roles(tmp_path):
    with pytest.raises(UsageError, match="--service"):
        init(f"sqlite:///{tmp_path}/ledger.db", "service")


def wrapped(error, invalidated=False):
    made = sa.exc.OperationalError("SELECT secret", {}, error)
    made.connection_invalidated = invalidated
    return made


def with_state(state, kind=psycopg.errors.OperationalError):
    return type("SomeError", (kind,), {"sqlstate": state})("hunter2")


LOST = [
    psycopg.OperationalError("consuming input failed: hunter2"),
    psycopg.errors.AdminShutdown("hunter2"),
    psycopg.errors.CrashShutdown("hunter2"),
    psycopg.errors.CannotConnectNow("hunter2"),
    psycopg.errors.ConnectionFailure("hunter2"),
    psycopg.errors.IdleInTransactionSessionTimeout("hunter2"),
    psycopg.errors.ConnectionTimeout("hunter2"),
]


@pytest.mark.parametrize("bare", [True, False], ids=["bare", "wrapped"])
@pytest.mark.parametrize("doing", ["opened", "read", "written"])
@pytest.mark.parametrize("error", LOST, ids=lambda error: type(error).__name__)
def test_a_server_that_is_away_is_unreachable(error, doing, bare):
    """The client tries again on `Unreachable`, and on nothing else."""
    url = databases.parse("postgresql://u:hunter2@h/d")
    said = databases.failure(url, error if bare else wrapped(error), doing)
    assert isinstance(said, Unreachable)
    assert "hunter2" not in str(said)
    assert "postgresql://u:***@h/d" in str(said)


@pytest.mark.parametrize(
    "error",
    [
        psycopg.errors.InsufficientPrivilege("hunter2"),
        psycopg.errors.DiskFull("hunter2"),
        psycopg.errors.LockNotAvailable("hunter2"),
        psycopg.errors.RaiseException("hunter2"),
        psycopg.errors.ReadOnlySqlTransaction("hunter2"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_a_retry_does_not_mend_is_no_unreachable_server(error):
    url = databases.parse("postgresql://u:hunter2@h/d")
    for doing in ("read", "written", "made"):
        said = databases.failure(url, error, doing)
        assert type(said) is PurserError
        assert str(error.sqlstate) in str(said)
        assert "hunter2" not in str(said)


def test_a_file_that_fails_is_not_called_unreachable():
    url = databases.parse("sqlite:////a/b.db")
    for error in (sqlite3.OperationalError("disk I/O error"), wrapped(sqlite3.OperationalError("full"), True)):
        assert type(databases.failure(url, error, "written")) is PurserError
        assert type(databases.failure(url, error, "opened")) is UsageError


@pytest.fixture
def nobody_listens():
    """A port that is taken, and refuses."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def test_a_server_that_is_not_there_is_unreachable(nobody_listens):
    for what in (Ledger, init):
        with pytest.raises(Unreachable, match="nothing is granted") as raised:
            what(f"postgresql://purser:hunter2@127.0.0.1:{nobody_listens}/books")
        assert "hunter2" not in str(raised.value)
    with pytest.raises(Unreachable):
        Ledger("postgresql://u@/books?host=/no/such/folder")
