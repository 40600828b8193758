"""A trainer's life (P7, P8, P10, P12): it takes the planned steps and no more, in the process group and with the
numbers that it was made with, from shards it samples itself; what failed half-way takes no part in anything again.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from dpsgd_reference import MODES, flat, model_of, noise_off, on_two_ranks, plan, shard_of, whole
from torch import nn

from cluster.errors import PurserError, UsageError
from training.engine.bookkeeping import BookKeepingHooks
from training.engine.run import SIGMA_MARGIN
from training.engine.sampling import MicroBatch
from training.engine.trainer import PrivateTrainer
from training.sections import Optimizer

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook")


def trainer_of(kind="mlp", mode="bookkeeping", choice=None, **changes):
    return PrivateTrainer(model_of(kind), choice or Optimizer(), plan(**changes), mode)


def test_no_more_steps_than_are_planned():
    """The lease pays for them by number; a linear learning rate would go below zero."""
    trainer = trainer_of(steps=3)
    trainer.steps(shard_of(), 2)
    before = flat(trainer.model)
    for count in (2, -1):
        with pytest.raises(PurserError, match=r"training\.steps"):
            trainer.steps(shard_of(), count)
    assert torch.equal(flat(trainer.model), before)
    trainer.steps(shard_of(), 1)


def test_every_micro_batch_has_one_shape():
    """Whoever joined; kernels, whose rounding may depend on shapes, see a unit alike whatever its companions (P8)."""
    trainer, seen = trainer_of(sample_rate=0.3, steps=20, physical_batch_size=7), set()
    trainer.model[0].register_forward_pre_hook(lambda _, inputs: seen.add(tuple(inputs[0].shape)))
    trainer.steps(shard_of(), 20)
    assert seen == {(7, 16)}


def largest_under_autocast(autocast, mode="bookkeeping"):
    """The largest contribution of 60 units over C, where the caller has autocast on: a habit of mixed precision."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 10))
    trainer = PrivateTrainer(model, Optimizer(), plan(max_grad_norm=0.01, max_records_per_unit=1), mode)
    features, one, most = torch.randn(60, 300), torch.zeros(1, dtype=torch.long), 0.0
    for u in range(60):
        with autocast("cpu", dtype=torch.bfloat16):
            trainer.accumulate(MicroBatch(features[u : u + 1], one + u % 10, one, 1))
        most = max(most, trainer.contribution().norm().item() / 0.01)
    return most


@pytest.mark.parametrize("mode", MODES)
def test_autocast_of_the_caller_reaches_no_norm(mode):
    """Norms and sums in bf16 would exceed the bound (H6)."""
    assert largest_under_autocast(torch.autocast, mode) <= 1 + 1e-6


def test_the_check_of_autocast_bites(monkeypatch):
    callers = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    assert largest_under_autocast(callers) > SIGMA_MARGIN


@pytest.mark.parametrize("where", ["forward pass", "step"])
def test_a_step_that_failed_is_not_tried_again(monkeypatch, where):
    """Units of it are in the sum already: they would count twice."""
    trainer, shard = trainer_of(physical_batch_size=4), shard_of()
    calls = []

    def fails(*_arguments):
        calls.append(1)
        if len(calls) == 2 or where == "step":
            raise MemoryError
        return real(*_arguments)

    if where == "step":
        real = trainer._optimizer.original_optimizer.step
        monkeypatch.setattr(trainer._optimizer.original_optimizer, "step", fails)
    else:
        real = trainer._loss
        monkeypatch.setattr(trainer, "_loss", fails)
    with pytest.raises(MemoryError):
        trainer.steps(shard, 1)
    monkeypatch.undo()
    for act in (lambda: trainer.steps(shard, 1), lambda: trainer.accumulate(whole(shard)), trainer.contribution):
        with pytest.raises(PurserError, match="made in part only"):
            act()


OTHERS = {
    "training.max_grad_norm": (Optimizer(), {"max_grad_norm": 50.0}),
    "training.noise_multiplier": (Optimizer(), {"noise_multiplier": 2.0}),
    "training.sample_rate": (Optimizer(), {"sample_rate": 0.5}),
    "training.expected_batch_size": (Optimizer(), {"expected_batch_size": 6}),
    "training.steps": (Optimizer(), {"steps": 4}),
    "training.optimizer.learning_rate": (Optimizer(learning_rate=0.001), {}),
    "training.optimizer.schedule": (Optimizer(schedule="linear"), {}),
}


@pytest.mark.parametrize("field", OTHERS)
def test_a_run_goes_on_with_the_numbers_it_began_with(field):
    """torch takes the checkpoint's learning rate without a word, and a statement would say the job file's."""
    state = trainer_of().state_dict()
    choice, changes = OTHERS[field]
    with pytest.raises(UsageError, match=rf"^{field}: .* was given, the checkpoint is of a run with"):
        trainer_of(choice=choice, **changes).load_state_dict(copy.deepcopy(state))
    trainer_of(physical_batch_size=5, block=1).load_state_dict(copy.deepcopy(state))  # these change no result


