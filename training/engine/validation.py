"""Which models may be trained: layers allowed by name, before anything is charged (P8).

A layer is allowed when its output for one record depends on that record alone and, where it trains, there is an exact
per-record gradient for it. Everything else is refused with the fix; there is no switch to let an unknown layer through.
"""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from cluster.errors import UsageError

HOOKED = (nn.Linear, nn.Conv2d, nn.Embedding, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
STATELESS = (
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
    nn.ParameterDict,
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.ReLU,
    nn.GELU,
    nn.SiLU,
    nn.Tanh,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
)
CROSS_UNIT = {
    nn.modules.batchnorm._BatchNorm: "it mixes the records of a batch; use GroupNorm or LayerNorm",
    nn.modules.instancenorm._InstanceNorm: "it keeps running statistics of records; use GroupNorm",
    nn.modules.rnn.RNNBase: "its per-record gradients are not supported here; use a feed-forward model",
}
# In the names of classes that are not on the list anyway: for a better word of why.
MIXTURES = ("moe", "expert", "router", "switchtransformers")
ATTENTION = ("eager", "sdpa")
# transformers and PEFT classes, read line by line: where their code touches several records, it is record by record.
RMS_NORMS = ("transformers.models.llama.modeling_llama.LlamaRMSNorm",)
FROZEN_ONLY = ("transformers.pytorch_utils.Conv1D",)
KNOWN = (
    *(f"transformers.activations.{name}" for name in ("SiLUActivation", "GELUActivation", "NewGELUActivation")),
    *(
        f"transformers.models.llama.modeling_llama.Llama{name}"
        for name in (
            "ForCausalLM",
            "ForSequenceClassification",
            "Model",
            "DecoderLayer",
            "Attention",
            "MLP",
            "RotaryEmbedding",
        )
    ),
    *(
        f"transformers.models.bert.modeling_bert.Bert{name}"
        for name in (
            "ForSequenceClassification",
            "Model",
            "Embeddings",
            "Encoder",
            "Layer",
            "Attention",
            "SelfAttention",
            "SelfOutput",
            "Intermediate",
            "Output",
            "Pooler",
        )
    ),
    *(
        f"transformers.models.gpt2.modeling_gpt2.GPT2{name}"
        for name in ("LMHeadModel", "ForSequenceClassification", "Model", "Block", "Attention", "MLP")
    ),
    "peft.peft_model.PeftModelForCausalLM",
    "peft.peft_model.PeftModelForSequenceClassification",
    "peft.tuners.lora.model.LoraModel",
    "peft.tuners.lora.layer.Linear",
    "peft.utils.other.ModulesToSaveWrapper",
)


def check_model(model: nn.Module, tied: bool = False) -> None:
    """Refuse a model whose per-record gradients could be wrong or whose records could touch each other.

    Args:
        tied: whether weights that train may be shared between layers: Opacus's hooks add up what both get.

    Raises:
        UsageError: names the layer or parameter and says what to do instead.
    """
    for name, module in model.named_modules():
        _check_module(f"model: the layer {name or 'at the top'} ({type(module).__name__})", module)
    _check_attention(model)
    _check_padding(model)
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{parameter_name}"
            if parameter.requires_grad and owners.setdefault(id(parameter), full) != full and not tied:
                raise UsageError(
                    f"model: {full} and {owners[id(parameter)]} are one tied weight; untie or freeze them, or use "
                    "training.clipping: hooks."
                )
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise UsageError("model: it has no trainable parameter; unfreeze at least one.")
    if len({p.device for p in model.parameters()}) > 1:
        raise UsageError("model: its parameters lie on different devices; put them on one.")
    if any(p.dtype != torch.float32 for p in trainable):
        raise UsageError(
            "model: a trainable parameter is not float32; sums and noise need float32 parameters. Load the model with "
            "dtype=torch.float32; training.precision: bf16 makes the passes fast."
        )


def _check_module(at: str, module: nn.Module) -> None:
    for kind, why in CROSS_UNIT.items():
        if isinstance(module, kind):
            raise UsageError(f"{at} cannot be trained privately: {why}.")
    trains = any(p.requires_grad for p in module.parameters(recurse=False))
    full = full_name(module)
    if any(word in type(module).__name__.lower() for word in MIXTURES):
        raise UsageError(
            f"{at} cannot be trained privately: its experts' capacity is shared by the records of a batch; "
            "use a dense model."
        )
    if type(module) is nn.Dropout:
        if module.p:
            raise UsageError(f"{at} drops numbers at random (p = {module.p:g}); set it to 0, noise regularises enough.")
    elif full in FROZEN_ONLY:
        if trains:
            raise UsageError(f"{at} has no per-record gradient here; freeze it and train a LoRA adapter.")
    elif type(module) not in HOOKED + STATELESS and full not in KNOWN + RMS_NORMS:
        allowed = ", ".join(kind.__name__ for kind in HOOKED + STATELESS)
        raise UsageError(
            f"{at} is not on the list of layers whose privacy was checked; allowed are {allowed}, and the Llama, BERT "
            "and GPT-2 models of transformers with LoRA adapters of PEFT."
        )
    elif trains and type(module) not in HOOKED and full not in RMS_NORMS:
        raise UsageError(f"{at} holds a parameter of its own, which no hook would see; move it into a layer.")
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.scale_grad_by_freq or module.sparse):
        raise UsageError(f"{at} uses max_norm, scale_grad_by_freq or sparse, which touch other records; turn it off.")
    if (isinstance(module, nn.Flatten) and module.start_dim < 1) or (
        isinstance(module, nn.Unflatten) and not _later(module.dim)
    ):
        raise UsageError(f"{at} could join or split the records of a batch; give it a dimension of 1 or more.")
    if getattr(module, "inplace", False):
        raise UsageError(f"{at} writes over its input, which the layer before it still needs; set inplace=False.")
    if isinstance(module, nn.LayerNorm) and module.elementwise_affine and module.bias is None:
        raise UsageError(f"{at} has no bias, which Opacus cannot do without; use bias=True.")
    if getattr(module, "attention_dropout", 0):
        raise UsageError(f"{at} drops numbers at random; set attention_dropout to 0 before the model is made.")
    if getattr(module, "rope_type", "default") in ("dynamic", "longrope"):
        raise UsageError(f"{at} changes its positions with the longest record seen; use another rope_type.")
    if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
        raise UsageError(f"{at} pads with {module.padding_mode}, for which Opacus has no gradient; use zeros.")


