"""A rehearsal on synthetic inputs before the first charge (P12): would the clipping hold, does a full batch fit?

Real records may not be seen here. The model's parameters are the same afterwards as before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cluster.errors import PurserError
from training.engine.sampling import MicroBatch
from training.engine.trainer import PrivateTrainer

# What fp32 may add to a contribution's norm; far inside the margin that the noise carries (run.SIGMA_MARGIN).
TOLERANCE = 1e-5
COMPANIONS = 2.0**-13  # the same for what a unit's companions may change, over max_grad_norm


@dataclass(frozen=True)
class Rehearsal:
    """What was seen on synthetic inputs, all public: parameters that will train, the largest contribution of one unit
    over max_grad_norm, the most a unit's contribution changed with its companions, and the micro-batch that fitted."""

    parameters: int
    largest_norm: float
    companions: float
    physical_batch_size: int


def synthetic(
    shape: tuple[int, ...], records: int, classes: int, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs that no record went into: sines of running numbers. Shapes [records, *shape] and [records]."""
    numbers = torch.arange(records * torch.Size(shape).numel(), dtype=torch.float64)
    return (scale * torch.sin(12.9898 * numbers + 1)).float().view(records, *shape), torch.arange(records) % classes


def rehearse(trainer: PrivateTrainer, shape: tuple[int, ...], classes: int) -> Rehearsal:
    """Try the run's clipping on synthetic units with features of `shape` and labels below `classes`.

    Raises:
        PurserError: one unit's contribution exceeds max_grad_norm, or changes with its companions, or a non-finite
            record is let through: training would not be private and does not start.
    """
    run = trainer.run
    before = [p.detach().clone() for p in trainer.model.parameters()]
    per_unit = run.max_records_per_unit
    units = max(1, min(4, run.physical_batch_size // per_unit))

    def contribution(features: torch.Tensor, labels: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
        trainer.accumulate(MicroBatch(features, labels, unit, int(unit.max()) + 1))
        return trainer.contribution()

    largest = companions = 0.0
    for scale in (1.0, 1e3):
        features, labels = synthetic(shape, units * per_unit, classes, scale)
        unit = torch.arange(units).repeat_interleave(per_unit)
        together = contribution(features, labels, unit)
        alone = []
        for u in range(units):
            mine = unit == u
            alone.append(contribution(features[mine], labels[mine], torch.zeros(per_unit, dtype=torch.long)))
            largest = max(largest, alone[-1].double().norm().item() / run.max_grad_norm)
        gap = (torch.stack(alone).double().sum(0) - together.double()).norm().item() / run.max_grad_norm
        companions = max(companions, gap)
    if not largest <= 1 + TOLERANCE:
        raise PurserError(
            f"rehearsal: one synthetic unit contributed {largest:.4g} × max_grad_norm; clipping does not hold for "
            "this model, nothing was charged."
        )
    if not companions <= units * COMPANIONS:
        raise PurserError(
            "rehearsal: a synthetic unit's contribution changed with its companions; nothing was charged."
        )
    features, labels = synthetic(shape, per_unit, classes)
    features[...] = float("inf")
    if not bool((contribution(features, labels, torch.zeros(per_unit, dtype=torch.long)) == 0).all()):
        raise PurserError("rehearsal: a non-finite record was let through; nothing was charged.")
    features, labels = synthetic(shape, run.physical_batch_size, classes)
    contribution(features, labels, torch.arange(run.physical_batch_size))
    if any(not torch.equal(p, old) for p, old in zip(trainer.model.parameters(), before, strict=True)):
        raise PurserError("rehearsal: it changed the model; nothing was charged.")
    return Rehearsal(sum(p.numel() for p in before), largest, companions, run.physical_batch_size)
