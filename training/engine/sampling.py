"""Poisson sampling of privacy units, and packing them into micro-batches (P7).

Each rank samples its own shard with its own key: inclusion is independent across units and ranks, so the union over
ranks is Poisson at the run's sample_rate whatever the world size. What was drawn is private: it stays in this process.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from cluster.errors import PurserError
from training.engine.randomness import Keystream
from training.engine.run import DPSGDRun


@dataclass(frozen=True)
class Shard:
    """One rank's private records, grouped by unit.

    Attributes:
        features: float tensor [records, ...].
        labels: int64 tensor [records].
        offsets: int64 array [units + 1]; unit u owns records offsets[u] to offsets[u+1].
    """

    features: torch.Tensor
    labels: torch.Tensor
    offsets: np.ndarray

    @property
    def units(self) -> int:
        """How many units this rank holds. Private."""
        return len(self.offsets) - 1


@dataclass(frozen=True)
class MicroBatch:
    """Whole units that go through the model at once: `unit` [records] numbers each record's unit from 0."""

    features: torch.Tensor
    labels: torch.Tensor
    unit: torch.Tensor
    units: int


class PoissonSampler:
    """Draws the logical batches of one rank: unit u joins step t with probability q, independently of all else."""

    def __init__(self, run: DPSGDRun, units: int) -> None:
        self._run = run
        self._units = units
        self._keys = Keystream()

    def draw(self) -> np.ndarray:
        """The units of the next step, ascending; may be empty. Shape [joined], int64."""
        return np.flatnonzero(self._keys.bernoulli(self._units, self._run.sample_rate))


def micro_batches(shard: Shard, joined: np.ndarray, physical_batch_size: int) -> Iterator[MicroBatch]:
    """Cut a logical batch into micro-batches of at most `physical_batch_size` records, each unit whole in one."""
    sizes = shard.offsets[joined + 1] - shard.offsets[joined]
    first = 0
    while first < len(joined):
        last, records = first, 0
        while last < len(joined) and records + sizes[last] <= physical_batch_size:
            records += sizes[last]
            last += 1
        if last == first:
            raise PurserError("training.physical_batch_size: a unit has more records than one micro-batch may hold.")
        chosen = joined[first:last]
        index = np.concatenate([np.arange(shard.offsets[u], shard.offsets[u + 1]) for u in chosen])
        rows = torch.from_numpy(index)
        unit = torch.from_numpy(np.repeat(np.arange(last - first), sizes[first:last]))
        yield MicroBatch(shard.features[rows], shard.labels[rows], unit, last - first)
        first = last
