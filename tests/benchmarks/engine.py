"""How fast the engine is: `python -m tests.benchmarks.engine [--quick] [--json]`.

One Llama-like model; the same micro-batches, AdamW, one logical step at a time, in turns; medians over rounds.

lora_vs_nonprivate         examples per second with LoRA adapters, over plain torch's with the same adapters
lora_vs_opacus             the same over Opacus's own path (PrivacyEngine, hooks)
full_vs_nonprivate         examples per second of full fine-tuning, over plain torch's
full_vs_opacus             the same over Opacus's own path (PrivacyEngine, ghost clipping)
full_hooks_vs_nonprivate   full fine-tuning with clipping: hooks, over plain torch's
lora_memory_vs_nonprivate  peak memory of a process that takes steps, over plain torch's; likewise full_memory_…
noise_share                drawing noise for a million parameters, over a step of a model of that size
bytes_per_step             what two ranks over gloo send per logical step, over an fp32 gradient of each
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from tests.benchmarks import main
from training.engine.objective import record_losses
from training.engine.randomness import Keystream
from training.engine.run import DPSGDRun
from training.engine.sampling import MicroBatch
from training.engine.trainer import PrivateTrainer, make_optimizer
from training.sections import Optimizer

warnings.filterwarnings("ignore")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ADAM = Optimizer(name="adam", learning_rate=1e-4)


@dataclass(frozen=True)
class Size:
    """Of the model and of a logical batch."""

    hidden: int = 256
    layers: int = 6
    vocabulary: int = 2048
    length: int = 128
    batch: int = 128
    physical: int = 16


SIZE = Size() if DEVICE.type == "cpu" else Size(1024, 12, 32000, 512, 128, 16)
MILLION = Size(hidden=128, layers=4, vocabulary=1024)


def model_of(size: Size, lora: bool) -> nn.Module:
    """A Llama of random weights, to be trained whole or by rank-8 adapters of all of its projections."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.hidden,
            intermediate_size=size.hidden * 8 // 3 // 16 * 16,
            num_hidden_layers=size.layers,
            num_attention_heads=size.hidden // 32,
            num_key_value_heads=size.hidden // 32,
            max_position_embeddings=size.length,
            use_cache=False,
        )
    )
    if lora:
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))
    return model.to(DEVICE).train()


def batches_of(size: Size) -> list[MicroBatch]:
    """One logical batch."""
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, size.vocabulary, (size.batch, size.length)))
    unit = torch.arange(size.physical)
    return [
        MicroBatch(part, part, unit, size.physical, torch.ones_like(part)).to(DEVICE)
        for part in tokens.split(size.physical)
    ]


