"""Where a ledger may live, for tests: both databases behind one face, and what a forger can do to either."""

from __future__ import annotations

import functools
import re
import sqlite3
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psycopg
from bookkeeping import DELTA, EPSILON, TRAIN, Contents, Desk, Row, desk_at, digits, plans
from postgresql import OWNER, SERVICE, SUPERUSER, Postgres
from psycopg.rows import dict_row

from cluster.accounting.ledger import init
from cluster.accounting.schema import GENESIS, entry_hash


class Place(ABC):
    """Where one ledger lives: how to open it, and what whoever owns the disk or the server can do behind its back."""

    kind: str
    url: str

    def __init__(self) -> None:
        self._desks: list[Desk] = []

    def desk(self, is_alive: Callable[[str], bool] | None = None, **kinds: Any) -> Desk:
        """Another accountant on this ledger."""
        desk = desk_at(self.url, is_alive, **kinds)
        self._desks.append(desk)
        return desk

    def leave(self) -> None:
        """Close all desks."""
        for desk in self._desks:
            desk.ledger.close()
        self._desks.clear()

    @abstractmethod
    def close(self) -> None:
        """Close everything that is open here."""

    @abstractmethod
    def read(self, query: str, **values: Any) -> list[Row]:
        """What is there, whatever the ledger says."""

    @abstractmethod
    def forge(self, *statements: str, values: Mapping[str, Any] | None = None) -> None:
        """Change it behind the ledger's back, in one transaction that no trigger stops."""

    @abstractmethod
    def copy(self) -> Place:
        """What an operator's backup does: a consistent copy of one moment, at a place of its own."""

    def rows(self, account: str) -> list[Row]:
        """All entries of `account` in order."""
        return self.read("SELECT * FROM entries WHERE account = :account ORDER BY seq", account=account)

    def insert(self, row: Row) -> None:
        """Put one entry in."""
        self.forge(_insert("entries", row), values=row)

    def contents(self) -> Contents:
        """Everything, to be put back later: a backup of this very moment."""
        return self.read("SELECT * FROM entries ORDER BY account, seq"), self.read("SELECT * FROM secrets")

    @abstractmethod
    def put_back(self, contents: Contents) -> None:
        """Restore a backup over whatever is there now."""


def _insert(table: str, row: Row) -> str:
    return f"INSERT INTO {table} ({', '.join(row)}) VALUES ({', '.join(f':{name}' for name in row)})"


class SqlitePlace(Place):
    """A file."""

    kind = "sqlite"

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file
        self.url = f"sqlite:///{file}"
        self._forger: sqlite3.Connection | None = None

    def close(self) -> None:
        self.leave()
        if self._forger is not None:
            self._forger.close()
            self._forger = None

    def _connection(self) -> sqlite3.Connection:
        if self._forger is None:
            self._forger = sqlite3.connect(self.file, isolation_level=None, check_same_thread=False)
            self._forger.row_factory = sqlite3.Row
            # A forgery need not survive a power cut, and there are hundreds.
            self._forger.execute("PRAGMA synchronous=OFF")
        return self._forger

    def read(self, query: str, **values: Any) -> list[Row]:
        return [dict(row) for row in self._connection().execute(query, values)]

    @contextmanager
    def _forging(self) -> Iterator[sqlite3.Connection]:
        connection = self._connection()
        triggers = self.read("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'")
        connection.execute("BEGIN IMMEDIATE")
        try:
            for trigger in triggers:
                connection.execute(f"DROP TRIGGER {trigger['name']}")
            yield connection
            for trigger in triggers:
                connection.execute(trigger["sql"])
            connection.execute("COMMIT")
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")

    def forge(self, *statements: str, values: Mapping[str, Any] | None = None) -> None:
        with self._forging() as connection:
            for statement in statements:
                connection.execute(statement, values or {})

    def put_back(self, contents: Contents) -> None:
        with self._forging() as connection:
            for table, rows in zip(("entries", "secrets"), contents, strict=True):
                connection.execute(f"DELETE FROM {table}")
                if rows:
                    connection.executemany(_insert(table, rows[0]), rows)

    def copy(self) -> SqlitePlace:
        target = self.file.with_name(f"copy-{len(list(self.file.parent.iterdir()))}.db")
        with closing(sqlite3.connect(target)) as new:
            new.execute("PRAGMA synchronous=OFF")
            self._connection().backup(new)
        return SqlitePlace(target)


class PostgresqlPlace(Place):
    """A database of a server, opened as the service's role; forged as the superuser."""

    kind = "postgresql"

    def __init__(self, server: Postgres, database: str) -> None:
        super().__init__()
        self.server, self.database = server, database
        self.url = server.url(database)
        self._forger: psycopg.Connection[Row] | None = None

    def close(self) -> None:
        self.leave()
        if self._forger is not None:
            self._forger.close()
            self._forger = None

    def _connection(self) -> psycopg.Connection[Row]:
        if self._forger is None:
            url = self.server.url(self.database, SUPERUSER)
            self._forger = psycopg.connect(url, autocommit=True, row_factory=dict_row)
            self._forger.execute("SET session_replication_role = replica")  # no triggers
            self._forger.execute("SET synchronous_commit = off")
        return self._forger

    def read(self, query: str, **values: Any) -> list[Row]:
        try:
            return self._connection().execute(_placeholders(query), values).fetchall()
        except psycopg.OperationalError:  # the server was restarted meanwhile
            self._forger = None
            return self._connection().execute(_placeholders(query), values).fetchall()

    def forge(self, *statements: str, values: Mapping[str, Any] | None = None) -> None:
        connection = self._connection()
        with connection.transaction():
            for statement in statements:
                connection.execute(_placeholders(statement), values or {})

    def put_back(self, contents: Contents) -> None:
        connection = self._connection()
        with connection.transaction(), connection.cursor() as cursor:
            for table, rows in zip(("entries", "secrets"), contents, strict=True):
                cursor.execute(f"DELETE FROM {table}")
                if rows:
                    cursor.executemany(_placeholders(_insert(table, rows[0])), rows)

    def copy(self) -> PostgresqlPlace:
        self.end_sessions()
        self.close()
        return PostgresqlPlace(self.server, self.server.create(self.database))

    def end_sessions(self) -> None:
        """Cut the connection of everybody who sits here, as a server does that is restarted."""
        others = "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        while self.read(f"SELECT pg_terminate_backend(pid) {others}"):
            time.sleep(0.002)


