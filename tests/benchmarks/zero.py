"""What DeepSpeed's steps cost and save: `python -m tests.benchmarks.zero [--quick] [--json]`.

Two ranks over gloo (nccl where each has a GPU), one Llama-like model, AdamW, whole logical steps: torch's optimizer
and each stage take one in turns; medians over rounds.

step_vs_torch_backend       full fine-tuning, stage 2: time of a step over that with torch's optimizer
stage_0_vs_torch_backend    likewise, and stage_1_…; lora_… with LoRA adapters and stage 2; bf16_… both in bf16
moments_stage_0             bytes of Adam's moments on a rank, over those with torch's optimizer; likewise …_1, …_2
state_stage_2               the same with the copies of parameters that the optimizer steps on; bf16_… both in bf16
state_vs_plain_deepspeed    what state_stage_2 counts, over plain DeepSpeed's own after a step of its own
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from tests.benchmarks import main
from tests.benchmarks.engine import ADAM, Size, model_of
from training.engine.objective import record_losses
from training.engine.run import DPSGDRun
from training.engine.sampling import MicroBatch, Shard
from training.engine.stepper import Stepper, TorchStepper, held
from training.engine.trainer import PrivateTrainer, make_optimizer
from training.engine.zero import Zero
from training.engine.zero_config import configuration

RANKS = 2
SIZE = Size(batch=16, physical=8)
STAGES = (None, 0, 1, 2)


def shard_of(size: Size) -> Shard:
    """One rank's half of a logical batch, which joins every step."""
    records = size.batch // RANKS
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, size.vocabulary, (records, size.length)))
    return Shard(tokens, tokens, np.arange(records + 1), torch.ones_like(tokens))


def trainer_of(lora: bool, stage: int | None, precision: str, rounds: int) -> PrivateTrainer:
    """Of a model of its own."""
    run = DPSGDRun(1.0, 1.0, 1.0, SIZE.batch, rounds, 1, SIZE.physical)
    stepper = TorchStepper if stage is None else Zero(configuration(stage, precision, SIZE.physical))
    return PrivateTrainer(model_of(SIZE, lora), ADAM, run, "bookkeeping", precision, stepper=stepper)


def medians(lora: bool, precision: str, stages: tuple[int | None, ...], rounds: int) -> dict[str, Any]:
    """Seconds of a step and bytes of what the optimizer holds, by stage."""
    trainers = {stage: trainer_of(lora, stage, precision, rounds + 1) for stage in stages}
    shard, seconds = shard_of(SIZE), {stage: [] for stage in stages}  # type: dict[Any, list[float]]
    for number in range(rounds + 1):
        for stage in itertools.islice(itertools.cycle(stages), number, number + len(stages)):
            dist.barrier()
            start = time.perf_counter()
            trainers[stage].steps(shard, 1)
            dist.barrier()
            if number:  # the first is not counted
                seconds[stage].append(time.perf_counter() - start)
    return {
        "seconds": {str(stage): statistics.median(times) for stage, times in seconds.items()},
        "moments": {str(stage): moments(trainer._stepper.optimizer) for stage, trainer in trainers.items()},
        "bytes": {str(stage): state_bytes(trainer._stepper) for stage, trainer in trainers.items()},
    }


def state_bytes(stepper: Stepper) -> int:
    """Of Adam's moments, and of parameters that it keeps beside the model's own."""
    return moments(stepper.optimizer) + sum(
        t.nbytes for t in held(stepper) if all(t is not p for p in stepper.parameters)
    )


def moments(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all of an optimizer's state."""
    return sum(t.nbytes for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t))


def plain_bytes() -> int:
    """What `state_bytes` counts, of DeepSpeed as its own documentation has it, without any of ours."""
    import deepspeed

    model: nn.Module = model_of(SIZE, lora=False)
    optimizer = make_optimizer(model, ADAM)
    config = {"train_micro_batch_size_per_gpu": SIZE.physical, "zero_optimization": {"stage": 2}}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    shard = shard_of(SIZE)
    rows, tokens = torch.arange(SIZE.physical), shard.features[: SIZE.physical]
    batch = MicroBatch(tokens, tokens, rows, SIZE.physical, torch.ones_like(tokens)).to(next(model.parameters()).device)
    engine.backward(record_losses(engine, batch).mean())
    engine.step()
    return moments(optimizer) + sum(p.nbytes for group in optimizer.param_groups for p in group["params"])


def _rank(rank: int, folder: str, rounds: int) -> None:
    torch.set_num_threads(1)
    gpu = torch.cuda.device_count() >= RANKS
    if gpu:
        torch.cuda.set_device(rank)
    os.environ["LOCAL_RANK"] = str(rank if gpu else 0)
    dist.init_process_group(
        "nccl" if gpu else "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=RANKS
    )
    seen = {
        "full": medians(False, "fp32", STAGES, rounds),
        "lora": medians(True, "fp32", (None, 2), rounds),
        "bf16": medians(False, "bf16", (None, 2), rounds),
        "plain": plain_bytes(),
    }
    dist.destroy_process_group()
    if rank == 0:
        (Path(folder) / "seen").write_text(json.dumps(seen))


def measure(quick: bool) -> dict[str, float]:
    """All of it."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, args=(folder, 3 if quick else 9), nprocs=RANKS, start_method="spawn")
        seen = json.loads((Path(folder) / "seen").read_text())

    def ratio(what: str, of: str, stage: int) -> float:
        return float(seen[what][of][str(stage)] / seen[what][of]["None"])

    return {
        "step_vs_torch_backend": ratio("full", "seconds", 2),
        "stage_0_vs_torch_backend": ratio("full", "seconds", 0),
        "stage_1_vs_torch_backend": ratio("full", "seconds", 1),
        "lora_step_vs_torch_backend": ratio("lora", "seconds", 2),
        "bf16_step_vs_torch_backend": ratio("bf16", "seconds", 2),
        "moments_stage_0": ratio("full", "moments", 0),
        "moments_stage_1": ratio("full", "moments", 1),
        "moments_stage_2": ratio("full", "moments", 2),
        "state_stage_2": ratio("full", "bytes", 2),
        "bf16_state_stage_2": ratio("bf16", "bytes", 2),
        "state_vs_plain_deepspeed": seen["full"]["bytes"]["2"] / seen["plain"],
        "step_s": seen["full"]["seconds"]["None"],
    }


if __name__ == "__main__":
    main(measure, __doc__)
