"""What tuning is worth: `python -m tests.benchmarks.modes [--quick] [--json]`.

Four ways to spend one (ε, δ), ε = 3, on a model of scikit-learn's digits (δ = 1e-4) and of Adult (δ = 1e-6, read from
../shared/data/adult.csv and skipped where that is not there):

untuned  one run with the defaults of a job file, learning_rate 1 and max_grad_norm 1: the geometric middle of the space
         that the others search. The whole budget is that one run's
filter   eight random candidates, all paid for at one Rényi order; the one with the best noised accuracy is released
select   private selection: K candidates, truncated negative binomial with η = 1/2 and mean 8; only the best is released
naive    eight random candidates, each with an (ε/8, δ/8) of its own, converted alone: what adding ε's up leaves

Of each way, on each dataset (DATASET_WAY_…):

accuracy          of the released model on the test part, the mean over twenty repeats; and (…_error) its standard error
noise_multiplier  the least at which the way fits its budget, at the order that is best for it
evaluation_noise  the same of each candidate's histogram, on the validation account, which has its own (ε, δ)
candidates        how many models were trained in the mean: what the way costs in time

and DATASET_select_beats_untuned, the share of repeats in which select's model is the better one.

A fifth of the records is the test part, by a public hash of the record alone: neither training nor validation sees it,
and its accuracy is printed without noise. That is for public research data only: Purser itself would never do it. In
one repeat all ways have the same partitions and the same candidates, as far as each of them gets.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import torch

from cluster.accounting import orders
from cluster.accounting.books import PARTITIONS
from cluster.accounting.costs import budget_cost, price
from cluster.accounting.mechanisms import Charge, DiscreteGaussian, PoissonSubsampledGaussian
from cluster.accounting.selection import quantile, repetitions_of
from cluster.environment import HOME
from cluster.errors import UsageError
from tests.benchmarks import main
from training import data, identity, sources
from training.config import Job
from training.engine.sampling import Shard
from training.engine.trainer import PrivateTrainer
from training.evaluation import noised
from training.jobfile import parse
from training.models import build
from training.preparation import prepare
from training.sections import Evaluation
from training.shards import Prepared
from tuning.config import SweepJob

TRIALS, ETA, REPEATS = 8, 0.5, 20
TEST = 5  # one record in so many is for the test
ADULT = Path(__file__).resolve().parents[3] / "shared" / "data" / "adult.csv"

# Two decades about the defaults of a job file. Chosen before anything was trained, and not changed since.
TUNING = {
    "trials": TRIALS,
    "space": {
        "training.optimizer.learning_rate": {"loguniform": [0.1, 10.0]},
        "training.max_grad_norm": {"loguniform": [0.1, 10.0]},
    },
}
OPTIMIZER = {"name": "sgd", "schedule": "linear"}
COUNTRIES = (
    "United-States Cambodia England Puerto-Rico Canada Germany Outlying-US(Guam-USVI-etc) India Japan Greece South "
    "China Cuba Iran Honduras Philippines Italy Poland Jamaica Vietnam Mexico Portugal Ireland France "
    "Dominican-Republic Laos Ecuador Taiwan Haiti Columbia Hungary Guatemala Nicaragua Scotland Thailand Yugoslavia "
    "El-Salvador Trinadad&Tobago Peru Hong Holand-Netherlands"
)
# As the census's own description has them. Without fnlwgt, which is a weight, and education, which education_num says.
CATEGORIES = {
    "type_employer": "Private Self-emp-not-inc Self-emp-inc Federal-gov Local-gov State-gov Without-pay Never-worked",
    "marital": "Married-civ-spouse Divorced Never-married Separated Widowed Married-spouse-absent Married-AF-spouse",
    "occupation": "Tech-support Craft-repair Other-service Sales Exec-managerial Prof-specialty Handlers-cleaners "
    "Machine-op-inspct Adm-clerical Farming-fishing Transport-moving Priv-house-serv Protective-serv Armed-Forces",
    "relationship": "Wife Own-child Husband Not-in-family Other-relative Unmarried",
    "race": "White Asian-Pac-Islander Amer-Indian-Eskimo Other Black",
    "sex": "Female Male",
    "country": COUNTRIES,
}
RANGES = {
    "age": (17, 90),
    "education_num": (1, 16),
    "capital_gain": (0, 100_000),
    "capital_loss": (0, 5_000),
    "hr_per_week": (1, 99),
}

JOBS: dict[str, dict[str, Any]] = {
    "digits": {
        "account": "digits",
        "privacy": {"epsilon": 3.0, "delta": 1e-4, "units": 1797 * (TEST - 1) // TEST},
        "data": {"source": data.DIGITS},
        "model": {"kind": "linear"},
        "training": {"steps": 80, "expected_batch_size": 360, "physical_batch_size": 512, "optimizer": OPTIMIZER},
        "tuning": TUNING,
    },
    "adult": {
        "account": "adult",
        "privacy": {"epsilon": 3.0, "delta": 1e-6, "units": 30_162 * (TEST - 1) // TEST},
        "data": {
            "source": str(ADULT),
            "features": {name: {"range": ends} for name, ends in RANGES.items()}
            | {name: {"categories": words.split()} for name, words in CATEGORIES.items()},
            "label": {"column": "income", "categories": ["<=50K", ">50K"]},
        },
        "model": {"kind": "linear"},
        "training": {"steps": 120, "expected_batch_size": 1024, "physical_batch_size": 2048, "optimizer": OPTIMIZER},
        "tuning": TUNING,
    },
}


# -- what each way may spend --


@dataclass(frozen=True)
class Way:
    """One way to spend a budget.

    Attributes:
        cost: what candidates that each ask for this charge cost together, at an order.
        share: by how much ε and δ are divided before they are converted.
    """

    cost: Callable[[Charge, int], int]
    share: int = 1


WAYS = {
    "untuned": Way(price),
    "filter": Way(lambda charge, order: TRIALS * price(charge, order)),
    "select": Way(lambda charge, order: orders.select_price([charge], order, TRIALS, ETA)),
    "naive": Way(price, share=TRIALS),
}


def fits(way: Way, job: Job, charge: Charge) -> bool:
    """Whether there is an order, of those that an account may have, at which the way's whole plan is within budget."""
    for order in orders.CANDIDATES:
        budget = budget_cost(job.privacy.epsilon / way.share, job.privacy.delta / way.share, order)
        try:
            if budget > 0 and way.cost(charge, order) <= budget:
                return True
        except UsageError:  # more than a ledger can hold
            continue
    return False


