"""Which candidate comes next, and the polite gate: a trial is offered to Ray Tune only when the budget can pay for it.

Grid and random are small Searchers, so that no candidate bypasses the gate. The gate only asks and records refusals;
the lease in the trial and the block in the worker are what enforces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ray.tune.search import Searcher

from tuning.config import SweepJob

GO, WAIT, REFUSE = "go", "wait", "refuse"


def proposals(job: SweepJob) -> Iterator[dict[str, Any]]:
    """The sweep's candidates in order, at most `tuning.trials` of them; dotted field → value."""
    if job.tuning.search == "grid" and job.tuning.space:
        yield from (values for values, _ in zip(job.grid(), range(job.tuning.trials), strict=False))
        return
    for _ in range(job.tuning.trials):
        yield job.tuning.drawn()


class BudgetedSearch(Searcher):
    """Hands out candidates that fit, waits while others' reservations may be released, and passes over the rest.

    Args:
        candidates: (number, values) of each, in the order in which they are to be tried.
        ask: (number, values) → go, wait or refuse. A refusal has been recorded when it returns.
    """

    def __init__(
        self, candidates: Iterable[tuple[int, dict[str, Any]]], ask: Callable[[int, dict[str, Any]], str]
    ) -> None:
        super().__init__()
        self._waiting = list(candidates)
        self._ask = ask

    def __getstate__(self) -> dict[str, Any]:
        """What Tune saves beside its experiment: not the gate, which holds the accountant's handle."""
        return {name: value for name, value in self.__dict__.items() if name != "_ask"}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next candidate as {"number", "values"}; None to be asked again; FINISHED when there are no more."""
        while self._waiting:
            number, values = self._waiting[0]
            answer = self._ask(number, values)
            if answer == WAIT:
                return None
            self._waiting.pop(0)
            if answer == GO:
                return {"number": number, "values": values}
        return str(Searcher.FINISHED)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Grid and random learn nothing from results."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: a sweep's state is its ledger."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""
