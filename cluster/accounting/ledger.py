"""The ledger: an append-only table of hash-chained entries in one database, and the commits that its writers share.

Requests that wait for the same lock are served in one transaction and answered when it is durable. No rule about
budgets may be written here: see `leases`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import sqlalchemy as sa

from cluster.accounting import databases, schema
from cluster.accounting.views import Draft, Hot, Memos, View
from cluster.errors import PurserError, Unreachable, UsageError

T = TypeVar("T")


class _Request(Generic[T]):
    """One act that waits for a commit, and what became of it."""

    def __init__(self, act: Callable[[Draft], T]) -> None:
        self._act = act
        self._answer: T
        self._error: Exception | None = None
        self._asleep = threading.Lock()
        self._asleep.acquire()
        self.ended = False

    def wait(self) -> None:
        """Until it has ended, or it is its turn to lead."""
        self._asleep.acquire()

    def wake(self) -> None:
        """Let its caller go on; once."""
        self._asleep.release()

    def run(self, draft: Draft) -> None:
        """Perform the act. An error that comes before anything was appended is its own and no other request's."""
        before = draft.appended
        self._error = None
        try:
            self._answer = self._act(draft)
        except PurserError as error:
            if draft.appended != before:
                raise _Undo from error
            self._error = error

    def fail(self, error: Exception) -> None:
        """It came to nothing."""
        self._error, self.ended = error, True

    def answer(self) -> T:
        """What the act returned, now that it is durable."""
        if self._error is not None:
            raise self._error
        return self._answer


class _Undo(Exception):
    """An act failed after it had appended: nothing of its transaction may be committed."""


