"""What a sweep knows of its trials: plain facts, no Ray, nothing that is not public or noised."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.config import Job
from training.driver import COMPLETED, FAILED, STOPPED, Charged, Outcome


@dataclass
class Trial:
    """One candidate of the sweep and how it ended."""

    number: int
    lease: str
    values: dict[str, Any]
    job: Job
    outcome: Outcome = field(default_factory=lambda: Outcome(FAILED, why="it was interrupted before it ended"))
    steps: int = 0
    charges: Charged | None = None

    @property
    def accuracy(self) -> float:
        """The noised accuracy, or −1 where none was released."""
        return float(self.outcome.metrics.get("accuracy", -1.0))


def lease_of(sweep: str, number: int) -> str:
    """The name of a trial's lease, which is also its Ray Train run's."""
    return f"{sweep}-{number:02d}"


def trial_folder(folder: Path, number: int) -> Path:
    """Where a trial keeps its weights and checkpoints, made if need be."""
    path = folder / "trials" / f"{number:02d}"
    path.mkdir(parents=True, exist_ok=True)
    return path


def best_of(trials: list[Trial]) -> Trial | None:
    """The trial with the highest noised accuracy among those that have weights to release."""
    finished = [t for t in trials if t.outcome.status in (COMPLETED, STOPPED) and t.outcome.metrics]
    return max(finished, key=lambda trial: trial.accuracy, default=None)


def said(values: dict[str, Any]) -> str:
    """A candidate's values for a line on the screen."""
    return "  ".join(f"{name.rpartition('.')[2]} {_short(value)}" for name, value in values.items())


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
