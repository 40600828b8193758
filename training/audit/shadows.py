"""Shadow models: trained as the audited one was, on canaries under coins of their own and on public records, and on
nothing else. No private record comes here, so that nothing is charged; no Ray.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable

import numpy as np

from training.audit.canaries import Canaries
from training.audit.watch import losses
from training.config import Job
from training.models import rehearsed
from training.shards import beside, public_shard


def shadow_losses(
    job: Job, canaries: Canaries, count: int, told: Callable[[int, int], None]
) -> tuple[np.ndarray, np.ndarray]:
    """Train `count` shadow models.

    Each has a unit as often as the audited run had: steps, σ, C and sample_rate are the job's, and what a noised sum is
    divided by follows from how many records there are here, which is public.

    Args:
        told: is called with how many are trained, and of how many.

    Returns:
        The loss of each canary, float64 [count, canaries], and which of them a model had learnt from, bool.
    """
    known = public_shard(job) if job.evaluation.on == "public" else None
    records = known.units if known is not None else 0
    fraction = 1 - job.data.validation_fraction
    mean = records + len(canaries) / 2
    values = {
        "privacy.units": max(2, round(records / fraction)),
        "privacy.delta": 1e-30,  # nothing is promised to anybody here, and it is below 1 / units
        "training.expected_batch_size": max(1, round(job.run().sample_rate * mean)),
        "training.backend": "torch",
        "training.deepspeed": {},
    }
    alike = job.with_values(values)
    rng = np.random.Generator(np.random.PCG64(secrets.randbits(128)))
    found = np.empty((count, len(canaries)))
    had = rng.permuted(np.tile(np.arange(count) < count // 2, (len(canaries), 1)), axis=1).T  # each in half of them
    everything = canaries.shard(job, np.arange(len(canaries)))
    for i in range(count):
        told(i, count)
        trainer, _ = rehearsed(alike)
        mine = canaries.shard(job, np.flatnonzero(had[i]))
        trainer.steps(mine if known is None else beside(known, mine), trainer.run.steps)
        found[i] = losses(trainer.model, everything, trainer.rows)
        trainer.unhook()
    told(count, count)
    return found, had
