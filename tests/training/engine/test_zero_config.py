"""What DeepSpeed is given: what is made, what a user's own may add, and every key that would break a promise (P9)."""

from __future__ import annotations

import json

import pytest
from product import DIGITS

from cluster.errors import UsageError
from training.engine.zero_config import REASONS, SIZES, SWITCHES, configuration
from training.jobfile import load
from tuning.config import SweepJob

MADE = {
    "gradient_clipping": 0.0,
    "gradient_accumulation_steps": 1,
    "prescale_gradients": False,
    "gradient_predivide_factor": 1.0,
    "communication_data_type": "fp32",
    "wall_clock_breakdown": False,
    "fp16": {"enabled": False},
}
# As transformers' documentation has it, but for what a private run may not have.
USERS = {
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": False},
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": 0.0,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "optimizer": "auto",
    "flops_profiler": {"enabled": False, "profile_step": 1},
    "zero_optimization": {
        "stage": 2,
        "overlap_comm": False,
        "allgather_partitions": True,
        "allgather_bucket_size": 2e8,
        "reduce_scatter": True,
        "reduce_bucket_size": 2e8,
        "contiguous_gradients": True,
    },
}


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_made(stage, precision):
    made = configuration(stage, precision, 64)
    assert {key: made[key] for key in MADE} == MADE
    assert made["bf16"]["enabled"] == (precision == "bf16")
    assert (made["zero_optimization"]["stage"], made["zero_optimization"]["overlap_comm"]) == (stage, False)
    assert json.loads(json.dumps(made)) == made


def test_a_user_s_own_is_added():
    made, plain = configuration(2, "bf16", 64, USERS), configuration(2, "bf16", 64)
    added = made["zero_optimization"].items() - plain["zero_optimization"].items()
    assert dict(added) == {
        "allgather_partitions": True,
        "allgather_bucket_size": 200_000_000,
        "reduce_scatter": True,
        "reduce_bucket_size": 200_000_000,
        "contiguous_gradients": True,
    }
    assert {**made, "zero_optimization": None} == {**plain, "zero_optimization": None}


def whole(key: str, value: object) -> dict:
    section, dot, name = key.partition(".")
    return {section: {name: value}} if dot else {key: value}


@pytest.mark.parametrize("key", [*REASONS, "zero_optimization.sub_group_size", "zero_optimization.log", "fancy"])
@pytest.mark.parametrize("value", [7, {"enabled": True, "device": "cpu"}, True])
def test_every_other_key_is_refused_by_name(key, value):
    with pytest.raises(ValueError, match="leave it out") as error:
        configuration(1, "fp32", 64, whole(key, value))
    assert str(error.value).startswith(f"deepspeed: {key}")
    assert REASONS.get(key, "none of the keys that were checked") in str(error.value)


@pytest.mark.parametrize("key", [*SIZES, *SWITCHES])
@pytest.mark.parametrize("value", ["big", -2, 3, 1e13, None, float("nan")])
def test_a_size_is_a_size_and_a_switch_a_switch(key, value):
    with pytest.raises(ValueError, match="write (true or false|an even whole number)$"):
        configuration(1, "fp32", 64, whole(key, value))


def zeroed(**training):
    """The job file of digits, with DeepSpeed."""
    return load(SweepJob, DIGITS, ["training.backend=deepspeed", *(f"training.{k}={v}" for k, v in training.items())])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"zero_stage": 3}, "training.zero_stage: 3 was given; it takes a layer's weights away"),
        ({"zero_stage": 4}, "training.zero_stage: 4 was given"),
        ({"clipping": "hooks"}, "training.clipping: hooks lets autograd sum gradients"),
        ({"backend": "torch", "deepspeed": "{steps: 1}"}, "training.deepspeed: it is for backend: deepspeed"),
        (
            {"deepspeed": "{gradient_clipping: 1.0}"},
            "training.deepspeed: gradient_clipping was given, and it would clip",
        ),
        (
            {"deepspeed": "{optimizer: {type: Adam}}"},
            "training.deepspeed: optimizer was given, and it is the job's own",
        ),
        ({"deepspeed": "absent.json"}, "absent.json cannot be read (FileNotFoundError)"),
        ({"deepspeed": "[1]"}, "training.deepspeed"),
    ],
)
def test_a_job_says_what_is_wrong_in_one_sentence(changes, words):
    with pytest.raises(UsageError) as error:
        zeroed(**changes)
    assert words in str(error.value)
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)


def test_a_file_becomes_part_of_the_job(tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps(USERS))
    job = zeroed(deepspeed=tmp_path / "ds.json", precision="bf16")
    assert job.training.deepspeed == USERS
    assert job.training.zero == configuration(2, "bf16", 256, USERS)
    assert type(job).model_validate(job.model_dump(mode="json")) == job, "it travels"
    (tmp_path / "ds.json").write_text("{")
    with pytest.raises(UsageError, match="JSONDecodeError"):
        zeroed(deepspeed=tmp_path / "ds.json")


def test_without_deepspeed_nothing_is_made():
    assert load(SweepJob, DIGITS).training.zero is None
