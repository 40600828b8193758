"""The hazards of DP-SGD engines (numbers as in the project's facts), each with the test that it does not apply here
(P8, P9, P10). Not here: H9 (adaptive clipping), H17 and H18 (FSDP and TP), which the engine does not have; H7
(torchcsprng) and H19 (several accountants): noise and accounting are our own.

| # | hazard | where it is tested |
| --- | --- | --- |
| H1 | ranks skip empty batches | test_dpsgd: test_each_step_is_one_collective_on_every_rank |
| H2 | one seed on every rank gives one sample, one noise | test_sampling: test_no_seed_reaches_the_coins |
| H3 | a seeded or saved generator replays noise | test_noise: test_a_resumed_run_does_not_replay_noise |
| H4 | a weight used by function escapes the norm | here: test_a_weight_…; test_language: test_an_embedding_used_by_… |
| H5 | a second clip norm or noise multiplier | test_there_is_one_clip_norm_and_one_noise_multiplier |
| H6 | sums in low precision | here: test_only_…, test_sums_…, test_products_…; test_trainer: test_autocast_… |
| H8 | one non-finite record poisons the sum | here: test_a_non_finite_…; test_contributions: test_a_unit_of_… |
| H10 | the number of records in the normaliser | test_dpsgd: test_the_declared_batch_size_divides_and_nothing_else |
| H11 | ranks silently train separate models | test_trainer: test_ranks_train_one_model_in_one_group; test_dpsgd |
| H12 | unequal micro-batches hang | test_dpsgd: ranks hold unequal shares; test_steps: test_a_lost_rank_ends_the_step |
| H13 | raw gradients stay in p.grad | test_no_raw_gradient_stays_behind |
| H14 | a second backward discards the first | test_dpsgd: any physical batch size |
| H15 | a parameter that is unused this time keeps an old gradient | test_a_parameter_that_was_not_used_is_refused |
| H16 | steps follow from the sample rate | test_dpsgd: test_exactly_as_many_steps_as_asked_for_with_empty_batches_too |
| H20 | the books fill and the weights stay | test_a_step_moves_every_parameter |
"""

from __future__ import annotations

import pytest
import torch
from dpsgd_reference import KINDS, MODES, flat, model_of, noise_off, part_of, plan, shard_of, unit_of, whole
from torch import nn
from torch.nn import functional as F

from cluster.errors import PurserError, UsageError
from training.engine.contributions import PerUnit, Units
from training.engine.optimizer import check_products
from training.engine.rehearsal import Inputs, rehearse
from training.engine.run import SIGMA_MARGIN
from training.engine.sampling import MicroBatch
from training.engine.trainer import PrivateTrainer
from training.engine.validation import check_model
from training.sections import Optimizer

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook")


def trainer_of(model, mode="bookkeeping", **changes):
    return PrivateTrainer(model, Optimizer(), plan(**changes), mode)


def add(trainer, gradients, unit, units):
    """Fold per-record gradients [records, numbers] of the model's one parameter into the trainer's sum."""
    (parameter,) = trainer.model.parameters()
    trainer._optimizer.accumulate({parameter: PerUnit(Units(unit, units).sums(gradients))})


