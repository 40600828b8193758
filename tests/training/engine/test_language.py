"""Transformers models in the engine: LoRA and full fine-tuning of a small Llama equal DP-SGD written out, in every way
that it can be run (P8, P9); what of them may not be trained is refused by name.

The reference knows no batches and no padding: each record goes through the model alone, in float64, cut to its length.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import dpsgd_reference
import numpy as np
import pytest
import torch
import torch.distributed as dist
from dpsgd_reference import MODES, flat, gradient_of, noise_off, on_two_ranks, plan, reference
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
)

from cluster.errors import PurserError, UsageError
from training.engine.rehearsal import Inputs, rehearse
from training.engine.run import SIGMA_MARGIN, DPSGDRun
from training.engine.sampling import MicroBatch, Shard
from training.engine.trainer import PrivateTrainer
from training.engine.validation import check_model
from training.sections import Optimizer

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook")

WORDS, LENGTH, CLASSES = 50, 9, 3
SAME, RATE = 1e-6, 0.1


def llama_config(words: int, width: int, inner: int, layers: int, **more: Any) -> LlamaConfig:
    sizes = {"vocab_size": words, "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    return LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, **more)


def bert(words: int = WORDS, width: int = 16, layers: int = 1, classes: int = 2) -> BertForSequenceClassification:
    """Without dropout; of random weights that are the same each time."""
    torch.manual_seed(0)
    sizes = {"vocab_size": words, "hidden_size": width, "intermediate_size": width, "num_hidden_layers": layers}
    config = BertConfig(**sizes, num_attention_heads=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config.num_labels = classes
    return BertForSequenceClassification(config)


@functools.cache
def llama(kind: str) -> nn.Module:
    """causal, tied or classes: a Llama of two layers; not to be changed."""
    torch.manual_seed(0)
    config = llama_config(WORDS, 32, 48, 2, num_labels=CLASSES, pad_token_id=0, tie_word_embeddings=kind == "tied")
    return LlamaForSequenceClassification(config) if kind == "classes" else LlamaForCausalLM(config)


def adapted(model: nn.Module, task: str = "CAUSAL_LM", targets: tuple[str, ...] = ("q_proj", "v_proj")) -> nn.Module:
    """With LoRA adapters that do something already."""
    fan_in_fan_out = targets == ("c_attn",)  # GPT-2 keeps its weights transposed
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), task_type=task, fan_in_fan_out=fan_in_fan_out)
    torch.manual_seed(2)
    with_adapters: Any = get_peft_model(copy.deepcopy(model), lora)
    torch.manual_seed(3)
    for name, parameter in with_adapters.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return with_adapters


MODELS = {  # model, labels are tokens, and a clip norm near the median
    "lora": (lambda: adapted(llama("causal")), True, 0.7),
    "full": (lambda: copy.deepcopy(llama("causal")), True, 4.5),
    "lora, classes": (lambda: adapted(llama("classes"), "SEQ_CLS"), False, 6.0),
    "full, classes": (lambda: copy.deepcopy(llama("classes")), False, 9.0),
}


def shard_of(causal: bool, most: int = 3, units: int = 6) -> Shard:
    """Records of 4 to 9 tokens, one to three of them in a unit."""
    random = np.random.default_rng(1)
    offsets = np.concatenate([[0], np.cumsum(random.integers(1, most + 1, units))]).astype(np.int64)
    records = int(offsets[-1])
    lengths = torch.from_numpy(random.integers(4, LENGTH + 1, records))
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    tokens = torch.from_numpy(random.integers(1, WORDS, (records, LENGTH))) * mask
    labels = tokens.masked_fill(mask == 0, -100) if causal else torch.from_numpy(random.integers(0, CLASSES, records))
    return Shard(tokens, labels, offsets, mask)


def record_loss(model: Any, shard: Shard, i: int) -> torch.Tensor:
    """Of record `i`, alone and without padding."""
    length = int(shard.mask[i].sum())
    tokens = shard.features[i : i + 1, :length]
    logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[0]
    if shard.labels.dim() == 1:
        return F.cross_entropy(logits[None], shard.labels[i : i + 1])
    return F.cross_entropy(logits[:-1], tokens[0, 1:])


def unit_gradient(model: nn.Module, shard: Shard, u: int) -> torch.Tensor:
    return gradient_of(model, sum(record_loss(model, shard, i) for i in range(shard.offsets[u], shard.offsets[u + 1])))


@functools.cache
def expected(name: str) -> torch.Tensor:
    make, causal, clip = MODELS[name]
    return reference(make(), shard_of(causal), plan(max_grad_norm=clip), RATE, gradient_at=unit_gradient)


def trained(model: nn.Module, shard: Shard, run: DPSGDRun, *how: Any) -> torch.Tensor:
    with noise_off():
        return dpsgd_reference.trained(model, shard, run, *how, learning_rate=RATE)


@pytest.mark.parametrize("name", MODELS)
def test_the_comparison_bites(name):
    make, causal, clip = MODELS[name]
    model, shard = make().double(), shard_of(causal)
    norms = [unit_gradient(model, shard, u).norm().item() for u in range(shard.units)]
    assert 1 <= sum(norm > clip for norm in norms) <= shard.units - 1
    assert set(np.diff(shard.offsets)) == {1, 2, 3}


@pytest.mark.parametrize("physical_batch_size", [3, 8, 64])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", MODES)
def test_each_way_of_clipping_gives_the_reference(mode, name, physical_batch_size):
    """Whatever the micro-batches, their padding, and whether norms are taken by times or of written-out gradients."""
    make, causal, clip = MODELS[name]
    got = trained(make(), shard_of(causal), plan(max_grad_norm=clip, physical_batch_size=physical_batch_size), mode)
    assert (got - expected(name)).abs().max() < SAME
    assert (got - flat(make())).abs().max() > 0.01


@pytest.mark.parametrize("name", ["lora", "full"])
def test_recomputed_activations_give_the_reference(name, monkeypatch):
    """And they are recomputed: each layer runs twice for every micro-batch."""
    make, causal, clip = MODELS[name]
    model, calls = make(), []
    layer = next(m for m in model.modules() if type(m).__name__ == "LlamaMLP")
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    run = plan(max_grad_norm=clip)
    got = trained(model, shard_of(causal), run, "bookkeeping", "fp32", True)
    assert (got - expected(name)).abs().max() < SAME
    assert len(calls) == 2 * run.steps


@pytest.mark.parametrize("name", ["lora", "full"])
@pytest.mark.parametrize("mode", MODES)
def test_bf16_passes_keep_the_bound_and_come_close(mode, name):
    """Sums and norms are of what the passes gave, in fp32 and fp64: a unit's bound holds as ever (H6)."""
    make, causal, clip = MODELS[name]
    shard, run = shard_of(causal), plan(max_grad_norm=clip)
    got = trained(make(), shard, run, mode, "bf16")
    moved = (expected(name) - flat(make())).norm()
    assert 1e-6 < (got - expected(name)).norm() < 0.1 * moved
    trainer = PrivateTrainer(make(), Optimizer(), plan(max_grad_norm=0.01), mode, "bf16")
    seen = rehearse(trainer, Inputs((LENGTH,), 0, WORDS))
    assert 0.999 < seen.largest_norm <= 1 + 1e-5


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", MODES)
def test_the_rehearsal_passes(mode, name):
    make, causal, clip = MODELS[name]
    model = make()
    before = flat(model)
    trainer = PrivateTrainer(model, Optimizer(), plan(max_grad_norm=clip / 10, physical_batch_size=12), mode)
    seen = rehearse(trainer, Inputs((LENGTH,), 0 if causal else CLASSES, WORDS))
    assert seen.parameters == len(before)
    assert 0.999 < seen.largest_norm <= 1 + 1e-5
    assert torch.equal(flat(model), before)


