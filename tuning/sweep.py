"""A filter-mode sweep: Ray Tune over admission-gated candidates, each trial a Ray Train run of its own.

Every trial is charged and visible; what it reports to Tune is public or noised. Nothing about a trial is decided from
anything else. The trial's small driver asks for no CPU, so that two cores suffice for it and its workers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler

from cluster.accounting.actor import AccountantClient, connect
from cluster.accounting.answers import explain
from cluster.errors import PurserError, without_content
from cluster.session import groups_at_once
from training.driver import COMPLETED, FAILED, REFUSED, STOPPED, Outcome, train
from training.folder import check_shared, marked
from training.jobfile import parse
from training.metrics import ACCURACY, LOSS, RELEASED, figure, in_words, only_public
from tuning.config import SweepJob, cheapest
from tuning.search import END, GO, REFUSE, WAIT, BudgetedSearch, Listed, Proposals, TreeParzen
from tuning.trials import Trial, keep_candidates, lease_of, nothing_left, refuse_rest, said, trial_folder

DRIVER_MEMORY = 64 * 2**20  # a trial's driver asks for no CPU, and Ray wants it to ask for something


class Reports(TuneReportCallback):
    """The door by which a run's reports enter Tune, and with it every searcher, scheduler and file of Tune's: they
    carry what is public or noised, by name, or the trial ends as failed (P13). The last report of a run stays outside:
    the driver tells how the run ended, and no scheduler may stop what is complete."""

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Ray Train calls it in its controller with each rank's report."""
        said = told(metrics[0])
        if "status" not in said:
            super().after_report(run_context, [said], None)


def told(report: dict[str, Any]) -> dict[str, Any]:
    """`report` if it may enter Tune, else the outcome that ends its trial."""
    try:
        only_public(report)
    except PurserError as error:
        return _outcome(Outcome(FAILED, why=str(error).removesuffix(".")))
    return report


def _outcome(outcome: Outcome) -> dict[str, Any]:
    return {"outcome": {"status": outcome.status, "metrics": outcome.metrics, "why": outcome.why}}


class Halving(ASHAScheduler):
    """Ray Tune's asynchronous successive halving over what is released at rungs; knows which trials it stopped, and
    where.

    It sees a trial's rungs only, never its end, so that what is complete is not stopped.
    """

    def __init__(self, grace_period: int, reduction_factor: int, loss: bool = False) -> None:
        super().__init__(
            time_attr="steps",
            metric=LOSS[0] if loss else ACCURACY[0],
            mode="min" if loss else "max",
            grace_period=grace_period,
            reduction_factor=reduction_factor,
            max_t=grace_period * reduction_factor**20,  # beyond any trial: rungs that nobody reaches
        )
        self.stopped: dict[int, dict[str, Any]] = {}

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """See `ASHAScheduler`."""
        action: str = super().on_trial_result(tune_controller, trial, result)
        if action == self.STOP:
            self.stopped[trial.config["number"]] = {
                name: result[name] for name in ("steps", *RELEASED) if name in result
            }
        return action


def run_trial(
    config: dict[str, Any], *, job: dict[str, Any], sweep: str, folder: str, mark: tuple[str, str], ledger: str
) -> None:
    """The Tune trainable: the small driver of one Ray Train run. The lease is asked for again here, where it counts:
    retries and restores of Tune pass by the searcher."""
    number = config["number"]
    lease = lease_of(sweep, number)
    try:
        check_shared(*mark)
        outcome = train(
            connect(ledger),
            ledger,
            parse(SweepJob, job).candidate(config["values"]),
            lease,
            sweep,
            trial_folder(Path(folder), number),
            mark,
            callbacks=[Reports()],
        )
    except PurserError as error:
        outcome = Outcome(FAILED, why=str(error))
    except Exception as error:  # noqa: BLE001 (its message may hold anything)
        outcome = Outcome(FAILED, why=f"the trial's driver failed with {without_content(error)}")
    tune.report(_outcome(outcome))


