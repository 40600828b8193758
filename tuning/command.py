"""`purser tune`: a sweep from the command line to its table and its release.

Joins books, Ray session and sweep. What no longer fits is refused before Ray is even started.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster import environment
from cluster.accounting.answers import explain
from cluster.accounting.books import Account, Books
from cluster.accounting.leases import Leases
from cluster.accounting.ledger import Ledger
from cluster.accounting.presence import Presence
from cluster.errors import PurserError, UsageError
from cluster.screen import Screen
from training import release
from training.admission import admit, what_would_fit
from training.command import greet
from training.driver import COMPLETED, FAILED, REFUSED, STOPPED, Outcome, charged
from tuning.config import SweepJob
from tuning.display import sweep_table
from tuning.plan import planned
from tuning.report import sweep_report, write_report
from tuning.search import proposals
from tuning.trials import Trial, best_of, keep_candidates, kept_candidates, lease_of, trial_folder


def tune(job: SweepJob, screen: Screen, resume: str | None = None) -> dict[str, Any]:
    """Run the sweep of `job`, or go on with the sweep called `resume`; returns the contract's keys.

    Raises:
        UsageError: the job, its space or its source is not what the account allows, or there is no such sweep; nothing
            was charged.
    """
    if job.tuning.mode == "select":
        raise UsageError("tuning.mode: select was given; this version can plan it but not run it, use filter.")
    plans = planned(job)
    ledger = Ledger(environment.ledger_url())
    books = Books(ledger)
    accounts, made = admit(books, job.plain, plans, job.tuning.trials)
    name = resume or environment.new_name(job.account)
    folder = environment.run_folder(name, new=resume is None)
    alive = environment.Alive(name)
    if resume is None:
        (folder / "job.json").write_text(job.model_dump_json(indent=2) + "\n", encoding="utf-8")
        keep_candidates(folder, list(proposals(job)))
    trials = _trials(job, name, folder)
    greet(screen, ledger.place, accounts, made)
    before = accounts

    leases = Leases(books, Presence(ledger).is_alive)
    leases.expire_dead()
    for trial in trials:
        if trial.over and leases.known(trial.lease):  # its driver may have died between its outcome and this
            leases.close(trial.lease, trial.outcome.closing, trial.outcome.status)
    todo = [trial for trial in trials if not trial.over]
    begun = {trial.number for trial in todo if leases.known(trial.lease)}
    if begun or any(leases.fits(trial.job.charges()).fits for trial in todo):
        _run(job, ledger, name, folder, screen, trials, begun)
    else:
        _refuse_all(todo, leases, name, folder)
    for trial in trials:
        if leases.known(trial.lease):
            trial.charges = charged(books, trial.job, trial.lease)
    best = best_of(trials)
    accounts = [books.show(account) for account in job.accounts]
    screen.say(sweep_table(trials, best, accounts[0].budget_cost))
    for account in accounts:
        screen.say(f"{account.account}: {account.remaining_cost / account.budget_cost:.1%} of the budget is left.")
    result = _result(job, name, trials, best)
    result["why"] = _why(trials, leases, accounts)
    said = None
    if best is not None:
        if result["why"]:
            screen.say(result["why"])
        said = _statement(name, trials, best)
        weights = trial_folder(folder, best.number) / release.WEIGHTS
        result["release"] = str(release.write_release(folder, weights, said))
        screen.say(f"Best: trial {best.number}. Released: {result['release']}")
    page = sweep_report(name, before, accounts, trials, best, said, result["why"])
    result["report"] = str(write_report(folder, page))
    screen.say(f"Report: {result['report']}")
    if any(trial.outcome.status == FAILED for trial in trials):
        screen.say(f"Next: purser tune --resume {name}")
    elif best is not None:
        screen.say(f"Next: purser budget show {job.account}")
    alive.release()
    return result


def _trials(job: SweepJob, name: str, folder: Path) -> list[Trial]:
    """The sweep's candidates, each with how it ended if it did."""
    trials = []
    for number, values in enumerate(kept_candidates(folder), start=1):
        trial = Trial(number, lease_of(name, number), values, job.candidate(values))
        trial.outcome = Outcome.kept(trial_folder(folder, number)) or trial.outcome
        trials.append(trial)
    return trials


