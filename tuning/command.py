"""`purser tune`: a sweep from the command line to its table and its release.

Joins books, Ray session and sweep. What no longer fits is refused before Ray is even started.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster import environment
from cluster.accounting.answers import explain
from cluster.accounting.books import Account
from cluster.accounting.leases import Leases
from cluster.accounting.mechanisms import Charge
from cluster.errors import PurserError
from cluster.screen import Screen
from cluster.service import Desk, open_desk
from training import release
from training.admission import admit, what_would_fit
from training.command import greet, progress
from training.driver import COMPLETED, FAILED, REFUSED, STOPPED, Outcome, charged, prepared_for
from training.folder import opened
from training.statement import Statement, statement
from tuning.config import SweepJob, cheapest
from tuning.display import sweep_table
from tuning.final import Final
from tuning.plan import planned
from tuning.report import sweep_report, write_report
from tuning.search import proposals
from tuning.trials import (
    CANDIDATES,
    Trial,
    keep_candidates,
    lease_of,
    nothing_left,
    refuse_rest,
    trial_folder,
    trials_of,
)


def tune(job: SweepJob, screen: Screen, resume: str | None = None, name: str | None = None) -> dict[str, Any]:
    """Run the sweep of `job`, or go on with the sweep called `resume`; returns the contract's keys.

    Args:
        name: see `folder.opened`.

    Raises:
        UsageError: the job, its space or its source is not what the account allows, or there is no such sweep; nothing
            was charged.
    """
    plans = planned(job)
    desk = open_desk()
    books, leases = desk.books, desk.leases
    accounts, made = admit(books, job.plain, plans, job.tuning.trials)
    orders = [account.order for account in accounts]
    job.corners(orders[0])  # where a field is auto, it can be solved everywhere
    name, folder = opened(job, resume, name)
    alive = environment.Alive(name)
    if resume is None and not (folder / CANDIDATES).exists():
        keep_candidates(folder, [] if job.tuning.search == "optuna" else list(proposals(job, orders[0])))
    trials = trials_of(job, name, folder)
    greet(screen, books.place, accounts, made, job)
    before = accounts

    leases.expire_dead()
    final = Final(job, name, folder, orders)
    for trial in (*trials, *filter(None, [final.of(trials)])):
        if trial.over and leases.known(trial.lease):  # its driver may have died between its outcome and this
            leases.close(trial.lease, trial.outcome.closing, trial.outcome.status)
    lost = final.hold_back(leases)
    try:
        _search(job, desk, name, folder, screen, trials, final, lost)
    finally:
        final.let_go(leases)

    best, last = final.winner(trials), final.of(trials)
    shown = [*trials, last] if last else trials
    for trial in shown:
        if leases.known(trial.lease):
            trial.charges = charged(books, trial.job, trial.lease)
    accounts = [books.show(account) for account in job.accounts]
    screen.say(sweep_table(shown, best, accounts[0].budget_cost))
    for account in accounts:
        screen.say(f"{account.account}: {account.remaining_cost / account.budget_cost:.1%} of the budget is left.")
    result = _result(job, name, trials, best, last)
    result["why"] = lost or _why(trials, last, leases, accounts)
    said = None
    leaves = best if last is None or last.outcome.status == REFUSED else last
    if leaves is not None and leaves.over:
        if result["why"]:
            screen.say(result["why"])
        assert best is not None
        said = _statement(name, trials, best, leaves)
        home = final.folder if leaves is last else trial_folder(folder, leaves.number)
        result["release"] = str(release.write_release(folder, leaves.outcome.weights(home), said))
        which = f"trial {best.number}" + (", trained once more" if leaves is last else "")
        screen.say(f"Best: {which}. Released: {result['release']}")
    page = sweep_report(name, before, accounts, trials, best, said, result["why"], last)
    result["report"] = str(write_report(folder, page))
    screen.say(f"Report: {result['report']}")
    if any(trial.outcome.status == FAILED for trial in ([last] if last else trials)):
        screen.say(f"Next: {environment.going_on('tune', name)}")
    elif best is not None:
        screen.say(f"Next: purser budget show {job.account}")
    alive.release()
    return result


def _search(
    job: SweepJob,
    desk: Desk,
    name: str,
    folder: Path,
    screen: Screen,
    trials: list[Trial],
    final: Final,
    lost: str,
) -> None:
    """Run what the budget can pay for: trials, unless the final run's hold is `lost` or its winner chosen; then it."""
    leases = desk.leases
    if lost:
        refuse_rest(folder, [trial for trial in trials if not leases.known(trial.lease)], lost)
    todo = [] if lost or final.began else [trial for trial in trials if not trial.over]
    begun = {trial.number for trial in todo if leases.known(trial.lease)}
    least = _least(job, leases)
    more = not (lost or final.began) and job.tuning.search == "optuna" and len(trials) < job.tuning.trials
    if more and not todo and not leases.fits(least).fits:  # one stands for all that would have been drawn
        todo = [_cheapest_drawn(job, name, folder, trials, leases)]
        more = False
    run = bool(begun) or more or any(leases.fits(trial.job.charges()).fits for trial in todo)
    if todo and not run:
        _refuse_all(todo, leases, name, folder, job.tuning.search != "grid" and not leases.fits(least).fits)
    last = final.of(trials)
    if run or (final.wanted and final.winner(trials) and not (last and last.over)):
        _run(job, desk, name, folder, screen, trials, begun, run, final)


