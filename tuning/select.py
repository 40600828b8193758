"""`purser tune` in select mode: a random number of candidates, of which only the best is ever seen.

One lease over both accounts: reserved before K is drawn, wholly spent before the first candidate's first step, never
refunded. No Ray Tune: a public number of worker groups takes candidates from the sealed queue, and tells nobody (P13).
Neither K nor anything of a loser may come to this file's callers (`sealed` alone knows).
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster import environment
from cluster.accounting.actor import AccountantClient
from cluster.accounting.answers import explain
from cluster.accounting.books import Account
from cluster.accounting.mechanisms import Charge
from cluster.errors import PurserError, UsageError, without_content
from cluster.files import copy_whole, write_whole
from cluster.screen import Screen
from cluster.service import Desk, open_desk
from training import release
from training.admission import admit
from training.command import greet
from training.config import Job
from training.driver import COMPLETED, FAILED, REFUSED, Charged, Outcome, charged, group_trainer, prepared_for, reason
from training.folder import marked, opened
from training.metrics import in_words
from training.statement import statement
from tuning.config import SweepJob
from tuning.plan import make, planned
from tuning.report import sweep_report, write_report
from tuning.sealed import Sealed
from tuning.trials import Trial

WINNER = "winner.json"  # in a sweep's folder: what is public of a selection that is over
CRASHES = 3  # of one group, each of which costs the candidate that ran


@dataclass(frozen=True)
class Winner:
    """The candidate that is released: its values and noised metrics; both None where none is."""

    values: dict[str, Any] | None
    metrics: dict[str, Any] | None

    def keep(self, folder: Path) -> Winner:
        """Write it to the sweep's folder, whole or not at all; returns itself."""
        write_whole(folder / WINNER, json.dumps(asdict(self)))
        return self

    @staticmethod
    def kept(folder: Path) -> Winner | None:
        """The winner of the sweep in `folder`, or None where it is not decided."""
        try:
            return Winner(**json.loads((folder / WINNER).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None


def select(job: SweepJob, screen: Screen, resume: str | None = None, name: str | None = None) -> dict[str, Any]:
    """Run the selection of `job`, or go on with the one called `resume`; returns the contract's keys.

    Args:
        name: see `folder.opened`.

    Raises:
        UsageError: the job, its space or its source is not what the account allows, or there is no such sweep; nothing
            was charged.
    """
    desk = open_desk()
    books, leases = desk.books, desk.leases
    accounts, made = admit(books, job.plain, planned(job), job.tuning.trials)
    name, folder = opened(job, resume, name)
    alive = environment.Alive(name)
    greet(screen, books.place, accounts, made, job)
    order = accounts[0].order
    leases.expire_dead()
    lease, sealed = f"{name}-select", Sealed(folder)
    outcome, winner = Outcome(COMPLETED), Winner.kept(folder)
    if winner is None:
        drawn = sealed.drawn_for(job)
        if not drawn and leases.known(lease) and any(books.charged(lease, account) for account in job.charged):
            raise UsageError(
                f"SWEEP: {name} was paid for, but what it had drawn is not in {folder} any more; put the folder back. "
                "Nothing is drawn twice for one price: to pay for another selection, give it another --name."
            )
        answer = leases.reserve(lease, name, job.selection(order))
        if answer.fits:
            if not drawn:
                sealed.draw(job, order)
            outcome = _run(job, order, desk, lease, name, folder, screen)
        else:
            least = make(books, job).as_json()["select_trials_that_fit"]
            offer = f" What would fit: tuning.trials={least}." if least and least > 1 else ""
            why = f"{explain(answer.shortages, accounts)}; nothing was spent and nothing was drawn.{offer}"
            outcome = Outcome(REFUSED, why=why)
        if outcome.status == COMPLETED:
            winner = _decide(sealed, folder)
    result = _result(job, name, outcome)
    if winner is not None:
        leases.close(lease, "settle", COMPLETED)
        paid = charged(books, job, lease)
        result |= _listed(job, lease, winner, paid)
        result |= _release(job, name, lease, folder, winner, accounts, paid, screen)
        if sealed.folder.exists():
            sealed.destroy()
    for account in [books.show(account) for account in job.accounts]:
        screen.say(f"{account.account}: {account.remaining_cost / account.budget_cost:.1%} of the budget is left.")
    going_on = outcome.status == FAILED
    screen.say(f"Next: {environment.going_on('tune', name) if going_on else f'purser budget show {job.account}'}")
    alive.release()
    return result


def _run(job: SweepJob, order: int, desk: Desk, lease: str, name: str, folder: Path, screen: Screen) -> Outcome:
    log = folder / "log.txt"
    screen.say(
        f"Selection {name}: {job.tuning.trials} candidates in the mean, only the best of them will be seen. It is paid "
        f"for as a whole, before it begins. Ray's own output: {log}"
    )
    with screen.quiet(log):
        from training.parallel import everywhere

        with desk.ray(folder) as (client, dashboard):
            screen.say(f"Ray is up, its dashboard is at http://{dashboard}; the workers are starting.")
            with client.holding(name):

                def paid() -> bool:
                    return all(desk.books.charged(lease, account) for account in job.charged)

                prepared = prepared_for(client, job.plain, everywhere)
                # Paid already: before an interruption.
                epoch = client.epoch(lease) if paid() else _open(client, lease, job.selection(order))
                if epoch is None:
                    client.close(lease, "release", REFUSED)
                    return Outcome(REFUSED, why="others have spent the budget meanwhile; nothing was spent by this.")
                return _groups(job, order, desk.books.identity, lease, epoch, folder, prepared, paid)


def _open(client: AccountantClient, lease: str, charges: list[Charge]) -> int | None:
    """Open the lease's attempt; None where it no longer holds the whole price, and nothing is authorised."""
    attempt = client.open(lease, secrets.token_hex(16), 0)
    if attempt.charges != {charge.account: charge for charge in charges}:
        raise PurserError("select: what would run is not what was reserved; nothing was charged.")
    return attempt.epoch if all(attempt.steps[charge.account] == 1 for charge in charges) else None


def _groups(
    job: SweepJob,
    order: int,
    ledger: str,
    lease: str,
    epoch: int,
    folder: Path,
    prepared: Path,
    paid: Callable[[], bool],
) -> Outcome:
    """Run the worker groups until the queue is empty: as many as the machine holds, however many candidates wait."""
    import ray

    from cluster.session import groups_at_once

    count = groups_at_once(job.training.workers, job.training.device)
    start = 1 + len(list(folder.glob("storage-*")))
    storage = folder / f"storage-{start}"
    storage.mkdir()
    config = {
        "job": job.model_dump(mode="json", include=set(Job.model_fields)),
        "sweep": job.model_dump(mode="json"),
        "lease": lease,
        "epoch": epoch,
        "order": order,
        "ledger": ledger,
        "folder": str(folder),
        "mark": marked(folder),
        "prepared": str(prepared),
        "code": environment.code_hash(),
    }
    group = ray.remote(num_cpus=0, max_retries=0)(run_group)
    running = [group.remote(f"{lease}-{start}-{i}", config, str(storage)) for i in range(1, count + 1)]
    failures = []
    for one in running:
        try:
            failure = ray.get(one)
        except Exception as error:  # noqa: BLE001 (its message may hold anything)
            failure = f"a group's driver failed with {without_content(error)}"
        failures += [failure] if failure else []
    # Where nobody came as far as paying, not even that there was no candidate may be told.
    if failures and (Sealed(folder).left or not paid()):
        return Outcome(FAILED, why=failures[0].rstrip("."))
    return Outcome(COMPLETED)


def run_group(name: str, config: Mapping[str, Any], storage: str) -> str:
    """The small driver of one worker group, a Ray task; returns why it ended early, or nothing."""
    from ray.train.v2.api.exceptions import TrainingFailedError

    from tuning.group import group_worker

    try:
        group_trainer(group_worker, config, name, Path(storage), crashes=CRASHES).fit()
    except TrainingFailedError as error:
        return reason(error)
    return ""


def _decide(sealed: Sealed, folder: Path) -> Winner:
    """The best candidate, its model in the sweep's folder; from here on nothing else is needed of what is sealed."""
    best = sealed.best()
    if best is None:
        return Winner(None, None).keep(folder)
    outcome = best.outcome
    assert outcome is not None
    model = release.left(best.folder)
    copy_whole(model, folder / model.name)
    return Winner(best.values, outcome.metrics).keep(folder)


def _result(job: SweepJob, name: str, outcome: Outcome) -> dict[str, Any]:
    """The contract's keys, as they are where nothing is released."""
    return {
        "sweep": name,
        "mode": job.tuning.mode,
        "status": outcome.status,
        "account": job.account,
        "trials": [],
        "best": None,
        "release": None,
        "report": None,
        "why": outcome.why,
    }


def _listed(job: SweepJob, lease: str, winner: Winner, paid: Charged) -> dict[str, Any]:
    """The one trial that may be listed: the winner, with the price of the whole selection."""
    if winner.values is None:
        return {}
    steps = job.candidate(winner.values).training.steps
    best = {"id": lease, "config": winner.values, "metrics": winner.metrics}
    cost = {"planned_steps": steps, "authorised_steps": steps, "cost": paid.cost}
    return {"trials": [{**best, "status": COMPLETED, **cost, "why": ""}], "best": best}


def _release(
    job: SweepJob,
    name: str,
    lease: str,
    folder: Path,
    winner: Winner,
    before: list[Account],
    paid: Charged,
    screen: Screen,
) -> dict[str, Any]:
    """Write release and report; returns where they are."""
    said, where = None, None
    whole = Trial(1, lease, winner.values or {}, job.candidate(winner.values or {}), charges=paid)
    if winner.metrics is None:
        screen.say("No candidate was drawn or none came to its end: nothing is released, as may happen by chance.")
    else:
        metrics = winner.metrics
        whole.outcome = Outcome(COMPLETED, metrics)
        reserved = job.selection(before[0].order)
        said = statement(
            whole.job, lease, paid.accounts, paid.entries, metrics, _sentence(job, name), "select", reserved
        )
        where = str(release.write_release(folder, release.left(folder), said))
        screen.say(f"Best: {in_words(metrics)}. Released: {where}")
    best = whole if winner.metrics is not None else None
    page = sweep_report(name, before, paid.accounts, [whole], best, said, selection=_facts(job, winner))
    report = str(write_report(folder, page))
    screen.say(f"Report: {report}")
    return {"release": where, "report": report}


def _distribution(job: SweepJob) -> str:
    repeats = job.tuning.repeats
    shape = "" if repeats.distribution == "poisson" else f" of shape η = {repeats.shape:g}"
    return f"{repeats.distribution.replace('_', ' ')}{shape}, {job.tuning.trials} in the mean"


def _sentence(job: SweepJob, name: str) -> str:
    return (
        f"this model is the best, by {job.evaluation.measured}, of a random number of candidates in selection {name} "
        f"({_distribution(job)}), each drawn independently; how many there were and all others stay hidden, but for "
        "how long it took. The whole selection was charged once, before it began (Papernot and Steinke 2022)."
    )


def _facts(job: SweepJob, winner: Winner) -> list[tuple[str, object]]:
    values = winner.values or {}
    return [
        ("number of candidates", f"{_distribution(job)}; how many there were stays hidden"),
        ("each drawn from", "the space below, independently" if job.tuning.space else "the job as it stands"),
        *(
            (name, ", ".join(f"{kind} {given}" for kind, given in dimension.model_dump(exclude_none=True).items()))
            for name, dimension in job.tuning.space.items()
        ),
        *((f"the best: {name}", value) for name, value in values.items()),
        ("all others", "stay hidden, and are destroyed"),
        ("charged", "once for all of them, before the first began; nothing is refunded"),
    ]
