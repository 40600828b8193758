"""The two databases a ledger may live in, and all that differs between them: URL, durability, the writers' lock.

SQLite (a file, embedded) and PostgreSQL (shared by a cluster). Nothing here knows what an entry means.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from cluster.errors import PurserError, Unreachable, UsageError

_AT_ONCE = 500  # rows of one INSERT; databases bound the parameters of a statement
PATIENCE = 60  # seconds that a writer waits for another
WRITERS = 0x707572736572  # the advisory lock of a PostgreSQL database's writers ("purser"); one ledger, one writer
_HOW = "use sqlite:////absolute/path.db or postgresql://user@host/database"


def parse(url: str) -> sa.URL:
    """`url` as SQLAlchemy reads it, with our driver.

    Raises:
        UsageError: not a URL, or of another database.
    """
    try:
        parsed = sa.make_url(url)
        backend = parsed.get_backend_name()
    except (sa.exc.ArgumentError, ValueError):
        raise UsageError(f"PURSER_LEDGER: this is no database URL; {_HOW}.") from None
    if "@" in (parsed.host or ""):  # not shown: what is taken for the host holds the end of a password
        raise UsageError("PURSER_LEDGER: an '@' within a user's name or password must be written %40.")
    if backend == "sqlite":  # options would open another file than the one that is named, and so another budget
        plain = parsed in (sa.URL.create(driver, database=parsed.database) for driver in ("sqlite", "sqlite+pysqlite"))
        if plain and os.path.isabs(parsed.database or "") and not {"?", "\0"} & set(url):
            return parsed
        raise UsageError(f"PURSER_LEDGER: {shown(parsed)} was given; {_HOW}, and nothing after the path.")
    if backend == "postgresql" and parsed.database:
        return parsed.set(drivername="postgresql+psycopg")
    raise UsageError(f"PURSER_LEDGER: {shown(parsed)} was given; {_HOW}.")


def shown(url: sa.URL) -> str:
    """`url` for people: its password hidden, without a driver they did not choose."""
    plain = url.set(drivername=url.get_backend_name(), query={})
    return plain.render_as_string()


def engine(url: sa.URL) -> sa.Engine:
    """Connections whose commits are durable, and whose transactions hold the writers' lock from their first statement.

    With default transactions two writers read the same totals and both insert: 16 of a budget of 10 was seen. A
    transaction with the execution option `reads_only` takes no lock that a writer would wait for.
    """
    if url.get_backend_name() == "sqlite":
        _make_private(str(url.database))
        made = sa.create_engine(url, connect_args={"timeout": PATIENCE, "isolation_level": None})
        sa.event.listen(made, "connect", _durable_sqlite)
        sa.event.listen(made, "begin", _begin_sqlite)
    else:
        made = sa.create_engine(
            url,
            pool_pre_ping=True,
            # A snapshot from before the lock was granted would show old totals: whatever the server's default is.
            isolation_level="READ COMMITTED",
            connect_args={
                "connect_timeout": 10,
                "application_name": "purser",
                "options": f"{url.query.get('options', '')} -c synchronous_commit=on -c lock_timeout={PATIENCE}s "
                f"-c idle_in_transaction_session_timeout={PATIENCE}s -c client_encoding=utf8",
            },
        )
        sa.event.listen(made, "connect", _durable_postgresql)
        sa.event.listen(made, "begin", _begin_postgresql)
    return made


def readers(engine: sa.Engine) -> sa.Engine:
    """The same connections for transactions that see one moment and write nothing."""
    if engine.dialect.name == "postgresql":
        return engine.execution_options(reads_only=True, isolation_level="REPEATABLE READ", postgresql_readonly=True)
    return engine.execution_options(reads_only=True)


class Prepared:
    """A statement compiled once and run on the driver's own cursor: a third of what a Core execution takes."""

    def __init__(self, statement: sa.ClauseElement, dialect: sa.Dialect) -> None:
        # Positional parameters, so that a row of values can be repeated.
        style = "qmark" if dialect.name == "sqlite" else "format"
        kind: Any = type(dialect)
        compiled: Any = statement.compile(dialect=kind(paramstyle=style))
        self._sql = str(compiled)
        self._values = self._sql.rpartition(" VALUES ")[2]
        self._defaults: dict[str, Any] = dict(compiled.params)
        self._order = tuple(compiled.positiontup)

    def run(self, cursor: Any, row: Mapping[str, Any]) -> Any:
        """Run it with the parameters in `row`, by name; returns the cursor."""
        return cursor.execute(self._sql, self._in_order(row)) or cursor

    def insert(self, cursor: Any, rows: Sequence[Mapping[str, Any]]) -> None:
        """Insert `rows`, many at a time: each call of the driver lets other threads run, and waits for them."""
        for start in range(0, len(rows), _AT_ONCE):
            some = rows[start : start + _AT_ONCE]
            sql = self._sql + f", {self._values}" * (len(some) - 1)
            cursor.execute(sql, [value for row in some for value in self._in_order(row)])

    def _in_order(self, row: Mapping[str, Any]) -> list[Any]:
        return [row[name] if name in row else self._defaults[name] for name in self._order]