def contribution(trainer, batch):
    trainer.accumulate(batch)
    return trainer.contribution().double()


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e6, 1e15])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_a_unit_contributes_at_most_the_clip_norm(mode, kind, scale):
    trainer, shard = trainer_of(model_of(kind), mode, max_grad_norm=0.25), shard_of()
    for u in range(shard.units):
        unit = unit_of(shard, u)
        batch = MicroBatch(unit.features * scale, unit.labels, unit.unit, 1)
        assert contribution(trainer, batch).norm() <= 0.25 * (1 + 1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_a_non_finite_unit_counts_as_zero(mode, kind, bad):
    """Whole, even if one of its records is fine; its companions count as if it were not there (H8)."""
    trainer, shard = trainer_of(model_of(kind), mode), shard_of()
    u = next(u for u in range(shard.units) if shard.offsets[u + 1] - shard.offsets[u] == 3)
    poisoned = part_of(shard, torch.arange(shard.units).numpy())
    poisoned.features[shard.offsets[u], 0] = bad
    others = part_of(shard, torch.tensor([v for v in range(shard.units) if v != u]).numpy())
    without = contribution(trainer, whole(others))
    together = contribution(trainer, whole(poisoned))
    alone = contribution(trainer, unit_of(poisoned, u))
    if bad == 3e38:  # finite: it may count, but within the bound
        assert alone.norm() <= 1 + 1e-6
    else:
        assert (alone == 0).all()
    assert (together - without - alone).abs().max() < 1e-5
    trainer.steps(poisoned, 1)
    assert torch.isfinite(flat(trainer.model)).all()


def test_a_gradient_that_overflows_in_the_sum_of_a_unit_counts_as_zero():
    """Two records of 3e38 each are finite, their sum in fp32 is not."""
    trainer = trainer_of(nn.Sequential(nn.Linear(4, 1, bias=False)))
    add(trainer, torch.full((2, 1, 4), 3e38), torch.zeros(2, dtype=torch.long), 1)
    assert (trainer.contribution() == 0).all()


def test_a_zero_gradient_is_no_division_by_zero():
    trainer = trainer_of(nn.Sequential(nn.Linear(4, 1, bias=False)))
    add(trainer, torch.zeros(2, 1, 4), torch.arange(2), 2)
    assert (trainer.contribution() == 0).all()


def test_the_bound_holds_for_huge_gradients():
    trainer = trainer_of(nn.Sequential(nn.Linear(64, 1, bias=False)), max_grad_norm=1e-6)
    for size in torch.linspace(1e37, 3.3e38, 60).tolist():
        add(trainer, torch.full((1, 1, 64), size), torch.zeros(1, dtype=torch.long), 1)
        assert trainer.contribution().double().norm() <= 1e-6 * SIGMA_MARGIN


@pytest.mark.parametrize("mode", MODES)
def test_a_weight_used_by_function_is_within_the_bound(mode):
    """The forward pass uses the first weight once more, past its hook. What is summed is what was normed (H4)."""
    model = model_of("mlp")
    plain = model.forward
    model.forward = lambda x: plain(x) + 50 * F.linear(x, model[0].weight)[:, :3]
    trainer, shard = trainer_of(model, mode), shard_of()
    for u in range(shard.units):
        assert contribution(trainer, unit_of(shard, u)).norm() <= 1 + 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_a_step_moves_every_parameter(mode):
    """What is charged for is applied (H20): also where no unit joined, by its noise."""
    for units in (12, 0):
        shard = part_of(shard_of(), torch.arange(units).numpy())
        trainer = trainer_of(model_of("cnn"), mode)
        before = [p.detach().clone() for p in trainer.model.parameters()]
        trainer.steps(shard, 1)
        assert all((p != old).all() for p, old in zip(trainer.model.parameters(), before, strict=True))


@pytest.mark.parametrize("field", ["max_grad_norm", "noise_multiplier"])
def test_there_is_one_clip_norm_and_one_noise_multiplier(field):
    """A scheduler that changes one of them would part the noise from what it is charged for (H5)."""
    optimizer = trainer_of(model_of("linear"))._optimizer
    planned = getattr(optimizer, field)
    with pytest.raises(PurserError, match=rf"training\.{field}"):
        setattr(optimizer, field, planned * 2)
    setattr(optimizer, field, planned)  # saying it again is no change
    assert getattr(optimizer, field) == planned


def test_opacus_own_batch_size_is_not_used():
    """Opacus keeps a field of its own; changing it changes no step."""
    steps = []
    for batch in (None, 1):
        trainer = trainer_of(model_of("linear"))
        if batch:
            trainer._optimizer.expected_batch_size = batch
        with noise_off():
            trainer.steps(shard_of(), 1)
        steps.append(flat(trainer.model))
    assert torch.equal(*steps)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_only_float32_parameters_train(dtype):
    """Sums and noise in bf16 lose a unit's bound in rounding (H6); a frozen parameter may be anything."""
    with pytest.raises(UsageError, match="float32"):
        check_model(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).to(dtype)))
    check_model(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).to(dtype).requires_grad_(False)))


def test_products_in_less_than_float32_are_refused():
    """TF32 and bf16 products would keep 11 or 8 bits of a norm (H6)."""
    trainer, torch_default = trainer_of(model_of("mlp")), torch.get_float32_matmul_precision()
    try:
        for precision in ("high", "medium"):
            torch.set_float32_matmul_precision(precision)
            with pytest.raises(PurserError, match="lower precision"):
                trainer.accumulate(whole(shard_of()))
    finally:
        torch.set_float32_matmul_precision(torch_default)


