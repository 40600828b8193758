"""Handing work to a cluster through Ray's job API: what is shipped, under which name, and how it is followed.

Only the dashboard's port and the cluster's token are needed. What travels is a staged folder with our own code and the
resolved job, never the folder that the user stands in: a `training.py` there would be imported in place of ours. No
data is read here, and nothing is charged.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.environment import ROOTS, code_hash
from cluster.errors import PurserError, UsageError

JOB = "job.json"  # the staged job; JSON is YAML
_WORDS = {"PENDING": "pending", "RUNNING": "running", "STOPPED": "stopped", "SUCCEEDED": "completed"}
_POLL = 1.0  # seconds


@dataclass(frozen=True)
class Submission:
    """One job on a cluster, as the job server tells of it.

    `status`: pending, running, or one of the contract's words; `code`: how its command ended, None where it has not, or
    never began. `message` is the job server's own.
    """

    submission_id: str
    status: str
    code: int | None
    message: str

    @property
    def over(self) -> bool:
        """Whether nothing more becomes of it."""
        return self.status not in ("pending", "running")

    @property
    def exit_code(self) -> int:
        """How a command that waited for it ends."""
        if self.status == "completed":
            return 0
        return self.code if self.code in (1, 2, 3) else 1


def submission_id(account: str, words: Sequence[str], job: Mapping[str, Any], name: str = "") -> str:
    """The name that the same work has every time it is submitted: of our code, the resolved job and the command."""
    said = json.dumps([code_hash(), list(words), job, name], sort_keys=True)
    return f"purser-{re.sub('[^A-Za-z0-9_-]', '-', account)}-{hashlib.sha256(said.encode()).hexdigest()[:12]}"


@contextmanager
def staged(job: Mapping[str, Any] | None) -> Iterator[Path]:
    """A folder with our own packages as this process would import them, and with `job`; it is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="purser-") as name:
        folder = Path(name)
        for root in ROOTS:
            spec = importlib.util.find_spec(root)
            assert spec is not None
            assert spec.origin is not None
            origin = Path(spec.origin)
            if origin.name == "__init__.py":
                shutil.copytree(origin.parent, folder / root, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(origin, folder)
        if job is not None:
            (folder / JOB).write_text(json.dumps(job), encoding="utf-8")
        yield folder


def requirements(path: Path) -> list[str]:
    """The lines of a requirements file, each of which must name one exact version.

    Raises:
        UsageError: one does not, or there is no such file.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--requirements: {path} cannot be read ({type(error).__name__}); name a text file.") from None
    wanted = [line for line in (line.partition("#")[0].strip() for line in lines) if line]
    for line in wanted:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*(\[[^\]]*\])?==[A-Za-z0-9.+!_-]+(\s*;.*)?", line):
            raise UsageError(f"--requirements: {line!r} names no exact version; write package==version.")
    return wanted


class JobServer:
    """The job server of one cluster: the dashboard's address, as `ray job submit --address` takes it."""

    def __init__(self, address: str) -> None:
        if not re.fullmatch(r"https?://[^\s/]+/?", address):
            raise UsageError(f"--address: {address!r} was given; write the cluster's dashboard, as http://HEAD:8265.")
        self.address = address
        self._client = self._answered(_client, address)

    def submit(
        self,
        words: Sequence[str],
        job: Mapping[str, Any] | None,
        name: str | None,
        metadata: Mapping[str, str],
        environment: Mapping[str, Any],
        cpus: float = 0,
    ) -> tuple[Submission, bool]:
        """Hand `purser WORDS` over, or find that it was handed over before; and whether it was.

        Args:
            name: the submission's, see `submission_id`; None for one that is never the same as another.
            environment: of Ray's runtime environment what is beside the staged folder.
            cpus: that the command itself asks for; one that asks for none runs on the head node.
        """
        # `exec`: Ray ends the processes that it sees below the command's shell at that moment, and one that the shell
        # starts a moment later would run on, and be charged, after it was said to be stopped.
        command = "exec " + shlex.join(["python", "-m", "purser", *words])
        with staged(job) as folder:
            try:
                made = self._client.submit_job(
                    entrypoint=command,
                    submission_id=name,
                    runtime_env={**environment, "working_dir": str(folder)},
                    metadata=dict(metadata),
                    entrypoint_num_cpus=cpus or None,
                )
            except RuntimeError as error:
                if name is not None and "already exists" in str(error):
                    return self.status(name), True
                raise PurserError(
                    f"submit: the cluster at {self.address} did not take the job ({_first_line(error)}); nothing was "
                    "charged."
                ) from None
        return self.status(made), False

    def head_works(self) -> bool:
        """Whether the head node offers CPUs; one that offers none is to run nothing."""
        from ray.util.state import list_nodes

        nodes = self._answered(lambda: list_nodes(address=self.address, detail=True, limit=10_000))
        return any(node.is_head_node and node.resources_total.get("CPU") for node in nodes)

    def status(self, name: str) -> Submission:
        """How the submission called `name` stands."""
        info = self._answered(self._client.get_job_info, name, name=name)
        code = info.driver_exit_code
        status = _WORDS.get(str(info.status.value), "refused" if code == 3 else "failed")
        return Submission(name, status, code, info.message or "")

    def log(self, name: str) -> str:
        """What it has printed so far."""
        return str(self._answered(self._client.get_job_logs, name, name=name))

    def stop(self, name: str) -> Submission:
        """Ask it to end and wait until it has; what it was charged stays charged."""
        self._answered(self._client.stop_job, name, name=name)
        while not (now := self.status(name)).over:
            time.sleep(_POLL)
        return now

    def forget(self, name: str) -> None:
        """Let go of a submission that has ended, so that its name is free."""
        self._answered(self._client.delete_job, name, name=name)

    def follow(self, name: str, tell: Callable[[str], None]) -> Submission:
        """Hand every line that it prints to `tell` until it has ended."""
        told = 0
        while True:
            now = self.status(name)
            log = self.log(name)
            whole = len(log) if now.over else log.rfind("\n") + 1
            for line in log[told:whole].splitlines():
                tell(line)
            told = max(told, whole)
            if now.over:
                return now
            time.sleep(_POLL)

    def _answered(self, ask: Callable[..., Any], *arguments: Any, name: str = "") -> Any:
        """What the job server answers; what goes wrong on the way as one sentence."""
        import requests
        from ray.exceptions import AuthenticationError

        try:
            return ask(*arguments)
        except AuthenticationError:
            raise UsageError(
                f"--address: the cluster at {self.address} wants its token; set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH "
                "to a file that holds it (RAY_AUTH_MODE=disabled for a cluster without one)."
            ) from None
        except (ConnectionError, requests.RequestException):
            raise UsageError(
                f"--address: nothing answers at {self.address}; name the cluster's dashboard, as http://HEAD:8265."
            ) from None
        except RuntimeError as error:
            if name and "404" in str(error):
                raise UsageError(f"SUBMISSION: {name} is not on the cluster at {self.address}.") from None
            raise PurserError(f"--address: {self.address} answered with an error ({_first_line(error)}).") from None


def _client(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    return JobSubmissionClient(address)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
