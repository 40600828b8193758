"""`purser tune`: a sweep from the command line to its table and its release.

Joins books, Ray session and sweep. What no longer fits is refused before Ray is even started.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster import environment
from cluster.accounting.books import Account, Books
from cluster.accounting.leases import Leases, explain
from cluster.accounting.ledger import Ledger
from cluster.accounting.presence import Presence
from cluster.errors import PurserError, UsageError
from cluster.screen import Screen
from training import release
from training.admission import admit, what_would_fit
from training.command import greet
from training.driver import COMPLETED, FAILED, REFUSED, STOPPED, Outcome
from tuning.config import SweepJob
from tuning.display import sweep_table
from tuning.plan import candidates, planned
from tuning.search import proposals
from tuning.trials import Trial, best_of, lease_of, trial_folder


def tune(job: SweepJob, screen: Screen) -> dict[str, Any]:
    """Run the sweep of `job`; returns the contract's keys.

    Raises:
        UsageError: the job, its space or its source is not what the account allows; nothing was charged.
    """
    if job.tuning.mode == "select":
        raise UsageError("tuning.mode: select was given; this version can plan it but not run it, use filter.")
    plans = planned(job)
    ledger = Ledger(environment.ledger_url())
    books = Books(ledger)
    accounts, made = admit(books, job.plain, plans, job.tuning.trials)
    name = environment.new_name(job.account)
    folder = environment.run_folder(name, new=True)
    alive = environment.Alive(name)
    (folder / "job.json").write_text(job.model_dump_json(indent=2) + "\n", encoding="utf-8")
    greet(screen, ledger.place, accounts, made)

    leases = Leases(books, Presence(ledger).is_alive)
    leases.expire_dead()
    if any(leases.fits(run.charges()).fits for run in candidates(job)):
        trials = _run(job, ledger, name, folder, screen)
    else:
        trials = _refuse_all(job, leases, name)
    best = best_of(trials)
    accounts = [books.show(account) for account in job.accounts]
    screen.say(sweep_table(trials, best, accounts[0].budget_cost))
    for account in accounts:
        screen.say(f"{account.account}: {account.remaining_cost / account.budget_cost:.1%} of the budget is left.")
    result = _result(job, name, trials, best)
    result["why"] = _why(trials, leases, accounts)
    if best is not None:
        if result["why"]:
            screen.say(result["why"])
        result["release"] = str(_release(name, folder, trials, best))
        screen.say(f"Best: trial {best.number}. Released: {result['release']}")
        screen.say(f"Next: purser budget show {job.account}")
    alive.release()
    return result


def _run(job: SweepJob, ledger: Ledger, name: str, folder: Path, screen: Screen) -> list[Trial]:
    log = folder / "log.txt"
    screen.say(f"Sweep {name}: up to {job.tuning.trials} trials. Ray's own output: {log}")
    with screen.quiet(log):
        from cluster.accounting.actor import start
        from cluster.session import local_ray
        from tuning.sweep import Sweep

        with local_ray(folder) as dashboard:
            client = start(ledger.url)
            screen.say(f"Ray is up, its dashboard is at http://{dashboard}.")
            with client.holding(name):
                return Sweep(client, ledger.identity, job, name, folder, screen.say).run()


def _refuse_all(job: SweepJob, leases: Leases, name: str) -> list[Trial]:
    """Nothing fits: write one refusal per trial, as the sweep's gate would have."""
    trials = []
    for number, values in enumerate(proposals(job), start=1):
        run = job.candidate(values)
        answer = leases.reserve(lease_of(name, number), name, run.charges())
        if answer.fits:  # room appeared in between: give it back, this sweep has not started
            leases.close(lease_of(name, number), "settle", REFUSED)
            raise PurserError("tune: room appeared in the budget just now; start the sweep again.")
        why = explain(answer.shortages, [leases.books.show(account) for account in job.accounts])
        trials.append(Trial(number, lease_of(name, number), values, run, Outcome(REFUSED, why=why)))
    return trials


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
    }


def _release(name: str, folder: Path, trials: list[Trial], best: Trial) -> Path:
    assert best.charges is not None
    ran = sum(trial.charges is not None and trial.charges.steps > 0 for trial in trials)
    chosen = (
        f"this model is trial {best.number} of sweep {name}, chosen by noised accuracy among {ran} trials that ran; "
        "every one of them, and every evaluation, was charged to the same accounts."
    )
    said = release.statement(
        best.job, best.lease, best.charges.accounts, best.charges.entries, best.outcome.metrics, chosen
    )
    return release.write_release(folder, trial_folder(folder, best.number) / release.WEIGHTS, said)
