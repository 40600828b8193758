"""One unit more or less, and what is released moves by that unit's contribution and the margin that the noise covers
(P8, P9): whatever rounding its companions, the micro-batches after it, or the other ranks' sums go through.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from dpsgd_reference import plan
from torch import nn

from training.engine import contributions, optimizer
from training.engine.bookkeeping import BookKeepingHooks
from training.engine.contributions import PerUnit, Products, Units
from training.engine.run import SIGMA_MARGIN
from training.engine.sampling import MicroBatch
from training.engine.stepper import TorchStepper
from training.engine.trainer import PrivateTrainer
from training.models import build
from training.sections import Model, Optimizer


def trainer_of(numbers, **changes):
    return PrivateTrainer(nn.Sequential(nn.Linear(numbers, 1, bias=False)), Optimizer(), plan(**changes))


def add(trainer, gradients):
    """Fold the gradients [units, numbers] of the model's one parameter into the trainer's sum."""
    (parameter,) = trainer.model.parameters()
    units = Units(torch.arange(len(gradients)), len(gradients))
    trainer._optimizer.accumulate({parameter: PerUnit(units.sums(gradients))})


def unit_more(units, clip, rows, last=1):
    """How far one more unit moves the sum of `units` that all point the same way, over the clip norm."""
    trainer = trainer_of(1, max_grad_norm=clip, physical_batch_size=rows)

    def total(count):
        while count:
            now = min(count, rows)
            count -= now
            add(trainer, torch.full((now, 1), 10.0))
        return trainer._optimizer._sum.item()

    before = total(units)
    return (total(last) - before) / clip


def test_one_more_unit_moves_the_sum_by_no_more_than_the_margin_covers():
    assert abs(unit_more(4096, 1.1, 64) - 1) < SIGMA_MARGIN - 1


@pytest.mark.parametrize("rows", [64, 10_000])
def test_one_more_unit_moves_a_large_sum_by_no_more_than_the_margin_covers(rows):
    assert abs(unit_more(1_000_000, 1.1, rows) - 1) < SIGMA_MARGIN - 1


def test_one_more_unit_in_front_moves_a_large_sum_by_no_more_than_the_margin_covers():
    """It shifts every micro-batch after it, and so how each of them is rounded. Units point nearly the same way."""
    units, numbers, rows = 262_144, 50, 64
    torch.manual_seed(0)
    gradients = torch.rand(numbers) + 0.5 + 0.3 * torch.randn(units, numbers)
    gradients *= 2 / gradients.norm(dim=1, keepdim=True)  # twice the clip norm
    sums = []
    for shard in (gradients, gradients[1:]):
        trainer = trainer_of(numbers, expected_batch_size=units, physical_batch_size=rows)
        for part in shard.split(rows):
            add(trainer, part)
        sums.append(trainer.contribution())
    assert (sums[0] - sums[1]).norm() <= SIGMA_MARGIN
    assert (sums[0] - sums[1] - gradients[0] / 2).norm() < SIGMA_MARGIN - 1


def test_one_more_unit_moves_a_large_micro_batch_by_no_more_than_the_margin_covers():
    sums = []
    for units in (100_000, 100_001):
        trainer = trainer_of(1, max_grad_norm=1.1, physical_batch_size=200_000)
        add(trainer, torch.full((units, 1), 10.0))
        sums.append(trainer.contribution().double().item())
    assert abs((sums[1] - sums[0]) / 1.1 - 1) < SIGMA_MARGIN - 1


def periodic(units, rows):
    """Gradients of which every `rows` repeat, so that one unit in front makes all micro-batches round alike: the period
    whose fp32 sum depends most on where it begins."""
    random, ones = np.random.default_rng(0), torch.ones(rows)

    def shift(period):
        return abs(ones[None] @ period - ones[None] @ period.roll(1, 0)).item()

    periods = [torch.from_numpy(random.uniform(0.5, 1.0, (rows, 1))).float() for _ in range(500)]
    return max(periods, key=shift).repeat(units // rows, 1)


def moved_by_one_in_front(units, rows):
    """How far the sum is from moving by exactly what one more unit in front of all others contributes."""
    gradients, sums = periodic(units, rows), []
    for shard in (gradients, torch.cat([gradients[-1:], gradients])):
        trainer = trainer_of(1, expected_batch_size=units, physical_batch_size=rows)
        (parameter,) = trainer.model.parameters()
        for part in shard.split(rows):
            units_of_it, ones = Units(torch.arange(len(part)), len(part)), torch.ones(len(part), 1, 1)
            trainer._optimizer.accumulate({parameter: Products(part[:, None], ones, units_of_it)})
        sums.append(trainer.contribution().item())
    return abs(sums[1] - sums[0] - gradients[-1].item())


@pytest.mark.parametrize(("units", "rows"), [(2**11, 64), (2**10, 256), (2**9, 512), (2**12, 256), (2**17, 64)])
def test_records_that_repeat_do_not_round_alike(units, rows):
    """The first three are the largest whose products are taken in fp32; they may use up half of the margin."""
    in_fp32 = units * rows**0.5 <= contributions.SPREAD
    assert in_fp32 == (units < 2**12)
    moved = moved_by_one_in_front(units, rows)
    assert moved < (SIGMA_MARGIN - 1) / 2 if in_fp32 else moved == 0


def test_the_check_of_repeating_records_bites(monkeypatch):
    """With products in fp32, a batch that large is moved by more than the margin."""
    monkeypatch.setattr(contributions, "SPREAD", 2.0**30)
    assert moved_by_one_in_front(2**17, 64) > SIGMA_MARGIN - 1


# Persons of many records that cancel, and persons of one record, of a linear model as a job file makes it.
WIDTH, CLASSES, MOST, PERSONS = 64, 9, 300, 4


def moved_by_one_more_person(ones):
    """How far the sum of `PERSONS` large units and `ones` small ones moves with one small unit more, over C."""
    run = plan(max_grad_norm=0.1, physical_batch_size=4096, max_records_per_unit=MOST)
    trainer = PrivateTrainer(build(Model(kind="linear"), WIDTH, CLASSES), Optimizer(), run)
    x, y = torch.full((MOST, WIDTH), 0.5), torch.arange(MOST) % CLASSES
    y[0] = 1

    def total(count):
        features = torch.cat([x.repeat(PERSONS, 1), -0.01 * x[:1].repeat(count, 1)])
        labels = torch.cat([y.repeat(PERSONS), torch.ones(count, dtype=torch.long)])
        unit = torch.cat([torch.arange(PERSONS).repeat_interleave(MOST), PERSONS + torch.arange(count)])
        trainer.accumulate(MicroBatch(features, labels, unit, PERSONS + count))
        return trainer.contribution()

    return (total(ones + 1) - total(ones)).norm().item() / run.max_grad_norm


FLIP = next(
    n for n in range(1, 2000) if -(-(PERSONS * MOST + n) // (PERSONS + n)) * (WIDTH + CLASSES) < WIDTH * CLASSES
)


def test_a_unit_does_not_decide_how_others_norms_are_taken():
    for ones in (1, FLIP - 1, FLIP):
        assert moved_by_one_more_person(ones) <= SIGMA_MARGIN


def test_the_check_of_how_norms_are_taken_bites(monkeypatch):
    """Where the records per unit at hand decide, one unit takes all over the edge, and those that cancel shrink."""
    public = BookKeepingHooks._keeps_factors

    def at_hand(hooks, module, a):
        hooks._most = -(-len(a) // hooks._units.count)
        return public(hooks, module, a)

    monkeypatch.setattr(BookKeepingHooks, "_keeps_factors", at_hand)
    assert moved_by_one_more_person(FLIP - 1) > SIGMA_MARGIN


def released_beside(monkeypatch, other):
    """What rank 0 of two releases of 300 units that all point one way, 50 times; the other rank's sum is `other`."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.add_(torch.tensor(other, dtype=tensor.dtype)))
    model = nn.Linear(1, 1, bias=False)
    model.weight.grad_sample = None
    run, seen = plan(noise_multiplier=1.0, expected_batch_size=512, physical_batch_size=512), []
    private = optimizer.PrivateOptimizer(TorchStepper(model, torch.optim.SGD(model.parameters(), lr=512.0)), run)
    for _ in range(50):
        nn.init.zeros_(model.weight)
        private.accumulate({model.weight: PerUnit(torch.ones(300, 1))})
        private.step()
        seen.append(-model.weight.item())
    return torch.tensor(seen, dtype=torch.float64)


