"""A logical step among ranks and over time: what is sent, what happens when a rank is lost, learning rates (P9)."""

from __future__ import annotations

import copy
import datetime
import math
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from dpsgd_reference import (
    flat,
    model_of,
    noise_off,
    on_two_ranks,
    part_of,
    plan,
    reference,
    shard_of,
    trained,
    unit_gradient,
)
from torch import nn

from cluster.errors import PurserError
from training.engine.optimizer import carrier_of
from training.engine.sampling import rows_of
from training.engine.trainer import PrivateTrainer, rate_at
from training.sections import Optimizer

SECONDS = 30  # after which a silent rank is given up


@pytest.mark.parametrize(
    ("schedule", "warmup", "want"),
    [
        ("constant", 0, [1, 1, 1, 1, 1]),
        ("linear", 0, [1, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", 0, [0.5 * (1 + math.cos(math.pi * step / 5)) for step in range(5)]),
        ("constant", 2, [1 / 3, 2 / 3, 1, 1, 1]),
        ("linear", 2, [1 / 3, 2 / 3, 1, 2 / 3, 1 / 3]),
        ("linear", 9, [0.1, 0.2, 0.3, 0.4, 0.5]),
    ],
)
def test_learning_rates(schedule, warmup, want):
    choice = Optimizer(schedule=schedule, warmup=warmup)
    assert [rate_at(step, 5, choice) for step in range(5)] == pytest.approx(want)


def test_a_schedule_is_what_the_steps_take():
    """One step of the run at the rate of its first step, and the second at the second's."""
    run = plan(steps=2, block=2)
    with noise_off():
        got = trained(model_of("mlp"), shard_of(), run, schedule="cosine", warmup=1)
    model = model_of("mlp").double()
    for rate in (0.25, 0.5):
        after = reference(model, shard_of(), plan(steps=1, block=1), rate)
        nn.utils.vector_to_parameters(after, model.parameters())
    assert (got - flat(model)).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_optimizers_take_the_private_gradient(name):
    """The same parameters as torch's own, given the clipped sum over B as a gradient."""
    shard, run = shard_of(), plan(steps=3)
    with noise_off():
        got = trained(model_of("linear"), shard, run, name=name, weight_decay=0.01, learning_rate=0.05)
    model = model_of("linear")
    kind = torch.optim.AdamW if name == "adam" else torch.optim.SGD
    optimizer = kind(model.parameters(), lr=0.05, weight_decay=0.01)
    for _ in range(run.steps):
        total, exact = torch.zeros_like(flat(model)), copy.deepcopy(model).double()
        for u in range(shard.units):
            gradient = unit_gradient(exact, shard, u)
            total += gradient * min(1.0, 1 / gradient.norm().item())
        start = 0
        for p in model.parameters():
            p.grad = (total[start : start + p.numel()] / run.expected_batch_size).view_as(p).float()
            start += p.numel()
        optimizer.step()
    assert (got - flat(model)).abs().max() < 1e-5


def test_rows_are_made_of_public_numbers():
    """A rank's whole batch where it is expected to be small, else physical_batch_size; a unit always fits."""
    assert rows_of(plan(expected_batch_size=360, physical_batch_size=256), 1) == 256
    assert rows_of(plan(expected_batch_size=64, physical_batch_size=256, max_records_per_unit=1), 4) == 32
    assert rows_of(plan(expected_batch_size=1, physical_batch_size=256, max_records_per_unit=3), 64) >= 3


@pytest.mark.parametrize(("ranks", "dtype"), [(1, torch.float32), (2, torch.float32), (4, torch.float64)])
def test_the_collective_is_fp32_only_where_the_margin_covers_it(monkeypatch, ranks, dtype):
    sent = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: ranks)
    monkeypatch.setattr(dist, "broadcast", lambda *_, **__: None)
    monkeypatch.setattr("training.engine.trainer.check_same_on_all_ranks", lambda *_: None)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: sent.append(tensor))
    run = plan(expected_batch_size=512, sample_rate=1e-3)
    trainer = PrivateTrainer(nn.Sequential(nn.Linear(5, 3)), Optimizer(), run)
    trainer.steps(part_of(shard_of(), np.arange(0)), 1)
    assert [(t.dtype, t.numel()) for t in sent] == [(dtype, 18)]


def test_rounding_to_fp32_stays_within_the_margin():
    """The worst that the bound allows for: every unit points the same way, and as many join as ever will."""
    torch.manual_seed(0)
    direction = torch.randn(1000, dtype=torch.float64)
    direction /= direction.norm()
    moved = [
        ((n + 1) * direction).float().double() - (n * direction).float().double() for n in range(2**11 - 20, 2**11)
    ]
    assert max(m.norm().item() for m in moved) <= 1 + 2.0**-10


def test_in_what_precision_sums_are_added_up():
    """By the numbers of ranks, units and parameters, and the noise: all of them public."""
    small = plan(expected_batch_size=64, noise_multiplier=1.0)
    assert carrier_of(small, 2, 10**6) == torch.float32
    assert carrier_of(small, 2, 10**7) == torch.float64  # the noise's last places alone, in so many dimensions
    assert carrier_of(small, 16, 1000) == torch.float64
    assert carrier_of(plan(expected_batch_size=64, noise_multiplier=4.0), 2, 10**6) == torch.float64
    assert carrier_of(plan(expected_batch_size=1024, noise_multiplier=1.0), 2, 1000) == torch.float64


def lost_rank(rank: int, folder: str) -> None:
    """Two ranks; the second is gone (or silent) in the middle of the run."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/group",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=5),
    )
    run, shard = plan(steps=100, block=100), shard_of()
    trainer = PrivateTrainer(model_of("linear"), Optimizer(), run)
    trainer.steps(shard, 2)
    if rank == 1 and Path(folder, "dies").exists():
        os._exit(0)
    if rank == 1:
        while not Path(folder, "said").exists():
            time.sleep(0.1)
        os._exit(0)
    began = time.monotonic()
    try:
        trainer.steps(shard, 1)
    except PurserError as error:
        said = f"{error}\n{error.__cause__ or error.__context__}"
        Path(folder, "saying").write_text(f"{time.monotonic() - began}\n{said}")
        Path(folder, "saying").rename(Path(folder, "said"))
    os._exit(0)


@pytest.mark.parametrize("how", ["dies", "is silent"])
def test_a_lost_rank_ends_the_step(tmp_path, how):
    """Within the process group's timeout, in our words, without the library's addresses."""
    (tmp_path / how).touch()
    on_two_ranks(lost_rank, tmp_path)
    took, *said = (tmp_path / "said").read_text().splitlines()
    assert float(took) < SECONDS
    assert said[0].startswith("training: another worker ended, or was silent for too long")
    assert said[1] == "None"
