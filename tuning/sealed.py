"""What a private selection remembers and nobody may see: how many candidates there are, which, and what each came to.

Files in one owner-only folder below the sweep's, inside the boundary like checkpoints. They are what its worker groups
take candidates from and what a resume goes on with. Nothing of them may be printed, reported, sent to Ray or put into
an error (P13); when the winner is out, they are destroyed. No Ray here.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.accounting.mechanisms import RepeatAndSelect
from cluster.accounting.selection import draw
from cluster.errors import UsageError
from cluster.files import remove, write_whole
from training.driver import COMPLETED, Outcome
from training.metrics import score
from training.release import left
from tuning.config import SweepJob

SEALED = "sealed"  # in a sweep's folder
_QUEUE = "queue.json"


@dataclass(frozen=True)
class Candidate:
    """One of K. `tag`: random bits that decide between equal scores, drawn before anything runs.

    `folder` is there once it has begun, its outcome once it is over: what lies between crashed, or runs.
    """

    values: dict[str, Any]
    tag: str
    folder: Path

    @property
    def outcome(self) -> Outcome | None:
        """What it came to."""
        return Outcome.kept(self.folder) if self.folder.exists() else None


def _hash(job: SweepJob) -> str:
    return hashlib.sha256(job.model_dump_json().encode()).hexdigest()


class Sealed:
    """The state of the selection whose sweep keeps its files in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / SEALED

    def drawn_for(self, job: SweepJob) -> bool:
        """Whether K and the candidates are drawn; they never are again.

        Raises:
            UsageError: they are, for another job.
        """
        if not (self.folder / _QUEUE).exists():
            return False
        if self._read()["job"] != _hash(job):
            raise UsageError(
                "SWEEP: its job.json is not what the selection began with; a selection goes on unchanged or not at "
                "all, put the file back or start a new one."
            )
        return True

    def draw(self, job: SweepJob, order: int | None = None) -> None:
        """Draw K and as many candidates, from the operating system's entropy; for after the price is reserved.

        Args:
            order: of the train account, at which a field that is auto is solved.
        """
        mechanism = job.selection()[0].mechanism
        assert isinstance(mechanism, RepeatAndSelect)
        count = draw(mechanism.repetitions)
        queue = [{"values": job.solved(job.tuning.drawn(), order), "tag": secrets.token_hex(16)} for _ in range(count)]
        self.folder.mkdir(mode=0o700, exist_ok=True)
        whole = {"job": _hash(job), "candidates": queue}
        write_whole(self.folder / _QUEUE, json.dumps(whole))

    def candidates(self) -> list[Candidate]:
        """All K of them."""
        queue = self._read()["candidates"]
        return [Candidate(one["values"], one["tag"], self.folder / f"{i}") for i, one in enumerate(queue)]

    def _read(self) -> dict[str, Any]:
        whole: dict[str, Any] = json.loads((self.folder / _QUEUE).read_text(encoding="utf-8"))
        return whole

    def claim(self) -> Candidate | None:
        """A candidate that nobody has begun, now begun: no other call ever returns it. None if there is none left."""
        for candidate in self.candidates():
            if candidate.folder.exists():
                continue
            try:
                candidate.folder.mkdir(mode=0o700)
            except FileExistsError:  # another group was quicker
                continue
            return candidate
        return None

    def keep(self, candidate: Candidate, metrics: dict[str, Any]) -> None:
        """`candidate` is over and has these noised metrics; its model is in its folder. Only the best's stay."""
        Outcome(COMPLETED, metrics).keep(candidate.folder)
        with self._locked():
            best = self.best()
            for other in self.candidates():
                if other.outcome and best and other.tag != best.tag:
                    remove(left(other.folder))

    def best(self) -> Candidate | None:
        """The candidate of the highest noised score; of equal ones that with the largest tag. A candidate that crashed
        counts as −∞. None if none is over: K was 0, or all of them crashed."""
        over = [(outcome, one) for one in self.candidates() if (outcome := one.outcome)]
        ranked = max(over, key=lambda pair: (score(pair[0].metrics), pair[1].tag), default=None)
        return ranked[1] if ranked else None

    @property
    def left(self) -> bool:
        """Whether there is a candidate that nobody has begun."""
        return not all(candidate.folder.exists() for candidate in self.candidates())

    def destroy(self) -> None:
        """Forget K and the losers."""
        shutil.rmtree(self.folder)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.folder / ".lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
