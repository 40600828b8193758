"""Shared by the engine's tests: small models and shards, DP-SGD as the paper has it (one unit at a time, in float64),
noise that is switched off, and what each of three real ranks does in the one test that spawns processes."""

from __future__ import annotations

import copy
import datetime
import os
import sys
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from training.engine.randomness import Keystream
from training.engine.run import DPSGDRun
from training.engine.sampling import MicroBatch, PoissonSampler, Shard
from training.engine.trainer import PrivateTrainer
from training.models import build
from training.sections import Model, Optimizer

torch.set_num_threads(1)  # models this small only lose time to more, most of all on two shared cores

KINDS = ("linear", "mlp", "cnn")
MODES = ("bookkeeping", "hooks")
WIDTH, CLASSES, IMAGE = 16, 3, (1, 4, 4)
CLIP = {"linear": 5.6, "mlp": 2.2, "cnn": 1.2}  # near the median norm: some units are clipped, some are not


def plan(**changes: Any) -> DPSGDRun:
    """A run that every unit joins at each step; with changes.

    The noise multiplier is the least allowed, because the public grid that sums are rounded to follows it: at 0.1 it is
    C·2^-22, so that three steps of rounding move a parameter by less than 1e-7.
    """
    facts: dict[str, Any] = {
        "noise_multiplier": 0.1,
        "max_grad_norm": 1.0,
        "sample_rate": 1.0,
        "expected_batch_size": 5,  # not the number of units, nor of those that join
        "steps": 3,
        "block": 3,
        "physical_batch_size": 64,
        "max_records_per_unit": 3,
    }
    return DPSGDRun(**{**facts, **changes})


def model_of(kind: str, seed: int = 0) -> nn.Module:
    """A model that the engine's user would get, with random weights."""
    torch.manual_seed(seed)
    model = build(Model(kind=kind, hidden=6, channels=2), WIDTH, CLASSES, IMAGE)
    if kind == "linear":
        nn.init.normal_(model[0].weight, std=0.3)
    return model


def shard_of(units: int = 12, seed: int = 1, most: int = 3) -> Shard:
    """Random units of 1 to `most` records."""
    random = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(random.integers(1, most + 1, units))]).astype(np.int64)
    records = int(offsets[-1])
    features = torch.from_numpy(random.normal(size=(records, WIDTH))).float()
    return Shard(features, torch.from_numpy(random.integers(0, CLASSES, records)), offsets)


def part_of(shard: Shard, units: np.ndarray) -> Shard:
    """The shard that holds only `units` of another; may be empty."""
    sizes = shard.offsets[units + 1] - shard.offsets[units]
    rows = np.concatenate([np.arange(shard.offsets[u], shard.offsets[u + 1]) for u in units] or [np.arange(0)])
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return Shard(shard.features[rows], shard.labels[rows], offsets, None if shard.mask is None else shard.mask[rows])


def unit_of(shard: Shard, u: int) -> MicroBatch:
    """Unit `u` alone."""
    alone = part_of(shard, np.array([u]))
    return MicroBatch(alone.features, alone.labels, torch.zeros(len(alone.labels), dtype=torch.long), 1)


def whole(shard: Shard) -> MicroBatch:
    """Every unit of a shard in one micro-batch."""
    sizes = torch.from_numpy(np.diff(shard.offsets))
    return MicroBatch(shard.features, shard.labels, torch.arange(shard.units).repeat_interleave(sizes), shard.units)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def flat(model: nn.Module) -> torch.Tensor:
    """Every parameter that trains in one float64 vector."""
    return torch.cat([p.detach().double().flatten() for p in trainable(model)])


def gradient_of(model: nn.Module, loss: torch.Tensor) -> torch.Tensor:
    """Of every parameter that trains, flat."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, trainable(model))])


def unit_gradient(model: nn.Module, shard: Shard, u: int) -> torch.Tensor:
    """The gradient of unit `u`'s summed loss; `model` is in float64."""
    unit = unit_of(shard, u)
    return gradient_of(model, nn.functional.cross_entropy(model(unit.features.double()), unit.labels, reduction="sum"))


def reference(
    model: nn.Module, shard: Shard, run: DPSGDRun, rate: float, falls: bool = False, gradient_at: Any = unit_gradient
) -> torch.Tensor:
    """Noise-free DP-SGD in float64, each unit on its own: sum its records, clip once, add up, divide by the declared B.

    Shares nothing with the engine but torch itself. Returns the parameters, flat.
    """
    model = copy.deepcopy(model).double()
    for step in range(run.steps):
        total = torch.zeros_like(flat(model))
        for u in range(shard.units):
            gradient = gradient_at(model, shard, u)
            total += gradient * min(1.0, run.max_grad_norm / max(gradient.norm().item(), 1e-300))
        after = flat(model) - rate * (1 - step / run.steps if falls else 1) * total / run.expected_batch_size
        nn.utils.vector_to_parameters(after, trainable(model))
    return flat(model)


@contextmanager
def noise_off():
    """Put zeros in place of the noise. Only a test can: the engine has no switch for it."""
    real = Keystream.normal
    Keystream.normal = lambda self, count: np.zeros(count)
    try:
        yield
    finally:
        Keystream.normal = real


