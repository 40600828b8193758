"""What a sweep's books cost in time: `python -m tests.benchmarks.sweep [--quick] [--json]`.

wall_vs_bare_tune      a filter-mode sweep of the digits job, over the same trials under bare Ray Tune and Ray Train:
                       medians over rounds of both, in one Ray session, in which each side is first in turn
quickest_vs_bare_tune  the same of the quickest of each side
sweep_s, bare_s        the medians, in seconds
before_s               of the sweep's, what comes before Tune begins: admission, and the accountant's start

--quick takes one round, whose first side finds cold caches: it shows that both sides run, its ratio says little.

Ours is what `purser tune` does between Ray's start and its table: the source is read, fingerprinted and admitted, the
accountant started over an SQLite file, and `tuning.sweep.Sweep` run. The bare side is what one would write without us:
the same candidates as a grid for Tune, with the same resources and concurrency, whose trainable fits a TorchTrainer of
as many workers with the same settings; each worker maps the same prepared records, takes the same shard, makes the same
model and PrivateTrainer and takes the same steps in the same blocks, with the same report and checkpoint after each;
rank 0 judges the same validation records and writes the same file of weights.

What only ours does, then: reserve, open, authorise and settle, each durable; the search gate; the beat of the holder;
the fingerprint of the source, on the driver; checks of what is prepared, and the hash of our code, on every worker; the
rehearsal; the discrete Gaussian noise on the histogram; a file with each trial's outcome.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cluster import environment
from cluster.accounting.books import Books
from cluster.accounting.ledger import Ledger
from cluster.screen import Screen
from cluster.session import cpus_per_worker, groups_at_once, local_ray
from tests.benchmarks import main
from training.admission import admit
from training.config import Job
from training.data import declared
from training.engine.trainer import PrivateTrainer
from training.jobfile import load, parse
from training.models import build
from training.preparation import prepare
from training.release import write_weights
from training.shards import Prepared
from tuning.config import SweepJob
from tuning.plan import planned

DIGITS = Path(__file__).resolve().parents[2] / "infra" / "jobs" / "digits.yaml"
EPSILON = 100.0  # every round's trials are paid for; what is measured is not how many fit
KEY = "00" * 32  # of the bare side's records, which are read and split by our code, too


def job_of(trials: int) -> SweepJob:
    """The shipped job with that many trials: two workers each, 80 steps in blocks of 20."""
    return load(SweepJob, DIGITS, [f"tuning.trials={trials}", f"privacy.epsilon={EPSILON}"])


# -- ours --


class Ours:
    """Sweeps of the real product, over one ledger that was made for this."""

    def __init__(self, job: SweepJob) -> None:
        self._job = job
        self._plans = planned(job)
        self._ledger = Ledger(environment.ledger_url())
        self.before: list[float] = []

    def __call__(self) -> float:
        """Seconds of one sweep, its accountant's start included."""
        from cluster.accounting.actor import start
        from tests.actors import end_accountant
        from training.driver import COMPLETED
        from tuning.search import proposals
        from tuning.sweep import Sweep
        from tuning.trials import Trial, keep_candidates, lease_of

        job = self._job
        began = time.perf_counter()
        admit(Books(self._ledger), job.plain, self._plans, job.tuning.trials)
        name = environment.new_name(job.account)
        folder = environment.run_folder(name, new=True)
        alive = environment.Alive(name)
        drawn = list(proposals(job))
        keep_candidates(folder, drawn)
        trials = [Trial(n, lease_of(name, n), values, job.candidate(values)) for n, values in enumerate(drawn, start=1)]
        client = start(self._ledger.url)
        self.before.append(time.perf_counter() - began)
        with client.holding(name):
            Sweep(client, self._ledger.identity, job, name, folder, trials, set(), lambda line: None).run()
        took = time.perf_counter() - began
        alive.release()
        end_accountant()
        wrong = [trial.outcome for trial in trials if trial.outcome.status != COMPLETED]
        if wrong:
            raise RuntimeError(f"a trial of the sweep did not complete: {wrong[0]}")
        return took


# -- bare --