@pytest.mark.parametrize("switch", ["driver", "backends"])
def test_other_switches_for_such_products_are_refused(monkeypatch, switch):
    """Of these, get_float32_matmul_precision does not speak, or only in an error of its own."""
    if switch == "driver":
        monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    else:
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            check_products()

        def mixed():
            raise RuntimeError("mix of the legacy and new APIs")

        monkeypatch.setattr(torch, "get_float32_matmul_precision", mixed)
    with pytest.raises(PurserError, match="lower precision") as caught:
        check_products()
    assert caught.value.__cause__ is None


def test_sums_are_float64():
    trainer = trainer_of(model_of("cnn"))
    trainer.accumulate(whole(shard_of()))
    assert trainer._optimizer._sum.dtype == torch.float64
    assert trainer.contribution().dtype == torch.float64


def test_sums_are_float64_whatever_torch_s_default_is():
    """A habit of large models; sums in bf16 would lose units (H6)."""
    trainer = trainer_of(model_of("mlp"))
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert trainer_of(model_of("mlp").float())._optimizer._sum.dtype == torch.float64
        trainer.accumulate(whole(shard_of()))
    finally:
        torch.set_default_dtype(torch.float32)
    expected = trainer.contribution()
    trainer.accumulate(whole(shard_of()))
    assert (trainer.contribution() - expected).abs().max() < 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_no_raw_gradient_stays_behind(mode):
    """After a backward pass the only private thing left is the clipped sum, after a step not even that (H13)."""
    trainer, shard = trainer_of(model_of("cnn"), mode), shard_of()
    trainer.accumulate(whole(shard))
    for p in trainer.model.parameters():
        assert p.grad is None
        assert p.grad_sample is None
    trainer.steps(shard, 1)
    for p in trainer.model.parameters():
        assert p.grad is None
        assert p.grad_sample is None
    assert (trainer._optimizer._sum == 0).all()
    hooks = trainer._hooks
    assert not any(vars(hooks).get(kept) for kept in ("_kept", "_summed", "_inputs"))


@pytest.mark.parametrize("mode", MODES)
def test_a_parameter_that_was_not_used_is_refused(mode):
    """It may have been used the last time; an old gradient must not be taken for a new one (H15)."""
    model = model_of("mlp")
    trainer, shard = trainer_of(model, mode), shard_of()
    trainer.accumulate(whole(shard))
    model.forward = lambda x: model[0](x)[:, :3]
    with pytest.raises(PurserError, match="no per-record gradient"):
        trainer.accumulate(whole(shard))


@pytest.mark.parametrize("mode", MODES)
def test_a_module_used_twice_counts_both_uses(mode):
    """One module object at two places is allowed: its two gradients are added before we clip."""
    torch.manual_seed(0)
    twice = nn.Linear(16, 16)
    model = nn.Sequential(twice, nn.Tanh(), twice, nn.Linear(16, 3))
    shard = shard_of(most=1)
    loss = F.cross_entropy(model(shard.features), shard.labels, reduction="sum")
    plain = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    trainer = trainer_of(model, mode, max_grad_norm=1e6)
    assert (contribution(trainer, whole(shard)) - plain).abs().max() < 1e-5


