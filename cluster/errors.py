"""The errors a person may see: one clear sentence each, and the exit code that goes with it.

A message names the field or account, what was given, what is allowed and what to do. It never holds anything
computed from private records, nor a library's own message: those may print cell values.
"""

from __future__ import annotations

import traceback


class PurserError(Exception):
    """Something failed; nothing was lost. Exit code 1."""

    exit_code = 1


class UsageError(PurserError):
    """A bad command, configuration, source or account; nothing was spent. Exit code 2."""

    exit_code = 2


class Refused(PurserError):
    """The budget does not allow it; nothing was spent. Exit code 3."""

    exit_code = 3


class Unreachable(PurserError):
    """The accountant did not answer in time: training fails closed."""


def without_content(error: BaseException) -> str:
    """Describe `error` by its type and the place in our code only, so that it may cross the boundary.

    Messages, arguments and chained exceptions of libraries are dropped: pyarrow and pydantic print values (P13).
    """
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if any(f"/{room}/" in f.filename for room in ("cluster", "training", "tuning"))]
    where = f" at {ours[-1].filename.rsplit('/', 1)[-1]}:{ours[-1].lineno}" if ours else ""
    return f"{type(error).__name__}{where}"