def errors(engine: sa.Engine) -> tuple[type[Exception], ...]:
    """What the database, its driver and the pool of connections to it may raise."""
    return sa.exc.DBAPIError, sa.exc.TimeoutError, engine.dialect.dbapi.Error  # type: ignore[union-attr]


def failure(url: sa.URL, error: Exception, doing: str) -> PurserError:
    """Our sentence for an error of the database; `Unreachable` where the same call may succeed in a moment."""
    cause = getattr(error, "orig", None) or error
    state = getattr(cause, "sqlstate", None)
    name = getattr(cause, "sqlite_errorname", None) or state or type(cause).__name__
    if isinstance(cause, sqlite3.IntegrityError) or str(state).startswith("23"):
        return PurserError(
            "ledger: a key is already used with other content, or an entry is there already; nothing was changed."
        )
    lost = url.get_backend_name() == "postgresql" and (
        getattr(error, "connection_invalidated", False)
        or (state is None and any(kind.__name__ == "OperationalError" for kind in type(cause).__mro__))
        or str(state).startswith(("08", "57P", "25P03"))
    )
    if lost:
        return Unreachable(
            f"ledger: {shown(url)} cannot be reached ({name}); nothing is granted until it can. "
            "Start the server or check the URL, then try again."
        )
    if doing == "opened":
        return UsageError(
            f"PURSER_LEDGER: {shown(url)} cannot be opened ({name}); check that the folder exists and can be written."
        )
    return PurserError(
        f"ledger: {shown(url)} could not be {doing} ({name}); nothing was changed. "
        "Check the disk and the permissions, then try again."
    )


def _make_private(path: str) -> None:
    """A new file is the owner's alone from its first moment; SQLite gives the -wal and -shm files its mode."""
    with contextlib.suppress(OSError):  # one that is there, or cannot be made, is found when it is opened
        os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o600))


def _durable_sqlite(connection: Any, _record: object) -> None:
    # What is not UTF-8 was put there by somebody else: let `verify` find that it does not hash, not the driver.
    connection.text_factory = lambda content: content.decode("utf-8", "replace")
    deadline = time.monotonic() + PATIENCE
    connection.execute("PRAGMA busy_timeout=100")
    while True:  # turning WAL on does not always wait for another process that is making the same file
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            break
        except sqlite3.OperationalError as error:
            if not error.sqlite_errorname.startswith("SQLITE_BUSY") or time.monotonic() > deadline:
                raise
            time.sleep(0.05)
    connection.execute(f"PRAGMA busy_timeout={1000 * PATIENCE}")
    connection.execute("PRAGMA synchronous=FULL")


def _begin_sqlite(connection: sa.Connection) -> None:
    reads_only = connection.get_execution_options().get("reads_only", False)
    driver: Any = connection.connection.driver_connection
    driver.execute("BEGIN DEFERRED" if reads_only else "BEGIN IMMEDIATE")


def _durable_postgresql(connection: Any, _record: object) -> None:
    with connection.cursor() as cursor:
        cursor.execute("SHOW fsync")
        durable = cursor.fetchone()[0] == "on"
    connection.rollback()
    if not durable:
        raise UsageError(
            "ledger: this PostgreSQL runs with fsync off, and may forget what it said was committed; turn fsync on."
        )


def _begin_postgresql(connection: sa.Connection) -> None:
    if not connection.get_execution_options().get("reads_only", False):
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({WRITERS})")
