"""What is seen of canaries is what it says: losses, inner products with noised updates, ranks; by the definition, one
canary at a time. Watching changes neither the model nor what is drawn (P7, P10)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from people import text_job
from torch.nn import functional as F

from cluster.errors import PurserError
from training.audit.canaries import draw
from training.audit.plan import SCORES
from training.audit.watch import Watch, losses
from training.engine.run import DPSGDRun
from training.engine.sampling import Shard
from training.engine.trainer import PrivateTrainer
from training.models import build, rehearsed
from training.sections import Model, Optimizer

CANARIES, SEALED = 12, "ab" * 32


def trainer_of(steps=7, clip=0.5):
    torch.manual_seed(0)
    run = DPSGDRun(1.0, clip, 0.5, 6, steps, 3, physical_batch_size=5)
    return PrivateTrainer(build(Model(kind="mlp", hidden=4), 6, 3), Optimizer(learning_rate=0.5), run)


def shard_of(records, seed=0):
    random = np.random.default_rng(seed)
    features = torch.from_numpy(random.normal(size=(records, 6))).float()
    return Shard(features, torch.from_numpy(random.integers(0, 3, records)), np.arange(records + 1))


def none():
    return np.zeros(0, np.int64)


def gradient(model, shard, number):
    """Of one record's loss, flat, in float64."""
    model = build(Model(kind="mlp", hidden=4), 6, 3).double().requires_grad_(True) if model is None else model
    loss = F.cross_entropy(model(shard.features[number : number + 1]), shard.labels[number : number + 1])
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).double()


@pytest.mark.parametrize("window", [1, 2, 20])
def test_scores_are_those_of_the_definition(monkeypatch, tmp_path, window):
    """Blocks of 3, 3 and 1 steps, windows of whatever fits in them."""
    monkeypatch.setattr("training.audit.watch.WINDOW", window)
    trainer, mine, real = trainer_of(), shard_of(CANARIES), shard_of(20, seed=1)
    watch = Watch(trainer, mine, none(), SEALED)
    model, start = trainer.model, losses(trainer.model, mine, 5)
    wanted_sum, wanted_changes = np.zeros(CANARIES), np.zeros(CANARIES)
    last: list[torch.Tensor] = []
    kept: list[torch.Tensor] = []

    def look():
        """At what was kept, with the model as it stands."""
        trainer._hooks.disable_hooks()
        for number in range(CANARIES if kept else 0):
            own = gradient(model, mine, number)
            size = own.norm().item()
            along = [(own @ update / size).item() for update in (*last, *kept)]
            wanted_sum[number] += min(size, 0.5) * sum(along[len(last) :])
            wanted_changes[number] += np.square(np.diff(along)).sum()
        trainer._hooks.enable_hooks()
        last[:] = kept[-1:] or last
        kept.clear()

    def told(update):
        if len(kept) == window:
            look()
        kept.append(update.clone())
        watch.told(update)

    for steps in (3, 3, 1):
        trainer.steps(real, steps, told)
        watch.look()
        look()
    watch.end(tmp_path, 0, np.arange(CANARIES))
    with np.load(tmp_path / "canaries-0.npz") as seen:
        assert np.allclose(seen[SCORES[1]], wanted_sum, atol=1e-5)
        assert np.allclose(seen[SCORES[2]], wanted_changes, atol=1e-5)
        assert np.allclose(seen[SCORES[0]], start - losses(model, mine, 5))
        assert np.allclose(seen["loss"], F.cross_entropy(model(mine.features), mine.labels, reduction="none").detach())
    assert np.abs(wanted_sum).max() > 1e-2, "there is something to see"


def test_who_watches_changes_nothing():
    """The model, its gradients and its mode are what they were, and so is the state of torch's generator."""
    trainer, mine = trainer_of(), shard_of(CANARIES)
    before, state = [p.clone() for p in trainer.model.parameters()], torch.get_rng_state()
    watch = Watch(trainer, mine, none(), SEALED)
    watch.told(torch.ones(trainer.last_numbers(10**9), dtype=torch.float64))
    watch.look()
    assert all(torch.equal(p, old) for p, old in zip(trainer.model.parameters(), before, strict=True))
    assert all(p.grad is None for p in trainer.model.parameters())
    assert trainer.model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(trainer.contribution(), torch.zeros(trainer.last_numbers(10**9), dtype=torch.float64))


def test_a_checkpoint_of_other_canaries_is_refused():
    trainer = trainer_of()
    fewer = Watch(trainer, shard_of(CANARIES - 1), none(), SEALED).state()
    others = Watch(trainer, shard_of(CANARIES), none(), "cd" * 32).state()
    for state in (None, fewer, others):
        with pytest.raises(PurserError, match="what was seen of the audit's canaries is not in it, or is of others"):
            Watch(trainer, shard_of(CANARIES), none(), SEALED).load(state)


def test_a_rank_that_holds_no_canary_has_nothing_to_say(tmp_path):
    trainer = trainer_of()
    watch = Watch(trainer, shard_of(0), none(), SEALED)
    trainer.steps(shard_of(20, seed=1), 3, watch.told)
    watch.look()
    watch.end(tmp_path, 1, none())
    with np.load(tmp_path / "canaries-1.npz") as seen:
        assert all(len(seen[name]) == 0 for name in seen.files if name != "sealed")


@pytest.mark.parametrize("packing", ["none", "unit"])
def test_a_token_s_rank_is_among_those_that_it_was_drawn_from(tmp_path, packing):
    """By the model's own logits for the token before it; and the loss is that token's alone."""
    job = text_job("notes.csv", label=False, unit="id", most=3, packing=packing).with_values({"audit.canaries": 20})
    trainer, _ = rehearsed(job)
    canaries = draw(job, 10)
    Watch(trainer, canaries.shard(job, np.arange(20)), canaries.candidates, SEALED).end(tmp_path, 0, np.arange(20))
    model = trainer.unhook().eval()
    with np.load(tmp_path / "canaries-0.npz") as seen, torch.no_grad():
        for number in range(20):
            length = canaries.arrays["length"][number]
            ids = torch.from_numpy(canaries.arrays["ids"][number : number + 1, :length]).long()
            scores = model(input_ids=ids).logits[0, length - 2].double()
            target = int(ids[0, -1])
            assert seen["loss"][number] == pytest.approx(-scores.log_softmax(0)[target].item(), abs=1e-4)
            rank = 1 + (scores[canaries.candidates] > scores[target]).sum().item()
            assert seen["rank"][number] == rank