def plain(model: nn.Module, batches: list[MicroBatch]) -> Callable[[], None]:
    """A logical step of plain torch."""
    optimizer = make_optimizer(model, ADAM)

    def step() -> None:
        for batch in batches:
            (record_losses(model, batch).sum() / (len(batches) * batch.units)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


class Criterion:
    """A record's mean loss, as Opacus's ghost clipping wants to be told of it."""

    reduction = "mean"

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Shape [records], or () where it is reduced."""
        losses = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none").mean(1)
        return losses if self.reduction == "none" else losses.mean()


def opacus(model: nn.Module, batches: list[MicroBatch], mode: str) -> Callable[[], None]:
    """A logical step of Opacus's own path."""
    from opacus import PrivacyEngine
    from torch.utils.data import DataLoader, TensorDataset

    tokens = torch.cat([batch.features for batch in batches])
    loader = DataLoader(TensorDataset(tokens), batch_size=len(tokens))
    made: Any = PrivacyEngine().make_private(
        module=model,
        optimizer=make_optimizer(model, ADAM),
        criterion=Criterion(),
        data_loader=loader,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        grad_sample_mode=mode,
    )
    private, optimizer, criterion = made[0], made[1], made[2] if mode == "ghost" else Criterion()

    def step() -> None:
        for number, batch in enumerate(batches):
            optimizer.signal_skip_step(number < len(batches) - 1)
            logits = private(input_ids=batch.features, attention_mask=batch.mask).logits
            criterion(logits, batch.labels).backward()
            optimizer.step()
            optimizer.zero_grad()

    return step


def purser(model: nn.Module, batches: list[MicroBatch], clipping: str = "bookkeeping") -> Callable[[], None]:
    """A logical step of ours."""
    size = sum(batch.units for batch in batches)
    run = DPSGDRun(1.0, 1.0, 0.01, size, 1000, 10, batches[0].units)
    trainer = PrivateTrainer(model, ADAM, run, clipping)

    def step() -> None:
        for batch in batches:
            trainer.accumulate(batch)
        trainer._optimizer.step()

    return step


ENGINES: dict[str, Callable[[nn.Module, list[MicroBatch]], Callable[[], None]]] = {
    "plain": plain,
    "hooks": lambda m, b: opacus(m, b, "hooks"),
    "ghost": lambda m, b: opacus(m, b, "ghost"),
    "purser": purser,
    "purser hooks": lambda m, b: purser(m, b, "hooks"),
}


def timed(step: Callable[[], None]) -> float:
    """Seconds of one logical step."""
    began = time.perf_counter()
    step()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def rates(lora: bool, engines: list[str], rounds: int) -> Callable[..., float]:
    """Steps of each engine, in turns, of which each has every place in turn: what one leaves in caches and allocator is
    found by the next. Returns our speed over another engine's, the quickest step of each: whatever else the machine
    does only adds to a time."""
    steps = {name: ENGINES[name](model_of(SIZE, lora), batches_of(SIZE)) for name in engines}
    times: dict[str, list[float]] = {name: [] for name in engines}
    for first in range(rounds + 1):
        for place in range(len(engines)):
            name = engines[(first + place) % len(engines)]
            times[name].append(timed(steps[name]))
    return lambda other, ours="purser": min(times[other][1:]) / min(times[ours][1:])


def _peak(engine: str, lora: bool, answer: Any) -> None:
    step = ENGINES[engine](model_of(SIZE, lora), batches_of(SIZE))
    for _ in range(2):
        step()
    if DEVICE.type == "cuda":
        answer.put(torch.cuda.max_memory_allocated())
    else:
        status = Path("/proc/self/status").read_text()
        answer.put(int(status.split("VmHWM:")[1].split()[0]))


def memory(lora: bool) -> float:
    """Peak memory of a process with our steps over one with plain torch's, what was imported included."""
    context = multiprocessing.get_context("spawn")
    peaks = {}
    for engine in ("purser", "plain"):
        answer = context.SimpleQueue()
        process = context.Process(target=_peak, args=(engine, lora, answer))
        process.start()
        peaks[engine] = answer.get()
        process.join()
    return peaks["purser"] / peaks["plain"]


def noise_share(rounds: int) -> float:
    """See the module."""
    model, batches = model_of(MILLION, lora=False), batches_of(MILLION)
    count, keys = sum(p.numel() for p in model.parameters()), Keystream()
    step = plain(model, batches)
    pairs = [(timed(lambda: keys.normal(count)), timed(step)) for _ in range(rounds + 1)][1:]
    return statistics.median(noise for noise, _ in pairs) / statistics.median(took for _, took in pairs)


def _sent() -> int:
    """Bytes that left over the loopback device since the machine started."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        if line.strip().startswith("lo:"):
            return int(line.split(":")[1].split()[8])
    raise RuntimeError("there is no loopback device")


def _rank(rank: int, folder: str, steps: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    model = nn.Sequential(nn.Linear(1000, 1000))
    trainer = PrivateTrainer(model, ADAM, DPSGDRun(1.0, 1.0, 0.01, 64, 1000, 10, 64))
    trainer._optimizer.step()
    dist.barrier()
    before = _sent()
    for _ in range(steps):
        trainer._optimizer.step()
    dist.barrier()
    if rank == 0:
        one = 4 * sum(p.numel() for p in model.parameters())
        (Path(folder) / "sent").write_text(str((_sent() - before) / steps / (2 * one)))
    dist.destroy_process_group()


def bytes_per_step() -> float:
    """See the module."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, args=(folder, 20), nprocs=2, start_method="spawn")
        return float((Path(folder) / "sent").read_text())


def measure(quick: bool) -> dict[str, float]:
    """All of it."""
    rounds = 3 if quick else 7
    lora = rates(True, ["plain", "hooks", "purser"], rounds)
    full = rates(False, ["plain", "ghost", "purser", "purser hooks"], rounds)
    result = {
        "lora_vs_nonprivate": lora("plain"),
        "lora_vs_opacus": lora("hooks"),
        "full_vs_nonprivate": full("plain"),
        "full_vs_opacus": full("ghost"),
        "full_hooks_vs_nonprivate": full("plain", "purser hooks"),
        "lora_memory_vs_nonprivate": memory(lora=True),
        "full_memory_vs_nonprivate": memory(lora=False),
        "noise_share": noise_share(rounds),
        "bytes_per_step": bytes_per_step(),
    }
    return result


if __name__ == "__main__":
    main(measure, __doc__)
