"""A run of the digits with canaries as a worker has it, without Ray: prepared from a file, rehearsed, watched block by
block and assessed. And engines that are broken on purpose, each in the one way that its name says.

The digits are enlarged to 32 × 32 pixels, so that a canary of random pixels has a direction that few records share; and
they are few, so that little of a step is theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import torch
from sklearn.datasets import load_digits

from training.audit.canaries import Canaries, draw
from training.audit.command import assessed, seen_by
from training.audit.plan import plan
from training.audit.watch import Watch
from training.config import Job
from training.engine import optimizer
from training.engine.randomness import Keystream
from training.jobfile import parse
from training.models import rehearsed
from training.preparation import prepare
from training.shards import Prepared, beside

KEY, SOURCE_KEY = "11" * 32, "33" * 32
SIDE, RECORDS = 4, 190


def digits_file(path: Path) -> Path:
    """Some digits, each pixel as SIDE × SIDE of them, as CSV."""
    images, labels = load_digits(return_X_y=True)
    large = np.kron(images[:RECORDS].reshape(-1, 8, 8), np.ones((SIDE, SIDE))).reshape(RECORDS, -1).astype(int)
    columns = {f"p{i}": pa.array(large[:, i]) for i in range(large.shape[1])}
    pacsv.write_csv(pa.table({**columns, "digit": pa.array(labels[:RECORDS])}), path)
    return path


def digits_job(source: Path, **training: object) -> Job:
    """A run whose ε at 1e-9 is 0.8, with 1,000 canaries."""
    return parse(
        Job,
        {
            "account": "digits",
            "privacy": {"epsilon": 3.0, "delta": 1e-4, "units": RECORDS},
            "data": {
                "source": str(source),
                "features": {f"p{i}": {"range": [0, 16]} for i in range(64 * SIDE**2)},
                "label": {"column": "digit", "categories": list("0123456789")},
            },
            "model": {"kind": "linear"},
            "training": {
                "steps": 80,
                "block": 20,
                "expected_batch_size": 163,
                "noise_multiplier": 16.0,
                "max_grad_norm": 0.1,
                "optimizer": {"learning_rate": 2.0, "schedule": "linear"},
                **training,
            },
            "audit": {"canaries": 1000},
        },
    )


def watched(job: Job, folder: Path, engine: str = "true"):
    """What all ranks (one) saw of the canaries of a run of `job`, and the canaries."""
    sealed = draw(job, plan(job).guesses).seal(folder)
    canaries = Canaries.unsealed(folder, sealed)
    trainer, _ = rehearsed(job)  # a broken one would not pass it
    every = canaries.part(0, 1)
    real = Prepared.at(prepare(job, SOURCE_KEY, KEY)).shard("train", 0, 1)
    shard = beside(real, canaries.shard(job, every[canaries.inside]))
    watch = Watch(trainer, canaries.shard(job, every), canaries.candidates, sealed)
    with BROKEN[engine]():
        for _ in range(0, job.training.steps, job.training.block):
            trainer.steps(shard, job.training.block, watch.told)
            watch.look()
    watch.end(folder, 0, every)
    return canaries, seen_by(folder)[0]


def verdict(
    job: Job,
    folder: Path,
    engine: str = "true",
    confidence: float = 0.95,
    coins: Callable[[Canaries], Canaries] = lambda canaries: canaries,
):
    """The audit of such a run; by other `coins`, if they are given."""
    canaries, seen = watched(job, folder, engine)
    canaries = coins(canaries)
    job = job.with_values({"audit.confidence": confidence, "audit.guesses": canaries.facts["guesses"]})
    return assessed(plan(job), canaries, seen)


# -- engines --


@contextmanager
def _as_it_is():
    yield


@contextmanager
def _noise(changed):
    real = Keystream.normal
    Keystream.normal = lambda self, count: changed(real, self, count)
    try:
        yield
    finally:
        Keystream.normal = real


def _without_noise():
    return _noise(lambda real, self, count: np.zeros(count))


def _with_a_tenth_of_it():
    return _noise(lambda real, self, count: real(self, count) / 10)


def _with_the_same_noise_each_step():
    kept: dict[int, np.ndarray] = {}

    def again(real, self, count):
        if count not in kept:
            kept[count] = real(self, count)
        return kept[count].copy()

    return _noise(again)


@contextmanager
def _without_clipping():
    real = optimizer.clip_factors
    optimizer.clip_factors = lambda squared_norms, _most: torch.ones_like(squared_norms).float()
    try:
        yield
    finally:
        optimizer.clip_factors = real


BROKEN = {
    "true": _as_it_is,
    "no noise": _without_noise,
    "noise at 1/10": _with_a_tenth_of_it,
    "same noise replayed": _with_the_same_noise_each_step,
    "clipping off": _without_clipping,
}