def bare_worker(config: dict[str, Any]) -> None:
    """The training loop of one worker: the engine, reports and checkpoints, and nothing else."""
    import ray.train

    def report(metrics: dict[str, Any]) -> None:
        if rank != 0:
            ray.train.report(metrics)
            return
        with tempfile.TemporaryDirectory() as folder:
            torch.save({**trainer.state_dict(), "steps": metrics["steps"]}, Path(folder) / "state.pt")
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))

    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    job = parse(Job, config["job"])
    table = declared(job.data)
    assert table.label is not None
    how = job.training
    prepared = Prepared.at(prepare(job, KEY, KEY))
    assert prepared is not None
    shard = prepared.shard("train", rank, world)
    model = build(job.model, table.width, len(table.label.categories))
    trainer = PrivateTrainer(model, how.optimizer, job.run(), how.clipping, how.precision)
    for done in range(0, how.steps, how.block):
        trainer.steps(shard, min(how.block, how.steps - done))
        report({"steps": min(done + how.block, how.steps)})
    metrics = {}
    if rank == 0:
        judged = prepared.shard("validation", 0, 1)
        trainer.model.eval()
        with torch.no_grad():
            right = trainer.model(judged.features[:]).argmax(1) == judged.labels[:]
        metrics = {"accuracy": right.double().mean().item()}
        write_weights(trainer.unhook(), Path(config["folder"]))
    report({"steps": how.steps, **metrics})


def bare_trial(config: dict[str, Any], *, job: dict[str, Any], folder: str) -> None:
    """The Tune trainable: the small driver of one Ray Train run."""
    from ray import tune
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    candidate = parse(SweepJob, job).candidate(config["values"])
    mine = Path(folder) / tune.get_context().get_trial_id()
    mine.mkdir()
    trainer = TorchTrainer(
        bare_worker,
        train_loop_config={"job": candidate.model_dump(mode="json"), "folder": str(mine)},
        scaling_config=ScalingConfig(
            num_workers=candidate.training.workers, resources_per_worker={"CPU": cpus_per_worker()}, use_gpu=False
        ),
        torch_config=TorchConfig(backend="gloo", timeout_s=300),
        run_config=RunConfig(
            name=f"{Path(folder).name}-{mine.name}",
            storage_path=str(mine / "storage"),
            callbacks=[TuneReportCallback()],
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            failure_config=FailureConfig(max_failures=1, controller_failure_limit=1, max_preemption_failures=2),
        ),
    )
    metrics = trainer.fit().metrics or {}
    tune.report({"outcome": {"accuracy": metrics["accuracy"]}})


class Bare:
    """The same trials without Purser's books."""

    def __init__(self, job: SweepJob) -> None:
        self._job = job

    def __call__(self) -> float:
        """Seconds of all of them."""
        from ray import tune

        from tuning.search import proposals
        from tuning.sweep import DRIVER_MEMORY

        job = self._job
        began = time.perf_counter()
        folder = Path(tempfile.mkdtemp(prefix="bare-", dir=environment.home()))
        concurrent = groups_at_once(job.training.workers, job.training.device)
        trainable = tune.with_parameters(bare_trial, job=job.model_dump(mode="json"), folder=str(folder))
        results = tune.Tuner(
            tune.with_resources(trainable, {"CPU": 0, "memory": DRIVER_MEMORY}),
            param_space={"values": tune.grid_search(list(proposals(job)))},
            tune_config=tune.TuneConfig(max_concurrent_trials=concurrent),
            run_config=tune.RunConfig(name="tune", storage_path=str(folder), verbose=0),
        ).fit()
        took = time.perf_counter() - began
        if results.errors or len(results) != job.tuning.trials:
            raise RuntimeError(f"{len(results)} of {job.tuning.trials} bare trials ended: {results.errors[:1]}")
        return took


# -- both --


def measure(quick: bool) -> dict[str, float]:
    """Both sides in one Ray session. The first round finds cold caches, ours first: it is not counted, unless it is the
    only one."""
    job, rounds = (job_of(2), 1) if quick else (job_of(4), 5)
    with tempfile.TemporaryDirectory() as home:
        os.environ[environment.HOME] = home
        os.environ.pop(environment.LEDGER, None)
        environment.secure_ray()
        screen = Screen(as_json=True)
        with screen.quiet(Path(home) / "log.txt"), local_ray(Path(home)):
            sides: dict[str, Callable[[], float]] = {"ours": Ours(job), "bare": Bare(job)}
            times: dict[str, list[float]] = {name: [] for name in sides}
            for number in range(rounds if quick else rounds + 1):
                for name in list(sides)[:: -1 if number % 2 else 1]:
                    times[name].append(sides[name]())
                    screen.say(f"round {number}, {name}: {times[name][-1]:.1f} s")
        before = sides["ours"].before  # type: ignore[attr-defined]
        os.chdir("/")
    ours, bare, before = (values[0 if quick else 1 :] for values in (times["ours"], times["bare"], before))
    return {
        "wall_vs_bare_tune": statistics.median(ours) / statistics.median(bare),
        "quickest_vs_bare_tune": min(ours) / min(bare),
        "sweep_s": statistics.median(ours),
        "bare_s": statistics.median(bare),
        "before_s": statistics.median(before),
    }


if __name__ == "__main__":
    main(measure, __doc__)
