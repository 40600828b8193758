"""A rehearsal on synthetic inputs before the first charge (P12): would the clipping hold, does a full batch fit?

Real records may not be seen here. The model's parameters are the same afterwards as before.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from cluster.errors import PurserError
from training.engine.sampling import MicroBatch
from training.engine.trainer import PrivateTrainer

# What fp32 may add to a contribution's norm; far inside the margin that the noise carries (run.SIGMA_MARGIN).
TOLERANCE = 1e-5
COMPANIONS = 2.0**-13  # the same for what a unit's companions may change, over max_grad_norm
AGREEMENT = {"fp32": 1e-3, "bf16": 0.1}  # how far per-record gradients may be from autograd's, relative


@dataclass(frozen=True)
class Inputs:
    """What the model takes, in public shapes: features of `shape` and labels below `classes`; or, with `vocabulary`,
    `shape` = (length,) tokens, and labels of their own where classes is 0."""

    shape: tuple[int, ...]
    classes: int
    vocabulary: int = 0


@dataclass(frozen=True)
class Rehearsal:
    """What was seen on synthetic inputs, all public: parameters that will train, the largest contribution of one unit
    over max_grad_norm, the most a unit's contribution changed with its companions, and the micro-batch that fitted."""

    parameters: int
    largest_norm: float
    companions: float
    physical_batch_size: int


def synthetic(inputs: Inputs, unit: torch.Tensor, scale: float = 1.0) -> MicroBatch:
    """Records that nobody's went into: sines of running numbers, or tokens by them; `unit` [records] numbers units."""
    records = len(unit)
    numbers = torch.arange(records * torch.Size(inputs.shape).numel(), dtype=torch.float64)
    labels = torch.arange(records) % max(1, inputs.classes)
    units = int(unit.max()) + 1
    if not inputs.vocabulary:
        features = (scale * torch.sin(12.9898 * numbers + 1)).float().view(records, *inputs.shape)
        return MicroBatch(features, labels, unit, units)
    tokens = ((numbers * 7919 + scale).long() % inputs.vocabulary).view(records, *inputs.shape)
    return MicroBatch(tokens, labels if inputs.classes else tokens, unit, units, torch.ones_like(tokens))


def rehearse(trainer: PrivateTrainer, inputs: Inputs) -> Rehearsal:
    """Try the run's clipping on synthetic units.

    Raises:
        PurserError: gradients are not what autograd's are, one unit's contribution exceeds max_grad_norm, or changes
            with its companions, or a non-finite record is let through: training would not be private, or of no use,
            and does not start.
    """
    run = trainer.run
    trains = [p for p in trainer.model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trains]
    per_unit = run.max_records_per_unit

    def contribution(batch: MicroBatch) -> torch.Tensor:
        trainer.accumulate(batch)
        return trainer.contribution()

    largest = companions = 0.0
    # Units as large as they may be, and as small: of the latter, more share a micro-batch.
    for size, scale in itertools.product(sorted({1, per_unit}), (1.0, 1e3)):
        units = max(1, min(4, trainer.rows // size))
        unit = torch.arange(units).repeat_interleave(size)
        batch = synthetic(inputs, unit, scale)
        together = contribution(batch)
        alone = []
        for u in range(units):
            alone.append(contribution(_only(batch, unit == u)))
            largest = max(largest, alone[-1].double().norm().item() / run.max_grad_norm)
        gap = (torch.stack(alone).double().sum(0) - together.double()).norm().item() / run.max_grad_norm
        companions = max(companions, gap)
    if not largest <= 1 + TOLERANCE:
        raise PurserError(
            f"rehearsal: one synthetic unit contributed {largest:.4g} × max_grad_norm; clipping does not hold for "
            "this model, nothing was charged."
        )
    if not companions <= 4 * COMPANIONS:
        raise PurserError(
            "rehearsal: a synthetic unit's contribution changed with its companions; nothing was charged."
        )
    _check_agreement(trainer, batch)
    if not inputs.vocabulary:
        batch = synthetic(inputs, torch.zeros(per_unit, dtype=torch.long))
        batch.features[...] = float("inf")
        if not bool((contribution(batch) == 0).all()):
            raise PurserError("rehearsal: a non-finite record was let through; nothing was charged.")
    contribution(synthetic(inputs, torch.arange(trainer.rows)))
    if any(not torch.equal(p, old) for p, old in zip(trains, before, strict=True)):
        raise PurserError("rehearsal: it changed the model; nothing was charged.")
    trainer.check_fixed()
    return Rehearsal(sum(p.numel() for p in trains), largest, companions, trainer.rows)


def _only(batch: MicroBatch, rows: torch.Tensor) -> MicroBatch:
    """The records of one unit, chosen by `rows` [records]."""
    mask = None if batch.mask is None else batch.mask[rows]
    return MicroBatch(batch.features[rows], batch.labels[rows], torch.zeros(int(rows.sum()), dtype=torch.long), 1, mask)


def _check_agreement(trainer: PrivateTrainer, batch: MicroBatch) -> None:
    """The unclipped sum must be autograd's gradient: a weight that is used past its layer's hook shows here."""
    for name, ours, theirs in trainer.gradients(batch):
        gap = (ours.double() - theirs.double()).norm().item()
        if not gap <= AGREEMENT[trainer.precision] * max(theirs.double().norm().item(), 1e-6):
            raise PurserError(
                f"rehearsal: the per-record gradients of {name} do not add up to its gradient; it is used outside its "
                "layer's own forward pass, where no hook sees it. Use it as a layer only, or freeze it. Nothing was "
                "charged."
            )
