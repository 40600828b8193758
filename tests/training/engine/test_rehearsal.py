"""The rehearsal on synthetic inputs lets sound trainers pass, stops broken ones before anything is charged (P8, P12)
and leaves the model as it was. Every broken variant here would train without an error of its own."""

from __future__ import annotations

import pytest
import torch
from dpsgd_reference import CLASSES, IMAGE, KINDS, WIDTH, flat, model_of, noise_off, plan, shard_of
from torch import nn

from cluster.errors import PurserError
from training.config import Model, Optimizer
from training.engine import rehearsal
from training.engine.optimizer import PrivateOptimizer
from training.engine.rehearsal import TOLERANCE, rehearse, synthetic
from training.engine.run import SIGMA_MARGIN
from training.engine.sampling import PoissonSampler
from training.engine.trainer import PrivateTrainer
from training.models import build

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook")


def trainer_of(kind="mlp", **changes):
    return PrivateTrainer(model_of(kind), Optimizer(), plan(**changes))


@pytest.mark.parametrize("per_unit", [1, 3])
@pytest.mark.parametrize("clip", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("kind", KINDS)
def test_sound_models_pass(kind, clip, per_unit):
    trainer = trainer_of(kind, max_grad_norm=clip, max_records_per_unit=per_unit, physical_batch_size=12)
    before = flat(trainer.model)
    seen = rehearse(trainer, (WIDTH,), CLASSES)
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
    assert rehearse(trainer, (WIDTH,), CLASSES).largest_norm > 0.99


def test_nothing_of_the_rehearsal_goes_into_the_first_step():
    """Neither sums nor gradients: with the noise off, training after a rehearsal is training."""
    after = []
    for rehearsed in (False, True):
        trainer = trainer_of()
        if rehearsed:
            rehearse(trainer, (WIDTH,), CLASSES)
        with noise_off():
            trainer.steps(shard_of(), PoissonSampler(trainer.run, 12), 2)
        after.append(flat(trainer.model))
    assert torch.equal(*after)


def test_a_physical_batch_of_one_unit_is_rehearsed():
    assert rehearse(trainer_of(physical_batch_size=3), (WIDTH,), CLASSES).physical_batch_size == 3


def test_the_largest_micro_batch_is_tried(monkeypatch):
    """Whether it fits in memory must be known before the first charge."""
    sizes = []
    real = PrivateTrainer.accumulate
    monkeypatch.setattr(
        PrivateTrainer, "accumulate", lambda self, batch: sizes.append(len(batch.labels)) or real(self, batch)
    )
    rehearse(trainer_of(physical_batch_size=37), (WIDTH,), CLASSES)
    assert max(sizes) == 37


def test_synthetic_inputs_are_made_of_nothing():
    """The same every time, finite, with every label; no generator is asked (P13)."""
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    features, labels = synthetic((2, 3), 7, 4, scale=10.0)
    again, _ = synthetic((2, 3), 7, 4, scale=10.0)
    assert features.shape == (7, 2, 3)
    assert features.dtype == torch.float32
    assert torch.equal(features, again)
    assert torch.isfinite(features).all()
    assert 5 < features.abs().max() <= 10
    assert labels.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert torch.equal(state, torch.random.get_rng_state())


def broken(factors, *, records=False, guarded=True):
    """PrivateOptimizer.accumulate with other clipping; `factors` maps norms (of units, or of records) to factors."""

    def accumulate(self, unit, units):
        flat_records = torch.cat([p.grad_sample.reshape(len(unit), -1) for p in self.params], dim=1)
        for p in self.params:
            p.grad_sample = p.grad = None
        groups = flat_records
        if not records:
            groups = torch.zeros(units, flat_records.shape[1]).index_add_(0, unit, flat_records)
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
    rehearse(trainer_of(), (WIDTH,), CLASSES)


BROKEN = {
    "no clipping": (broken(lambda norms, bound: torch.ones_like(norms)), "clipping does not hold"),
    "twice the norm": (broken(lambda norms, bound: clipped(norms, 2 * bound)), "clipping does not hold"),
    "a last digit too much": (broken(lambda norms, bound: clipped(norms, bound * 1.0001)), "clipping does not hold"),
    "records instead of units": (broken(clipped, records=True), "clipping does not hold"),
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
        rehearse(trainer, (WIDTH,), CLASSES)
    assert torch.equal(flat(trainer.model), before)


def test_a_non_finite_record_let_through_is_caught(monkeypatch):
    monkeypatch.setattr(PrivateOptimizer, "accumulate", broken(clipped, guarded=False))
    with pytest.raises(PurserError, match="non-finite record was let through"):
        rehearse(trainer_of(), (WIDTH,), CLASSES)


def test_a_non_finite_record_that_counts_a_little_is_caught(monkeypatch):
    """Finite, small, and still one record's own mark."""
    real = PrivateOptimizer.accumulate

    def accumulate(self, unit, units):
        marked = any(not torch.isfinite(p.grad_sample).all() for p in self.params)
        real(self, unit, units)
        self._sum[0] += 1e-6 * marked

    monkeypatch.setattr(PrivateOptimizer, "accumulate", accumulate)
    with pytest.raises(PurserError, match="non-finite record was let through"):
        rehearse(trainer_of(), (WIDTH,), CLASSES)


def test_records_that_touch_each_other_in_the_model_are_caught():
    """A hook on an allowed layer can mix records behind the back of the list of layers."""
    model = model_of("mlp")
    model[0].register_forward_hook(lambda module, inputs, output: output - output.mean(0))
    with pytest.raises(PurserError, match="changed with its companions"):
        rehearse(PrivateTrainer(model, Optimizer(), plan()), (WIDTH,), CLASSES)


def test_a_model_that_changes_in_the_forward_pass_is_caught():
    model = model_of("mlp")

    def drift(module, inputs, output):
        with torch.no_grad():
            module.bias += 1e-7 * inputs[0].abs().mean()

    model[0].register_forward_hook(drift)
    with pytest.raises(PurserError, match="changed the model"):
        rehearse(PrivateTrainer(model, Optimizer(), plan()), (WIDTH,), CLASSES)


def test_a_parameter_without_a_gradient_is_caught():
    model = nn.Sequential(nn.Linear(WIDTH, 8), nn.Linear(8, CLASSES))
    model.forward = lambda x: model[0](x)[:, :CLASSES]
    with pytest.raises(PurserError, match="no per-record gradient"):
        rehearse(PrivateTrainer(model, Optimizer(), plan()), (WIDTH,), CLASSES)


def test_the_tolerance_lies_within_the_margin_that_the_noise_carries():
    assert 10 * TOLERANCE < SIGMA_MARGIN - 1
    assert rehearsal.TOLERANCE is TOLERANCE


def test_a_companion_s_influence_beyond_the_margin_is_caught(monkeypatch):
    real = PrivateOptimizer.accumulate

    def accumulate(self, unit, units):
        real(self, unit, units)
        self._sum[0] += 1.5 * (SIGMA_MARGIN - 1) * self.max_grad_norm * (units > 1)

    monkeypatch.setattr(PrivateOptimizer, "accumulate", accumulate)
    with pytest.raises(PurserError, match="changed with its companions"):
        rehearse(trainer_of(), (WIDTH,), CLASSES)
