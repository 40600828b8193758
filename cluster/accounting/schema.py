"""The shape of the ledger: its two tables, what makes them append-only, and the hash that chains entries.

Made once, by the role that owns the database; whoever serves the ledger afterwards needs to read and to append, and
gets no other right. Nothing may be decided or read here.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from cluster.errors import UsageError

metadata = sa.MetaData()

# Byte order everywhere, so that a range of keys means the same on every server.
_Text = sa.String().with_variant(sa.String(collation="C"), "postgresql")

entries = sa.Table(
    "entries",
    metadata,
    sa.Column("account", _Text, nullable=False),
    sa.Column("seq", sa.BigInteger, nullable=False),
    sa.Column("kind", _Text, nullable=False),
    sa.Column("key", _Text, nullable=False, unique=True),
    sa.Column("lease", _Text),
    sa.Column("attempt", sa.Integer),
    sa.Column("block", sa.Integer),
    sa.Column("cost", sa.BigInteger, nullable=False),
    sa.Column("spent_after", sa.BigInteger, nullable=False),
    sa.Column("reserved_after", sa.BigInteger, nullable=False),
    sa.Column("lease_reserved_after", sa.BigInteger, nullable=False),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("at", _Text, nullable=False),
    sa.Column("prev_hash", _Text, nullable=False),
    sa.Column("hash", _Text, nullable=False),
    sa.PrimaryKeyConstraint("account", "seq"),
    sa.Index("entries_by_lease", "lease", "account", "seq"),
)
# Who holds what is found from the newest reservation backwards, without a walk over everything that was authorised.
_only = entries.c.kind == "reserve"
sa.Index("entries_reserving", entries.c.account, entries.c.seq, sqlite_where=_only, postgresql_where=_only)

# Keys that must never be printed: the ledger's HMAC key and each dataset's partition key.
hidden = sa.Table(
    "secrets",
    metadata,
    sa.Column("name", _Text, primary_key=True),
    sa.Column("value", _Text, nullable=False),
)

GENESIS = "0" * 64
HASHED = tuple(column.name for column in entries.columns if column.name != "hash")
_encoder = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)
IDENTITY, HMAC_KEY = "ledger:id", "ledger:hmac"


def canonical(value: object) -> str:
    """JSON with sorted keys and no spaces: the form that is hashed and stored."""
    return _encoder.encode(value)


def entry_hash(row: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of every column but `hash` itself; `prev_hash` makes it a chain."""
    return hashlib.sha256(canonical({name: row[name] for name in HASHED}).encode()).hexdigest()


def make(connection: sa.Connection, service: str | None = None) -> None:
    """Make what is missing of the tables, their triggers and the ledger's own secrets.

    Args:
        connection: a transaction of the role that is to own them.
        service: a PostgreSQL role that may SELECT and INSERT, and do nothing else.
    """
    metadata.create_all(connection)
    for statement in _POSTGRESQL if connection.dialect.name == "postgresql" else _sqlite():
        connection.exec_driver_sql(statement)
    for name in (IDENTITY, HMAC_KEY):
        hide(connection, name)
    if service is not None:
        if connection.execute(sa.text("SELECT 1 FROM pg_roles WHERE rolname = :r"), {"r": service}).first() is None:
            raise UsageError(f"--service: there is no role {service!r} in this database; CREATE ROLE makes it.")
        role = connection.dialect.identifier_preparer.quote(service)
        for table in metadata.sorted_tables:
            connection.exec_driver_sql(f"REVOKE ALL ON {table.name} FROM PUBLIC, {role}")
            connection.exec_driver_sql(f"GRANT SELECT, INSERT ON {table.name} TO {role}")


def hide(connection: sa.Connection, name: str) -> None:
    """Draw the hidden value called `name`, where it is missing."""
    if connection.execute(sa.select(hidden.c.name).where(hidden.c.name == name)).first() is None:
        connection.execute(sa.insert(hidden).values(name=name, value=secrets.token_hex(32)))


def _sqlite() -> list[str]:
    # REPLACE deletes what it replaces without firing the trigger on DELETE.
    taken = {
        "entries": "key = NEW.key OR (account = NEW.account AND seq = NEW.seq)",
        "secrets": "name = NEW.name",
    }
    forbid = "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END"
    return [
        f"CREATE TRIGGER IF NOT EXISTS {table}_no_replace BEFORE INSERT ON {table} "
        f"WHEN EXISTS (SELECT 1 FROM {table} WHERE {same}) {forbid}"
        for table, same in taken.items()
    ] + [
        f"CREATE TRIGGER IF NOT EXISTS {table}_no_{act.lower()} BEFORE {act} ON {table} {forbid}"
        for table in taken
        for act in ("UPDATE", "DELETE")
    ]


_POSTGRESQL = [
    "CREATE OR REPLACE FUNCTION purser_append_only() RETURNS trigger LANGUAGE plpgsql AS "
    "$$ BEGIN RAISE EXCEPTION 'the ledger is append-only'; END $$",
    *(
        f"CREATE OR REPLACE TRIGGER {table}_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} "
        "FOR EACH STATEMENT EXECUTE FUNCTION purser_append_only()"
        for table in ("entries", "secrets")
    ),
]