def test_tied_weights_train_in_hooks_mode_only():
    model, shard, run = copy.deepcopy(llama("tied")), shard_of(True), plan(max_grad_norm=4.5)
    with pytest.raises(UsageError, match=r"lm_head\.weight and .*embed_tokens\.weight.*training\.clipping: hooks"):
        PrivateTrainer(copy.deepcopy(model), Optimizer(), run)
    want = reference(model, shard, run, RATE, gradient_at=unit_gradient)
    assert (trained(model, shard, run, "hooks") - want).abs().max() < SAME


class Reused(LlamaForCausalLM):
    """Uses its first weight once more, past the layer's own forward pass (H4)."""

    def forward(self, **inputs: Any) -> Any:
        out = super().forward(**inputs)
        hidden = self.model.embed_tokens(inputs["input_ids"])
        out.logits = out.logits + F.linear(hidden, self.model.embed_tokens.weight)
        return out


@pytest.mark.parametrize("mode", MODES)
def test_an_embedding_used_by_f_linear(mode, monkeypatch):
    """Opacus's ghost clipping let it through at 32.8 times the norm. Here its class is unknown; were it known, what is
    added is what was normed; and the rehearsal sees that it is not the gradient, and names the weight."""
    model = Reused(llama("causal").config)
    with pytest.raises(UsageError, match="not on the list"):
        check_model(model)
    monkeypatch.setattr("training.engine.trainer.check_model", lambda *_, **__: None)
    trainer = PrivateTrainer(model, Optimizer(), plan(), mode)
    with pytest.raises(
        PurserError, match=r"model\.embed_tokens\.weight .* used outside its layer.*Nothing was charged"
    ):
        rehearse(trainer, Inputs((LENGTH,), 0, WORDS))