class Ledger:
    """The entries of one database.

    Args:
        url: a SQLAlchemy URL, `sqlite:////absolute/path.db` or `postgresql://user@host/database`.

    A SQLite file is made where it is missing. A PostgreSQL database must have been made by its owner before: one that
    is found empty is not the one that holds the books.

    Raises:
        UsageError: another database, one without a ledger, or a file that cannot be opened.
        Unreachable: a server that does not answer.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._engine = databases.engine(databases.parse(url))
        self._readers = databases.readers(self._engine)
        self.errors = databases.errors(self._engine)
        self._hot = Hot(self._engine.dialect)
        self._memos: Memos = {}
        self._writer: sa.Connection | None = None
        self._waiting: list[_Request[Any]] = []
        self._leader: _Request[Any] | None = None  # whose caller serves all that wait
        self._gate = threading.Lock()  # over who waits and who leads
        self._turn = threading.Lock()  # over the kept connection
        self.failures = 0  # transactions that the database failed
        try:
            with self._readers.connect() as connection:
                there = sa.inspect(connection).has_table(schema.hidden.name)
        except self.errors as error:
            raise databases.failure(self._engine.url, error, "opened") from None
        if not there and not self.embedded:
            raise UsageError(
                f"PURSER_LEDGER: {self.place} holds no ledger; `purser accountant init` makes one, once, as the role "
                "that owns the database. If it held one before, restore it: an empty ledger grants nothing."
            )
        if not there:
            init(url)

    @property
    def embedded(self) -> bool:
        """Whether this is a file of this machine's, made and filled as it is needed."""
        return self._engine.dialect.name == "sqlite"

    @property
    def place(self) -> str:
        """The URL for people: without a password."""
        return databases.shown(self._engine.url)

    def session(self) -> sa.Connection:
        """A connection of its own, outside transactions, for what lives as long as a session of the server's."""
        return self._engine.connect().execution_options(isolation_level="AUTOCOMMIT", reads_only=True)

    def failure(self, error: Exception) -> PurserError:
        """What an error of the database, met while reading, means to a person."""
        return databases.failure(self._engine.url, error, "read")

    def close(self) -> None:
        """Close every connection; they come back when they are needed."""
        with self._turn:
            self._drop()
        self._engine.dispose()

    @property
    def identity(self) -> str:
        """A public name for this ledger: clients check that they talk to the one they mean."""
        return self.secret(schema.IDENTITY)[:16]

    def secret(self, name: str) -> str:
        """The hidden value called `name`.

        Raises:
            UsageError: there is none.
        """
        with self.reading() as view:
            value = view.secret(name)
        if value is None:
            raise UsageError(f"ledger: it holds nothing under {name.split(':')[0]}; was the account made here?")
        return value

    @contextmanager
    def reading(self) -> Iterator[View]:
        """A view of one moment; takes no lock that a writer would wait for."""
        try:
            with self._readers.connect() as connection:
                yield View(connection)
        except self.errors as error:
            raise self.failure(error) from None

    def write(self, act: Callable[[Draft], T]) -> T:
        """Perform `act` under the writers' lock and return its answer once it is durable.

        Whoever waits for the lock meanwhile is served in the same transaction, and shares its commit. `act` may be
        performed more than once before it is committed: it must do nothing but read and append.

        Raises:
            PurserError: from `act`, or because the database failed; nothing was changed.
            Unreachable: the server went away; whether the act was committed is not known, so do the same act again.
        """
        request = _Request(act)
        served: list[_Request[Any]] = []
        with self._gate:
            self._waiting.append(request)
            if self._leader is None:
                self._lead(request)
        try:
            request.wait()
            if not request.ended:
                with self._turn:
                    with self._gate:
                        served, self._waiting = self._waiting, []
                    self._serve(served)
        finally:
            with self._gate:
                if not request.ended and request in self._waiting:  # interrupted before it was served
                    self._waiting.remove(request)
                if self._leader is request:
                    self._lead(self._waiting[0] if self._waiting else None)
            for other in served:
                if not other.ended:
                    other.fail(_interrupted())
                if other is not request:
                    other.wake()
        return request.answer()

    def _lead(self, request: _Request[Any] | None) -> None:
        self._leader = request
        if request is not None:
            request.wake()

    def _serve(self, requests: list[_Request[Any]]) -> None:
        try:
            self._commit(requests)
        except BaseException as error:
            self._memos.clear()  # it may hold what was never committed
            if isinstance(error, Exception) and not isinstance(error, Unreachable) and len(requests) > 1:
                for request in requests:  # one of them is to blame: each on its own
                    self._serve([request])
                return
            for request in requests:
                request.fail(_reason(error))
            if not isinstance(error, Exception):
                raise
        else:
            for request in requests:
                request.ended = True

    def _commit(self, requests: list[_Request[Any]]) -> None:
        """One transaction, on a connection that is kept: most of what a commit costs but the disk is in making one."""
        try:
            connection, transaction = self._begin()
            draft = Draft(connection, self._hot, self._memos)
            for request in requests:
                request.run(draft)
            draft.flush()
            transaction.commit()
        except BaseException as error:
            self._drop()
            if isinstance(error, self.errors):
                self.failures += 1
                raise databases.failure(self._engine.url, error, "written") from None
            raise

    def _begin(self) -> tuple[sa.Connection, sa.RootTransaction]:
        if self._writer is not None:
            try:
                return self._writer, self._writer.begin()
            except self.errors:
                self._drop()
                if self.embedded:
                    raise
        self._writer = self._engine.connect()  # the first, or the one before had gone stale: nothing was done on it
        return self._writer, self._writer.begin()

    def _drop(self) -> None:
        """Give up the kept connection, and first of all the lock that it holds."""
        writer, self._writer = self._writer, None
        if writer is None:
            return
        try:
            writer.rollback()  # closing alone would not do: SQLite keeps a closed file's lock while a cursor is left
        except self.errors:  # the connection is broken; the error that brought us here tells of it
            writer.invalidate()
        writer.close()


def init(url: str, service: str | None = None) -> None:
    """Make the tables of a ledger, as the role that is to own them; harmless where they are there already.

    Args:
        service: a PostgreSQL role that is given SELECT and INSERT on them, and nothing else.
    """
    engine = databases.engine(databases.parse(url))
    if service is not None and engine.dialect.name == "sqlite":
        raise UsageError(f"--service: {service!r} was given, but SQLite knows no roles; leave it out.")
    try:
        with engine.begin() as connection:
            schema.make(connection, service)
    except databases.errors(engine) as error:
        raise databases.failure(engine.url, error, "made") from None
    finally:
        engine.dispose()


def _reason(error: BaseException) -> Exception:
    if isinstance(error, _Undo):
        assert isinstance(error.__cause__, Exception)
        return error.__cause__
    if isinstance(error, Exception):
        return error
    return _interrupted()


def _interrupted() -> PurserError:
    return PurserError("ledger: the write was interrupted; whether it was committed shows when it is asked again.")
