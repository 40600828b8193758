"""The transformers model of a job as the engine may train it, and what leaves of it: fp32, without dropout, whole or
with LoRA adapters of PEFT.

Knows no records: what is made here follows from the job and public weights alone, and is the same in every process.
Code that comes with a model is never run, and a pickle is code.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cluster.errors import UsageError, without_content
from training.config import Job
from training.sections import Lora, Model
from training.tokens import TINY, end_of, tokenizer_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

BASE = "base"  # in a release's folder, beside an adapter on a model that is nowhere else to be had
HEADS = ("classifier", "score")  # how transformers calls what is new of a classifier; PEFT trains it by these names
ATTENTION = "sdpa"
_SEED = 0x9E3779B9  # of weights that nobody trained; public
_TINY_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
    "initializer_range": 0.1,  # from 0.02, adapters would have to shout to be heard through weights that stay small
}


def build(job: Job) -> Any:
    """The model of `job`, which reads text: fp32, on the CPU; what is to train asks for gradients.

    Weights that no file has (a tiny model's, a new head's, adapters') are drawn alike in every process, so that all
    ranks, a resumed run and whoever loads the release mean the same base. The global random state stays as it was.

    Raises:
        UsageError: there is no such model, or the job asks of it what it cannot do, by the job's field.
    """
    quiet()
    tokenizer = tokenizer_of(job.model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        model, fresh = _base(job, tokenizer)
        _check_fits(job, model, tokenizer)
        if job.model.lora is not None:
            return _adapted(model, job.model, job.model.lora, fresh)
    for name, layer in model.named_modules():
        if name == "bert.embeddings.position_embeddings":  # looked up once for all records: no gradient is one record's
            layer.requires_grad_(False)
    return model


def save(model: Any, job: Job, folder: Path) -> None:
    """Write to `folder` what may leave of the trained `model`, which stays as it is, and the tokenizer: the adapter, or
    all weights, into which an adapter is merged."""
    tokenizer = tokenizer_of(job.model)
    if tokenizer.pad_token_id is None:  # as it was trained
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(end_of(tokenizer))
    if job.target == "adapter":
        adapter = model.peft_config["default"]
        adapter.base_model_name_or_path = BASE if job.model.made_here else job.model.public().path
        model.save_pretrained(folder, save_embedding_layers=False)
        if job.model.made_here:
            _save_whole(build(job.with_values({"model.lora": None, "release.target": None})), folder / BASE)
    elif job.model.lora is not None:  # merged in a copy: at a rung the run goes on
        copy = build(job)
        copy.load_state_dict(model.state_dict())
        _save_whole(copy.merge_and_unload(), folder)
    else:
        _save_whole(model, folder)
    tokenizer.save_pretrained(folder)


def quiet() -> None:
    """The libraries tell, in tables, which weights are new, and of each other's old names; that is known."""
    from transformers.utils import logging

    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _base(job: Job, tokenizer: PreTrainedTokenizerFast) -> tuple[PreTrainedModel, set[str]]:
    """The model without adapters, and the names of its parameters that no file has, but for a tiny one's."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    causal, path = job.model.kind == "causal-lm", str(job.model.path)
    auto: Any = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    if path in TINY:
        config = _settled(_tiny(path, causal, len(tokenizer)), job, tokenizer)
        return auto.from_config(config, attn_implementation=ATTENTION, dtype=torch.float32), set()
    config = _loaded(job, lambda: AutoConfig.from_pretrained(path, trust_remote_code=False))
    model, seen = _loaded(
        job,
        lambda: auto.from_pretrained(
            path,
            config=_settled(config, job, tokenizer),
            dtype=torch.float32,  # else whatever the file has
            attn_implementation=ATTENTION,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # a head for other labels
            output_loading_info=True,
        ),
    )
    others = {key if isinstance(key, str) else key[0] for key in seen["mismatched_keys"]}
    wrong = {name for name in others if not any(part in HEADS for part in name.split("."))}
    fresh = {name for name, _ in model.named_parameters() if name in seen["missing_keys"] or name in others}
    if wrong or (causal and fresh):
        raise UsageError(
            f"model.path: {path!r} was given, and {min(wrong | fresh)} is not in it as its configuration says; name a "
            f"folder or hub's id that holds a whole {job.model.kind} model."
        )
    return model, fresh


def _loaded(job: Job, load: Callable[[], Any]) -> Any:
    failure = None
    try:
        return load()
    except Exception as error:  # noqa: BLE001 (a dozen libraries read such folders)
        failure = without_content(error)
    raise UsageError(
        f"model.path: {job.model.path!r} was given, and no {job.model.kind} model can be loaded from it ({failure}); "
        "name a folder with its configuration and safetensors, or a hub's id that this machine can reach."
    )


def _tiny(path: str, causal: bool, words: int) -> Any:
    from transformers import BertConfig, LlamaConfig

    if path == "tiny:llama":
        return LlamaConfig(vocab_size=words, num_key_value_heads=2, tie_word_embeddings=False, **_TINY_SIZES)
    if causal:
        raise UsageError("model.path: tiny:bert was given; it is no causal model, write tiny:llama.")
    return BertConfig(vocab_size=words, **_TINY_SIZES)


def _settled(config: Any, job: Job, tokenizer: PreTrainedTokenizerFast) -> Any:
    """`config` as the engine and the job want it."""
    for name, value in config.to_dict().items():
        drops = "dropout" in name or name.endswith("pdrop")
        if drops and (value is None or isinstance(value, (int, float))):
            setattr(config, name, 0.0)
    config.use_cache = False
    config.pad_token_id = end_of(tokenizer) if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    config.bos_token_id = tokenizer.bos_token_id
    config.eos_token_id = end_of(tokenizer)
    if job.model.kind == "sequence-classification":
        if job.data.label is None:
            raise UsageError("data.label: it is missing; declare the column to predict and its categories.")
        config.id2label = dict(enumerate(job.data.label.categories))
        config.label2id = {name: i for i, name in config.id2label.items()}
        config.problem_type = "single_label_classification"
    return config


def _check_fits(job: Job, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    text, room = job.data.text, getattr(model.config, "max_position_embeddings", None)
    if text is not None and room is not None and text.max_length > room:
        raise UsageError(
            f"data.text.max_length: {text.max_length} was given; the model of model.path reads {room} tokens, choose "
            f"{room} or fewer."
        )
    words: Any = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > words:
        raise UsageError(
            f"model.path: the tokenizer of {job.model.path!r} has {len(tokenizer)} tokens and its model knows {words}; "
            "name a model and its own tokenizer."
        )


def _adapted(model: PreTrainedModel, said: Model, lora: Lora, fresh: Iterable[str]) -> Any:
    """`model` with adapters; what no file has trains as well, or whoever loads the release would have another."""
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers.pytorch_utils import Conv1D

    linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, (torch.nn.Linear, Conv1D))}
    own = {name for name in linear if not any(part in HEADS for part in name.split("."))}
    new = {name.rpartition(".")[0] for name in fresh} - set(HEADS)
    chosen = _ending_in(own - new, lora.target_modules)
    adapters = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # a quotient of r, of which PEFT says that it is whole
        target_modules=list(lora.target_modules),
        exclude_modules=sorted(set(linear) - chosen),
        modules_to_save=sorted(new) or None,
        lora_dropout=0.0,
        fan_in_fan_out=any(isinstance(linear[name], Conv1D) for name in chosen),  # GPT-2 keeps its weights transposed
        task_type=TaskType.CAUSAL_LM if said.kind == "causal-lm" else TaskType.SEQ_CLS,
    )
    return get_peft_model(model, adapters)


def _ending_in(layers: set[str], targets: Sequence[str]) -> set[str]:
    """Of `layers` those whose names end in one of `targets`.

    Raises:
        UsageError: none does in one of them.
    """
    found = set()
    for target in targets:
        mine = {name for name in layers if name == target or name.endswith(f".{target}")}
        if not mine:
            there = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
            raise UsageError(
                f"model.lora.target_modules: {target!r} was given, and no linear layer's name ends in it; this model "
                f"has {there}."
            )
        found |= mine
    return found


def _save_whole(model: Any, folder: Path) -> None:
    model.config.use_cache = True  # in training only it is of no use
    model.save_pretrained(folder, max_shard_size="10TB")  # one file, which the statement names
    model.config.use_cache = False