def test_positions_that_all_records_share_are_refused_with_the_fix():
    """BERT looks its positions up once for all records: there is no gradient of one record's."""
    trainer = PrivateTrainer(bert(), Optimizer(), plan(max_grad_norm=0.01))
    with pytest.raises(PurserError, match=r"position_embeddings has not one row per record.*freeze this layer"):
        rehearse(trainer, Inputs((LENGTH,), 2, WORDS))
    fixed = bert()
    fixed.bert.embeddings.position_embeddings.requires_grad_(False)
    seen = rehearse(PrivateTrainer(fixed, Optimizer(), plan(max_grad_norm=0.01)), Inputs((LENGTH,), 2, WORDS))
    assert 0.999 < seen.largest_norm <= 1 + 1e-5


def deep_llama() -> nn.Module:
    torch.manual_seed(1)
    return LlamaForCausalLM(llama_config(100, 64, 128, 4, initializer_range=0.1))


def small_bert() -> nn.Module:
    model = bert(100, 64, 2, CLASSES)
    model.bert.embeddings.position_embeddings.requires_grad_(False)
    return model


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("make", [deep_llama, small_bert])
def test_a_padded_companion_changes_nothing(make, precision):
    """transformers takes another kernel where no record is padded: in bf16 that moved companions by 0.02 C."""
    records, length = 16, 32
    tokens = torch.from_numpy(np.random.default_rng(0).integers(1, 100, (records, length)))
    run = plan(max_grad_norm=1.0, max_records_per_unit=1, physical_batch_size=records, expected_batch_size=64)
    model = make()
    trainer = PrivateTrainer(model, Optimizer(), run, "bookkeeping", precision)

    def contribution(mask, units):
        inputs = (tokens * mask)[units]
        labels = torch.arange(records)[units] % CLASSES
        if make is deep_llama:
            labels = inputs.masked_fill(mask[units] == 0, -100)
        count = len(inputs)
        trainer.accumulate(MicroBatch(inputs, labels, torch.arange(count), count, mask[units]))
        return trainer.contribution()

    whole, padded = torch.ones_like(tokens), torch.ones_like(tokens)
    padded[0, 20:] = 0
    for mask in (whole, padded):
        everyone, alone, others = (contribution(mask, part) for part in (slice(None), slice(0, 1), slice(1, None)))
        assert alone.norm() <= SIGMA_MARGIN
        assert (everyone - others - alone).norm() < 1e-4


def test_padding_before_a_record_is_refused():
    """Causal models are given no mask, so that they would read it; many tokenizers of theirs pad on the left."""
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    with pytest.raises(UsageError, match="padding_side to right"):
        Shard(mask, mask, np.arange(3), mask)
    Shard(mask.flip(1), mask, np.arange(3), mask.flip(1))


