"""The engine against DP-SGD written out: one unit at a time, in float64 (P7, P8, P9, P11, P12).

With the noise off, any physical batch size and any number of ranks, one of them empty, give the reference's parameters
to 1e-6; a unit of several records is clipped once, as a whole. With the noise on, the sum over ranks carries it once,
every rank takes the same step, and each step has one collective, however many of its batches are empty.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from dpsgd_reference import (
    BATCHES,
    CLASSES,
    CLIP,
    KINDS,
    MODES,
    WIDE,
    flat,
    fresh_processes,
    model_of,
    noise_off,
    part_of,
    plan,
    rank_main,
    reference,
    shard_of,
    trained,
    unit_gradient,
    unit_of,
    whole,
)
from torch import nn

from training.engine.optimizer import grid_of
from training.engine.randomness import Keystream
from training.engine.run import SIGMA_MARGIN, DPSGDRun
from training.engine.sampling import PoissonSampler
from training.engine.trainer import PrivateTrainer
from training.sections import Optimizer

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook")

SAME = 1e-6
SIX = 6.0  # standard errors: a false alarm rate of 2e-9 for each statistical check of a normal quantity


@pytest.mark.parametrize("kind", KINDS)
def test_the_comparison_bites(kind):
    """Some units are clipped and some are not, some have several records; else little would be compared."""
    model, shard = model_of(kind).double(), shard_of()
    norms = [unit_gradient(model, shard, u).norm().item() for u in range(shard.units)]
    assert 3 <= sum(norm > CLIP[kind] for norm in norms) <= shard.units - 3
    assert set(np.diff(shard.offsets)) == {1, 2, 3}


@pytest.mark.parametrize("physical_batch_size", [3, 4, 7, 64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_any_physical_batch_size_gives_the_reference(mode, kind, physical_batch_size):
    shard = shard_of()
    run = plan(max_grad_norm=CLIP[kind], physical_batch_size=physical_batch_size)
    with noise_off():
        got = trained(model_of(kind), shard, run, mode)
    expected = reference(model_of(kind), shard, run, 0.5)
    assert (got - expected).abs().max() < SAME
    assert (expected - flat(model_of(kind))).abs().max() > 0.05  # it did train


def test_a_linear_schedule_gives_the_reference():
    run = plan(max_grad_norm=CLIP["mlp"])
    with noise_off():
        got = trained(model_of("mlp"), shard_of(), run, schedule="linear")
    assert (got - reference(model_of("mlp"), shard_of(), run, 0.5, falls=True)).abs().max() < SAME


def test_a_unit_is_clipped_once_not_record_by_record():
    """The reference with every record as its own unit is something else: the comparison above would see it."""
    shard = shard_of()
    run = plan(max_grad_norm=CLIP["mlp"])
    by_record = dataclasses.replace(shard, offsets=np.arange(len(shard.labels) + 1))
    expected = reference(model_of("mlp"), shard, run, 0.5)
    assert (reference(model_of("mlp"), by_record, run, 0.5) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("mode", MODES)
def test_a_unit_contributes_the_same_whatever_its_companions(mode):
    """To fp32 accuracy, and P8's bound holds for each."""
    for kind in KINDS:
        trainer = PrivateTrainer(model_of(kind), Optimizer(), plan(max_grad_norm=CLIP[kind]), mode)
        shard = shard_of()
        alone = []
        for u in range(shard.units):
            trainer.accumulate(unit_of(shard, u))
            alone.append(trainer.contribution().double())
            assert alone[-1].norm() <= CLIP[kind] * (1 + 1e-6)
        trainer.accumulate(whole(shard))
        assert (torch.stack(alone).sum(0) - trainer.contribution()).abs().max() < 1e-5


def test_the_declared_batch_size_divides_and_nothing_else():
    """A shard twice over is exactly twice the step: no count of units is anywhere in the normaliser (P11, H10)."""
    shard = shard_of()
    twice = part_of(shard, np.tile(np.arange(shard.units), 2))
    start = flat(model_of("linear"))
    with noise_off():
        one, two = (trained(model_of("linear"), s, plan(steps=1, block=1)) - start for s in (shard, twice))
        half = trained(model_of("linear"), shard, plan(steps=1, block=1, expected_batch_size=10)) - start
    assert (two - 2 * one).abs().max() < SAME
    assert (half - one / 2).abs().max() < SAME


@pytest.mark.parametrize(("sigma", "clip"), [(0.1, 1e-6), (8.0, 0.5), (1e5, 1e6)])
def test_noise_is_scaled_by_the_run_s_own_numbers(monkeypatch, sigma, clip):
    """Ones in place of the noise: the step is σ·C·(1 + 2^-10)/B, which is charged for as σ and never less."""
    monkeypatch.setattr(Keystream, "normal", lambda self, count: np.ones(count))
    run = plan(noise_multiplier=sigma, max_grad_norm=clip, steps=1, block=1, expected_batch_size=4)
    model = nn.Sequential(nn.Linear(3, 2))
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    step = -trained(model, part_of(shard_of(), np.arange(0)), run, learning_rate=1.0)
    assert torch.allclose(step, torch.tensor(sigma * clip * SIGMA_MARGIN / 4, dtype=torch.float64), rtol=2e-6)
    assert run.noise_std / clip > sigma