def _least(job: SweepJob, leases: Leases) -> list[Charge]:
    orders = [leases.books.show(account).order for account in job.accounts]
    return cheapest(job.corners(orders[0]), orders)


def _cheapest_drawn(job: SweepJob, name: str, folder: Path, trials: list[Trial], leases: Leases) -> Trial:
    """The cheapest candidate there is, as if Optuna had drawn it: to be refused by name."""
    train = leases.books.show(job.accounts[0])
    values = min(job.extremes(train.order), key=lambda one: train.price(job.candidate(one).charges()[0]))
    number = len(trials) + 1
    trials.append(Trial(number, lease_of(name, number), values, job.candidate(values)))
    keep_candidates(folder, [trial.values for trial in trials])
    return trials[-1]


def _run(
    job: SweepJob,
    desk: Desk,
    name: str,
    folder: Path,
    screen: Screen,
    trials: list[Trial],
    begun: set[int],
    search: bool,
    final: Final,
) -> None:
    log = folder / "log.txt"
    over, most = sum(trial.over for trial in trials), max(len(trials), job.tuning.trials if search else 0)
    most = len(trials) if job.tuning.search != "optuna" else most
    said = f"{over} of {most} trials are over already" if over else f"up to {most} trials"
    screen.say(f"Sweep {name}: {said}. Ray's own output: {log}")
    with screen.quiet(log):
        from training.parallel import everywhere
        from tuning.sweep import Sweep

        with desk.ray(folder) as (client, dashboard):
            screen.say(f"Ray is up, its dashboard is at http://{dashboard}.")
            with client.holding(name):
                prepared_for(client, job.plain, everywhere)
                if search:
                    Sweep(client, desk.books.identity, job, name, folder, trials, begun, screen.say).run()
                if final.wanted:
                    steps = job.tuning.reserve_for_final
                    with progress(screen, desk.books, job.accounts[0], final.lease, steps):
                        final.run(client, desk.books.identity, trials, screen.say)


def _refuse_all(trials: list[Trial], leases: Leases, name: str, folder: Path, spent: bool) -> None:
    """Nothing fits: write one refusal per trial, as the sweep's gate would have; where nothing in the space can be paid
    any more (`spent`), the first stands for all."""
    for trial in trials[:1] if spent else trials:
        answer = leases.reserve(trial.lease, name, trial.job.charges())
        if answer.fits:  # room appeared in between: give it back, this sweep has not started
            leases.close(trial.lease, "settle", REFUSED)
            raise PurserError("tune: room appeared in the budget just now; start the sweep again.")
        accounts = [leases.books.show(account) for account in trial.job.accounts]
        trial.outcome = Outcome(REFUSED, why=explain(answer.shortages, accounts))
        trial.outcome.keep(trial_folder(folder, trial.number))
        if spent:
            refuse_rest(folder, trials[1:], nothing_left(answer, accounts))


def _why(trials: list[Trial], last: Trial | None, leases: Leases, accounts: list[Account]) -> str:
    """Why trials did not run, and what the remaining budget would pay for; empty where all of them ran. A final run
    that did not come to its end is told first."""
    if last is not None and last.outcome.status in (REFUSED, FAILED):
        return f"the final run {'was refused' if last.outcome.status == REFUSED else 'failed'}: {last.outcome.why}"
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


def _result(job: SweepJob, name: str, trials: list[Trial], best: Trial | None, last: Trial | None) -> dict[str, Any]:
    statuses = {trial.outcome.status for trial in trials}
    status = next((word for word in (COMPLETED, STOPPED, FAILED, REFUSED) if word in statuses), REFUSED)
    if last is not None and last.outcome.status == FAILED:
        status = FAILED
    return {
        "sweep": name,
        "mode": job.tuning.mode,
        "status": status,
        "account": job.account,
        "trials": [_said(trial) for trial in trials],
        "best": {"id": best.lease, "config": best.values, "metrics": best.outcome.metrics} if best else None,
        "final": _said(last) if last else None,
        "release": None,
        "report": None,
    }


def _said(trial: Trial) -> dict[str, Any]:
    return {
        "id": trial.lease,
        "config": trial.values,
        "status": trial.outcome.status,
        "planned_steps": trial.job.training.steps,
        "authorised_steps": trial.charges.steps if trial.charges else 0,
        "cost": trial.charges.cost if trial.charges else 0,
        "metrics": trial.outcome.metrics,
        "why": trial.outcome.why,
    }


def _statement(name: str, trials: list[Trial], best: Trial, leaves: Trial) -> Statement:
    """Of what leaves: the best trial's model, or that of the final run."""
    assert leaves.charges is not None
    ran = sum(trial.charges is not None and trial.charges.steps > 0 for trial in trials)
    chosen = (
        f"trial {best.number} of sweep {name}, chosen by {leaves.job.evaluation.measured} among {ran} trials that ran"
    )
    if leaves is best:
        chosen = f"this model is {chosen}; every one of them"
    else:
        chosen = (
            f"this model is the winner's configuration ({chosen}) trained once more for {leaves.job.training.steps} "
            "steps; every trial, this last run"
        )
    chosen += " and every evaluation on private records was charged to the same accounts."
    if leaves.outcome.rung:
        chosen += f" It was {leaves.outcome.why}, and is what it was then."
    paid, metrics = leaves.charges, leaves.outcome.metrics
    return statement(leaves.job, leaves.lease, paid.accounts, paid.entries, metrics, chosen, "filter")
