"""A rehearsal on synthetic inputs before the first charge (P12): would the clipping hold, does a full batch fit?

Real records may not be seen here. The model's parameters are the same afterwards as before.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from cluster.errors import PurserError
from training.engine.sampling import MicroBatch
from training.engine.trainer import PrivateTrainer

# What fp32 may add to a contribution's norm; far inside the margin that the noise carries (run.SIGMA_MARGIN).
TOLERANCE = 1e-5
COMPANIONS = 2.0**-13  # the same for what a unit's companions may change, over max_grad_norm
# How far the sum of per-record gradients may be from autograd's gradient, over the sum of the units' norms (they may
# cancel), and of a parameter whose gradient is nothing but rounding, over those of all parameters.
AGREEMENT = {"fp32": (1e-3, 1e-6), "bf16": (0.1, 1e-3)}


@dataclass(frozen=True)
class Inputs:
    """What the model takes, in public shapes: features of `shape` and labels below `classes`; or, with `vocabulary`,
    `shape` = (length,) tokens, and labels of their own where classes is 0; `packed` where records share rows."""

    shape: tuple[int, ...]
    classes: int
    vocabulary: int = 0
    packed: bool = False


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
    batch = MicroBatch(tokens, labels if inputs.classes else tokens, unit, units, torch.ones_like(tokens))
    return replace(batch, positions=_positions(*tokens.shape)) if inputs.packed else batch


def _positions(rows: int, length: int) -> torch.Tensor:
    """Of 1, 2, 3, 1, … records in a row: one that has a row to itself must not tell what others have."""
    each = -(-length // (1 + torch.arange(rows) % 3))
    return torch.arange(length) % each[:, None]


def rehearse(trainer: PrivateTrainer, inputs: Inputs) -> Rehearsal:
    """Try the run's clipping on synthetic units: on the model as it is, and on one a little aside from it, since of a
    layer that starts at zero (a LoRA adapter, say) nothing is seen at first.

    Raises:
        PurserError: not what is handed over is applied, gradients are not what autograd's are, a tensor gets none, one
            unit's contribution exceeds max_grad_norm, or changes with its companions, or a non-finite record is let
            through: training would not be private, or of no use, and does not start.
        UsageError: a layer would take the records of a batch for one record.
    """
    trainer.check_hand_over()
    trains = [p for p in trainer.model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trains]
    seen = [_check_clipping(trainer, inputs)]
    try:
        _move_aside(trains)
        seen.append(_check_clipping(trainer, inputs))
        _check_all_learn(trainer, inputs)
    finally:
        with torch.no_grad():
            for p, old in zip(trains, before, strict=True):
                p.copy_(old)
    _check_non_finite(trainer, inputs)
    for size in sorted({1, trainer.run.max_records_per_unit}):  # the fullest micro-batches, and a step after them
        trainer.accumulate(synthetic(inputs, torch.arange(trainer.rows // size).repeat_interleave(size)))
    trainer.rehearse_step()
    if any(not torch.equal(p, old) for p, old in zip(trains, before, strict=True)):
        raise PurserError("rehearsal: it changed the model; nothing was charged.")
    trainer.check_fixed()
    largest, companions = (max(values) for values in zip(*seen, strict=True))
    return Rehearsal(sum(p.numel() for p in trains), largest, companions, trainer.rows)


@torch.no_grad()
def _move_aside(parameters: Iterable[torch.Tensor]) -> None:
    """By a tenth of their size, or 0.02; the same in every run."""
    for p in parameters:
        size = max(0.02, 0.1 * p.abs().mean().item())
        for some in p.view(-1).split(1 << 22):
            numbers = torch.arange(len(some), dtype=torch.float64, device=p.device)
            some.add_((size * torch.sin(7.233 * numbers + 2)).to(p.dtype))


def _layouts(rows: int, most: int) -> Iterator[torch.Tensor]:
    """Which unit each record is of: small units, units as large as they may be, and one of those among small ones."""
    for size in sorted({1, most}):
        yield torch.arange(max(1, min(4, rows // size))).repeat_interleave(size)
    if 1 < most < rows:
        yield torch.cat([torch.zeros(most, dtype=torch.long), torch.arange(1, 1 + min(4, rows - most))])


def _check_clipping(trainer: PrivateTrainer, inputs: Inputs) -> tuple[float, float]:
    """The largest contribution of one unit and the most it changed with its companions, over max_grad_norm."""
    run = trainer.run
    largest = companions = 0.0
    for unit, scale in itertools.product(_layouts(trainer.rows, run.max_records_per_unit), (1.0, 1e3)):
        batch = synthetic(inputs, unit, scale)
        together = _contribution(trainer, batch)
        alone = [_contribution(trainer, _only(batch, unit == u)) for u in range(batch.units)]
        largest = max(largest, *(one.norm().item() / run.max_grad_norm for one in alone))
        companions = max(companions, (torch.stack(alone).sum(0) - together).norm().item() / run.max_grad_norm)
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
    return largest, companions


def _check_all_learn(trainer: PrivateTrainer, inputs: Inputs) -> None:
    """Every tensor that trains must get a gradient: one that gets none would be trained on noise alone, in silence."""
    batch = synthetic(inputs, torch.arange(min(4, trainer.rows)))
    for name, ours, theirs, _ in trainer.gradients(batch):
        if not (bool(ours.any()) and bool(theirs.any())):
            raise PurserError(
                f"rehearsal: {name} is to train, and no gradient reaches it: nothing would move it but noise. Freeze "
                "it, leave its layer out of model.lora.target_modules, or see that the loss depends on it. Nothing was "
                "charged."
            )


def _contribution(trainer: PrivateTrainer, batch: MicroBatch) -> torch.Tensor:
    trainer.accumulate(batch)
    return trainer.contribution()


def _check_non_finite(trainer: PrivateTrainer, inputs: Inputs) -> None:
    if inputs.vocabulary:
        return  # tokens are whole numbers
    batch = synthetic(inputs, torch.zeros(trainer.run.max_records_per_unit, dtype=torch.long))
    batch.features[...] = float("nan")  # of which no layer makes a number again; some do of Inf
    if not bool((_contribution(trainer, batch) == 0).all()):
        raise PurserError("rehearsal: a non-finite record was let through; nothing was charged.")


def _only(batch: MicroBatch, rows: torch.Tensor) -> MicroBatch:
    """The records of one unit, chosen by `rows` [records]."""
    mask = None if batch.mask is None else batch.mask[rows]
    positions = None if batch.positions is None else batch.positions[rows]
    unit = torch.zeros(int(rows.sum()), dtype=torch.long)
    return MicroBatch(batch.features[rows], batch.labels[rows], unit, 1, mask, positions)


def _check_agreement(trainer: PrivateTrainer, batch: MicroBatch) -> None:
    """The unclipped sum must be autograd's gradient: a weight that is used past its layer's hook shows here."""
    seen = [
        (name, (ours.double() - theirs.double()).norm().item(), sizes)
        for name, ours, theirs, sizes in trainer.gradients(batch)
    ]
    relative, least = AGREEMENT[trainer.precision]
    everything = sum(sizes for _, _, sizes in seen)
    for name, gap, sizes in seen:
        if not gap <= max(relative * sizes, least * everything):
            raise PurserError(
                f"rehearsal: the per-record gradients of {name} do not add up to its gradient; it is used outside its "
                "layer's own forward pass, where no hook sees it. Use it as a layer only, or freeze it. Nothing was "
                "charged."
            )
