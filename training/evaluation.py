"""Judging a model: on private records by counts released with discrete Gaussian noise, on public ones exactly (P13).

The un-noised counts of private records exist for one line of this file and go nowhere else. Their release must have
been authorised first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cluster.accounting.mechanisms import DiscreteGaussian
from cluster.errors import PurserError
from training.config import Job
from training.engine.objective import in_one_shape, logits_of, record_losses
from training.engine.sampling import MicroBatch, Shard
from training.sections import LOSS_PARTS, Evaluation


@dataclass(frozen=True)
class PublicRecords:
    """Records of a file that the job declares public, each a unit of its own. A type of its own, so that nobody judges
    private ones without noise."""

    shard: Shard


def judged(model: nn.Module, records: Shard | PublicRecords, job: Job) -> dict[str, Any]:
    """What is released of `model` as `job` says: on public records exactly, on private ones with noise.

    Args:
        records: every one of the validation partition, or of the public file.

    Returns:
        See `noised`; of public records `correct` and `wrong` are exact, and errors are those of sampling records.

    Raises:
        PurserError: the records are not those that the job says; nothing was released.
    """
    evaluation, rows = job.evaluation, job.training.physical_batch_size
    if isinstance(records, PublicRecords) != (evaluation.on == "public"):
        raise PurserError("evaluation: these are not the records that the job says; nothing was released.")
    if isinstance(records, PublicRecords):
        return exact(model, records, evaluation, rows)
    return noised(model, records, evaluation, job.histogram, rows)


def noised(
    model: nn.Module, shard: Shard, evaluation: Evaluation, mechanism: DiscreteGaussian, rows: int = 1024
) -> dict[str, Any]:
    """Release how many records `model` labels correctly and wrongly and the accuracy they imply, or how much of the
    bound its units' losses come to.

    Args:
        shard: every record of the validation partition. For the accuracy a unit has at most `mechanism.l2_sensitivity`
            of them; for the loss that is `LOSS_PARTS`, however many it has. With groups, each has two counts of its
            own: what a unit adds to all of them together stays the same, so that their L2 sensitivity does.
        rows: records that go through the model at once.

    Returns:
        `correct` and `wrong` (noised counts, whole numbers that may be negative), `accuracy` in [0, 1] (their share,
        so that no private count normalises it) and `accuracy_error`, 1.96 standard deviations of the noise in both.
        Or `clipped_loss`, in nats from 0 to the bound, and `clipped_loss_error`. With groups, counts are the sums over
        groups, and `groups` holds figure and error of each by its name.

    Raises:
        PurserError: the noise that OpenDP would add is not the noise that was charged.
    """
    from opendp.domains import atom_domain, vector_domain  # not opendp.prelude, which imports scikit-learn: 0.4 s
    from opendp.measurements import make_gaussian
    from opendp.metrics import l2_distance
    from opendp.mod import enable_features

    names = _names(evaluation)
    enable_features("contrib")
    space = vector_domain(atom_domain(T=int), size=2 * len(names)), l2_distance(T=float)
    release = make_gaussian(*space, scale=mechanism.scale)
    rho = mechanism.l2_sensitivity**2 / (2 * mechanism.scale**2)
    if not release.map(float(mechanism.l2_sensitivity)) <= rho * (1 + 1e-9):
        raise PurserError("evaluation: OpenDP would add less noise than was charged for; nothing was released.")
    counts = release(_counts(_per_record(model, shard, evaluation, rows), shard, evaluation))

    def said(good: int, bad: int, deviation: float) -> dict[str, float]:
        total = good + bad
        if total <= 0:
            return _figures(evaluation, 0.0, 1.0)
        return _figures(evaluation, good / total, 1.96 * deviation * math.hypot(good, bad) / total**2)

    good, bad = sum(counts[::2]), sum(counts[1::2])
    of_each = zip(names, counts[::2], counts[1::2], strict=True)
    return {
        **({"correct": good, "wrong": bad} if evaluation.metric == "accuracy" else {}),
        **said(good, bad, mechanism.scale * math.sqrt(len(names))),
        **(
            {"groups": {name: said(yes, no, mechanism.scale) for name, yes, no in of_each}} if evaluation.groups else {}
        ),
    }


def exact(model: nn.Module, records: PublicRecords, evaluation: Evaluation, rows: int = 1024) -> dict[str, Any]:
    """What `noised` releases, of public records: nothing is added, and the errors are 1.96 standard errors of the mean
    over records like these."""
    shard, names = records.shard, _names(evaluation)
    goodness = _per_record(model, shard, evaluation, rows)

    def said(some: torch.Tensor) -> dict[str, float]:
        if len(some) < 2:
            return _figures(evaluation, float(some.sum()), 1.0)
        return _figures(evaluation, float(some.mean()), 1.96 * float(some.std()) / math.sqrt(len(some)))

    of = _groups(shard, evaluation)
    right = int(goodness.sum()) if evaluation.metric == "accuracy" else 0
    return {
        **({"correct": right, "wrong": shard.units - right} if evaluation.metric == "accuracy" else {}),
        **said(goodness),
        **({"groups": {name: said(goodness[of == i]) for i, name in enumerate(names)}} if evaluation.groups else {}),
    }


def _names(evaluation: Evaluation) -> tuple[str, ...]:
    return evaluation.groups.names if evaluation.groups is not None else ("all",)


def _groups(shard: Shard, evaluation: Evaluation) -> torch.Tensor:
    """The group of each record."""
    if evaluation.groups is None:
        return torch.zeros(len(shard.labels), dtype=torch.long)
    if shard.groups is None or len(shard.groups) != len(shard.labels):
        raise PurserError("evaluation: it has groups, but its records are in none of them; nothing was released.")
    return shard.groups[:]


def _figures(evaluation: Evaluation, goodness: float, error: float) -> dict[str, float]:
    """Of a share of what is good, in [0, 1] but for noise: the accuracy, or the loss that the rest of it is."""
    name, value = "accuracy", min(1.0, max(0.0, goodness))
    if evaluation.metric == "loss":
        name, value = "clipped_loss", 1 - value
    return {name: evaluation.most * value, f"{name}_error": evaluation.most * min(1.0, error)}


@torch.no_grad()
def _per_record(model: nn.Module, shard: Shard, evaluation: Evaluation, rows: int) -> torch.Tensor:
    """How good `model` is on each record, float64 in [0, 1]: 1 where its label is right, or the share of the bound that
    its loss leaves."""

    def good(batch: MicroBatch) -> torch.Tensor:
        count = len(batch.unit)
        if evaluation.metric == "accuracy":
            return logits_of(model, batch)[:count].argmax(1) == batch.labels[:count]
        lost = record_losses(model, batch).double() / evaluation.loss_bound
        return 1 - lost.nan_to_num(nan=1.0).clamp(0, 1)

    return asked(model, shard, rows, good)


@torch.no_grad()
def asked(model: nn.Module, shard: Shard, rows: int, question: Callable[[MicroBatch], torch.Tensor]) -> torch.Tensor:
    """What `question` says of each record of `shard`, float64 [records], while `model` is not training.

    Batches have one shape, so that no record changes how another's is computed. Of private records the answers are
    secret (P13).
    """
    training, device = model.training, next(model.parameters()).device
    bf16 = next(model.parameters()).dtype == torch.bfloat16  # DeepSpeed's: they take numbers in fp32 by autocast only
    found = [torch.zeros(0, dtype=torch.float64)]
    model.eval()
    for start in range(0, len(shard.labels), rows):
        some = slice(start, start + rows)
        labels, mask = shard.labels[some], None if shard.mask is None else shard.mask[some]
        positions = None if shard.positions is None else shard.positions[some]
        one_each = torch.arange(len(labels))
        batch = MicroBatch(shard.features[some], labels, one_each, len(labels), mask, positions)
        batch = in_one_shape(model, batch, rows).to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            found.append(question(batch).double().cpu())
    model.train(training)  # at a rung the run goes on, and hooks see only a model that trains
    return torch.cat(found)


def _counts(goodness: torch.Tensor, shard: Shard, evaluation: Evaluation) -> list[int]:
    """The cells (good, bad) of each group, before noise.

    For the accuracy a record is 1 in one cell. For the loss a unit shares `LOSS_PARTS` out over the groups of its
    records, by their number and rounded down, and each group's part over good and bad, by the mean over its records: it
    adds at most `LOSS_PARTS` in L1 to all cells together, and so in L2.
    """
    of, groups = _groups(shard, evaluation), len(_names(evaluation))
    good = whole = torch.zeros(0, dtype=torch.long)
    if evaluation.metric == "accuracy":
        good, whole = goodness.long(), torch.ones(len(of), dtype=torch.long)
    elif len(of):
        sizes = torch.from_numpy(shard.offsets).diff()
        unit = torch.repeat_interleave(torch.arange(shard.units), sizes)
        cells, place, records = torch.unique(unit * groups + of, return_inverse=True, return_counts=True)
        mean = torch.zeros(len(cells), dtype=torch.float64).index_add_(0, place, goodness) / records
        whole = LOSS_PARTS * records // sizes[cells // groups]
        good, of = torch.minimum((whole * mean).round().long(), whole), cells % groups
    counts = torch.zeros(groups, 2, dtype=torch.long)
    counts.index_add_(0, of, torch.stack([good, whole - good], dim=1))
    return counts.flatten().tolist()
