"""What is told of a model that was judged: the allow-listed names, and how screens, pages and searchers read them.

Pure functions of what was released already; no record and no count that is not noised or public comes here (P13).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from cluster.errors import PurserError

ACCURACY = ("accuracy", "accuracy_error", "correct", "wrong")
LOSS = ("clipped_loss", "clipped_loss_error")  # of losses each clipped: no name that an un-noised loss goes by
METRICS = (*ACCURACY, *LOSS)  # what evaluations release
RELEASED = (*METRICS, "groups")
PUBLIC = frozenset(("steps", "attempt", "status", *RELEASED))  # what the report of a run may carry


class Figure(NamedTuple):
    """The number that a model is judged by, and its error bar: 95 % of it lies within ± `error`."""

    name: str
    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.error:.3f}"


def figure(metrics: Mapping[str, Any]) -> Figure | None:
    """The figure in `metrics`; None where there is none, or a part of it is missing or no finite number."""
    for name in (ACCURACY[0], LOSS[0]):
        found = [metrics.get(name), metrics.get(f"{name}_error")]
        value, error = (float(one) if isinstance(one, (int, float)) else math.nan for one in found)
        if math.isfinite(value) and math.isfinite(error):
            return Figure(name.replace("_", " "), value, max(0.0, error))
    return None


def in_words(metrics: Mapping[str, Any]) -> str:
    """The figure in words, such as "accuracy 0.861 ± 0.012"; empty where there is none."""
    found = figure(metrics)
    return f"{found.name} {found}" if found else ""


def by_group(metrics: Mapping[str, Any]) -> list[str]:
    """The figure of each declared group, in words; none where none were declared."""
    return [f"{name}: {in_words(one)}" for name, one in metrics.get("groups", {}).items()]


def score(metrics: Mapping[str, Any]) -> float:
    """What runs are compared by, the higher the better: the accuracy, or the loss with its sign changed.

    Raises:
        PurserError: there is neither.
    """
    found = figure(metrics)
    if found is None:
        raise PurserError("report: a run that is to be compared has neither an accuracy nor a clipped loss.")
    return found.value if found.name == ACCURACY[0] else -found.value


def only_public(report: Mapping[str, object]) -> None:
    """Check that a run's report carries nothing but step counts as planned, status words and released metrics, by name.

    Raises:
        PurserError: another key; what it stands for is not shown.
    """
    for key in report:
        if key not in PUBLIC:
            raise PurserError(
                f"report: a run reported {str(key)[:40]!r}, which is neither public nor noised, so it was dropped "
                f"and the run ended; a report may carry {', '.join(sorted(PUBLIC))}."
            )
