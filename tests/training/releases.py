"""Releases of a small Llama of random weights, whole and as an adapter, as a run's folder has them."""

from __future__ import annotations

import json
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from training.sections import Model
from training.tokens import tokenizer_of

PROMPTS = ("Dear Ada,", "ä", "", "A much longer beginning of a text")
TOKENIZER = tokenizer_of(Model(kind="causal-lm", path="tiny:llama"))
STATEMENT = {"schema": "purser.privacy-statement/1", "run": "people-1", "guarantee": {"epsilon": 3.0}}


def llama(kind: type = LlamaForCausalLM) -> Any:
    """Of random weights, so large that what it writes is no constant; the same each time."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(
        vocab_size=len(TOKENIZER), num_attention_heads=4, max_position_embeddings=128, pad_token_id=0, **sizes
    )
    model = kind(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return model


def adapted() -> Any:
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model: Any = get_peft_model(llama(), lora)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def release(folder, model, job=None):
    """A run's folder with a release, as `purser train` leaves it; returns the release."""
    made = folder / "release"
    model.save_pretrained(made)
    if (made / "adapter_config.json").is_file():
        llama().save_pretrained(made / "base")
        said = json.loads((made / "adapter_config.json").read_text())
        (made / "adapter_config.json").write_text(json.dumps({**said, "base_model_name_or_path": "base"}))
    TOKENIZER.save_pretrained(made)
    (made / "statement.json").write_text(json.dumps(STATEMENT))
    if job is not None:
        (folder / "job.json").write_text(job.model_dump_json())
    return made