class Sweep(tune.Callback):
    """One sweep under way.

    Args:
        trials: its candidates, those that are over included; how each ends is written there, and what Optuna draws is
            added.
        begun: the numbers of those whose lease is in the ledger already, from before an interruption.
        tell: shows a line to the person who waits.
        trainable: runs one trial: a function like `run_trial`, or a class that Tune sets up with the same keywords.
            What it reports goes through `told`.
    """

    def __init__(
        self,
        client: AccountantClient,
        ledger: str,
        job: SweepJob,
        name: str,
        folder: Path,
        trials: list[Trial],
        begun: Collection[int],
        tell: Callable[[str], None],
        trainable: Any = run_trial,
    ) -> None:
        self._client, self._ledger, self._job, self._name, self._folder = client, ledger, job, name, folder
        self._begun, self._tell, self._trainable = begun, tell, trainable
        self._drawn = trials
        self.trials = {trial.number: trial for trial in trials}
        orders = [client.show(account).order for account in job.accounts]
        self._least = cheapest(job.corners(orders[0]), orders)
        self._source: Proposals
        if job.tuning.search == "optuna":
            self._source = TreeParzen(job, orders[0], trials, self._draw)
        else:
            todo = sorted((one for one in trials if not one.over), key=lambda one: one.number not in begun)
            self._source = Listed((one.number, one.values) for one in todo)
        grace = job.tuning.asha.grace_period or job.training.block
        self._halving = None
        if job.tuning.scheduler == "asha":
            self._halving = Halving(grace, job.tuning.asha.reduction_factor, job.evaluation.metric == "loss")
        self._live: set[int] = set()
        self._asked = set(begun)  # whose leases may hold a reservation

    def __getstate__(self) -> dict[str, Any]:
        """What Tune saves beside its experiment: nothing, a sweep's state is its ledger."""
        return {}

    def run(self) -> None:
        """Run every candidate that is not over and that the budget can pay for."""
        job = self._job
        concurrent = groups_at_once(job.training.workers, job.training.device)
        trainable = tune.with_parameters(
            self._trainable,
            job=job.model_dump(mode="json"),
            sweep=self._name,
            folder=str(self._folder),
            mark=marked(self._folder),
            ledger=self._ledger,
        )
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"CPU": 0, "memory": DRIVER_MEMORY}),
            tune_config=tune.TuneConfig(
                search_alg=BudgetedSearch(self._source, self._ask),
                scheduler=self._halving,
                num_samples=-1,
                max_concurrent_trials=concurrent,
                reuse_actors=isinstance(self._trainable, type),
            ),
            run_config=tune.RunConfig(
                name=self._storage(),
                storage_path=str(self._folder),
                callbacks=[self],
                stop=lambda _trial_id, result: "outcome" in result,
                verbose=0,
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

    def _draw(self, number: int, values: dict[str, Any]) -> None:
        """A new candidate: kept before anything is asked for it."""
        trial = Trial(number, lease_of(self._name, number), values, self._job.candidate(values))
        self._drawn.append(trial)
        keep_candidates(self._folder, [one.values for one in self._drawn])
        self.trials[number] = trial

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
            self._source.learn(number, trial.outcome)
            return END if self._spent() else REFUSE
        self._live.add(number)
        self._asked.add(number)
        word = "goes on" if number in self._begun else "reserved"
        self._tell(f"trial {number:2d}  {said(values)}  {word}, its workers are starting")
        return GO

    def _spent(self) -> bool:
        """Whether nothing in the space can be paid any more; then every candidate that is left is refused in one
        sentence. A grid is gone through to its end: its candidates are few, and known to its owner one by one."""
        answer = self._client.fits(self._least)
        if self._job.tuning.search == "grid" or answer.fits or (answer.may_fit_later and self._live):
            return False
        why = nothing_left(answer, [self._client.show(account) for account in self._job.accounts])
        refuse_rest(self._folder, [trial for trial in self.trials.values() if trial.number not in self._asked], why)
        self._tell(f"[yellow]The sweep ends[/]: {why}")
        return True

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Take in what a trial reports: planned step counts as it goes, its outcome at the end."""
        mine = self.trials[trial.config["number"]]
        if "outcome" in result:
            mine.outcome = Outcome(**result["outcome"])
        elif result.get("steps", 0) > mine.steps:
            mine.steps = result["steps"]
            said = f", {in_words(result)}" if figure(result) else ""
            self._tell(f"trial {mine.number:2d}  {mine.steps} of {mine.job.training.steps} steps{said}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial is over, by itself or by the scheduler."""
        mine = self.trials[trial.config["number"]]
        rung = self._halving.stopped.get(mine.number) if self._halving else None
        if rung is not None:
            self._stopped(mine, dict(rung))
        self._ended(mine)

    def _stopped(self, mine: Trial, metrics: dict[str, Any]) -> None:
        """Tune is killing the trial's driver, which will keep no outcome. With this one its lease is settled, and not
        released: a worker group that Ray Train restarts meanwhile could open a released lease again."""
        steps = metrics.pop("steps")
        why = f"stopped early by ASHA at {steps} of {mine.job.training.steps} steps"
        mine.outcome = Outcome(STOPPED, metrics, why, rung=steps).keep(trial_folder(self._folder, mine.number))

    def _ended(self, mine: Trial) -> None:
        """End the lease, if its driver did not live to: what was never authorised is free for the next trial."""
        self._client.close(mine.lease, mine.outcome.closing, mine.outcome.status)
        self._live.discard(mine.number)
        self._source.learn(mine.number, mine.outcome)
        word = mine.outcome.status
        if word in (COMPLETED, STOPPED) and mine.outcome.metrics:
            word = f"[green]{word}[/], {in_words(mine.outcome.metrics)}"
            word += f", {mine.outcome.why}" if mine.outcome.why else ""
        elif mine.outcome.why:
            word = f"[red]{word}[/]: {mine.outcome.why}"
        self._tell(f"trial {mine.number:2d}  {word}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The trial's process died."""
        mine = self.trials[trial.config["number"]]
        if not mine.over:
            mine.outcome = replace(mine.outcome, why="its process died; what was authorised is spent")
        self._ended(mine)