@pytest.mark.parametrize("make", [LlamaForSequenceClassification, GPT2ForSequenceClassification])
def test_a_classifier_that_does_not_know_padding_is_refused(make):
    """It would fail in the first pass, in a library's words."""
    if make is LlamaForSequenceClassification:
        config = llama_config(WORDS, 32, 48, 1)
    else:
        config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=WORDS, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    config.pad_token_id = None
    model = make(config)
    for name, p in model.named_parameters():
        p.requires_grad_(name == "score.weight")
    with pytest.raises(UsageError, match="no pad_token_id"):
        check_model(model)


def train_as_rank(rank: int, folder: str) -> None:
    """Adapters, and a whole model, on one of two ranks: four units on the first, two on the second."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    for name in ("lora", "full"):
        make, causal, clip = MODELS[name]
        shard = shard_of(causal)
        cut = shard.offsets[4]
        rows, offsets = (slice(cut), shard.offsets[:5]) if rank == 0 else (slice(cut, None), shard.offsets[4:] - cut)
        mine = Shard(shard.features[rows], shard.labels[rows], offsets, shard.mask[rows])
        run = plan(max_grad_norm=clip, physical_batch_size=8, expected_batch_size=2000)
        with noise_off():
            got = dpsgd_reference.trained(make(), mine, run, learning_rate=RATE * 2000 / 5)
        torch.save(got, Path(folder) / f"{name}{rank}")
    dist.destroy_process_group()


def test_two_ranks_give_the_reference(tmp_path):
    on_two_ranks(train_as_rank, tmp_path)
    for name in ("lora", "full"):
        first, second = (torch.load(tmp_path / f"{name}{rank}") for rank in range(2))
        assert torch.equal(first, second)
        assert (first - expected(name)).abs().max() < SAME


def test_gpt2_trains_by_adapters_only():
    config = GPT2Config(
        vocab_size=WORDS, n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    with pytest.raises(UsageError, match=r"Conv1D\) has no per-record gradient here; freeze it and train a LoRA"):
        check_model(GPT2LMHeadModel(config))
    lora = adapted(GPT2LMHeadModel(config), targets=("c_attn",))
    seen = rehearse(PrivateTrainer(lora, Optimizer(), plan(max_grad_norm=0.01)), Inputs((LENGTH,), 0, WORDS))
    assert 0.999 < seen.largest_norm <= 1 + 1e-5


def test_experts_of_limited_capacity_are_refused():
    config = MixtralConfig(
        vocab_size=WORDS, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    config.num_key_value_heads = config.num_local_experts = 2
    with pytest.raises(
        UsageError, match="capacity is shared by the records of a batch; use a dense model|not on the list"
    ):
        check_model(MixtralForCausalLM(config))
    moe = nn.Module()
    moe.__class__ = type("SwitchTransformersSparseMoE", (nn.Module,), {})
    with pytest.raises(UsageError, match="capacity is shared by the records of a batch; use a dense model"):
        check_model(nn.Sequential(nn.Linear(2, 2), moe))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda config: setattr(config, "attention_dropout", 0.1), "attention drops numbers at random"),
        (
            lambda config: setattr(config, "_attn_implementation", "flash_attention_2"),
            "attn_implementation = eager or sdpa",
        ),
    ],
)
def test_attention_that_was_not_checked_is_refused(change, why):
    model: Any = copy.deepcopy(llama("causal"))
    change(model.config)
    with pytest.raises(UsageError, match=why):
        check_model(model)


def test_a_model_loaded_in_bf16_is_refused():
    """transformers loads what the file says unless it is told otherwise (H6)."""
    with pytest.raises(UsageError, match=r"dtype=torch\.float32"):
        check_model(copy.deepcopy(llama("causal")).to(torch.bfloat16))
    adapters = adapted(copy.deepcopy(llama("causal")).to(torch.bfloat16)).float()
    check_model(adapters)


def test_checkpoints_of_activations_are_refused_where_they_would_count_twice():
    with pytest.raises(UsageError, match=r"training\.clipping: hooks, which would see every layer twice"):
        PrivateTrainer(adapted(llama("causal")), Optimizer(), plan(), "hooks", "fp32", True)
    with pytest.raises(UsageError, match="Sequential brings none"):
        PrivateTrainer(nn.Sequential(nn.Linear(2, 2)), Optimizer(), plan(), "bookkeeping", "fp32", True)