@pytest.mark.parametrize("below", [0.0, 0.3, -0.3])
def test_what_is_released_lies_on_a_public_grid(monkeypatch, below):
    """Sums that differ by less than the grid release one number: the low bits that would tell them apart are gone."""
    run = plan(noise_multiplier=8.0, steps=1, block=1, expected_batch_size=1)
    grid = 2.0 ** (math.floor(math.log2(run.noise_std)) - 18)
    sums = torch.arange(-10, 10, dtype=torch.float64) * 1001 * grid
    monkeypatch.setattr(Keystream, "normal", lambda self, count: (sums.numpy() + below * grid) / run.noise_std)
    model = nn.Sequential(nn.Linear(5, 4, bias=False))
    nn.init.zeros_(model[0].weight)
    assert torch.equal(trained(model, part_of(shard_of(), np.arange(0)), run, learning_rate=1.0), -sums)


def test_exactly_as_many_steps_as_asked_for_with_empty_batches_too(monkeypatch):
    """Sampled at 0.05, ten steps over two units are nearly always empty; each adds its noise all the same (H1)."""
    drawn = []
    monkeypatch.setattr(Keystream, "normal", lambda self, count: drawn.append(count) or np.zeros(count))
    run = plan(sample_rate=0.05, steps=10, block=5)
    model = model_of("linear")
    trained(model, part_of(shard_of(), np.arange(2)), run)
    assert drawn == [flat(model).numel()] * 10


def test_one_object_feeds_clipper_noise_sampler_and_lease():
    run = plan(noise_multiplier=3.0, max_grad_norm=0.7, sample_rate=0.25)
    trainer = PrivateTrainer(model_of("linear"), Optimizer(), run)
    charge = run.charge("digits/train")
    mechanism = charge.mechanism
    assert (mechanism.noise_multiplier, mechanism.sample_rate) == (3.0, 0.25)
    assert (charge.account, charge.steps, charge.block) == ("digits/train", run.steps, run.block)
    assert trainer._optimizer._run is run
    assert trainer.run is run
    assert PoissonSampler(run, 4)._run is run
    for field in dataclasses.fields(DPSGDRun):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(run, field.name, 1)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What four real processes over gloo saw."""
    folder = tmp_path_factory.mktemp("ranks")
    with fresh_processes():
        mp.start_processes(rank_main, args=(str(folder),), nprocs=4, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(4)]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_any_number_of_ranks_gives_the_reference(ranks, world):
    """Ranks begin with unlike weights and hold unlike shares, one of three nothing at all: all end at the reference."""
    for kind in KINDS:
        expected = reference(model_of(kind), shard_of(), plan(max_grad_norm=CLIP[kind]), 0.5)
        for seen, mode, batch in itertools.product(ranks[:world], MODES, BATCHES):
            run = plan(max_grad_norm=CLIP[kind], expected_batch_size=batch)
            # Sums that travel in fp32 lie on a coarser grid, which is part of the mechanism: half of it at each step.
            coarse = run.steps * 0.1 * grid_of(run, rounded=world > 1) / 2 if batch == 5 else 0
            got = seen[f"parameters{world}"][kind, mode, batch]
            assert (got - expected).abs().max() < SAME + coarse
            assert torch.equal(got, ranks[0][f"parameters{world}"][kind, mode, batch])


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_the_sum_over_ranks_carries_the_noise_once(ranks, world):
    """No rank holds a unit, σ = 2, B = 4: a deviation of 0.5; it is 0.87 where every rank adds its own."""
    noise = ranks[0][f"noise{world}"]
    assert all(torch.equal(seen[f"noise{world}"], noise) for seen in ranks[:world])
    n = noise.numel()
    assert n == WIDE[0] * WIDE[1] + WIDE[1]
    expected = 2.0 * SIGMA_MARGIN / 4
    assert abs(noise.square().mean() / expected**2 - 1) < SIX * math.sqrt(2 / n)
    assert abs(noise.mean()) < SIX * expected / math.sqrt(n)


def test_each_step_is_one_collective_on_every_rank(ranks):
    """Two ranks are nearly always empty and one always is, yet none skips a collective and none waits (H1, H12)."""
    for seen in ranks:
        assert seen["collectives"] == ["all_reduce"] * 11
        assert torch.equal(seen["rare"], ranks[0]["rare"])


def test_ranks_with_one_seed_draw_independently(ranks):
    """seed 42 on all of them: positions agree as often as coins do, not always (H2).

    2,000 pairs of fair coins for each pair of ranks; six standard errors, 2e-9 for each of three pairs.
    """
    joined = [seen["joined"] for seen in ranks]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        agree = (joined[a] == joined[b]).double().mean().item()
        assert abs(agree - 0.5) < SIX * 0.5 / math.sqrt(joined[a].numel())


def test_classes_are_all_in_the_shard():
    assert set(shard_of().labels.tolist()) == set(range(CLASSES))
