"""Records of one unit that share a row stay examples of their own: the unit's gradient is what it is unpacked, whatever
stands beside it in a row or a batch (P8). Each way to get it wrong is seen to be caught."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dpsgd_reference import plan
from test_language import LENGTH, WORDS, adapted, llama
from transformers import GPT2Config, GPT2LMHeadModel

from cluster.errors import PurserError
from training.engine import objective
from training.engine.objective import IGNORED
from training.engine.rehearsal import Inputs, rehearse
from training.engine.sampling import Shard, micro_batches
from training.engine.trainer import PrivateTrainer
from training.preparation import packed
from training.sections import Optimizer
from training.shards import packed_shard, shard_of

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook")

ROOM, UNITS = 2 * LENGTH, 4
SAME = 1e-5  # over the size of the gradient, in fp32
EVERYONE = range(UNITS)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    config = GPT2Config(**sizes, initializer_range=0.2, bos_token_id=1, eos_token_id=1)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return GPT2LMHeadModel(config)


MODELS = {
    "llama": lambda: adapted(llama("causal")),
    "gpt2": lambda: adapted(gpt2(), targets=("c_attn",)),
}


def columns_of(lengths, prompts):
    """Encoded records of so many tokens, of which so many are a prompt."""
    tokens = torch.from_numpy(np.random.default_rng(1).integers(1, WORDS, (len(lengths), ROOM))).int()
    length = torch.tensor(lengths, dtype=torch.int32)
    ids = tokens.masked_fill(torch.arange(ROOM) >= length[:, None], 0)
    return {"ids": ids, "length": length, "prompt": torch.tensor(prompts, dtype=torch.int32)}


def both() -> tuple[Shard, Shard]:
    """The same records unpacked and packed: units of 1, 4, 3 and 2 records, of which the last fill a row each."""
    lengths = np.array([5, 7, 4, 9, 6, 3, 11, 2, ROOM, ROOM])
    columns, offsets = columns_of(lengths, [0, 2, 0, 3, 0, 1, 0, 2, 4, 0]), np.array([0, 1, 5, 8, 10])
    order, rows, units = packed(lengths, offsets, ROOM)
    again = {name: column[torch.from_numpy(order)] for name, column in columns.items()}
    return shard_of(columns, offsets, causal=True), packed_shard(again, rows, units)


def trainer_of(name, clip=1e4):
    run = plan(max_grad_norm=clip, max_records_per_unit=4, physical_batch_size=12, expected_batch_size=64)
    return PrivateTrainer(MODELS[name](), Optimizer(), run)


def contribution(trainer, shard, units=EVERYONE):
    """What `units` contribute together, in one micro-batch."""
    (batch,) = micro_batches(shard, np.array(units), trainer.rows)
    trainer.accumulate(batch)
    return trainer.contribution()


def gap(name):
    """How far any unit's gradient is from what it is unpacked, over its size."""
    trainer, (plain, shared) = trainer_of(name), both()
    pairs = [(contribution(trainer, plain, [u]), contribution(trainer, shared, [u])) for u in EVERYONE]
    return max(((ours - theirs).norm() / theirs.norm()).item() for theirs, ours in pairs)


def moved(name):
    """How far the units' contributions alone are from those together, over max_grad_norm."""
    trainer, (_, shared) = trainer_of(name, clip=0.1), both()
    alone = sum(contribution(trainer, shared, [u]) for u in EVERYONE)
    return ((alone - contribution(trainer, shared)).norm() / 0.1).item()


def test_rows_are_saved():
    plain, shared = both()
    assert (len(plain.labels), len(shared.labels)) == (10, 6)
    assert shared.positions[:].max() == ROOM - 1


@pytest.mark.parametrize("name", MODELS)
def test_a_unit_s_gradient_is_what_it_is_unpacked(name):
    assert gap(name) < SAME


@pytest.mark.parametrize("name", MODELS)
def test_companions_change_nothing(name):
    assert moved(name) < 1e-5


# -- broken on purpose --


@pytest.mark.parametrize("name", MODELS)
def test_attention_across_records_is_seen(monkeypatch, name):
    monkeypatch.setattr(
        objective, "logits_of", lambda model, batch: model(input_ids=batch.features, position_ids=None).logits
    )
    assert gap(name) > 100 * SAME


def token_losses(model, batch):
    """The loss of every token but a row's first, whatever record it is of, and what was wanted there."""
    logits = objective.logits_of(model, batch)[: len(batch.unit)].float()
    wanted = batch.labels[: len(batch.unit), 1:]
    lost = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), wanted, ignore_index=IGNORED, reduction="none"
    )
    return lost, wanted


def test_a_loss_over_rows_is_seen(monkeypatch):
    """One mean over all that a row predicts: a record's weight would depend on what it shares the row with."""
    right = objective.record_losses

    def by_row(model, batch):
        if batch.positions is None:
            return right(model, batch)
        lost, wanted = token_losses(model, batch)
        return lost.sum(1) / (wanted != IGNORED).sum(1).clamp(min=1)

    monkeypatch.setattr("training.engine.trainer.record_losses", by_row)
    assert gap("llama") > 100 * SAME


def test_a_token_predicted_across_records_is_seen(monkeypatch):
    """The loss without a look at where a record begins, but for the record that it counts a token to."""
    right = objective.record_losses

    def across(model, batch):
        if batch.positions is None:
            return right(model, batch)
        lost, wanted = token_losses(model, batch)
        record = (batch.positions[: len(batch.unit)] == 0).cumsum(1)[:, 1:]
        counts = torch.stack([((wanted != IGNORED) & (record == r)).sum(1) for r in range(1, 5)])
        return sum(((lost * (record == r)).sum(1) / counts[r - 1].clamp(min=1)) for r in range(1, 5))

    monkeypatch.setattr("training.engine.trainer.record_losses", across)
    assert gap("llama") > 100 * SAME


def test_a_row_s_mask_does_not_depend_on_other_rows(monkeypatch):
    """transformers makes a mask only where some row of the batch has two records: a row of padding always has."""
    masks = []
    right = torch.nn.functional.scaled_dot_product_attention

    def watched(*args, **named):
        masks.append(named.get("attn_mask") is not None)
        return right(*args, **named)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    trainer, (plain, shared) = trainer_of("llama"), both()
    contribution(trainer, shared, [3])  # a record to a row
    assert masks
    assert all(masks)
    masks.clear()
    contribution(trainer, plain, [3])
    assert not any(masks)
    masks.clear()
    monkeypatch.setattr("training.engine.trainer.in_one_shape", lambda model, batch, rows: batch)
    contribution(trainer, shared, [3])
    assert not any(masks), "without that row it would be another kernel"


# -- the rehearsal --


@pytest.mark.parametrize("name", MODELS)
def test_the_rehearsal_goes_through_packed_rows(name):
    seen = rehearse(trainer_of(name, clip=0.01), Inputs((ROOM,), 0, WORDS, packed=True))
    assert 0.999 < seen.largest_norm <= 1 + 1e-5


def test_the_rehearsal_catches_rows_that_see_each_other(monkeypatch):
    """Here a row's records begin anew only where a companion's do, as where a mask is a matter of the whole batch."""

    def batchwise(model, batch):
        several = (batch.positions[:-1] == 0).sum() > len(batch.unit) and len(batch.unit) > 1
        return model(input_ids=batch.features, position_ids=batch.positions if several else None).logits

    monkeypatch.setattr(objective, "logits_of", batchwise)
    with pytest.raises(PurserError, match="changed with its companions"):
        rehearse(trainer_of("llama", clip=0.01), Inputs((ROOM,), 0, WORDS, packed=True))