def least(way: Way, job: Job, charge_of: Callable[[float], Charge]) -> float:
    """The least noise, to a thousandth, at which `way` fits the budget of `job`; cost falls as noise rises."""
    low, high = 0.2, 2000.0
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(way, job, charge_of(middle)) else (middle, high)
    return high


def noise_of(way: Way, job: Job) -> tuple[float, float]:
    """(noise_multiplier, noise of each evaluation): each partition's account has the whole (ε, δ) for itself."""
    train, validation = job.accounts
    run = job.run().charge(train)
    assert isinstance(run.mechanism, PoissonSubsampledGaussian)
    step = run.mechanism
    return (
        least(way, job, lambda sigma: replace(run, mechanism=replace(step, noise_multiplier=sigma))),
        least(way, job, lambda scale: Charge(validation, DiscreteGaussian(scale, 1), 1, 1)),
    )


# -- records --


@dataclass(frozen=True)
class Parts:
    """A dataset in one repeat: what is trained on, what candidates are judged by, and what nobody sees."""

    train: Shard
    validation: Shard
    test: tuple[Shard, ...]


def divided(job: Job, folder: Path) -> tuple[Job, Job]:
    """(what a job may see, the test part). Equal records are on one side."""
    source = sources.find(job.data.source)
    table = pa.Table.from_batches(source.batches(0))
    first = np.concatenate([identity.digests_of(batch)[:, :8] for batch in table.to_batches()])
    tested = first.copy().view(">u8").ravel() % TEST == 0

    def part(name: str, mine: np.ndarray) -> Job:
        pacsv.write_csv(table.filter(pa.array(mine)), folder / name)
        return job.model_copy(update={"data": job.data.model_copy(update={"source": str(folder / name)})})

    return part("seen.csv", ~tested), part("tested.csv", tested)


def shards_of(job: Job, key: str) -> tuple[Shard, ...]:
    """The units of both partitions, as a worker that is alone would have them."""
    prepared = Prepared.at(prepare(job, key, key))
    assert prepared is not None
    return tuple(prepared.shard(partition, 0, 1) for partition in PARTITIONS)


def parts_of(seen: Job, tested: Job, key: str) -> Parts:
    """Partitions under a dataset's hidden `key`; for the test part they do not matter."""
    train, validation = shards_of(seen, key)
    return Parts(train, validation, shards_of(tested, key))