def _later(dim: object) -> bool:
    return isinstance(dim, int) and dim >= 1


def _check_attention(model: nn.Module) -> None:
    config = getattr(model, "config", None)
    kind = getattr(config, "_attn_implementation", None)
    if kind is not None and kind not in ATTENTION:
        raise UsageError(
            f"model: its attention is {kind}, whose handling of several records was not checked; load it with "
            f"attn_implementation = {' or '.join(ATTENTION)}."
        )
    if getattr(config, "attention_dropout", 0) or getattr(config, "attention_probs_dropout_prob", 0):
        raise UsageError("model: its attention drops numbers at random; set its dropout to 0 in the configuration.")


def _check_padding(model: nn.Module) -> None:
    config = getattr(model, "config", None)
    if type(model).__name__.endswith("SequenceClassification") and getattr(config, "pad_token_id", 0) is None:
        raise UsageError(
            "model: its configuration has no pad_token_id, by which it finds where a record ends; set it to the "
            "tokenizer's."
        )


def guard_rows(model: nn.Module) -> list[RemovableHandle]:
    """Refuse, at each forward pass, an input that a layer would take for one record while it is many.

    Norms go over the last dimensions whatever the others are, and a convolution takes [rows, height, width] for one
    image of so many channels: then records touch each other. Shapes are public; there is one of them in a whole run.
    """
    guards: list[RemovableHandle] = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            least = len(module.normalized_shape) + 1
        elif isinstance(module, nn.Conv2d):
            least = 4
        elif isinstance(module, nn.GroupNorm):
            least = 2
        else:
            continue
        guards.append(module.register_forward_pre_hook(functools.partial(_guard, name, least)))
    return guards


def _guard(name: str, least: int, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    if inputs[0].dim() < least:
        raise UsageError(
            f"model: the layer {name} ({type(module).__name__}) got {inputs[0].dim()} dimensions and would take the "
            f"records of a batch for one record; give it {least} or more, the first of which counts records."
        )


def full_name(module: nn.Module) -> str:
    """By which the lists above know a class that is not imported here."""
    return f"{type(module).__module__}.{type(module).__qualname__}"
