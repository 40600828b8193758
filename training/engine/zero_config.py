"""The DeepSpeed configuration of a run: made here, with what the user's own may add; pure, and without DeepSpeed.

A key is taken if it is on the list of those that change neither what is trained nor what is told. All others are
refused, those that people bring with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

AUTO = "auto"  # as transformers has it: whoever runs it fills it in

_BATCHES = "a step is one Poisson sample, which training.expected_batch_size and physical_batch_size describe"
_TELLS = "what it writes was computed from records, and no noise covers it"
_SAMPLES = "it chooses records by another rule than the Poisson sampling that is accounted for"
_MOVES = "states on another device were not tried here; choose a higher training.zero_stage, or more workers"
_MODEL = "it changes the model that was checked"
# Keys that people bring, and why they may not; sections stand for all that is in them.
REASONS = {
    "train_batch_size": _BATCHES,
    "train_micro_batch_size_per_gpu": _BATCHES,
    "gradient_accumulation_steps": f"{_BATCHES}; it must be 1",
    "managed_gradient_accumulation": _BATCHES,
    "gradient_clipping": "it would clip the noised sum, most of whose norm is noise; units are clipped by "
    "training.max_grad_norm, so it must be 0",
    "fp16": "its loss scaling and skipped steps are not for noised gradients; write training.precision: bf16",
    "bf16": "write training.precision: bf16",
    "bfloat16": "write training.precision: bf16",
    "amp": "write training.precision: bf16",
    "torch_autocast": "write training.precision: bf16",
    "data_types": "gradients that were finished in fp32 are handed over; write training.precision: bf16",
    "communication_data_type": "it must be fp32",
    "seq_parallel_communication_data_type": "it must be fp32",
    "prescale_gradients": "every rank hands over the same finished gradient, which may not be scaled",
    "gradient_predivide_factor": "every rank hands over the same finished gradient, which may not be scaled",
    "sparse_gradients": "noise is in every coordinate of a gradient",
    "optimizer": "it is the job's own, write training.optimizer",
    "scheduler": "it is the job's own, write training.optimizer.schedule",
    "zero_optimization.stage": "it is the job's own, write training.zero_stage",
    "zero_optimization.overlap_comm": "gradients are handed over at once, so there is nothing to overlap; it must be "
    "false",
    "zero_optimization.offload_optimizer": _MOVES,
    "zero_optimization.offload_param": _MOVES,
    "zero_optimization.cpu_offload": _MOVES,
    "zero_optimization.zenflow": _MOVES,
    "zero_optimization.zero_quantized_gradients": "communication must be fp32",
    "moe": "experts' capacity is shared by the records of a batch; use a dense model",
    "pipeline": "a pipeline splits the model on which a unit is clipped as a whole",
    "tensor_parallel": "a unit is clipped by the norm of all of its gradient, which no rank would hold",
    "sequence_parallel_size": "a unit is clipped by the norm of all of its gradient, which no rank would hold",
    "compile": "compiled graphs go past the hooks that see each record",
    "hybrid_engine": _MODEL,
    "progressive_layer_drop": _MODEL,
    "compression_training": _MODEL,
    "quantize_training": _MODEL,
    "sparse_attention": _MODEL,
    "activation_checkpointing": "write training.activation_checkpointing: full",
    "curriculum_learning": _SAMPLES,
    "data_efficiency": _SAMPLES,
    "dataloader_drop_last": _SAMPLES,
    "elasticity": f"it changes batches; {_BATCHES}",
    "tensorboard": _TELLS,
    "wandb": _TELLS,
    "csv_monitor": _TELLS,
    "comet": _TELLS,
    "dump_state": _TELLS,
    "steps_per_print": "the time of a step tells how many records were in it",
    "wall_clock_breakdown": "the time of a step tells how many records were in it",
    "memory_breakdown": "the memory of a step tells how many records were in it",
    "flops_profiler": "the time of a step tells how many records were in it",
    "comms_logger": "the time of a step tells how many records were in it",
    "autotuning": "it runs steps that nobody has paid for; search with purser tune",
    "checkpoint": "checkpoints are Ray Train's",
}
# What only changes how the finished gradient and the new weights travel, and how large the pieces are.
SIZES = tuple(f"zero_optimization.{name}" for name in ("reduce_bucket_size", "allgather_bucket_size"))
SWITCHES = tuple(
    f"zero_optimization.{name}"
    for name in ("allgather_partitions", "reduce_scatter", "contiguous_gradients", "round_robin_gradients")
)


def configuration(stage: int, precision: str, rows: int, user: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What `deepspeed.initialize` is given.

    Args:
        stage: of ZeRO (Rajbhandari et al. 2020): 0 shards nothing, 1 the optimizer's states, 2 gradients as well.
        precision: fp32; or bf16, with weights in bf16 and a sharded copy of them in fp32 that steps are taken on.
        rows: of a micro-batch. DeepSpeed only counts with it.
        user: a DeepSpeed configuration of the user's, which is added.

    Raises:
        ValueError: the stage is 3; or `user` has a key that would break a promise, or was not checked.
    """
    if stage == 3:
        raise ValueError(
            "zero_stage: 3 was given; it takes a layer's weights away between its passes, while per-record gradients "
            "need them. Write 2, which shards all but the weights, and model.lora or precision: bf16 where memory is "
            "short"
        )
    made: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,  # sgd, which torch and not DeepSpeed has tested
        "fp16": {"enabled": False},
        "bf16": {"enabled": precision == "bf16", "check_grad_overflow": False},
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": False,
            **({"compute_grad_norm": False} if stage else {}),  # nobody clips by it
        },
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
    _merge(made, user or {}, "")
    return made


def _merge(made: dict[str, Any], user: Mapping[str, Any], at: str) -> None:
    """Add what the user says to `made`, whose own values stand."""
    for name, value in user.items():
        key = f"{at}.{name}" if at else str(name)
        ours = made.get(name)
        if value == AUTO or (name in made and value == ours and isinstance(value, bool) == isinstance(ours, bool)):
            continue
        if isinstance(value, Mapping) and isinstance(ours, dict):
            _merge(ours, value, key)
        elif isinstance(value, Mapping) and value.get("enabled") is False:
            continue  # a section that is turned off
        elif key in SWITCHES and isinstance(value, bool):
            made[name] = value
        elif key in SIZES and type(value) in (int, float) and 2 <= value < 1e12 and value % 2 == 0:
            made[name] = int(value)
        elif key in SIZES + SWITCHES:
            wanted = "true or false" if key in SWITCHES else "an even whole number"
            raise ValueError(f"deepspeed: {key}: {value!r} was given; write {wanted}")
        else:
            raise ValueError(f"deepspeed: {key} was given, and {_reason(key)}; leave it out")


def _reason(key: str) -> str:
    whole, _, _ = key.partition(".")
    return REASONS.get(key) or REASONS.get(whole) or "it is none of the keys that were checked"