def _placeholders(statement: str) -> str:
    return re.sub(r":(\w+)", r"%(\1)s", statement)


class Places(ABC):
    """Makes places of one kind; each is taken for a while and then given back."""

    kind: str

    def __init__(self) -> None:
        self.taken: list[Place] = []

    @abstractmethod
    def empty(self) -> Place:
        """A ledger without accounts."""

    @abstractmethod
    def digits(self) -> Place:
        """A ledger that holds the accounts of `digits`: choosing their orders takes longer than most tests."""

    @abstractmethod
    def new(self) -> Place:
        """A ledger just made, that shares not even its identity with another."""

    def take(self, place: Any) -> Any:
        """Look after a place until `give_back`."""
        self.taken.append(place)
        return place

    def copy(self, place: Place) -> Place:
        """A copy of `place`, see `Place.copy`."""
        return self.take(place.copy())

    def give_back(self, keep: int = 0) -> None:
        """Give back all that were taken but for the first `keep`."""
        while len(self.taken) > keep:
            place = self.taken.pop()
            place.leave()
            self._again(place)

    @abstractmethod
    def _again(self, place: Any) -> None:
        """What becomes of a place that was given back."""


class SqlitePlaces(Places):
    """Files in one folder."""

    kind = "sqlite"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder, self._made = folder, 0
        self._free: list[Path] = []

    def empty(self) -> SqlitePlace:
        if not self._free:
            self._made += 1
            folder = self._folder / str(self._made)
            folder.mkdir()
            self._free.append(folder / "ledger.db")
        return self.take(SqlitePlace(self._free.pop()))

    new = empty

    def digits(self) -> SqlitePlace:
        place = self.empty()
        place.file.write_bytes(_made_once())
        return place

    def _again(self, place: SqlitePlace) -> None:
        place.close()
        for part in place.file.parent.glob(f"{place.file.name}*"):
            part.unlink()
        if place.file.name == "ledger.db":
            self._free.append(place.file)


@functools.cache
def _made_once() -> bytes:
    """The file of a new ledger with the accounts of `digits`."""
    with tempfile.TemporaryDirectory() as folder:
        desk = desk_at(f"sqlite:///{folder}/ledger.db")
        desk.books.create(digits(), EPSILON, DELTA, plans(digits()), 8)
        desk.ledger.close()  # the last connection to close moves the write-ahead log into the file
        return (Path(folder) / "ledger.db").read_bytes()


class PostgresqlPlaces(Places):
    """Databases of one server, used again and again: emptying one takes a fortieth of making one."""

    kind = "postgresql"

    def __init__(self, server: Postgres) -> None:
        super().__init__()
        self.server = server
        self.template = server.create()
        init(server.url(self.template, OWNER), SERVICE)
        place = PostgresqlPlace(server, self.template)
        self._empty = place.contents()
        place.desk().books.create(digits(), EPSILON, DELTA, plans(digits()), 8)
        self._digits = place.contents()
        place.put_back(self._empty)
        place.close()
        self._free: list[PostgresqlPlace] = []

    def _with(self, contents: Contents) -> PostgresqlPlace:
        free = self._free.pop() if self._free else None
        place = self.take(free or PostgresqlPlace(self.server, self.server.create(self.template)))
        place.url = self.server.url(place.database)
        place.end_sessions()  # whoever is left there from an earlier test must not meddle with this one
        place.put_back(contents)
        return place

    def empty(self) -> PostgresqlPlace:
        return self._with(self._empty)

    def digits(self) -> PostgresqlPlace:
        return self._with(self._digits)

    def new(self) -> PostgresqlPlace:
        place = PostgresqlPlace(self.server, self.server.create())
        init(self.server.url(place.database, OWNER), SERVICE)
        return self.take(place)

    def _again(self, place: PostgresqlPlace) -> None:
        self._free.append(place)

    def end(self) -> None:
        """Drop what was made."""
        self.give_back()
        for place in self._free:
            place.close()
            self.server.drop(place.database)
        self.server.drop(self.template)


def rewrite_chain(place: Place, seq: int, change: Mapping[str, Any], account: str = TRAIN) -> None:
    """Alter entry `seq` and recompute every hash from it on, so that the chain is whole in itself again."""
    previous = GENESIS
    for row in place.rows(account):
        row["prev_hash"] = previous
        if row["seq"] == seq:
            row.update(change)
        row["hash"] = previous = entry_hash(row)
        columns = ", ".join(f"{name} = :{name}" for name in row)
        place.forge(f"UPDATE entries SET {columns} WHERE account = :account AND seq = :seq", values=row)
