"""The rehearsal on synthetic inputs lets sound trainers pass, stops broken ones before anything is charged (P8, P12)
and leaves the model as it was. Every broken variant here would train without an error of its own."""

from __future__ import annotations

import pytest
import torch
from dpsgd_reference import CLASSES, IMAGE, KINDS, MODES, WIDTH, flat, model_of, noise_off, plan, shard_of
from torch import nn

from cluster.errors import PurserError
from training.engine import rehearsal
from training.engine.contributions import Units
from training.engine.optimizer import PrivateOptimizer
from training.engine.rehearsal import TOLERANCE, Inputs, rehearse, synthetic
from training.engine.run import SIGMA_MARGIN
from training.engine.trainer import PrivateTrainer
from training.models import build
from training.sections import Model, Optimizer

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook")


INPUTS = Inputs((WIDTH,), CLASSES)


def trainer_of(kind="mlp", mode="hooks", **changes):
    return PrivateTrainer(model_of(kind), Optimizer(), plan(**changes), mode)


@pytest.mark.parametrize("per_unit", [1, 3])
@pytest.mark.parametrize("clip", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_sound_models_pass(mode, kind, clip, per_unit):
    trainer = trainer_of(kind, mode, max_grad_norm=clip, max_records_per_unit=per_unit, physical_batch_size=12)
    before = flat(trainer.model)
    seen = rehearse(trainer, INPUTS)
    assert seen.parameters == before.numel()
    assert seen.physical_batch_size == 12
    assert 0 < seen.largest_norm <= 1 + TOLERANCE
    assert seen.companions < 1e-4
    if clip <= 1:
        assert seen.largest_norm > 1 - 1e-4  # the clipping was at work: its bound was tried
    assert torch.equal(flat(trainer.model), before)


def test_a_fresh_linear_model_passes():
    """All zeros: its gradients are not."""
    trainer = PrivateTrainer(build(Model(kind="linear"), WIDTH, CLASSES, IMAGE), Optimizer(), plan())
    assert rehearse(trainer, INPUTS).largest_norm > 0.99


def test_nothing_of_the_rehearsal_goes_into_the_first_step():
    """Neither sums nor gradients: with the noise off, training after a rehearsal is training."""
    after = []
    for rehearsed in (False, True):
        trainer = trainer_of()
        if rehearsed:
            rehearse(trainer, INPUTS)
        with noise_off():
            trainer.steps(shard_of(), 2)
        after.append(flat(trainer.model))
    assert torch.equal(*after)


def test_a_physical_batch_of_one_unit_is_rehearsed():
    assert rehearse(trainer_of(physical_batch_size=3), INPUTS).physical_batch_size == 3


def test_the_largest_micro_batch_is_tried(monkeypatch):
    """Whether it fits in memory must be known before the first charge."""
    sizes = []
    real = PrivateTrainer.accumulate
    monkeypatch.setattr(
        PrivateTrainer, "accumulate", lambda self, batch: sizes.append(len(batch.labels)) or real(self, batch)
    )
    rehearse(trainer_of(physical_batch_size=37), INPUTS)
    assert max(sizes) == 37


def test_synthetic_inputs_are_made_of_nothing():
    """The same every time, finite, with every label; no generator is asked (P13)."""
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    made, again = (synthetic(Inputs((2, 3), 4), torch.arange(7), scale=10.0) for _ in range(2))
    features, labels = made.features, made.labels
    assert features.shape == (7, 2, 3)
    assert features.dtype == torch.float32
    assert torch.equal(features, again.features)
    assert torch.isfinite(features).all()
    assert 5 < features.abs().max() <= 10
    assert labels.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert torch.equal(state, torch.random.get_rng_state())


def broken(factors, *, guarded=True):
    """PrivateOptimizer.accumulate with other clipping; `factors` maps norms to factors."""

    def accumulate(self, contributions):
        groups = torch.cat([contributions[p].gradients for p in self.params], dim=1)
        norms = groups.norm(dim=1)
        scale = factors(norms, self.max_grad_norm)
        finite = torch.isfinite(norms) if guarded else torch.ones_like(norms, dtype=torch.bool)
        self._sum += torch.where(finite, scale, 0.0) @ groups.masked_fill(~finite[:, None], 0.0)

    return accumulate


def clipped(norms, bound):
    return (bound / norms.clamp(min=1e-30)).clamp(max=1.0)


def test_the_stand_in_is_sound_when_it_clips(monkeypatch):
    """So that what the next tests catch is what they break."""
    monkeypatch.setattr(PrivateOptimizer, "accumulate", broken(clipped))
    rehearse(trainer_of(), INPUTS)


BROKEN = {
    "no clipping": (broken(lambda norms, bound: torch.ones_like(norms)), "clipping does not hold"),
    "twice the norm": (broken(lambda norms, bound: clipped(norms, 2 * bound)), "clipping does not hold"),
    "a last digit too much": (broken(lambda norms, bound: clipped(norms, bound * 1.0001)), "clipping does not hold"),
    "one norm for all units": (
        broken(lambda norms, bound: torch.where(torch.isfinite(norms), clipped(norms.norm(), bound), 0.0)),
        "changed with its companions",
    ),
    "the mean of the batch": (
        broken(lambda norms, bound: clipped(norms, bound) / len(norms)),
        "changed with its companions",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_clipping_is_caught(monkeypatch, name):
    accumulate, why = BROKEN[name]
    monkeypatch.setattr(PrivateOptimizer, "accumulate", accumulate)
    trainer = trainer_of()
    before = flat(trainer.model)
    with pytest.raises(PurserError, match=rf"^rehearsal: .*{why}.*nothing was charged"):
        rehearse(trainer, INPUTS)
    assert torch.equal(flat(trainer.model), before)


def test_records_clipped_in_place_of_units_are_caught(monkeypatch):
    real = Units.sums

    def sums(self, records):
        flat_records = records.flatten(1)
        return real(self, flat_records * clipped(flat_records.norm(dim=1), 1.0)[:, None])

    monkeypatch.setattr(Units, "sums", sums)
    monkeypatch.setattr(PrivateOptimizer, "accumulate", broken(lambda norms, bound: torch.ones_like(norms)))
    with pytest.raises(PurserError, match="rehearsal: "):
        rehearse(trainer_of(), INPUTS)


def test_a_non_finite_record_let_through_is_caught(monkeypatch):
    monkeypatch.setattr(PrivateOptimizer, "accumulate", broken(clipped, guarded=False))
    with pytest.raises(PurserError, match="non-finite record was let through"):
        rehearse(trainer_of(), INPUTS)


def test_a_non_finite_record_that_counts_a_little_is_caught(monkeypatch):
    """Finite, small, and still one record's own mark."""
    real = PrivateOptimizer.accumulate

    def accumulate(self, contributions):
        marked = any(not torch.isfinite(contributions[p].gradients).all() for p in self.params)
        real(self, contributions)
        self._sum[0] += 1e-6 * marked

    monkeypatch.setattr(PrivateOptimizer, "accumulate", accumulate)
    with pytest.raises(PurserError, match="non-finite record was let through"):
        rehearse(trainer_of(), INPUTS)


def test_records_that_touch_each_other_in_the_model_are_caught():
    """A hook on an allowed layer can mix records behind the back of the list of layers."""
    model = model_of("mlp")
    model[0].register_forward_hook(lambda module, inputs, output: output - output.mean(0))
    with pytest.raises(PurserError, match="changed with its companions"):
        rehearse(PrivateTrainer(model, Optimizer(), plan()), INPUTS)


def test_records_that_touch_each_other_where_one_large_unit_fills_a_micro_batch(monkeypatch):
    """Units may have 8 records and a micro-batch has 8 rows; but units of one record share it."""
    mixing = nn.Sequential(
        nn.Unflatten(0, (1, 1, -1)),
        nn.AvgPool2d((3, 1), 1, (1, 0)),
        nn.Unflatten(0, (1, -1)),
        Joined(),
        nn.Linear(16, 3),
    )
    monkeypatch.setattr("training.engine.trainer.check_model", lambda *_, **__: None)
    run = plan(max_records_per_unit=8, physical_batch_size=8)
    with pytest.raises(PurserError, match="changed with its companions"):
        rehearse(PrivateTrainer(mixing, Optimizer(), run), INPUTS)


class Joined(nn.Module):
    def forward(self, x):
        return x.reshape(-1, WIDTH)


@pytest.mark.parametrize("mode", MODES)
def test_records_that_touch_each_other_between_layers_of_zeros_are_caught(mode, monkeypatch):
    """At first everything between them is zero: the model a little aside shows what its first steps will make of it."""
    model = nn.Sequential(nn.Linear(WIDTH, 8), nn.Linear(8, CLASSES))
    for p in model.parameters():
        nn.init.zeros_(p)
    model[0].register_forward_hook(lambda module, inputs, output: output + output.mean(0))
    trainer = PrivateTrainer(model, Optimizer(), plan(), mode)
    with pytest.raises(PurserError, match="changed with its companions|do not add up"):
        rehearse(trainer, INPUTS)
    for check in ("_move_aside", "_check_all_learn"):
        monkeypatch.setattr(rehearsal, check, lambda *_: None)
    rehearse(trainer, INPUTS)  # as it is, it seems sound


class Silent(nn.Sequential):
    """Its first layer trains in a place from which nothing comes back."""

    def __init__(self, how):
        super().__init__(nn.Linear(WIDTH, 8), nn.Linear(WIDTH, CLASSES), nn.Linear(8, CLASSES))
        self.how = how

    def forward(self, x):
        first = self[0](x)
        heard = {"detached": first.detach(), "unheard": torch.ones_like(first), "times zero": 0 * first}[self.how]
        return self[1](x) + self[2](heard)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["detached", "unheard", "times zero"])
def test_a_tensor_that_no_gradient_reaches_is_named(mode, how, monkeypatch):
    """It would take 45 GPU hours of noise in silence (Opacus issue 820)."""
    monkeypatch.setattr("training.engine.trainer.check_model", lambda *_, **__: None)
    model = Silent(how)
    trainer = PrivateTrainer(model, Optimizer(), plan(), mode)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(PurserError, match=r"0\.weight (got no per-record|is to train, and no) gradient"):
        rehearse(trainer, INPUTS)
    if how == "times zero":
        monkeypatch.setattr(rehearsal, "_check_all_learn", lambda *_: None)
        rehearse(trainer, INPUTS)  # nothing else sees it
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_norms_that_go_by_the_units_at_hand_are_caught(monkeypatch):
    """Units of one size say nothing of it: one large unit among small ones does."""
    monkeypatch.setattr(PrivateTrainer, "_contributions", by_the_units_at_hand(PrivateTrainer._contributions))
    with pytest.raises(PurserError, match="changed with its companions"):
        rehearse(trainer_of(max_records_per_unit=3), INPUTS)


def by_the_units_at_hand(real):
    """A trainer that takes norms half as large once units of several sizes are in a micro-batch."""

    def contributions(trainer, batch):
        found = real(trainer, batch)
        if len(batch.unit.bincount().unique()) > 1:
            for contribution in found.values():
                contribution.gradients.mul_(0.5 / contribution.gradients.norm(dim=1, keepdim=True))
        return found

    return contributions


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("per_unit", [1, 3, 5, 10, 50])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_that_cancel_are_not_taken_for_wrong_ones(mode, per_unit, kind):
    """Of a new linear model, each class as often as the others: the bias has no gradient but rounding."""
    model = build(Model(kind=kind), WIDTH, 10)
    trainer = PrivateTrainer(model, Optimizer(), plan(max_records_per_unit=per_unit), mode)
    assert rehearse(trainer, Inputs((WIDTH,), 10)).largest_norm > 0.99


def test_the_fullest_micro_batches_and_a_step_are_tried(monkeypatch):
    """Of the smallest units and of the largest: either may need more memory. Then what Adam keeps, undone."""
    choice = Optimizer(name="adam")
    trainer = PrivateTrainer(model_of("mlp"), choice, plan(physical_batch_size=30, expected_batch_size=60))
    seen, stepped, step = [], [], trainer._optimizer.original_optimizer.step
    real = trainer.accumulate
    monkeypatch.setattr(trainer, "accumulate", lambda batch: seen.append((len(batch.unit), batch.units)) or real(batch))
    monkeypatch.setattr(trainer._optimizer.original_optimizer, "step", lambda: stepped.append(step()))
    before = flat(trainer.model)
    rehearse(trainer, INPUTS)
    assert {(30, 30), (30, 10)} <= set(seen)
    assert len(stepped) == 1
    assert not trainer._optimizer.original_optimizer.state
    assert torch.equal(flat(trainer.model), before)
    assert (trainer.contribution() == 0).all()


def test_a_buffer_that_changes_in_the_forward_pass_is_caught():
    """Before anything is charged, not at release."""
    model = model_of("mlp")
    model[0].register_buffer("seen", torch.zeros(1))
    model[0].register_forward_hook(lambda module, inputs, output: module.seen.add_(1) and None)
    with pytest.raises(PurserError, match=r"0\.seen is frozen or a buffer, and yet it changed"):
        rehearse(PrivateTrainer(model, Optimizer(), plan()), INPUTS)


def test_a_model_that_changes_in_the_forward_pass_is_caught():
    model = model_of("mlp")

    def drift(module, inputs, output):
        with torch.no_grad():
            module.bias += 1e-7 * inputs[0].abs().mean()

    model[0].register_forward_hook(drift)
    with pytest.raises(PurserError, match="changed the model"):
        rehearse(PrivateTrainer(model, Optimizer(), plan()), INPUTS)


def test_a_layer_that_makes_a_number_of_infinity_is_not_taken_for_a_leak():
    model = nn.Sequential(nn.Tanh(), nn.Linear(WIDTH, CLASSES))
    rehearse(PrivateTrainer(model, Optimizer(), plan()), INPUTS)


def test_a_rehearsal_comes_before_the_first_step():
    """It would make an end of what Adam and momentum keep."""
    trainer = PrivateTrainer(model_of("mlp"), Optimizer(name="adam"), plan())
    trainer.steps(shard_of(), 1)
    with pytest.raises(PurserError, match="before the first step"):
        rehearse(trainer, INPUTS)


def test_a_parameter_without_a_gradient_is_caught():
    model = nn.Sequential(nn.Linear(WIDTH, 8), nn.Linear(8, CLASSES))
    model.forward = lambda x: model[0](x)[:, :CLASSES]
    with pytest.raises(PurserError, match="no per-record gradient"):
        rehearse(PrivateTrainer(model, Optimizer(), plan()), INPUTS)


def test_the_tolerance_lies_within_the_margin_that_the_noise_carries():
    assert 10 * TOLERANCE < SIGMA_MARGIN - 1
    assert rehearsal.TOLERANCE is TOLERANCE


def test_a_companion_s_influence_beyond_the_margin_is_caught(monkeypatch):
    real = PrivateOptimizer.accumulate

    def accumulate(self, contributions):
        real(self, contributions)
        units = len(contributions[self.params[0]].gradients)
        self._sum[0] += 1.5 * (SIGMA_MARGIN - 1) * self.max_grad_norm * (units > 1)

    monkeypatch.setattr(PrivateOptimizer, "accumulate", accumulate)
    with pytest.raises(PurserError, match="changed with its companions"):
        rehearse(trainer_of(), INPUTS)
