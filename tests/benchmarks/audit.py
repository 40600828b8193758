"""What an audit costs, and what it finds: `python -m tests.benchmarks.audit [--quick] [--json]`.

overhead_ratio      of a run of the digits (`infra/jobs/digits.yaml`, one process) with 500 canaries: seconds of a
                    training that is watched over those of the same that is not, less 1; medians of runs taken in
                    turns, pair by pair. mlp_… and cnn_… of these models
rows                for each claimed ε (of the run, at the audit's δ; null for training without privacy: the least noise
                    that there may be) and each engine, true and broken in one way: the largest lower bound at 95 %, and
                    whether it contradicts the claim; with how often of how many runs it did, and the audit's ceiling.
                    Enlarged digits with 1,000 canaries, as in tests/training/audit
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.benchmarks import main
from tests.training.audit.audited import BROKEN, KEY, SOURCE_KEY, digits_file, digits_job, verdict
from training.audit.canaries import draw
from training.audit.plan import claimed
from training.audit.power import Channel
from training.audit.watch import Watch
from training.config import Job
from training.jobfile import load
from training.models import rehearsed
from training.preparation import prepare
from training.shards import Prepared, beside
from tuning.config import SweepJob

DIGITS = Path(__file__).parent.parent.parent / "infra" / "jobs" / "digits.yaml"
CANARIES = 500
CLAIMS = (1.0, 3.0, 8.0, None)


def overhead(kind: str, rounds: int, folder: Path) -> float:
    """Of watching, over the training that is watched."""
    job = load(SweepJob, DIGITS, [f"audit.canaries={CANARIES}", f"model.kind={kind}"]).plain
    canaries, every = draw(job, CANARIES // 5), np.arange(CANARIES)
    real = Prepared.at(prepare(job, SOURCE_KEY, KEY))
    assert real is not None
    shard = beside(real.shard("train", 0, 1), canaries.shard(job, every[canaries.inside]))
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for number in range(2 * rounds):
        watching = bool((number + number // 2) % 2)  # each is first as often as the other
        trainer, _ = rehearsed(job)
        begun = time.perf_counter()
        watch = Watch(trainer, canaries.shard(job, every), canaries.candidates, "") if watching else None
        for _ in range(0, job.training.steps, job.training.block):
            trainer.steps(shard, job.training.block, watch.told if watch else None)
            if watch:
                watch.look()
        if watch:
            watch.end(folder, 0, every)
        seconds[watching].append(time.perf_counter() - begun)
    pairs = zip(seconds[True], seconds[False], strict=True)
    return statistics.median(watched / alone for watched, alone in pairs) - 1


def noise_for(job: Job, epsilon: float | None) -> float:
    """The least noise multiplier, to 1 %, of which a run of `job` may claim `epsilon`."""
    low, high = 0.1, 200.0
    if epsilon is None:
        return low
    while high / low > 1.01:
        middle = (low * high) ** 0.5
        run = job.run()
        enough = claimed(Channel(run.sample_rate, middle, run.steps)) <= epsilon
        low, high = (low, middle) if enough else (middle, high)
    return high


def rows(folder: Path, repeats: int) -> list[dict[str, Any]]:
    """See the head of this file."""
    job, found = digits_job(digits_file(folder / "digits.csv")), []
    for epsilon in CLAIMS:
        this = job.with_values({"training.noise_multiplier": noise_for(job, epsilon)})
        for engine in BROKEN:
            said = []
            for number in range(repeats):
                place = folder / f"{epsilon}-{len(found)}-{number}"
                place.mkdir()
                said.append(verdict(this, place, engine))
            middle = sorted(said, key=lambda one: one["epsilon_lower_bound"])[repeats // 2]
            times = sum(one["contradicted"] for one in said)
            found.append(
                {
                    "engine": engine,
                    "epsilon_claimed": None if epsilon is None else middle["epsilon_claimed"],
                    "epsilon_lower_bound": middle["epsilon_lower_bound"],
                    "contradicted": epsilon is not None and 2 * times > repeats,
                    "score": middle["score"],
                    "times": f"{times if epsilon is not None else 0} of {repeats}",
                    "ceiling": middle["ceiling"],
                    "noise_multiplier": this.training.noise_multiplier,
                }
            )
    return found


def measure(quick: bool) -> dict[str, Any]:
    """All of it; `quick` with fewer rounds."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["PURSER_HOME"] = str(folder / "home")
        return {
            "overhead_ratio": overhead("linear", 5 if quick else 21, folder),
            "mlp_overhead_ratio": overhead("mlp", 5 if quick else 21, folder),
            "cnn_overhead_ratio": overhead("cnn", 3 if quick else 9, folder),
            "rows": rows(folder, 1 if quick else 5),
        }


if __name__ == "__main__":
    main(measure, __doc__)
