"""Judging a model on private records: a (correct, wrong) histogram released with discrete Gaussian noise (P13).

The un-noised counts exist for one line of this file and go nowhere else. The release must have been authorised first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cluster.accounting.mechanisms import DiscreteGaussian
from cluster.errors import PurserError

if TYPE_CHECKING:
    import torch

    from training.config import Groups
    from training.engine.sampling import Shard

METRICS = ("accuracy", "accuracy_error", "correct", "wrong")  # what every evaluation releases, all of it noised
RELEASED = (*METRICS, "groups")
PUBLIC = frozenset(("steps", "attempt", "status", *RELEASED))  # what the report of a run may carry


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


def noised_accuracy(
    model: torch.nn.Module, shard: Shard, mechanism: DiscreteGaussian, groups: Groups | None = None
) -> dict[str, Any]:
    """Release how many records `model` labels correctly and wrongly, and the accuracy they imply.

    Args:
        shard: every record of the validation partition, at most `mechanism.l2_sensitivity` of one unit.
        groups: the declared groups of `shard.groups`. Each then has two counts of its own, noised alike: a unit adds at
            most `l2_sensitivity` records to all of them together, so that their L2 sensitivity stays the same.

    Returns:
        `correct` and `wrong` (noised counts, whole numbers that may be negative), `accuracy` in [0, 1] (their share,
        so that no private count normalises it) and `accuracy_error`, 1.96 standard deviations of the noise in both.
        With groups, counts are the sums over groups, and `groups` holds accuracy and error of each by its name.

    Raises:
        PurserError: the noise that OpenDP would add is not the noise that was charged.
    """
    import torch
    from opendp.domains import atom_domain, vector_domain  # not opendp.prelude, which imports scikit-learn: 0.4 s
    from opendp.measurements import make_gaussian
    from opendp.metrics import l2_distance
    from opendp.mod import enable_features

    names = groups.names if groups is not None else ("all",)
    enable_features("contrib")
    space = vector_domain(atom_domain(T=int), size=2 * len(names)), l2_distance(T=float)
    release = make_gaussian(*space, scale=mechanism.scale)
    rho = mechanism.l2_sensitivity**2 / (2 * mechanism.scale**2)
    if not release.map(float(mechanism.l2_sensitivity)) <= rho * (1 + 1e-9):
        raise PurserError("evaluation: OpenDP would add less noise than was charged for; nothing was released.")
    training = model.training
    model.eval()
    with torch.no_grad():
        right = model(shard.features).argmax(1) == shard.labels if shard.units else torch.zeros(0, dtype=torch.bool)
    model.train(training)  # at a rung the run goes on, and hooks see only a model that trains
    of = shard.groups if groups is not None else torch.zeros(len(right), dtype=torch.long)
    if of is None or len(of) != len(right):
        raise PurserError("evaluation: it has groups, but its records are in none of them; nothing was released.")
    cells = torch.bincount(2 * of + (~right).long().cpu(), minlength=2 * len(names))
    noised = release([int(count) for count in cells])
    pairs = {name: (noised[2 * i], noised[2 * i + 1]) for i, name in enumerate(names)}
    correct, wrong = sum(noised[::2]), sum(noised[1::2])
    whole = _accuracy(correct, wrong, mechanism.scale * math.sqrt(len(names)))
    each = {name: _accuracy(*pair, mechanism.scale) for name, pair in pairs.items()} if groups is not None else {}
    return {"correct": correct, "wrong": wrong, **whole, **({"groups": each} if each else {})}


def _accuracy(correct: int, wrong: int, deviation: float) -> dict[str, float]:
    """What two noised counts say, whose noise has each that standard `deviation`."""
    total = correct + wrong
    if total <= 0:
        return {"accuracy": 0.0, "accuracy_error": 1.0}
    error = 1.96 * deviation * math.hypot(correct, wrong) / total**2
    return {"accuracy": min(1.0, max(0.0, correct / total)), "accuracy_error": min(1.0, error)}
