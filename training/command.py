"""`purser train`: one run from the command line to its release.

Joins books, Ray session and driver; shows progress as the ledger knows it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from cluster import environment
from cluster.accounting.answers import explain
from cluster.accounting.books import Account, Books
from cluster.accounting.costs import epsilon_text
from cluster.accounting.leases import Leases
from cluster.accounting.mechanisms import Charge
from cluster.background import repeated
from cluster.errors import UsageError
from cluster.screen import Screen
from cluster.service import open_desk
from cluster.session import check_gpus
from training import release
from training.admission import admit, what_would_fit
from training.config import Job
from training.driver import COMPLETED, FAILED, REFUSED, STOPPED, Outcome, charged, train
from training.folder import marked, opened
from training.metrics import by_group, in_words
from training.statement import statement


def run(
    job: Job,
    plans: Mapping[str, Sequence[Charge]],
    trials: int,
    screen: Screen,
    resume: str | None = None,
    name: str | None = None,
) -> dict[str, Any]:
    """Run `job` once under a lease, or go on with the run called `resume`; returns the contract's keys.

    Args:
        name: see `folder.opened`.

    Raises:
        UsageError: the job does not fit its account or the run to be resumed; nothing was charged.
    """
    desk = open_desk()
    books, leases = desk.books, desk.leases
    accounts, made = admit(books, job, plans, trials)
    name, folder = opened(job, resume, name)
    alive = environment.Alive(name)
    begun = leases.known(name)
    if resume is not None and not begun:
        raise UsageError(
            f"RUN: {resume} never held a lease, so there is nothing to go on with; start a new run (a sweep goes on "
            "with purser tune --resume)."
        )
    greet(screen, books.place, accounts, made, job)
    planned = job.training.steps
    result = {
        "run": name,
        "status": REFUSED,
        "planned_steps": planned,
        "authorised_steps": 0,
        "account": job.account,
        "epsilon_of_run": 0.0,
        "metrics": {},
        "rungs": [],
        "release": None,
        "why": "",
    }
    if begun and leases.settled(name):
        raise UsageError(f"RUN: {name} is complete and settled; start a new run.")
    if not begun:
        refusal = refused(leases, job, name, accounts)
        if refusal:
            return {**result, "why": refusal}
    if job.audit.canaries:
        seal(job, folder, begun, screen)
    log = folder / "log.txt"
    screen.say(f"Run {name}: {planned} steps on {job.training.workers} workers. Ray's own output: {log}")
    with screen.quiet(log):
        from training.parallel import everywhere

        with desk.ray(folder) as (client, dashboard):
            screen.say(f"Ray is up, its dashboard is at http://{dashboard}; the workers are starting.")
            check_gpus(job.training.workers, job.training.device)
            with client.holding(name), progress(screen, books, job.accounts[0], name, planned):
                mark = marked(folder)
                outcome = train(client, books.identity, job, name, name, folder, mark, everywhere=everywhere)
            cost = charged(client, job, name)
    result |= {"status": outcome.status, "authorised_steps": cost.steps, "epsilon_of_run": cost.epsilon}
    result |= {"metrics": outcome.metrics, "rungs": release.kept_rungs(folder), "why": outcome.why}
    if outcome.status in (COMPLETED, STOPPED) and release.left(folder).exists():
        said = statement(job, name, cost.accounts, cost.entries, outcome.metrics, "none in this run.")
        result["release"] = str(release.write_release(folder, release.left(folder), said))
    _conclude(screen, outcome, result, bool(job.audit.canaries))
    alive.release()
    return result


def seal(job: Job, folder: Path, begun: bool, screen: Screen) -> None:
    """Draw the canaries of a run that has not `begun`, and say what may be said of them."""
    from training.audit.canaries import Canaries, digest, draw
    from training.audit.plan import plan

    sealed = digest(folder)
    if not begun and not sealed:
        sealed = draw(job, plan(job).guesses).seal(folder)
    facts = Canaries.unsealed(folder, sealed).facts
    screen.say(
        f"Canaries: {facts['canaries']} {facts['kind']} ({facts['distinct']} of them differ), each in by a fair coin; "
        f"{facts['guesses']} guesses will be made. Sealed, SHA-256 {sealed}"
    )


def greet(screen: Screen, url: str, accounts: Sequence[Account], made: bool, job: Job) -> None:
    """Say which books are used and how they stand, and what DeepSpeed is given where it takes the steps of `job`."""
    first = accounts[0]
    screen.say(f"Ledger {url}")
    screen.say(
        f"Dataset {first.dataset.name}: ε = {first.epsilon:g}, δ = {first.delta:g} for each {first.dataset.unit}"
        + (", accounts made from this job." if made else ".")
    )
    for account in accounts:
        screen.say(
            f"  {account.account}: order {account.order}, {account.remaining_cost / account.budget_cost:.1%} left"
        )
    if (config := job.training.zero) is not None:
        screen.say(f"DeepSpeed {json.dumps(config)}", markup=False)


def refused(leases: Leases, job: Job, lease: str, accounts: Sequence[Account]) -> str:
    """Why `job` cannot be paid for and what could; empty where it can. A refusal is written to the ledger."""
    answer = leases.fits(job.charges())
    if not answer.fits and leases.expire_dead():
        answer = leases.fits(job.charges())
    if answer.fits:
        return ""
    answer = leases.reserve(lease, lease, job.charges())
    if answer.fits:  # room appeared just now, and the run holds it
        return ""
    now = [leases.books.show(account.account) for account in accounts]
    return f"{explain(answer.shortages, now)}; nothing was spent. {what_would_fit(job, now, answer.shortages)}"


def progress(screen: Screen, books: Books, account: str, lease: str, planned: int) -> AbstractContextManager[None]:
    """Tell of each authorised block while the run goes on: the ledger is the one place that knows."""
    told = 0

    def tell() -> None:
        nonlocal told
        steps = sum(entry["steps"] for entry in books.charged(lease, account))
        if steps > told:
            told = steps
            screen.say(f"  {steps} of {planned} steps authorised")

    return repeated(tell, 0.5, at_once=False)


def _conclude(screen: Screen, outcome: Outcome, result: Mapping[str, Any], audited: bool) -> None:
    for rung in result["rungs"]:
        screen.say(f"after {rung['steps']} steps: {in_words(rung)}")
    metrics = outcome.metrics
    epsilon = epsilon_text(result["epsilon_of_run"])
    line = f"{outcome.status}: {result['authorised_steps']} steps authorised, ε of this run {epsilon}"
    if metrics:
        line += f", {in_words(metrics)}"
    screen.say(line + (f" ({outcome.why})" if outcome.why else ""))
    for line in by_group(metrics):
        screen.say(f"  {line}", markup=False)
    if result["release"]:
        screen.say(f"Released: {result['release']}")
    if outcome.status in (FAILED, STOPPED):
        screen.say(f"Next: {environment.going_on('train', result['run'])}")
    elif audited:
        screen.say(f"Next: purser audit {result['run']}")
    else:
        screen.say(f"Next: purser budget show {result['account']}")


def rehearse(job: Job, screen: Screen) -> dict[str, Any]:
    """Try the job's clipping and memory on synthetic inputs in this process; nothing is read, nothing charged."""
    from training.models import device_of, rehearsed

    config, alone = job.training.zero, ExitStack()
    with alone:
        if config is not None:
            from training.engine.zero import group_of_one

            alone.enter_context(group_of_one(device_of(job)))
            screen.say(f"DeepSpeed {json.dumps(config)}", markup=False)
        _, seen = rehearsed(job)
    screen.say(
        f"Rehearsal on synthetic inputs: {seen.parameters} parameters; one unit contributes at most "
        f"{seen.largest_norm:.7f} × max_grad_norm, whatever its companions; a micro-batch of "
        f"{seen.physical_batch_size} records fits. Nothing was charged."
    )
    return {
        "run": None,
        "status": COMPLETED,
        "planned_steps": job.training.steps,
        "authorised_steps": 0,
        "account": job.account,
        "epsilon_of_run": 0.0,
        "metrics": {},
        "release": None,
        "rehearsal": vars(seen),
        "deepspeed": config,
    }