@pytest.mark.parametrize("change", ["a new buffer", "an unfrozen weight", "a checkpoint that knows none"])
def test_frozen_tensors_are_all_of_them(change):
    """What was not there at the start is not released either."""
    model = model_of("mlp")
    model[2].requires_grad_(False)
    trainer = PrivateTrainer(model, Optimizer(), plan())
    if change == "a new buffer":
        model[0].register_buffer("seen", torch.ones(1))
    elif change == "an unfrozen weight":
        model[2].requires_grad_(True)
    else:
        with pytest.raises(PurserError, match="not those that this run began with"):
            trainer.load_state_dict({**trainer.state_dict(), "fixed": {}})
        return
    with pytest.raises(PurserError, match=r"(0\.seen|2\.bias) is frozen or a buffer, and yet it changed"):
        trainer.unhook()


def test_a_checkpoint_holds_what_trains_and_goes_on_with_the_same_rest_only():
    """Of a large base with a small adapter the rest is nearly everything."""

    def made(seed: int, frozen: bool = True) -> PrivateTrainer:
        model = model_of("mlp", seed=seed)
        model[0].requires_grad_(not frozen)
        return PrivateTrainer(model, Optimizer(), plan())

    before = made(0)
    with torch.no_grad():
        before.model[2].weight.add_(1)
    state = copy.deepcopy(before.state_dict())
    assert set(state["model"]) == {"2.weight", "2.bias"}
    after = made(0)
    after.load_state_dict(state)
    assert torch.equal(flat(after.model), flat(before.model))
    for other in (made(1), made(0, frozen=False)):  # another base; a base that trains
        with pytest.raises(PurserError, match="not those that this run began with"):
            other.load_state_dict(state)


def lives(rank: int, folder: str) -> None:
    """One of two ranks; what it was told goes to a file."""
    told = []

    def hear(name, act):
        try:
            act()
            told.append(f"{name}: nothing")
        except (PurserError, UsageError) as error:
            told.append(f"{name}: {error}")

    def made(clip=1.0, buffer=0.0):
        model = model_of("linear")
        model[0].register_buffer("scale", torch.full((1,), buffer))
        return PrivateTrainer(model, Optimizer(), plan(max_grad_norm=clip))

    early = made()
    limit = datetime.timedelta(seconds=30)
    dist.init_process_group("gloo", init_method=f"file://{folder}/one", rank=rank, world_size=2, timeout=limit)
    hear("made before the group", lambda: early.steps(shard_of(), 1))
    hear("another clip norm", lambda: made(clip=10.0 if rank else 0.1))
    hear("another buffer", lambda: made(buffer=float(rank)))
    alike = made()
    hear("alike", lambda: alike.steps(shard_of(), 1))
    dist.destroy_process_group()
    hear("after the group", lambda: alike.steps(shard_of(), 1))
    dist.init_process_group("gloo", init_method=f"file://{folder}/two", rank=rank, world_size=2, timeout=limit)
    hear("in another group", alike._optimizer.step)
    dist.destroy_process_group()
    Path(folder, f"told{rank}").write_text("\n".join(told))
    os._exit(0)


def test_ranks_train_one_model_in_one_group(tmp_path):
    """Silently, each rank would train a model of its own, or clip at a norm of its own (H11)."""
    on_two_ranks(lives, tmp_path)
    for rank in range(2):
        told = dict(line.split(": ", 1) for line in (tmp_path / f"told{rank}").read_text().splitlines())
        assert "process group changed" in told["made before the group"]
        assert "not all ranks were given the same" in told["another clip norm"]
        assert "not all ranks were given the same" in told["another buffer"]
        assert told["alike"] == "nothing"
        assert "process group changed" in told["after the group"]
        assert told["in another group"].startswith("training: ")


class Layers(nn.Module):
    """Narrow to wide and wide to narrow: gradients are written out in either order."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.narrow, self.wide = nn.Linear(16, 40), nn.Linear(40, 3)

    def forward(self, x):
        return self.wide(torch.tanh(self.narrow(x)))


def test_weights_turned_over_train_the_same(monkeypatch):
    monkeypatch.setattr("training.engine.trainer.check_model", lambda *_, **__: None)
    got = []
    for turned in (True, False):
        trainer = PrivateTrainer(Layers(), Optimizer(learning_rate=0.5), plan())
        assert isinstance(trainer._hooks, BookKeepingHooks)
        assert list(trainer._hooks._turned.values()) == [(16, 40)]
        if not turned:
            trainer._hooks._turned = {}
        with noise_off():
            trainer.steps(shard_of(), 3)
        got.append(flat(trainer.model))
    assert (got[0] - got[1]).abs().max() < 1e-6