def low_bits(monkeypatch):
    """What of the released sums is below 2^-15 C, which 300 C in fp32 has nothing of: beside -250 C, and beside a unit
    of 2^-16 C more."""
    return [(released_beside(monkeypatch, other) % 2**-15).unique().tolist() for other in (-250.0, -250.0 + 2**-16)]


def test_another_rank_s_unit_does_not_show_below_a_large_sum(monkeypatch):
    """Rounded to fp32, a large sum has no low bits, and so no noise in them: another rank's would be released as they
    are. The grid is coarse enough to have none."""
    without, with_it = low_bits(monkeypatch)
    assert without == with_it == [0.0]


def test_the_check_of_low_bits_bites(monkeypatch):
    fine = optimizer.grid_of
    monkeypatch.setattr(optimizer, "grid_of", lambda run, rounded: fine(run, False))
    without, with_it = low_bits(monkeypatch)
    assert without == [0.0]
    assert with_it == [2.0**-16], "one unit more is read off each release"


def test_grids_are_made_of_public_numbers():
    """σC·2^-18; where ranks' sums travel in fp32, the unit in the last place of the largest that can be."""
    assert optimizer.grid_of(plan(noise_multiplier=1.0, max_grad_norm=2.0), rounded=False) == 2.0**-17
    run = plan(noise_multiplier=1.0, expected_batch_size=512)
    assert optimizer.grid_of(run, rounded=True) == 2.0**-14
    assert np.spacing(np.float32(512 + 12 * 512**0.5 + 60)) <= 2.0**-14