REFUSED = {
    "Flatten": (lambda: nn.Flatten(0, 1), "join or split the records"),
    "Unflatten": (lambda: nn.Unflatten(0, (1, -1)), "join or split the records"),
    "ReLU": (lambda: nn.ReLU(inplace=True), "inplace=False"),
    "LayerNorm": (lambda: nn.LayerNorm(4, bias=False), "use bias=True"),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4), "mixes the records"),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4), "mixes the records"),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(4), "mixes the records"),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(4, track_running_stats=True), "statistics of records"),
    "LSTM": (lambda: nn.LSTM(4, 4), "per-record gradients are not supported"),
    "GRU": (lambda: nn.GRU(4, 4), "per-record gradients are not supported"),
    "Dropout": (lambda: nn.Dropout(), "set it to 0"),
    "Bilinear": (lambda: nn.Bilinear(4, 4, 4), "not on the list"),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(4, 2), "not on the list"),
    "PReLU": (lambda: nn.PReLU(), "not on the list"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_layers_are_refused_by_name(name):
    """With their place, what is wrong with them and, where there is one, what to use instead."""
    layer, why = REFUSED[name]
    with pytest.raises(UsageError, match=why) as raised:
        check_model(nn.Sequential(nn.Linear(4, 4), layer()))
    assert f"the layer 1 ({name})" in str(raised.value)
    with pytest.raises(UsageError, match=why):
        PrivateTrainer(nn.Sequential(nn.Linear(4, 4), layer()), Optimizer(), plan())


ROWS = 12  # as many as a micro-batch of `plan` has where physical_batch_size is 12
JOINING = {
    "LayerNorm": (lambda: nn.LayerNorm((ROWS, 8)), (8,)),
    "RMSNorm": (lambda: nn.RMSNorm((ROWS, 8), elementwise_affine=False), (8,)),
    "Conv2d": (lambda: nn.Conv2d(ROWS, ROWS, 1).requires_grad_(False), (8, 8)),
}


@pytest.mark.parametrize("name", JOINING)
def test_a_layer_that_takes_a_batch_for_one_record_is_refused(name):
    """torch norms over the last dimensions whatever the first are, and takes [rows, 8, 8] for one image. Below layers
    that start at zero, no rehearsal would see that records touch."""
    make, shape = JOINING[name]
    first, last = nn.Linear(8, 8), nn.Linear(64 if name == "Conv2d" else 8, 3)
    for p in (*first.parameters(), *last.parameters()):
        nn.init.zeros_(p)
    trainer = trainer_of(nn.Sequential(first, make(), nn.Flatten(), last), physical_batch_size=ROWS)
    with pytest.raises(UsageError, match="would take the records of a batch for one record"):
        rehearse(trainer, Inputs(shape, 3))
    assert len(trainer.unhook()[1]._forward_pre_hooks) == 0


def test_a_subclass_of_an_allowed_layer_is_unknown():
    """Its forward may do anything."""

    class Mixing(nn.Linear):
        def forward(self, x):
            return super().forward(x - x.mean(0))

    with pytest.raises(UsageError, match=r"the layer 0 \(Mixing\) is not on the list"):
        check_model(nn.Sequential(Mixing(4, 4)))
    with pytest.raises(UsageError, match="at the top"):
        check_model(Mixing(4, 4))


def test_parametrised_layers_are_unknown():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    with pytest.raises(UsageError, match="ParametrizedLinear"):
        check_model(nn.Sequential(layer))


def test_tied_weights_are_refused():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    with pytest.raises(UsageError, match=r"1\.weight and 0\.weight are one tied weight"):
        check_model(nn.Sequential(first, second))


def test_a_parameter_outside_a_hooked_layer_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model[1].register_parameter("slope", nn.Parameter(torch.ones(1)))
    with pytest.raises(UsageError, match=r"the layer 1 \(ReLU\) holds a parameter"):
        check_model(model)


def test_a_parameter_that_a_hooked_layer_does_not_know_is_refused():
    """Whoever refuses it, no step may be taken with it."""
    model = nn.Sequential(nn.Linear(16, 3))
    model[0].register_parameter("extra", nn.Parameter(torch.ones(3)))
    with pytest.raises((PurserError, AttributeError)):
        trainer_of(model).accumulate(whole(shard_of()))


def test_a_model_that_trains_nothing_is_refused():
    with pytest.raises(UsageError, match="no trainable parameter"):
        check_model(nn.Sequential(nn.Linear(2, 2).requires_grad_(False)))
    with pytest.raises(UsageError, match="no trainable parameter"):
        check_model(nn.Sequential(nn.Flatten()))


def test_parameters_on_two_devices_are_refused():
    with pytest.raises(UsageError, match="different devices"):
        check_model(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta")))


def test_an_embedding_that_renormalises_its_weights_is_refused():
    with pytest.raises(UsageError, match="Embedding"):
        check_model(nn.Sequential(nn.Embedding(5, 3, max_norm=0.1), nn.Flatten(), nn.Linear(6, 3)))


def test_a_convolution_that_opacus_cannot_differentiate_is_refused():
    with pytest.raises(UsageError, match="Conv2d"):
        check_model(nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular"), nn.Flatten()))