def accuracy(model: torch.nn.Module, shards: Iterable[Shard]) -> float:
    """The share of records that are labelled correctly; no noise, see the module."""
    model.eval()
    with torch.no_grad():
        right = [model(shard.features[:]).argmax(1) == shard.labels[:] for shard in shards]
    return torch.cat(right).double().mean().item()


# -- one repeat --


def trained(job: Job, parts: Parts) -> torch.nn.Module:
    """One candidate: Purser's own engine, in this process."""
    assert job.data.label is not None
    model = build(job.model, job.data.width, len(job.data.label.categories))
    trainer = PrivateTrainer(model, job.training.optimizer, job.run(), job.training.clipping)
    trainer.steps(parts.train, job.training.steps)
    return trainer.unhook()


def candidates(job: SweepJob, draw: random.Random) -> Iterator[dict[str, Any]]:
    """Independent draws from the space, without end."""
    while True:
        yield {name: dimension.at(draw.random()) for name, dimension in job.tuning.space.items()}


def repetitions(share: float) -> int:
    """K: the least k with P[K ≤ k] ≥ `share`."""
    return quantile(repetitions_of(TRIALS, ETA), min(share, 1 - 1e-6))


def released(job: SweepJob, parts: Parts, tried: Iterable[dict[str, Any]], noise: tuple[float, float]) -> float:
    """Train and judge each candidate at `noise`; the test accuracy of the one whose noised accuracy is best."""
    best: tuple[float, torch.nn.Module] | None = None
    for values in tried:
        candidate = job.candidate({**values, "training.noise_multiplier": noise[0]})
        model = trained(candidate, parts)
        score = noised(model, parts.validation, Evaluation(), DiscreteGaussian(noise[1], 1))["accuracy"]
        if best is None or score > best[0]:
            best = score, model
    assert best is not None
    return accuracy(best[1], parts.test)


def compare(name: str, repeats: int) -> dict[str, float]:
    """Every way on one dataset."""
    job = parse(SweepJob, JOBS[name])
    job = job.model_copy(update={"data": data.declared(job.data)})
    seen, tested = divided(job, Path(os.environ[HOME]))
    noise = {way: noise_of(how, job) for way, how in WAYS.items()}
    reached: dict[str, list[float]] = {way: [] for way in WAYS}
    counts: dict[str, list[int]] = {way: [] for way in WAYS}
    for repeat in range(repeats):
        draw = random.Random(f"{name} {repeat}")  # candidates and K are public; the engine's keys are its own
        drawn = candidates(job, random.Random(f"candidates of {name} {repeat}"))
        count = {"untuned": 1, "filter": TRIALS, "select": repetitions(draw.random()), "naive": TRIALS}
        tried = list(itertools.islice(drawn, max(count.values())))
        parts = parts_of(seen, tested, hashlib.sha256(f"key of {name} {repeat}".encode()).hexdigest())
        for way in WAYS:
            plan = [{}] if way == "untuned" else tried[: count[way]]
            reached[way].append(released(job, parts, plan, noise[way]))
            counts[way].append(count[way])
        print(name, repeat + 1, {way: round(values[-1], 4) for way, values in reached.items()}, count, file=sys.stderr)
    result: dict[str, float] = {}
    for way, values in reached.items():
        result |= {
            f"{name}_{way}_accuracy": statistics.mean(values),
            f"{name}_{way}_noise_multiplier": noise[way][0],
            f"{name}_{way}_evaluation_noise": noise[way][1],
            f"{name}_{way}_candidates": statistics.mean(counts[way]),
        }
        if repeats > 1:
            result[f"{name}_{way}_error"] = statistics.stdev(values) / math.sqrt(repeats)
    better = [mine > theirs for mine, theirs in zip(reached["select"], reached["untuned"], strict=True)]
    return result | {f"{name}_select_beats_untuned": statistics.mean(better)}


def measure(quick: bool) -> dict[str, float]:
    """Both datasets; digits once where it must be quick."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as home:
        os.environ[HOME] = home
        result = compare("digits", 1 if quick else REPEATS)
        if quick:
            return result
        if not ADULT.is_file():
            print(f"adult: skipped, {ADULT} is not there", file=sys.stderr)
            return result
        return result | compare("adult", REPEATS)


if __name__ == "__main__":
    main(measure, __doc__)
