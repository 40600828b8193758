"""What a transaction sees of the ledger, and what it may add: the only place that queries entries or appends one.

Running totals live in every hashed row, so that an admission reads the last row of its account and writes one. No rule
about budgets may be written here: see `leases`.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping
from typing import Any

import sqlalchemy as sa

from cluster.accounting.databases import Prepared
from cluster.accounting.schema import GENESIS, canonical, entries, entry_hash, hidden, hide

Row = dict[str, Any]

_MEMO = 10_000  # leases whose state is kept in memory, per account

_this: dict[str, Any] = {name: sa.bindparam(name) for name in ("account", "lease", "key", "until", "name", "seq")}
_of_account = sa.select(entries).where(entries.c.account == _this["account"])
_LAST = _of_account.order_by(entries.c.seq.desc()).limit(1)
_ALL = _of_account.order_by(entries.c.seq).execution_options(yield_per=1000)
_SINCE = _of_account.where(entries.c.seq > _this["seq"]).order_by(entries.c.seq)
_SINCE = _SINCE.with_only_columns(entries.c.seq, entries.c.kind, entries.c.body)
_BY_KEY = sa.select(entries).where(entries.c.key == _this["key"])
_BY_PREFIX = sa.select(entries.c.account).where((entries.c.key >= _this["key"]) & (entries.c.key < _this["until"]))
_OF_LEASE = _of_account.where(entries.c.lease == _this["lease"]).order_by(entries.c.seq)
_NEWEST = _of_account.where(entries.c.lease == _this["lease"]).order_by(entries.c.seq.desc()).limit(1)
_CHARGED = sa.select(sa.func.coalesce(sa.func.sum(entries.c.cost), 0)).where(
    (entries.c.account == _this["account"]) & (entries.c.lease == _this["lease"]) & (entries.c.kind == "authorise")
)
# The kind is written out, so that SQLite sees that its partial index will do.
_RESERVES = _of_account.where(entries.c.kind == sa.literal_column("'reserve'")).order_by(entries.c.seq.desc())
_LAST_RESERVE = _RESERVES.limit(1)
_RESERVING = _RESERVES.with_only_columns(entries.c.lease)
_SECRET = sa.select(hidden.c.value).where(hidden.c.name == _this["name"])
_APPEND = sa.insert(entries)
_COLUMNS = tuple(column.name for column in entries.columns)


Memos = dict[str, tuple[str, dict[str, Any]]]  # account → (the hash of its newest entry, what was remembered then)


class Hot:
    """The two statements that every admission runs, prepared for one database."""

    def __init__(self, dialect: sa.Dialect) -> None:
        self.last, self.append = Prepared(_LAST, dialect), Prepared(_APPEND, dialect)


class View:
    """What one transaction sees of the ledger."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    def _ask(self, query: sa.Executable, **values: object) -> sa.CursorResult[Any]:
        return self._connection.execute(query, values)

    def _one(self, query: sa.Select[Any], **values: object) -> Row | None:
        row = self._ask(query, **values).mappings().first()
        return None if row is None else dict(row)

    def scalar(self, query: sa.Executable, **values: object) -> Any:
        """The one value that `query` selects."""
        return self._ask(query, **values).scalar_one()

    def last(self, account: str) -> Row | None:
        """The newest entry of `account`, which carries its totals."""
        return self._one(_LAST, account=account)

    def by_key(self, key: str) -> Row | None:
        """The entry with this idempotency key, if it was committed."""
        return self._one(_BY_KEY, key=key)

    def newest(self, lease: str, account: str) -> Row | None:
        """The newest entry of `lease` on `account`, which carries the lease's state."""
        return self._one(_NEWEST, lease=lease, account=account)

    def memo(self, account: str) -> dict[str, Any]:
        """What may be remembered while the newest entry of `account` stays the newest; nothing in a mere view."""
        return {}

    def accounts(self) -> list[str]:
        """Every account, by name."""
        return self._with_prefix("account:")

    def accounts_of_lease(self, lease: str) -> list[str]:
        """The accounts on which `lease` holds or held a reservation, sorted."""
        return self._with_prefix(f"reserve:{lease}:")

    def _with_prefix(self, prefix: str) -> list[str]:
        until = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        return sorted(self._ask(_BY_PREFIX, key=prefix, until=until).scalars())

    def of_account(self, account: str) -> Iterator[Row]:
        """All entries of `account` in order."""
        for row in self._ask(_ALL, account=account).mappings():
            yield dict(row)

    def since(self, account: str, seq: int) -> list[Row]:
        """Sequence number, kind and body of what was added to `account` after its entry `seq`, in order."""
        return [dict(row) for row in self._ask(_SINCE, account=account, seq=seq).mappings()]

    def of_lease(self, lease: str, account: str) -> list[Row]:
        """All entries of `lease` on `account` in order."""
        return [dict(row) for row in self._ask(_OF_LEASE, lease=lease, account=account).mappings()]

    def charged(self, lease: str, account: str) -> int:
        """What `lease` was authorised on `account` in all."""
        return int(self.scalar(_CHARGED, lease=lease, account=account))

    def last_reserve(self, account: str) -> Row | None:
        """The newest `reserve` entry of `account`."""
        return self._one(_LAST_RESERVE, account=account)

    def holders(self, account: str) -> Iterator[Row]:
        """The newest entry of every lease that holds a reservation on `account`, last reserved first.

        Ends as soon as all that is reserved is accounted for: what is held now was mostly reserved lately.
        """
        last = self.last(account)
        left = last["reserved_after"] if last else 0
        leases = iter(self._ask(_RESERVING, account=account).scalars().all() if left else ())
        while left > 0 and (lease := next(leases, None)) is not None:
            newest = self.newest(lease, account)
            if newest and newest["lease_reserved_after"] > 0:
                left -= newest["lease_reserved_after"]
                yield newest

    def secret(self, name: str) -> str | None:
        """The hidden value called `name`, if there is one."""
        value = self._ask(_SECRET, name=name).scalar_one_or_none()
        return None if value is None else str(value)


