"""A filter-mode sweep: Ray Tune over admission-gated candidates, each trial a Ray Train run of its own.

Every trial is charged and visible; what it reports to Tune is public or noised. Nothing about a trial is decided from
anything else. The trial's small driver asks for no CPU, so that two cores suffice for it and its workers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import tune

from cluster.accounting.actor import AccountantClient, connect
from cluster.accounting.answers import explain
from cluster.errors import PurserError, without_content
from cluster.session import CPUS_PER_WORKER, cpus
from training.config import parse
from training.driver import COMPLETED, FAILED, REFUSED, STOPPED, Outcome, train
from tuning.config import SweepJob
from tuning.search import GO, REFUSE, WAIT, BudgetedSearch
from tuning.trials import Trial, lease_of, said, trial_folder

DRIVER_MEMORY = 64 * 2**20  # a trial's driver asks for no CPU, and Ray wants it to ask for something


def run_trial(config: dict[str, Any], *, job: dict[str, Any], sweep: str, folder: str, ledger: str) -> None:
    """The Tune trainable: the small driver of one Ray Train run. The lease is asked for again here, where it counts:
    retries and restores of Tune pass by the searcher."""
    from ray.tune.integration.ray_train import TuneReportCallback

    number = config["number"]
    lease = lease_of(sweep, number)
    try:
        outcome = train(
            connect(ledger),
            ledger,
            parse(SweepJob, job).candidate(config["values"]),
            lease,
            sweep,
            trial_folder(Path(folder), number),
            callbacks=[TuneReportCallback()],
        )
    except PurserError as error:
        outcome = Outcome(FAILED, why=str(error))
    except Exception as error:  # noqa: BLE001 (its message may hold anything)
        outcome = Outcome(FAILED, why=f"the trial's driver failed with {without_content(error)}")
    tune.report({"outcome": {"status": outcome.status, "metrics": outcome.metrics, "why": outcome.why}})


class Sweep(tune.Callback):
    """One sweep under way.

    Args:
        trials: its candidates, those that are over included; how each ends is written there.
        begun: the numbers of those whose lease is in the ledger already, from before an interruption.
        tell: shows a line to the person who waits.
    """

    def __init__(
        self,
        client: AccountantClient,
        ledger: str,
        job: SweepJob,
        name: str,
        folder: Path,
        trials: Sequence[Trial],
        begun: Collection[int],
        tell: Callable[[str], None],
    ) -> None:
        self._client, self._ledger, self._job, self._name, self._folder = client, ledger, job, name, folder
        self._begun, self._tell = begun, tell
        self.trials = {trial.number: trial for trial in trials}
        self._live: set[int] = set()
        self._asked = set(begun)  # whose leases may hold a reservation

    def __getstate__(self) -> dict[str, Any]:
        """What Tune saves beside its experiment: nothing, a sweep's state is its ledger."""
        return {}

    def run(self) -> None:
        """Run every candidate that is not over and that the budget can pay for."""
        job = self._job
        todo = [(trial.number, trial.values) for trial in self.trials.values() if not trial.over]
        concurrent = max(1, int(cpus() / (job.training.workers * CPUS_PER_WORKER)))
        trainable = tune.with_parameters(
            run_trial,
            job=job.model_dump(mode="json"),
            sweep=self._name,
            folder=str(self._folder),
            ledger=self._ledger,
        )
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"CPU": 0, "memory": DRIVER_MEMORY}),
            tune_config=tune.TuneConfig(
                search_alg=BudgetedSearch(todo, self._ask), num_samples=-1, max_concurrent_trials=concurrent
            ),
            run_config=tune.RunConfig(
                name=self._storage(), storage_path=str(self._folder), callbacks=[self], verbose=0
            ),
        )
        try:
            tuner.fit()
        finally:
            for trial in self.trials.values():
                if trial.outcome.status != REFUSED and trial.number in self._asked:
                    self._client.close(trial.lease, trial.outcome.closing, trial.outcome.status)

    def _storage(self) -> str:
        """A folder for what Tune keeps of this start of the sweep; nothing is ever read from it."""
        return f"tune-{1 + len(list(self._folder.glob('tune-*')))}"

    def _ask(self, number: int, values: dict[str, Any]) -> str:
        """The gate: reserve for trial `number`, wait for a reservation of ours to be released, or refuse it."""
        trial = self.trials[number]
        charges = trial.job.charges()
        if number not in self._begun:
            answer = self._client.fits(charges)
            if not answer.fits and answer.may_fit_later and self._live:
                return WAIT
        answer = self._client.reserve(trial.lease, self._name, charges)
        if not answer.fits:
            accounts = [self._client.show(account) for account in trial.job.accounts]
            trial.outcome = Outcome(REFUSED, why=explain(answer.shortages, accounts))
            trial.outcome.keep(trial_folder(self._folder, number))
            self._tell(f"trial {number:2d}  {said(values)}  [yellow]refused[/]: {trial.outcome.why}")
            return REFUSE
        self._live.add(number)
        self._asked.add(number)
        word = "goes on" if number in self._begun else "reserved"
        self._tell(f"trial {number:2d}  {said(values)}  {word}, its workers are starting")
        return GO

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Take in what a trial reports: planned step counts as it goes, its outcome at the end."""
        mine = self.trials[trial.config["number"]]
        if "outcome" in result:
            mine.outcome = Outcome(**result["outcome"])
        elif result.get("steps", 0) > mine.steps:
            mine.steps = result["steps"]
            self._tell(f"trial {mine.number:2d}  {mine.steps} of {mine.job.training.steps} steps")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial is over; say how."""
        mine = self.trials[trial.config["number"]]
        self._live.discard(mine.number)
        word = mine.outcome.status
        if word in (COMPLETED, STOPPED) and mine.outcome.metrics:
            metrics = mine.outcome.metrics
            word = f"[green]{word}[/], accuracy {metrics['accuracy']:.3f} ± {metrics['accuracy_error']:.3f}"
        elif mine.outcome.why:
            word = f"[red]{word}[/]: {mine.outcome.why}"
        self._tell(f"trial {mine.number:2d}  {word}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The trial's process died; its lease is released when the sweep ends."""
        mine = self.trials[trial.config["number"]]
        mine.outcome = replace(mine.outcome, why="its process died; what was authorised is spent")
        self.on_trial_complete(iteration, trials, trial, **info)
