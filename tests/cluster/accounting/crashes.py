"""Commits that fail, processes that end, and callers who wait for one commit together."""

from __future__ import annotations

import os
import sqlite3
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from bookkeeping import Desk

from cluster.accounting.ledger import Ledger


class Faults:
    """Makes the commits of one accountant fail, before or after they reached the database.

    Args:
        desk: whose.

    `next` holds what befalls the next commits, in turn: "before" and "after" are errors of the driver (a full disk, a
    lost connection), "killed before" and "killed after" end the process, "" lets it pass.
    """

    def __init__(self, desk: Desk) -> None:
        self.next: list[str] = []
        self.commits = 0
        dialect = desk.ledger._engine.dialect
        self._commit: Callable[[Any], None] = dialect.do_commit
        self._lost = lost_on(desk)
        dialect.do_commit = self.do_commit

    def do_commit(self, connection: Any) -> None:
        fault = self.next.pop(0) if self.next else ""
        error = Killed() if fault.startswith("killed") else self._lost
        if fault.endswith("before"):
            raise error
        self._commit(connection)
        self.commits += 1
        if fault.endswith("after"):
            raise error


class Killed(BaseException):
    """The process ends here: nobody catches it, and nobody is told."""


def lost_on(desk: Desk) -> Exception:
    """What the driver says when it does not know whether a commit arrived."""
    if desk.ledger.embedded:
        return sqlite3.OperationalError("disk I/O error")
    return psycopg.OperationalError("consuming input failed: server closed the connection unexpectedly")


def child(script: str, *arguments: object, **environment: str) -> dict[str, Any]:
    """Arguments for `subprocess` that run `script` in a fresh Python which can import all that a test can."""
    here = Path(__file__).resolve()
    paths = os.pathsep.join(str(folder) for folder in (here.parent, here.parents[2], here.parents[3]))
    return {
        "args": [sys.executable, "-c", script, *map(str, arguments)],
        "env": {**os.environ, "PYTHONPATH": paths, **environment},
        "text": True,
    }


@dataclass
class Outcome:
    """What came of a call: an answer, or whatever was raised instead."""

    value: Any = None
    error: BaseException | None = None

    def get(self) -> Any:
        """The answer, or the error once more."""
        if self.error is not None:
            raise self.error
        return self.value


def outcome(call: Callable[[], Any]) -> Outcome:
    """Make `call`, and say what came of it."""
    try:
        return Outcome(value=call())
    except BaseException as error:  # noqa: BLE001 (also the end of the process is an outcome here)
        return Outcome(error=error)


def together(ledger: Ledger, *calls: Callable[[], Any]) -> list[Outcome]:
    """Make `calls` from a thread each, in this order, so that all that write wait for one commit and share it."""
    outcomes: list[Outcome | None] = [None] * len(calls)

    def make(number: int) -> None:
        outcomes[number] = outcome(calls[number])

    threads = [threading.Thread(target=make, args=(number,)) for number in range(len(calls))]
    with ledger._turn:
        for thread in threads:
            waiting = len(ledger._waiting)
            thread.start()
            while thread.is_alive() and len(ledger._waiting) == waiting:
                time.sleep(0.0001)
    for thread in threads:
        thread.join(120)
    assert None not in outcomes, "somebody waits for ever"
    return outcomes  # type: ignore[return-value]