def _run(
    job: SweepJob, ledger: Ledger, name: str, folder: Path, screen: Screen, trials: list[Trial], begun: set[int]
) -> None:
    log = folder / "log.txt"
    over = sum(trial.over for trial in trials)
    said = f"{over} of {len(trials)} trials are over already" if over else f"up to {len(trials)} trials"
    screen.say(f"Sweep {name}: {said}. Ray's own output: {log}")
    with screen.quiet(log):
        from cluster.accounting.actor import start
        from cluster.session import local_ray
        from tuning.sweep import Sweep

        with local_ray(folder) as dashboard:
            client = start(ledger.url)
            screen.say(f"Ray is up, its dashboard is at http://{dashboard}.")
            with client.holding(name):
                Sweep(client, ledger.identity, job, name, folder, trials, begun, screen.say).run()


def _refuse_all(trials: list[Trial], leases: Leases, name: str, folder: Path) -> None:
    """Nothing fits: write one refusal per trial, as the sweep's gate would have."""
    for trial in trials:
        answer = leases.reserve(trial.lease, name, trial.job.charges())
        if answer.fits:  # room appeared in between: give it back, this sweep has not started
            leases.close(trial.lease, "settle", REFUSED)
            raise PurserError("tune: room appeared in the budget just now; start the sweep again.")
        why = explain(answer.shortages, [leases.books.show(account) for account in trial.job.accounts])
        trial.outcome = Outcome(REFUSED, why=why).keep(trial_folder(folder, trial.number))


def _why(trials: list[Trial], leases: Leases, accounts: list[Account]) -> str:
    """Why trials did not run, and what the remaining budget would pay for; empty where all of them ran."""
    refused = [trial for trial in trials if trial.outcome.status == REFUSED]
    failed = [trial for trial in trials if trial.outcome.status == FAILED]
    if not refused:
        return f"{len(failed)} trials failed, the first because {failed[0].outcome.why}." if failed else ""
    cheapest = min(refused, key=lambda trial: accounts[0].price(trial.job.charges()[0]))
    shortages = leases.fits(cheapest.job.charges()).shortages
    asked = f": for the cheapest of them, {explain(shortages, accounts)}" if shortages else ""
    offer = f" {what_would_fit(cheapest.job, accounts, shortages)}" if shortages else ""
    count = "1 trial" if len(refused) == 1 else f"{len(refused)} trials"
    return f"{count} could not be paid for{asked}; nothing was spent on what was refused.{offer}"


def _result(job: SweepJob, name: str, trials: list[Trial], best: Trial | None) -> dict[str, Any]:
    statuses = {trial.outcome.status for trial in trials}
    status = next(word for word in (COMPLETED, STOPPED, FAILED, REFUSED) if word in statuses)
    return {
        "sweep": name,
        "mode": job.tuning.mode,
        "status": status,
        "account": job.account,
        "trials": [
            {
                "id": trial.lease,
                "config": trial.values,
                "status": trial.outcome.status,
                "planned_steps": trial.job.training.steps,
                "authorised_steps": trial.charges.steps if trial.charges else 0,
                "cost": trial.charges.cost if trial.charges else 0,
                "metrics": trial.outcome.metrics,
                "why": trial.outcome.why,
            }
            for trial in trials
        ],
        "best": {"id": best.lease, "config": best.values, "metrics": best.outcome.metrics} if best else None,
        "release": None,
        "report": None,
    }


def _statement(name: str, trials: list[Trial], best: Trial) -> dict[str, Any]:
    assert best.charges is not None
    ran = sum(trial.charges is not None and trial.charges.steps > 0 for trial in trials)
    chosen = (
        f"this model is trial {best.number} of sweep {name}, chosen by noised accuracy among {ran} trials that ran; "
        "every one of them, and every evaluation, was charged to the same accounts."
    )
    return release.statement(
        best.job, best.lease, best.charges.accounts, best.charges.entries, best.outcome.metrics, chosen
    )
