"""Norms and weighted sums of contributions, however they are kept, equal those of gradients written out (P8).

The shapes are drawn so that each way of keeping them is taken: gradients, factors of a product, looked-up rows.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from dpsgd_reference import MODES, WIDTH, flat, model_of, plan, shard_of, unit_gradient, whole
from torch import nn

from cluster.errors import PurserError
from training.engine.contributions import Lookups, PerUnit, Products, Units, clip_factors
from training.engine.run import SIGMA_MARGIN
from training.engine.sampling import MicroBatch
from training.engine.trainer import PrivateTrainer
from training.sections import Optimizer

OF_RECORD = torch.tensor([2, 0, 1, 0, 2, 0])  # units of 3, 1 and 2 records that do not lie together
ROWS = 11


def kept(times=4, scale=1.0, seed=0):
    """(per-unit gradients in float64 [units, numbers], the contribution) of each kind, over the same units."""
    torch.manual_seed(seed)
    units = Units(OF_RECORD, 3)
    a, g = scale * torch.randn(6, times, 5), torch.randn(6, times, 7)
    entries = torch.randint(0, ROWS, (6, times))
    products = torch.einsum("nto,nti->noi", g.double(), a.double()).flatten(1)
    rows = torch.zeros(6, ROWS, 7, dtype=torch.float64)
    for n, t in itertools.product(range(6), range(times)):
        rows[n, entries[n, t]] += g[n, t].double()

    def of_units(records):
        return torch.zeros(3, records.shape[1], dtype=torch.float64).index_add_(0, OF_RECORD, records)

    written = of_units(products)
    yield written, PerUnit(units.sums(products.float()))
    yield written, PerUnit(units.sums(products.view(6, 7, 5).mT.float()), turned=(5, 7))
    yield written, Products(a, g, units)
    yield of_units(rows.flatten(1)), Lookups(entries, g, units, torch.Size((ROWS, 7)))


@pytest.mark.parametrize("spread", [1.0, 2.0**20])
@pytest.mark.parametrize("times", [1, 4])
def test_norms_and_sums_are_those_of_the_gradients(monkeypatch, times, spread):
    """Some units at a time."""
    monkeypatch.setattr("training.engine.contributions._RUN", 2)
    weights = torch.tensor([0.5, 2.0, 0.25])
    for written, contribution in kept(times):
        assert torch.allclose(contribution.squared_norms(), written.square().sum(1), rtol=1e-5)
        total = torch.full((written.shape[1],), 3.0, dtype=torch.float64)
        contribution.add_to(total, weights, False, spread)
        assert torch.allclose(total.double() - 3, weights.double() @ written, atol=1e-4)


@pytest.mark.parametrize("times", [1, 4])
def test_inner_products_are_those_of_the_gradients(monkeypatch, times):
    """Some records' products at a time."""
    monkeypatch.setattr("training.engine.contributions._AT_ONCE", 80)
    for written, contribution in kept(times):
        vectors = torch.randn(3, written.shape[1])
        assert torch.allclose(contribution.inner(vectors), written @ vectors.double().T, atol=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_unit_of_weight_zero_adds_exactly_nothing(bad):
    """Whatever of it is not finite, activations or gradients, it has no norm and no part in the sum (H8)."""
    for number, (written, contribution) in enumerate(kept()):
        records = (OF_RECORD == 2).nonzero()[:, 0]
        if isinstance(contribution, PerUnit):
            contribution.gradients[2, 0] = bad
        else:
            contribution.backprops[records[0]] = bad
            if isinstance(contribution, Products) and number:
                contribution.activations[records[1]] = bad
        factors = clip_factors(contribution.squared_norms(), 1e6)
        assert factors.tolist() == [1.0, 1.0, 0.0]
        total = torch.zeros(written.shape[1], dtype=torch.float64)
        contribution.add_to(total, factors, holes=True)
        assert torch.allclose(total.double(), written[:2].sum(0), atol=1e-4)


def test_norms_go_to_their_own_units():
    """A record each, but in another order."""
    order = torch.tensor([3, 1, 2, 0])
    units, (a, g) = Units(order, 4), torch.randn(2, 4, 1, 6)
    entries = torch.zeros(4, 1, dtype=torch.long)
    want = torch.zeros(4).index_add_(0, order, a.square().sum((1, 2)) * g.square().sum((1, 2)))
    assert torch.allclose(Products(a, g, units).squared_norms().float(), want)
    want = torch.zeros(4).index_add_(0, order, g.square().sum((1, 2)))
    assert torch.allclose(Lookups(entries, g, units, torch.Size((2, 6))).squared_norms().float(), want)


@pytest.mark.parametrize("clip", [1e-6, 1e-3, 1.0])
def test_products_below_fp32_do_not_hide_a_norm(clip):
    """An activation of 1.8e19 and gradients whose squares are below what fp32 can hold: their product counts."""
    for size in (1e-25, 1e-23, 1e-21, 1e-19):
        a, g = torch.zeros(1, 2, 100), torch.full((1, 2, 100), size)
        a[0, :, 0] = 1.8e19
        contribution = Products(a, g, Units(torch.zeros(1, dtype=torch.long), 1))
        total = torch.zeros(100 * 100, dtype=torch.float64)
        factors = clip_factors(contribution.squared_norms(), clip)
        contribution.add_to(total, factors, holes=False)
        assert total.double().norm() <= clip * SIGMA_MARGIN


def test_cancellation_never_makes_a_norm_too_small():
    """Times that cancel to a thousandth of a thousandth: fp32 inner products may see nothing of what is left."""
    worst, random = 0.0, np.random.default_rng(0)
    for _ in range(200):
        a = torch.from_numpy(random.normal(size=(1, 1, 300))).float()
        g = torch.from_numpy(random.normal(size=(1, 1, 40))).float()
        left = torch.from_numpy(random.normal(size=(1, 1, 40)) * 10.0 ** random.uniform(-7, -3)).float()
        contribution = Products(
            torch.cat([a, a], 1), torch.cat([g, left - g], 1), Units(torch.zeros(1, dtype=torch.long), 1)
        )
        gradient = torch.einsum("to,ti->oi", contribution.backprops[0].double(), contribution.activations[0].double())
        factor = clip_factors(contribution.squared_norms(), 1e-3)
        total = torch.zeros(40 * 300, dtype=torch.float64)
        contribution.add_to(total, factor, holes=False)
        worst = max(worst, float(factor[0]) * gradient.norm().item() / 1e-3)
        assert total.double().norm() <= 1e-3 * SIGMA_MARGIN
    assert 0.01 < worst <= SIGMA_MARGIN


def test_the_check_of_cancellation_bites(monkeypatch):
    """Without what is added for rounding, the norm of some unit is too small by more than the margin."""
    monkeypatch.setattr(
        "training.engine.contributions._guarded", lambda a, g, _: (a * g).double().sum((1, 2)).clamp(min=0)
    )
    with pytest.raises(AssertionError):
        test_cancellation_never_makes_a_norm_too_small()


class Shapes(nn.Module):
    """Layers on [records, width] and on [records, heads, times, width]; one of them used twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 6)
        self.norm, self.groups, self.last = nn.LayerNorm(6), nn.GroupNorm(2, 4), nn.Linear(24, 3)

    def forward(self, x):
        x = self.first(x.view(len(x), 2, 2, 4))
        x = self.second(torch.tanh(self.second(x)))
        return self.last(self.groups(self.norm(x).flatten(1, 2)).flatten(1))


@pytest.mark.parametrize("factors", [False, True])
def test_layers_of_any_shape(monkeypatch, factors):
    """Whichever way linear layers are kept, in a trainer with padding and units of several records."""
    monkeypatch.setattr("training.engine.trainer.check_model", lambda *_, **__: None)
    if factors:
        monkeypatch.setattr("training.engine.bookkeeping.BookKeepingHooks._keeps_factors", lambda *_: True)
    shard = shard_of()
    exact = Shapes().double()
    want = torch.stack([unit_gradient(exact, shard, u) for u in range(shard.units)])
    clip = want.norm(dim=1).median().item()
    trainer = PrivateTrainer(Shapes(), Optimizer(), plan(max_grad_norm=clip))
    trainer.accumulate(whole(shard).padded(40))
    clipped = want * (clip / want.norm(dim=1)).clamp(max=1)[:, None]
    assert (trainer.contribution() - clipped.sum(0)).abs().max() < 1e-5


def test_units_whose_records_do_not_lie_together():
    shard = shard_of()
    batch = whole(shard)
    order = torch.randperm(len(batch.labels), generator=torch.Generator().manual_seed(0))
    shuffled = MicroBatch(batch.features[order], batch.labels[order], batch.unit[order], batch.units)
    sums = []
    for given in (batch, shuffled):
        trainer = PrivateTrainer(model_of("mlp"), Optimizer(), plan())
        trainer.accumulate(given)
        sums.append(trainer.contribution())
    assert (sums[0] - sums[1]).abs().max() < 1e-6


def test_padding_changes_nothing():
    sums = []
    for rows in (0, 50):
        trainer = PrivateTrainer(model_of("cnn"), Optimizer(), plan())
        trainer.accumulate(whole(shard_of()).padded(rows))
        sums.append(trainer.contribution())
    assert (sums[0] - sums[1]).abs().max() < 1e-6


def test_a_pass_that_fails_leaves_a_trainer_that_works():
    """Parameters are trainable again, and nothing of the failed pass goes into the next."""
    trainer, shard = PrivateTrainer(model_of("mlp"), Optimizer(), plan()), shard_of()
    trainer.accumulate(whole(shard))
    want = trainer.contribution()
    real = trainer.model.forward
    for broken in (lambda x: real(x).expand(2, 2), lambda x: real(x[:1])):  # in the forward pass, and in the loss
        trainer.model.forward = broken
        with pytest.raises((RuntimeError, ValueError)):
            trainer.accumulate(whole(shard))
    trainer.model.forward = real
    assert all(p.requires_grad for p in trainer.model.parameters())
    trainer.accumulate(whole(shard))
    assert torch.equal(trainer.contribution(), want)


def test_a_failed_pass_leaves_nothing_of_its_records():
    """Opacus keeps activations, and gradients that it had begun, on modules and parameters."""
    for mode in MODES:
        trainer, shard = PrivateTrainer(model_of("mlp"), Optimizer(), plan(), mode), shard_of()
        trainer.accumulate(whole(shard))
        want = trainer.contribution()
        batch = whole(shard)
        bad = MicroBatch(batch.features, torch.full_like(batch.labels, 99), batch.unit, batch.units)
        with pytest.raises((RuntimeError, IndexError)):
            trainer.accumulate(bad)
        handle = trainer.model[2].weight.register_hook(lambda _: 1 / 0) if mode == "hooks" else None
        if handle:
            with pytest.raises(ZeroDivisionError):
                trainer.accumulate(batch)
            handle.remove()
        assert not any(vars(m).get("activations") for m in trainer.model.modules())
        for p in trainer.model.parameters():
            assert p.grad is None
            assert p.grad_sample is None
            assert not hasattr(p, "_current_grad_sample")
        trainer.accumulate(batch)
        assert torch.equal(trainer.contribution(), want)


def test_a_micro_batch_that_was_added_in_part_ends_the_run(monkeypatch):
    """Tried again, its first parameters would count twice."""
    trainer, shard = PrivateTrainer(model_of("mlp"), Optimizer(), plan()), shard_of()
    real, left = PerUnit.add_to, iter([True, False])

    def add_to(self, *arguments):
        if not next(left, True):
            raise RuntimeError("out of memory")
        real(self, *arguments)

    monkeypatch.setattr(PerUnit, "add_to", add_to)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.accumulate(whole(shard))
    for act in (lambda: trainer.accumulate(whole(shard)), trainer.contribution, trainer._optimizer.step):
        with pytest.raises(PurserError, match="made in part only"):
            act()


def test_nothing_of_a_micro_batch_is_kept():
    trainer = PrivateTrainer(model_of("mlp"), Optimizer(), plan())
    trainer.accumulate(whole(shard_of()))
    hooks = trainer._hooks
    assert len(hooks._units.of_record) == 0
    assert not any((hooks._kept, hooks._summed, hooks._inputs, hooks._units._grams))


def test_no_gradient_of_a_weight_is_computed():
    """That is what one backward pass saves; autograd itself is asked."""
    trainer = PrivateTrainer(model_of("mlp"), Optimizer(), plan())
    asked = []
    real = trainer._loss
    trainer._loss = lambda batch: asked.append([p.requires_grad for p in trainer.model.parameters()]) or real(batch)
    trainer.accumulate(whole(shard_of()))
    assert asked == [[False] * len(list(trainer.model.parameters()))]


def test_frozen_and_buffered_tensors_are_as_they_were_at_release():
    """A buffer that follows the records would carry them out past the noise (BatchNorm's would)."""
    model = model_of("mlp")
    model[2].requires_grad_(False)
    model[0].register_buffer("seen", torch.zeros(1))
    trainer = PrivateTrainer(model, Optimizer(), plan())
    trainer.accumulate(whole(shard_of()))
    for name, tensor in (("0.seen", model[0].seen), ("2.weight", model[2].weight)):
        before = tensor.detach().clone()
        tensor.data += 1e-3
        with pytest.raises(
            PurserError, match=rf"{name} is frozen or a buffer, and yet it changed.*nothing is released"
        ):
            trainer.unhook()
        tensor.data.copy_(before)
    assert trainer.unhook() is model
    assert flat(model).numel() > WIDTH


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["linear", "mlp", "cnn"])
def test_what_an_audit_asks_of_a_unit_is_its_clipped_gradient(kind, mode):
    """Lengths and directions of records alone, over all numbers and over the last tensors only, by the definition."""
    shard, run = shard_of(most=1), plan(max_grad_norm=0.7, physical_batch_size=16)
    model = model_of(kind)
    trainer = PrivateTrainer(model, Optimizer(), run, mode)
    gradients = torch.stack([unit_gradient(model_of(kind).double(), shard, u) for u in range(shard.units)])
    norms = gradients.norm(dim=1)
    assert (norms > 0.7).any()
    last = trainer.last_numbers(gradients.shape[1] - 1)
    assert 0 < last < gradients.shape[1] == trainer.last_numbers(10**9)
    for numbers in (gradients.shape[1], last):
        vectors = torch.randn(4, numbers)
        lengths, along = trainer.along(whole(shard), vectors)
        assert torch.allclose(lengths, norms.clamp(max=0.7), atol=1e-5)
        assert torch.allclose(along, (gradients[:, -numbers:] / norms[:, None]) @ vectors.double().T, atol=1e-4)
    assert all(p.grad is None for p in model.parameters())
    trainer.steps(shard, 1)  # nothing of it is left behind


def test_a_canary_that_would_count_as_nothing_has_no_direction():
    shard = shard_of(most=1)
    shard.features[3] = float("nan")
    trainer = PrivateTrainer(model_of("linear"), Optimizer(), plan(physical_batch_size=16))
    lengths, along = trainer.along(whole(shard), torch.ones(2, trainer.last_numbers(10**9)))
    assert lengths[3] == 0
    assert (along[3] == 0).all()
    assert (lengths.isfinite().all(), along.isfinite().all()) == (True, True)


def test_updates_are_told_as_they_are_applied():
    """After noise, sum and division: what the model's step was made of; the same on a run that nobody watches."""
    shard, run = shard_of(), plan(noise_multiplier=1.0)
    model, told = model_of("mlp"), []
    trainer = PrivateTrainer(model, Optimizer(learning_rate=0.5), run)
    before = flat(model)
    trainer.steps(shard, run.steps, lambda update: told.append(update.clone()))
    assert len(told) == run.steps
    assert torch.allclose(before - 0.5 * torch.stack(told).sum(0), flat(model), atol=1e-6)
