"""The ledger: one append-only table of hash-chained entries over SQLAlchemy, and the lock that guards it.

Running totals live in every hashed row, so that an admission reads the last row and writes one. Nothing is ever
updated or deleted; triggers say so to anyone who tries. No rule about budgets may be written here: see `leases`.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import secrets
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa

from cluster.errors import PurserError, UsageError

_metadata = sa.MetaData()

entries = sa.Table(
    "entries",
    _metadata,
    sa.Column("account", sa.String, nullable=False),
    sa.Column("seq", sa.BigInteger, nullable=False),
    sa.Column("kind", sa.String, nullable=False),
    sa.Column("key", sa.String, nullable=False, unique=True),
    sa.Column("lease", sa.String),
    sa.Column("attempt", sa.Integer),
    sa.Column("block", sa.Integer),
    sa.Column("cost", sa.BigInteger, nullable=False),
    sa.Column("spent_after", sa.BigInteger, nullable=False),
    sa.Column("reserved_after", sa.BigInteger, nullable=False),
    sa.Column("lease_reserved_after", sa.BigInteger, nullable=False),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("at", sa.String, nullable=False),
    sa.Column("prev_hash", sa.String, nullable=False),
    sa.Column("hash", sa.String, nullable=False),
    sa.PrimaryKeyConstraint("account", "seq"),
    sa.Index("entries_by_lease", "lease", "account", "seq"),
)

# Keys that must never be printed: the ledger's HMAC key and each dataset's partition key.
hidden = sa.Table(
    "secrets",
    _metadata,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("value", sa.String, nullable=False),
)

GENESIS = "0" * 64
PATIENCE = 60  # seconds that a writer waits for another
HASHED = tuple(column.name for column in entries.columns if column.name != "hash")


def canonical(value: object) -> str:
    """JSON with sorted keys and no spaces: the form that is hashed and stored."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def entry_hash(row: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of every column but `hash` itself; `prev_hash` makes it a chain."""
    return hashlib.sha256(canonical({name: row[name] for name in HASHED}).encode()).hexdigest()


