"""The final run of a sweep: what is held back for it before the first trial, and the winner trained once more.

The hold is a lease that authorises nothing. Its room passes to the final run's own lease in one transaction, so that
no other job can take it in between. Which trial won is on disk before that, and stays: one configuration is retrained.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path

from cluster.accounting.actor import AccountantClient
from cluster.accounting.answers import explain
from cluster.accounting.leases import Leases
from cluster.errors import PurserError
from cluster.files import write_whole
from training.driver import FAILED, REFUSED, Outcome, train
from training.folder import marked
from training.metrics import in_words
from tuning.config import SweepJob, dearest
from tuning.trials import Trial, best_of, said

WINNER = "winner.json"  # in a sweep's folder, once its final run may begin


class Final:
    """The final run of the sweep called `name`, if its job wants one.

    Args:
        orders: of the train and the validation account.
    """

    def __init__(self, job: SweepJob, name: str, folder: Path, orders: Sequence[int]) -> None:
        self.wanted = job.tuning.reserve_for_final > 0
        self.lease, self.hold = f"{name}-final-run", f"{name}-final"
        self._job, self._name, self._folder, self._orders = job, name, folder, orders

    @property
    def folder(self) -> Path:
        """Where it keeps its weights and checkpoints, made if need be."""
        path = self._folder / "final"
        path.mkdir(exist_ok=True)
        return path

    @property
    def began(self) -> bool:
        """Whether the winner is chosen, so that no further trial may be run."""
        return (self._folder / WINNER).exists()

    def hold_back(self, leases: Leases) -> str:
        """Reserve, or after an interruption regain, the price of the dearest final run that there can be.

        Returns:
            Why that cannot be; empty where it is held, or where nothing needs to be held (any more).
        """
        if not self.wanted or self.began:
            return ""
        runs = [self._job.final(values) for values in self._job.extremes(self._orders[0])]
        charges, again = dearest(runs, self._orders), leases.known(self.hold)
        answer = leases.reserve(self.hold, self._name, charges)
        if again:  # it was released, or its holder found dead: an attempt that authorises nothing reserves it anew
            attempt = leases.open(self.hold, secrets.token_hex(16))
            if all(attempt.steps[charge.account] == charge.steps for charge in charges):
                return ""
            leases.close(self.hold, "release", "it cannot be regained")
            answer = leases.fits(charges)
        if answer.fits:
            return ""
        accounts = [leases.books.show(account) for account in self._job.accounts]
        return (
            f"tuning.reserve_for_final: {self._job.tuning.reserve_for_final} steps for the final run cannot be held "
            f"back, {explain(answer.shortages, accounts)}; nothing was spent on it, choose fewer steps"
        )

    def let_go(self, leases: Leases) -> None:
        """Release what is still held back; after the final run has taken its place, nothing."""
        if leases.known(self.hold):
            leases.close(self.hold, "release", "no final run")

    def of(self, trials: Sequence[Trial]) -> Trial | None:
        """The final run as a trial, as far as it came; None where no winner is chosen."""
        if not self.began:
            return None
        number = json.loads((self._folder / WINNER).read_text(encoding="utf-8"))["number"]
        best = next(trial for trial in trials if trial.number == number)
        final = Trial(0, self.lease, best.values, self._job.final(best.values))
        final.outcome = Outcome.kept(self.folder) or final.outcome
        return final

    def winner(self, trials: Sequence[Trial]) -> Trial | None:
        """The trial whose configuration is, or would now be, trained once more."""
        final = self.of(trials)
        return best_of(trials) if final is None else next(t for t in trials if t.values is final.values)

    def run(self, client: AccountantClient, ledger: str, trials: Sequence[Trial], tell: Callable[[str], None]) -> None:
        """Choose the winner, let the final run's reservation take the place of the hold, and train."""
        best = self.winner(trials)
        if best is None:
            return
        write_whole(self._folder / WINNER, json.dumps({"number": best.number}))
        final = self.of(trials)
        assert final is not None
        if final.over:
            return
        answer = client.reserve(final.lease, self._name, final.job.charges(), self.hold)
        if not answer.fits:
            accounts = [client.show(account) for account in final.job.accounts]
            Outcome(REFUSED, why=explain(answer.shortages, accounts)).keep(self.folder)
            return
        tell(f"final run: trial {best.number}'s  {said(best.values)}  for {final.job.training.steps} steps")
        try:
            outcome = train(client, ledger, final.job, final.lease, self._name, self.folder, marked(self._folder))
        except PurserError as error:
            outcome = Outcome(FAILED, why=str(error)).keep(self.folder)
        figure = f", {in_words(outcome.metrics)}" if outcome.metrics else ""
        tell(f"final run: {outcome.status}{figure}{f': {outcome.why}' if outcome.why else ''}")