class Draft(View):
    """A view that may append, under the writers' lock: what it reads stays true until it is committed.

    New entries wait in memory and are written together; every read sees them.
    """

    def __init__(self, connection: sa.Connection, hot: Hot, memos: Memos) -> None:
        super().__init__(connection)
        self._hot = hot
        self._cursor = connection.connection.cursor()
        self._memos = memos
        self._waiting: list[Row] = []
        self._last: dict[str, Row] = {}
        self.appended = 0

    def last(self, account: str) -> Row | None:
        """See `View.last`; read once per transaction."""
        row = self._last.get(account)
        if row is None:
            found = self._hot.last.run(self._cursor, {"account": account}).fetchone()
            if found is None:
                return None
            row = self._last[account] = dict(zip(_COLUMNS, found, strict=True))
        return row

    def memo(self, account: str) -> dict[str, Any]:
        """See `View.memo`. The newest entry's hash stands for all before it, whoever wrote them."""
        last = self.last(account)
        head = last["hash"] if last else GENESIS
        known = self._memos.get(account)
        if known is None or known[0] != head or len(known[1]) > _MEMO:
            known = self._memos[account] = (head, {})
        return known[1]

    def _ask(self, query: sa.Executable, **values: object) -> sa.CursorResult[Any]:
        self.flush()
        return super()._ask(query, **values)

    def flush(self) -> None:
        """Write the entries that wait."""
        if self._waiting:
            rows, self._waiting = self._waiting, []
            self._hot.append.insert(self._cursor, rows)

    def hide(self, name: str) -> None:
        """Draw the hidden value called `name`, where it is missing."""
        hide(self._connection, name)

    def append(
        self,
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
    ) -> Row:
        """Add one entry to the chain of `account`; `spent` and `reserved` are changes to the running totals.

        A key that is taken fails the whole act when it is written: its owner looks first, see `by_key`.
        """
        last = self.last(account)
        memo = self.memo(account)
        row: Row = {
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
        self._waiting.append(row)
        self._last[account] = row
        memo.pop(str(lease), None)
        self._memos[account] = (row["hash"], memo)
        self.appended += 1
        return row
