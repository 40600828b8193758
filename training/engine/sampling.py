"""Poisson sampling of privacy units, and packing them into micro-batches (P7).

Each rank samples its own shard with its own key: inclusion is independent across units and ranks, so the union over
ranks is Poisson at the run's sample_rate whatever the world size. What was drawn is private: it stays in this process.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from cluster.errors import PurserError, UsageError
from training.engine.randomness import Keystream
from training.engine.run import DPSGDRun


class Rows(Protocol):
    """Rows as a tensor has them, or that are read when they are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, which: torch.Tensor | slice, /) -> torch.Tensor:
        """The rows at `which`, int64 [rows] or a slice, as a tensor of their own."""
        ...


@dataclass(frozen=True)
class Shard:
    """One rank's private records, grouped by unit. What holds them may be a tensor, or read them when they are asked
    for: nothing here asks for more than the records of one micro-batch.

    Attributes:
        features: float tensor [records, ...], or int64 tokens [records, length].
        labels: int64 tensor [records]; or [records, length], the token that each token is, with -100 where it is not to
            be predicted.
        offsets: int64 array [units + 1]; unit u owns records offsets[u] to offsets[u+1].
        groups: int64 tensor [records], which declared group each record is of; only where a model is judged.
        mask: int64 tensor [records, length], 1 where there is a token and 0 in the padding after them; None for tables.
        positions: int64 tensor [records, length], of tokens that several records of one unit may share a row of: the
            place of each in its own record. `records` are then rows wherever they are counted here. None elsewhere.

    Raises:
        UsageError: there is padding before a token: causal models are given no mask, and would read it. Only a tensor
            is looked through for it: what reads rows when they are asked for makes its masks of lengths.
    """

    features: Rows
    labels: Rows
    offsets: np.ndarray
    mask: Rows | None = None
    groups: Rows | None = None
    positions: Rows | None = None

    def __post_init__(self) -> None:
        if isinstance(self.mask, torch.Tensor) and bool((self.mask[:, 1:] > self.mask[:, :-1]).any()):
            raise UsageError(
                "data: padding stands before a record's tokens; set the tokenizer's padding_side to right."
            )

    @property
    def units(self) -> int:
        """How many units this rank holds. Private."""
        return len(self.offsets) - 1


@dataclass(frozen=True)
class MicroBatch:
    """Whole units that go through the model at once.

    Attributes:
        features, labels, mask, positions: as a shard's, [rows, ...]: the records, and then padding up to a public
            number of rows.
        unit: int64 [records], which unit each record is of, from 0; on the CPU.
        units: how many units there are.
    """

    features: torch.Tensor
    labels: torch.Tensor
    unit: torch.Tensor
    units: int
    mask: torch.Tensor | None = None
    positions: torch.Tensor | None = None

    def to(self, device: torch.device) -> MicroBatch:
        """On `device`, but for `unit`."""
        mask = None if self.mask is None else self.mask.to(device)
        positions = None if self.positions is None else self.positions.to(device)
        features, labels = self.features.to(device), self.labels.to(device)
        return replace(self, features=features, labels=labels, mask=mask, positions=positions)

    def padded(self, rows: int) -> MicroBatch:
        """With rows of zeros after the records, whose loss nobody asks for: every micro-batch has one shape.

        Their mask is 1 but for its end: a row that attends to nothing would be NaN, and where every mask is 1
        transformers may take another kernel. Their positions are 0, each token a record of its own: transformers makes
        no mask where no row of a batch has two records.
        """
        missing = rows - len(self.labels)
        if missing <= 0:
            return self

        def fill(values: torch.Tensor, value: int) -> torch.Tensor:
            return torch.cat([values, values.new_full((missing, *values.shape[1:]), value)])

        mask = self.mask
        if mask is not None:
            mask = fill(mask, 1)
            mask[-missing:, -1] = 0
        positions = None if self.positions is None else fill(self.positions, 0)
        features, labels = fill(self.features, 0), fill(self.labels, 0)
        return replace(self, features=features, labels=labels, mask=mask, positions=positions)


class PoissonSampler:
    """Draws the logical batches of one rank: unit u joins step t with probability q, independently of all else."""

    def __init__(self, run: DPSGDRun, units: int) -> None:
        self._run = run
        self._units = units
        self._keys = Keystream()

    def draw(self) -> np.ndarray:
        """The units of the next step, ascending; may be empty. Shape [joined], int64."""
        return np.flatnonzero(self._keys.bernoulli(self._units, self._run.sample_rate))


def rows_of(run: DPSGDRun, ranks: int) -> int:
    """How many rows every micro-batch has: physical_batch_size, or fewer where a rank's whole batch is expected to be
    smaller. Made of public numbers only."""
    share = run.expected_batch_size / ranks
    most = math.ceil(share + 4 * math.sqrt(share)) * run.max_records_per_unit
    return min(run.physical_batch_size, most)


def micro_batches(shard: Shard, joined: np.ndarray, rows: int) -> Iterator[MicroBatch]:
    """Cut a logical batch into micro-batches of at most `rows` records, each unit whole in one.

    Raises:
        PurserError: a unit does not fit.
    """
    sizes = shard.offsets[joined + 1] - shard.offsets[joined]
    first = 0
    while first < len(joined):
        last, records = first, 0
        while last < len(joined) and records + sizes[last] <= rows:
            records += sizes[last]
            last += 1
        if last == first:
            raise PurserError("training.physical_batch_size: a unit has more records than one micro-batch may hold.")
        chosen = joined[first:last]
        index = torch.from_numpy(np.concatenate([np.arange(shard.offsets[u], shard.offsets[u + 1]) for u in chosen]))
        unit = torch.from_numpy(np.repeat(np.arange(last - first), sizes[first:last]))
        mask = None if shard.mask is None else shard.mask[index]
        positions = None if shard.positions is None else shard.positions[index]
        yield MicroBatch(shard.features[index], shard.labels[index], unit, last - first, mask, positions)
        first = last
