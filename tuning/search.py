"""Which candidate comes next, and the polite gate: a trial is offered to Ray Tune only when the budget can pay for it.

Grid, random and Optuna are behind one Searcher of ours, so that no candidate bypasses the gate. The gate only asks and
records refusals; the lease in the trial and the block in the worker are what enforce. Whatever learns here learns
from what was released, and so was noised or public.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ray.tune.search import Searcher

from training.driver import COMPLETED, STOPPED, Outcome
from training.metrics import figure, score
from tuning.config import Dimension, SweepJob

if TYPE_CHECKING:
    import optuna

    from tuning.trials import Trial

GO, WAIT, REFUSE, END = "go", "wait", "refuse", "end"

Candidate = tuple[int, dict[str, Any]]  # its number, from 1 on, and its values: dotted field → value


def proposals(job: SweepJob, order: int | None = None) -> Iterator[dict[str, Any]]:
    """The candidates of a grid or random search in order, at most `tuning.trials` of them.

    Args:
        order: of the train account, at which a field that is auto is solved.
    """
    if job.tuning.search == "grid" and job.tuning.space:
        for values, _ in zip(job.grid(), range(job.tuning.trials), strict=False):
            yield job.solved(values, order)
        return
    for _ in range(job.tuning.trials):
        yield job.solved(job.tuning.drawn(), order)


class Proposals(Protocol):
    """Where candidates come from."""

    def next(self) -> Candidate | None:
        """The next one, which is on disk when it is handed out; None when there are no more."""

    def learn(self, number: int, outcome: Outcome) -> None:
        """How candidate `number` ended."""


class Listed:
    """Candidates of a grid or random search, drawn at the sweep's start. Nothing is learnt from results."""

    def __init__(self, candidates: Iterable[Candidate]) -> None:
        self._waiting = list(candidates)

    def next(self) -> Candidate | None:
        """See `Proposals`."""
        return self._waiting.pop(0) if self._waiting else None

    def learn(self, number: int, outcome: Outcome) -> None:
        """Nothing."""


class TreeParzen:
    """Optuna's tree-structured Parzen estimator. It learns the released score of each trial that has one, and at which
    rung a trial was stopped; nothing else.

    Args:
        known: the candidates that were drawn before an interruption; those that are not over come first.
        keep: (number, values) of a new one; it is on disk when this returns.
    """

    def __init__(
        self, job: SweepJob, order: int, known: Sequence[Trial], keep: Callable[[int, dict[str, Any]], None]
    ) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._job, self._order, self._keep, self._drawn = job, order, keep, len(known)
        self._distributions = {name: _distribution(one) for name, one in job.tuning.searched.items()}
        startup = max(2, min(10, job.tuning.trials // 4))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            # The liar takes trials under way for poor ones, so that those beside each other differ.
            sampler = optuna.samplers.TPESampler(n_startup_trials=startup, constant_liar=True)
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        self._asked: dict[int, optuna.Trial] = {}
        self._unfinished = [(trial.number, trial.values) for trial in known if not trial.over]
        for trial in known:
            if trial.over:
                self._study.add_trial(self._ended(trial.values, trial.outcome))

    def next(self) -> Candidate | None:
        """See `Proposals`."""
        if self._unfinished:
            number, values = self._unfinished.pop(0)
            self._study.enqueue_trial(self._parameters(values))
            self._asked[number] = self._study.ask(self._distributions)
            return number, values
        if self._drawn >= self._job.tuning.trials:
            return None
        asked = self._study.ask(self._distributions)
        values = self._job.solved(self._values(asked.params), self._order)
        self._keep(self._drawn + 1, values)
        self._drawn += 1
        self._asked[self._drawn] = asked
        return self._drawn, values

    def learn(self, number: int, outcome: Outcome) -> None:
        """See `Proposals`."""
        if (asked := self._asked.pop(number, None)) is None:
            return
        state, value, judged = self._said(outcome)
        for steps, one in judged.items():
            asked.report(one, steps)
        self._study.tell(asked, value, state)

    def _said(self, outcome: Outcome) -> tuple[optuna.trial.TrialState, float | None, dict[int, float]]:
        """What the study is told of a trial: its state, its value at its end, and that at the rung it stopped at."""
        from optuna.trial import TrialState

        if not figure(outcome.metrics) or outcome.status not in (COMPLETED, STOPPED):
            return TrialState.FAIL, None, {}
        value = score(outcome.metrics)
        if outcome.rung:
            return TrialState.PRUNED, None, {outcome.rung: value}
        return TrialState.COMPLETE, value, {}

    def _ended(self, values: dict[str, Any], outcome: Outcome) -> optuna.trial.FrozenTrial:
        import optuna

        state, value, judged = self._said(outcome)
        return optuna.trial.create_trial(
            state=state,
            value=value,
            params=self._parameters(values),
            distributions=self._distributions,
            intermediate_values=judged,
        )

    def _parameters(self, values: dict[str, Any]) -> dict[str, Any]:
        """A candidate in Optuna's terms: of a choice its place, for choices may be lists."""
        found = {}
        for name, dimension in self._job.tuning.searched.items():
            choice = None if dimension.choice is None else list(dimension.choice)
            found[name] = values[name] if choice is None else choice.index(values[name])
        return found

    def _values(self, parameters: dict[str, Any]) -> dict[str, Any]:
        found = {}
        for name, dimension in self._job.tuning.searched.items():
            found[name] = parameters[name] if dimension.choice is None else dimension.choice[parameters[name]]
        return found


def _distribution(dimension: Dimension) -> optuna.distributions.BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if dimension.choice is not None:
        return CategoricalDistribution(range(len(dimension.choice)))
    if dimension.int is not None:
        return IntDistribution(*dimension.int)
    ends = dimension.uniform or dimension.loguniform
    assert ends is not None
    return FloatDistribution(*ends, log=dimension.loguniform is not None)


class BudgetedSearch(Searcher):
    """Hands out candidates that fit, waits while others' reservations may be released, and passes over the rest.

    Args:
        source: where candidates come from.
        ask: (number, values) → go, wait, refuse, or end where nothing can be paid any more. A refusal has been recorded
            when it returns.
    """

    def __init__(self, source: Proposals, ask: Callable[[int, dict[str, Any]], str]) -> None:
        super().__init__()
        self._source = source
        self._ask = ask
        self._waiting: Candidate | None = None
        self._ended = False

    def __getstate__(self) -> dict[str, Any]:
        """What Tune saves beside its experiment: not the gate, which holds the accountant's handle, nor the source."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_ask", "_source")}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next candidate as {"number", "values"}; None to be asked again; FINISHED when there are no more."""
        while not self._ended:
            self._waiting = self._waiting or self._source.next()
            if self._waiting is None:
                break
            number, values = self._waiting
            answer = self._ask(number, values)
            if answer == WAIT:
                return None
            self._waiting = None
            self._ended = answer == END
            if answer == GO:
                return {"number": number, "values": values}
        return str(Searcher.FINISHED)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing: what a source learns is told to it by the sweep, which knows what is noised."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: a sweep's state is its ledger and its folder."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""
