"""Eight runs whose next blocks wait for one commit, and acts that fail in every way there is."""

from __future__ import annotations

import threading
import time

from bookkeeping import TRAIN, VALIDATION
from crashes import Outcome, outcome

from cluster.errors import PurserError, UsageError

NAMES = tuple("abcdefgh")


def first_blocks(desk, running):
    """One call for each lease's first block."""
    return [lambda n=name, e=epoch: desk.leases.authorise(n, e, TRAIN, 1) for name, epoch in running.items()]


def paid(place, account=TRAIN):
    return [row["lease"] for row in place.rows(account) if row["kind"] == "authorise"]


def failures(desk):
    """Acts that fail in every way there is, each with what its own caller must get."""

    def refused(_draft):
        raise UsageError("refused")

    def refused_late(draft):
        draft.append(account=TRAIN, kind="refuse", key="late", body={})
        raise UsageError("refused late")

    def bug(draft):
        draft.append(account=TRAIN, kind="refuse", key="bug", body={})
        draft.hide("partition:bug")
        raise RuntimeError("bug")

    def taken(draft):
        draft.append(account=VALIDATION, kind="refuse", key=f"account:{TRAIN}", body={})

    def taken_and_seen(draft):
        draft.append(account=VALIDATION, kind="refuse", key=f"account:{TRAIN}", body={})
        draft.flush()

    def not_a_number(draft):
        draft.append(account=TRAIN, kind="refuse", key="nan", body={"x": float("nan")})

    def broken_sql(draft):
        draft._connection.exec_driver_sql("SELECT nonsense")

    return {
        "refused": (refused, UsageError),
        "refused late": (refused_late, UsageError),
        "bug": (bug, RuntimeError),
        "taken": (taken, PurserError),
        "taken and seen": (taken_and_seen, PurserError),
        "not a number": (not_a_number, ValueError),
        "broken sql": (broken_sql, PurserError),
    }


def begin(call):
    """A thread that makes `call`, and where what comes of it will be found."""
    found: list[Outcome] = []
    thread = threading.Thread(target=lambda: found.append(outcome(call)), daemon=True)
    thread.start()
    return thread, found


def until(reached):
    """Wait for what another thread is about to do."""
    deadline = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.0005)