class Ledger:
    """The entries of one database.

    Args:
        url: a SQLAlchemy URL; SQLite only in this version.

    Raises:
        UsageError: another database, or a file that cannot be opened.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            parsed = sa.make_url(url)
        except (sa.exc.ArgumentError, ValueError):
            raise UsageError("PURSER_LEDGER: this is no database URL; use sqlite:////absolute/path.db.") from None
        if parsed.get_backend_name() != "sqlite" or not os.path.isabs(parsed.database or ""):
            raise UsageError(
                f"PURSER_LEDGER: {parsed.render_as_string()} was given; "
                "this version keeps its ledger in a SQLite file: use sqlite:////absolute/path.db."
            )
        self._make_private(str(parsed.database))
        connect = {"timeout": PATIENCE, "isolation_level": None}  # we say BEGIN ourselves
        self._engine = sa.create_engine(parsed, connect_args=connect)
        sa.event.listen(self._engine, "connect", _durable)
        sa.event.listen(self._engine, "begin", _begin)
        self._readers = self._engine.execution_options(reads_only=True)
        try:
            with self.reading() as connection:
                there = sa.inspect(connection).has_table("secrets")
            if not there:
                self._create()
        except sa.exc.DatabaseError:
            raise UsageError(
                f"PURSER_LEDGER: {parsed.database} cannot be opened; check that the folder exists and can be written."
            ) from None

    @staticmethod
    def _make_private(path: str) -> None:
        """A new file is the owner's alone from its first moment; SQLite gives the -wal and -shm files its mode."""
        with contextlib.suppress(OSError):  # one that is there, or cannot be made, is found when it is opened
            os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o600))

    def _create(self) -> None:
        with self.writing() as connection:
            _metadata.create_all(connection)
            taken = {
                "entries": "key = NEW.key OR (account = NEW.account AND seq = NEW.seq)",
                "secrets": "name = NEW.name",
            }
            for table, same in taken.items():
                # REPLACE deletes what it replaces without firing the trigger on DELETE.
                connection.exec_driver_sql(
                    f"CREATE TRIGGER IF NOT EXISTS {table}_no_replace BEFORE INSERT ON {table} "
                    f"WHEN EXISTS (SELECT 1 FROM {table} WHERE {same}) "
                    f"BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END"
                )
                for act in ("UPDATE", "DELETE"):
                    connection.exec_driver_sql(
                        f"CREATE TRIGGER IF NOT EXISTS {table}_no_{act.lower()} BEFORE {act} ON {table} "
                        f"BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END"
                    )
            for name in ("ledger:id", "ledger:hmac"):
                self._hide(connection, name, secrets.token_hex(32))

    def _hide(self, connection: sa.Connection, name: str, value: str) -> None:
        there = connection.execute(sa.select(hidden.c.name).where(hidden.c.name == name)).first()
        if there is None:
            connection.execute(sa.insert(hidden).values(name=name, value=value))

    def secret(self, name: str, *, connection: sa.Connection | None = None) -> str:
        """The hidden value called `name`; with a writing `connection` it is made where it is missing."""
        query = sa.select(hidden.c.value).where(hidden.c.name == name)
        if connection is not None:
            self._hide(connection, name, secrets.token_hex(32))
            return str(connection.execute(query).scalar_one())
        with self.reading() as reader:
            value = reader.execute(query).scalar_one_or_none()
        if value is None:
            raise UsageError(f"ledger: it holds nothing under {name.split(':')[0]}; was the account made here?")
        return str(value)

    @property
    def identity(self) -> str:
        """A public name for this ledger: clients check that they talk to the one they mean."""
        return self.secret("ledger:id")[:16]

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """A transaction that holds the write lock from its first statement, so that what it reads stays true.

        With default transactions two writers read the same totals and both insert: 16 of a budget of 10 was seen.
        """
        try:
            with self._engine.begin() as connection:
                yield connection
        except sa.exc.DatabaseError as error:
            raise PurserError(
                f"ledger: {self.url} could not be written ({getattr(error.orig, 'sqlite_errorname', 'error')}); "
                "nothing was changed. Check the disk and its permissions, then try again."
            ) from None

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A read of one moment; takes no lock that a writer would wait for."""
        with self._readers.connect() as connection:
            yield connection

    def accounts(self, connection: sa.Connection) -> list[str]:
        """Every account, by name."""
        query = sa.select(entries.c.account).where(entries.c.seq == 1).order_by(entries.c.account)
        return [str(name) for name in connection.execute(query).scalars()]

    def last(self, connection: sa.Connection, account: str) -> dict[str, Any] | None:
        """The newest entry of `account`, which carries its totals."""
        query = sa.select(entries).where(entries.c.account == account).order_by(entries.c.seq.desc()).limit(1)
        return _one(connection, query)

    def by_key(self, connection: sa.Connection, key: str) -> dict[str, Any] | None:
        """The entry with this idempotency key, if it was committed."""
        return _one(connection, sa.select(entries).where(entries.c.key == key))

    def of_account(self, connection: sa.Connection, account: str) -> Iterator[dict[str, Any]]:
        """All entries of `account` in order."""
        query = sa.select(entries).where(entries.c.account == account).order_by(entries.c.seq)
        for row in connection.execute(query).mappings():
            yield dict(row)

    def of_lease(self, connection: sa.Connection, lease: str, account: str) -> list[dict[str, Any]]:
        """All entries of `lease` on `account` in order."""
        where = (entries.c.lease == lease) & (entries.c.account == account)
        return [
            dict(row) for row in connection.execute(sa.select(entries).where(where).order_by(entries.c.seq)).mappings()
        ]

    def accounts_of_lease(self, connection: sa.Connection, lease: str) -> list[str]:
        """The accounts on which `lease` holds or held a reservation, sorted."""
        where = (entries.c.lease == lease) & (entries.c.kind == "reserve")
        query = sa.select(entries.c.account).where(where).order_by(entries.c.account)
        return [str(name) for name in connection.execute(query).scalars()]

    def holders(self, connection: sa.Connection) -> dict[str, str]:
        """lease → its newest entry's body, for every lease that still holds a reservation somewhere."""
        newest = (
            sa.select(entries.c.account, entries.c.lease, sa.func.max(entries.c.seq).label("seq"))
            .where(entries.c.lease.is_not(None) & (entries.c.kind != "refuse"))
            .group_by(entries.c.account, entries.c.lease)
            .subquery()
        )
        same = (entries.c.account == newest.c.account) & (entries.c.seq == newest.c.seq)
        query = sa.select(entries.c.lease, entries.c.body).join(newest, same).where(entries.c.lease_reserved_after > 0)
        return {str(lease): str(body) for lease, body in connection.execute(query)}

    def append(
        self,
        connection: sa.Connection,
        *,
        account: str,
        kind: str,
        key: str,
        cost: int = 0,
        spent: int = 0,
        reserved: int = 0,
        lease: str | None = None,
        lease_reserved: int = 0,
        attempt: int | None = None,
        block: int | None = None,
        body: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Add one entry to the chain of `account`; `spent` and `reserved` are changes to the running totals."""
        last = self.last(connection, account)
        row: dict[str, Any] = {
            "account": account,
            "seq": last["seq"] + 1 if last else 1,
            "kind": kind,
            "key": key,
            "lease": lease,
            "attempt": attempt,
            "block": block,
            "cost": cost,
            "spent_after": (last["spent_after"] if last else 0) + spent,
            "reserved_after": (last["reserved_after"] if last else 0) + reserved,
            "lease_reserved_after": lease_reserved,
            "body": canonical(body),
            "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "prev_hash": last["hash"] if last else GENESIS,
        }
        row["hash"] = entry_hash(row)
        if self.by_key(connection, key):  # under the lock, so that it stays true
            raise PurserError(f"ledger: the key {key} is already used with other content; nothing was changed.")
        connection.execute(sa.insert(entries).values(**row))
        return row


def _one(connection: sa.Connection, query: sa.Select[Any]) -> dict[str, Any] | None:
    row = connection.execute(query).mappings().first()
    return None if row is None else dict(row)


def _durable(connection: Any, _record: object) -> None:
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


def _begin(connection: sa.Connection) -> None:
    reads_only = connection.get_execution_options().get("reads_only", False)
    connection.exec_driver_sql("BEGIN DEFERRED" if reads_only else "BEGIN IMMEDIATE")
