"""Running a command of ours on a cluster and telling its end as if it had run here: its lines, its sentence, its code.

Every command runs there with --json, so that its last line is its result; what Ray's job manager writes between is left
out. See `jobs` for what travels.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.errors import PurserError, Refused, UsageError
from cluster.jobs import JOB, JobServer, Submission
from cluster.screen import Screen

_RAYS = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+\s+[A-Z]+ \S+\.py:\d+ -- ")
_SENTENCE = "purser: "
_ENDS: Mapping[int, type[PurserError]] = {2: UsageError, 3: Refused}
# A job has no terminal; and a node that runs none of its processes needs none of its files.
_AROUND = {"env_vars": {"COLUMNS": "120"}, "config": {"eager_install": False}}


@dataclass
class Transcript:
    """The log of one command, line by line: what it said goes to `say`, its result and its last sentence are kept."""

    say: Callable[[str], None]
    result: dict[str, Any] | None = None
    sentence: str = ""

    def take(self, line: str) -> None:
        """Sort one line."""
        if line.startswith("{") and (found := _object(line)) is not None:
            self.result = found
        elif line.startswith(_SENTENCE):
            self.sentence = line.removeprefix(_SENTENCE)
        elif not _RAYS.match(line):
            self.say(line)


def _object(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def follow(server: JobServer, name: str, screen: Screen) -> tuple[Submission, Transcript]:
    """Show what the submission called `name` says until it has ended."""
    told = Transcript(lambda line: screen.say(line, markup=False))
    return server.follow(name, told.take), told


def end(ended: Submission, told: Transcript) -> None:
    """Raise what a command that ended badly said, or what the job server says where it never came to speak."""
    if ended.status == "completed" or (told.result is not None and not told.sentence):
        return
    why = told.sentence or _why(ended)
    raise _ENDS.get(ended.exit_code, PurserError)(why)


def _why(ended: Submission) -> str:
    if ended.status == "stopped":
        return f"submission {ended.submission_id} was stopped; what it was charged stays charged."
    said = ended.message.strip().splitlines()
    return (
        f"submission {ended.submission_id} ended without a word of ours ({said[-1][:300] if said else ended.status}); "
        "is this purser's Python, first on the PATH that the cluster was started with?"
    )


def ask(address: str, words: Sequence[str], screen: Screen, job: Mapping[str, Any] | None = None) -> int:
    """Run `purser WORDS [job]` on the cluster at `address` and print what it says; returns its exit code.

    Raises:
        PurserError: what the command there ended with.
    """
    server = JobServer(address)
    words = words if job is None else [*words, JOB]
    made, _ = server.submit([*words, "--json"], job, None, {"purser": words[0]}, _AROUND)
    ended, told = follow(server, made.submission_id, screen)
    end(ended, told)
    screen.result(told.result or {})
    return ended.exit_code


@dataclass(frozen=True)
class Work:
    """What is submitted: `purser WORDS` over `job`.

    Args:
        name: see `jobs.submission_id`; None for what may be submitted as often as one likes.
        metadata: shows in Ray's dashboard.
    """

    words: Sequence[str]
    job: Mapping[str, Any] | None
    name: str | None
    metadata: Mapping[str, str]


def submit(
    address: str, work: Work, pip: Sequence[str], cpus: float | None, screen: Screen, wait: bool
) -> dict[str, Any]:
    """Hand a run or a sweep over; with `wait`, show what it says until it has ended.

    One that was handed over before, and did not complete, is handed over again: it goes on under its name.

    Args:
        pip: packages, with their versions, that its processes need beside the cluster's own.
        cpus: see `JobServer.submit`; None for one CPU where the head node offers none.

    Raises:
        PurserError: with `wait`, what the job ended with.
    """
    server = JobServer(address)
    environment = {**_AROUND, "pip": list(pip)} if pip else dict(_AROUND)
    if cpus is None:
        cpus = 0 if server.head_works() else 1
    handed = [*work.words, "--json"], work.job, work.name, work.metadata, environment, cpus
    made, before = server.submit(*handed)
    if before and made.over and made.status != "completed":
        server.forget(made.submission_id)
        screen.say(f"Submission {made.submission_id} was handed over before and ended {made.status}; it goes on.")
        made, before = server.submit(*handed)
    if before:
        screen.say(f"Submission {made.submission_id} was handed over before and is {made.status}.")
        if made.over:
            screen.say("To run the same once more, and pay for it once more, give it a --name of its own.")
    else:
        screen.say(f"Submission {made.submission_id} is handed over.")
    if not wait:
        screen.say(f"Next: purser logs {made.submission_id} --address {address} --follow")
        return {"submission_id": made.submission_id, "status": made.status}
    ended, told = follow(server, made.submission_id, screen)
    screen.result({"submission_id": ended.submission_id, "status": ended.status, "result": told.result})
    end(ended, told)
    return {}
