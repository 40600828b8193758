"""Judging a model on private records: a (correct, wrong) histogram released with discrete Gaussian noise (P13).

The un-noised counts exist for one line of this file and go nowhere else. The release must have been authorised first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from cluster.accounting.mechanisms import DiscreteGaussian
from cluster.errors import PurserError

if TYPE_CHECKING:
    import torch

    from training.engine.sampling import Shard

METRICS = ("accuracy", "accuracy_error", "correct", "wrong")  # what an evaluation releases, all of it noised
PUBLIC = frozenset(("steps", "attempt", "status", *METRICS))  # what the report of a run may carry


def only_public(report: Mapping[str, object]) -> None:
    """Check that a run's report carries nothing but step counts as planned, status words and noised metrics, by name.

    Raises:
        PurserError: another key; what it stands for is not shown.
    """
    for key in report:
        if key not in PUBLIC:
            raise PurserError(
                f"report: a run reported {str(key)[:40]!r}, which is neither public nor noised, so it was dropped "
                f"and the run ended; a report may carry {', '.join(sorted(PUBLIC))}."
            )


def noised_accuracy(model: torch.nn.Module, shard: Shard, mechanism: DiscreteGaussian) -> dict[str, float]:
    """Release how many records `model` labels correctly and wrongly, and the accuracy they imply.

    Args:
        shard: every record of the validation partition, at most `mechanism.l2_sensitivity` of one unit.

    Returns:
        `correct` and `wrong` (noised counts, whole numbers that may be negative), `accuracy` in [0, 1] (their share,
        so that no private count normalises it) and `accuracy_error`, 1.96 standard deviations of the noise in both.

    Raises:
        PurserError: the noise that OpenDP would add is not the noise that was charged.
    """
    import opendp.prelude as dp
    import torch

    dp.enable_features("contrib")
    space = dp.vector_domain(dp.atom_domain(T=int), size=2), dp.l2_distance(T=float)
    release = dp.m.make_gaussian(*space, scale=mechanism.scale)
    rho = mechanism.l2_sensitivity**2 / (2 * mechanism.scale**2)
    if not release.map(float(mechanism.l2_sensitivity)) <= rho * (1 + 1e-9):
        raise PurserError("evaluation: OpenDP would add less noise than was charged for; nothing was released.")
    training = model.training
    model.eval()
    with torch.no_grad():
        right = model(shard.features).argmax(1) == shard.labels if shard.units else torch.zeros(0, dtype=torch.bool)
    model.train(training)  # at a rung the run goes on, and hooks see only a model that trains
    correct, wrong = release([int(right.sum()), int((~right).sum())])
    total = correct + wrong
    if total <= 0:
        return {"correct": correct, "wrong": wrong, "accuracy": 0.0, "accuracy_error": 1.0}
    error = 1.96 * mechanism.scale * math.hypot(correct, wrong) / total**2
    return {
        "correct": correct,
        "wrong": wrong,
        "accuracy": min(1.0, max(0.0, correct / total)),
        "accuracy_error": min(1.0, error),
    }