def trained(model: nn.Module, shard: Shard, run: DPSGDRun, *how: Any, **optimizer: Any) -> torch.Tensor:
    """The engine's parameters after the run, flat; `how`: clipping, precision, activation_checkpointing."""
    choice = Optimizer(**{"learning_rate": 0.5, **optimizer})
    trainer = PrivateTrainer(model, choice, run, *how)
    trainer.steps(shard, run.steps)
    return flat(trainer.unhook())


SERVER = forkserver.ForkServer()  # the session's own has not imported torch, which takes longer than what ranks do
RANKS = ("dpsgd_reference", "test_language", "test_steps", "test_trainer", "test_zero")


@contextmanager
def fresh_processes():
    """A context of `torch.multiprocessing` whose processes have imported what they run before they start. Their server
    is a fresh process: nothing of this one is in them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        SERVER.set_forkserver_preload([name for name in RANKS if name in sys.modules])
        patch.setattr(forkserver, "connect_to_new_process", SERVER.connect_to_new_process)
        yield mp.get_context("forkserver")


def on_two_ranks(act: Any, folder: Path) -> None:
    """Run `act(rank, folder)` in two fresh processes; both must end well."""
    on_ranks(2, act, folder)


def on_ranks(count: int, act: Any, *arguments: Any) -> None:
    """Run `act(rank, *arguments)` in `count` fresh processes; all must end well."""
    with fresh_processes() as context:
        ranks = [context.Process(target=act, args=(rank, *map(str, arguments))) for rank in range(count)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(180)
            assert process.exitcode == 0


# What follows runs in spawned processes.

BATCHES = (5, 2000)  # expected: with few of them the ranks' sums travel in fp32, with many in fp64
WIDE = (300, 400)  # a layer with 120,000 weights: enough to tell one noise from the sum of three


class Counted:
    """Counts the collectives that the engine asks for, by name."""

    NAMES = ("all_reduce", "broadcast", "all_gather", "reduce", "barrier", "all_gather_object", "broadcast_object_list")

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __enter__(self) -> Counted:
        self._real = {name: getattr(dist, name) for name in self.NAMES}
        for name, function in self._real.items():
            setattr(dist, name, self._counting(name, function))
        return self

    def _counting(self, name: str, function: Any) -> Any:
        def count(*args: Any, **options: Any) -> Any:
            self.calls.append(name)
            return function(*args, **options)

        return count

    def __exit__(self, *error: object) -> None:
        for name, function in self._real.items():
            setattr(dist, name, function)


def rank_main(rank: int, folder: str) -> None:
    """One of four ranks: groups of four, three, two and one; what it saw goes to `folder`/rank.pt, for the parent."""
    seen: dict[str, Any] = {}
    for world in (4, 3, 2, 1):
        if rank < world:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/group{world}",
                rank=rank,
                world_size=world,
                timeout=datetime.timedelta(seconds=60),
            )
            seen[f"parameters{world}"] = {
                (kind, mode, batch): _trained_as_rank(kind, mode, rank, world, batch)
                for kind in KINDS
                for mode in MODES
                for batch in BATCHES
            }
            seen[f"noise{world}"] = _noise_as_rank()
            if world == 4:
                seen |= _sampling_as_rank() | _collectives_as_rank(rank)
            dist.destroy_process_group()
    torch.save(seen, Path(folder) / f"{rank}.pt")


def _trained_as_rank(kind: str, mode: str, rank: int, world: int, batch: int) -> torch.Tensor:
    """Of three or four ranks the last holds nothing, ever; the others hold unequal shares."""
    shard = shard_of()
    holders = max(1, min(world, 2) if world < 4 else 3)
    owner = np.minimum(np.arange(shard.units) % (holders + 1), holders - 1)
    mine = part_of(shard, np.flatnonzero(owner == rank))
    with noise_off():
        # Another seed on every rank: the engine must start all of them from rank 0's parameters.
        run = plan(max_grad_norm=CLIP[kind], physical_batch_size=4, expected_batch_size=batch)
        return trained(model_of(kind, seed=rank), mine, run, mode, learning_rate=0.1 * batch)


def _noise_as_rank() -> torch.Tensor:
    """No rank holds a unit, so that a step is noise alone."""
    model = nn.Sequential(nn.Linear(*WIDE))
    run = plan(noise_multiplier=2.0, expected_batch_size=4, steps=1, block=1)
    empty = part_of(shard_of(), np.arange(0))
    trainer = PrivateTrainer(model, Optimizer(learning_rate=1.0), run)
    before = flat(model)
    trainer.steps(empty, 1)
    return flat(model) - before


def _sampling_as_rank() -> dict[str, Any]:
    """Every rank sets the same seeds first, as people do."""
    torch.manual_seed(42)
    np.random.seed(42)
    sampler = PoissonSampler(plan(sample_rate=0.5), 400)
    return {"joined": torch.from_numpy(np.stack([np.isin(np.arange(400), sampler.draw()) for _ in range(5)]))}


def _collectives_as_rank(rank: int) -> dict[str, Any]:
    """Batches that are nearly always empty, on one rank always."""
    shard = part_of(shard_of(), np.arange(2 * (rank < 2)))
    run = plan(sample_rate=0.05, steps=11, block=11)
    trainer = PrivateTrainer(model_of("linear"), Optimizer(), run)
    with Counted() as counted:
        trainer.steps(shard, run.steps)
    return {"collectives": counted.calls, "rare": flat(trainer.model)}
