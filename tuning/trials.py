"""What a sweep knows of its trials, and keeps of them for a resume: plain facts, no Ray, nothing that is not public or
noised."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.accounting.answers import Answer, explain
from cluster.accounting.books import Account
from cluster.errors import UsageError
from cluster.files import write_whole
from training.config import Job
from training.driver import COMPLETED, FAILED, REFUSED, STOPPED, Charged, Outcome
from training.metrics import score
from tuning.config import SweepJob

CANDIDATES = "candidates.json"  # in a sweep's folder: drawn once, so that a resumed sweep has the same


@dataclass
class Trial:
    """One candidate of the sweep and how it ended. Number 0 is the final run of the best."""

    number: int
    lease: str
    values: dict[str, Any]
    job: Job
    outcome: Outcome = field(default_factory=lambda: Outcome(FAILED, why="it was interrupted before it ended"))
    steps: int = 0
    charges: Charged | None = None

    @property
    def label(self) -> str:
        """What it is called on a screen or a page."""
        return str(self.number) if self.number else "final"

    @property
    def over(self) -> bool:
        """Whether nothing is left to be done for it: a resumed sweep runs only what is not over."""
        return self.outcome.status in (COMPLETED, STOPPED, REFUSED)


def lease_of(sweep: str, number: int) -> str:
    """The name of a trial's lease, which is also its Ray Train run's."""
    return f"{sweep}-{number:02d}"


def trials_of(job: SweepJob, name: str, folder: Path) -> list[Trial]:
    """The candidates of the sweep called `name`, each with how it ended if it did."""
    trials = []
    for number, values in enumerate(kept_candidates(folder), start=1):
        trial = Trial(number, lease_of(name, number), values, job.candidate(values))
        trial.outcome = Outcome.kept(trial_folder(folder, number)) or trial.outcome
        trials.append(trial)
    return trials


def trial_folder(folder: Path, number: int) -> Path:
    """Where a trial keeps its weights and checkpoints, made if need be."""
    path = folder / "trials" / f"{number:02d}"
    path.mkdir(parents=True, exist_ok=True)
    return path


def keep_candidates(folder: Path, candidates: Sequence[dict[str, Any]]) -> None:
    """Write what a sweep will try, before any of it is asked for; with Optuna, what it drew so far."""
    write_whole(folder / CANDIDATES, json.dumps(list(candidates), indent=1) + "\n")


def kept_candidates(folder: Path) -> list[dict[str, Any]]:
    """What the sweep in `folder` tries; dotted field → value.

    Raises:
        UsageError: there is no sweep in it.
    """
    try:
        candidates: list[dict[str, Any]] = json.loads((folder / CANDIDATES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UsageError(
            f"SWEEP: {folder.name} is no sweep that can be resumed; a single run goes on with purser train --resume."
        ) from None
    return candidates


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """The trial with the highest score among those that have weights to release."""
    finished = [t for t in trials if t.outcome.status in (COMPLETED, STOPPED) and t.outcome.metrics]
    return max(finished, key=lambda trial: score(trial.outcome.metrics), default=None)


def nothing_left(answer: Answer, accounts: Sequence[Account]) -> str:
    """Why a sweep ends by itself."""
    asked = explain(answer.shortages, accounts)
    return f"nothing in the space can be paid any more: for the cheapest candidate, {asked}"


def refuse_rest(folder: Path, trials: Sequence[Trial], why: str) -> None:
    """Refuse what was not asked for yet, without an entry of its own in the ledger."""
    for trial in trials:
        if not trial.over:
            trial.outcome = Outcome(REFUSED, why=why).keep(trial_folder(folder, trial.number))


def said(values: dict[str, Any]) -> str:
    """A candidate's values for a line on the screen."""
    return "  ".join(f"{name.rpartition('.')[2]} {_short(value)}" for name, value in values.items())


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
