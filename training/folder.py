"""The folder of a run or a sweep: found or made, bound to the job that it began with, and the same one for all who work
in it. No Ray, no records.
"""

from __future__ import annotations

import json
import secrets
from pathlib import Path

from cluster import environment
from cluster.errors import UsageError
from cluster.files import write_whole
from training.config import Job
from training.jobfile import J, parse

JOB = "job.json"
MARK = "mark"  # of the command that works in the folder


def opened(job: Job, resume: str | None, name: str | None) -> tuple[str, Path]:
    """The name and folder of the run or sweep of `job`, made if need be, with the job in it.

    Args:
        resume: it is there, and goes on.
        name: what it is called; if it is there it goes on, as long as its job is the same. Else a new name.

    Raises:
        UsageError: none is there to be resumed, or another job has begun under its name.
    """
    text = job.model_dump_json(indent=2) + "\n"
    if resume is not None:
        return resume, environment.run_folder(resume)
    folder = environment.run_folder(name or environment.new_name(job.account), new=True, again=name is not None)
    if (folder / JOB).exists():
        if (folder / JOB).read_text(encoding="utf-8") != text:
            raise UsageError(f"--name: another job has begun as {name}; choose another name, nothing was charged.")
    else:
        write_whole(folder / JOB, text)
    return folder.name, folder


def resumed(kind: type[J], name: str) -> J:
    """The job of the run called `name`, as it was resolved when it started.

    Raises:
        UsageError: no such run, or it holds no job.
    """
    folder = environment.run_folder(name)
    try:
        raw = json.loads((folder / JOB).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UsageError(f"RUN: {name} holds no {JOB}; it cannot be resumed, start a new run.") from None
    return parse(kind, raw)


def marked(folder: Path) -> tuple[str, str]:
    """Leave a mark in `folder` that nobody else's folder has; see `check_shared`."""
    mark = secrets.token_hex(16)
    write_whole(folder / MARK, mark)
    return str(folder), mark


def check_shared(folder: str, mark: str) -> None:
    """On any node: is `folder` here the one in which the command left `mark`?

    Raises:
        UsageError: it is not there, or it is another one at the same place.
    """
    try:
        found = (Path(folder) / MARK).read_text(encoding="utf-8")
    except OSError:
        found = ""
    if found != mark:
        raise UsageError(
            f"{environment.HOME}: {folder} is not the same folder on every node of this cluster; put "
            f"{environment.HOME} on storage that all of them share. Nothing was charged."
        )
