"""The front door: the `purser` command parses, hands over and prints; it decides nothing.

It starts in under half a second: whatever needs torch or Ray is imported by the command that uses it.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

# `python -m purser`, and Ray for a job's working folder, put the folder one stands in first; a `training.py` or
# `cluster/` there must not pass for ours.
if Path.cwd() != Path(__file__).resolve().parent:
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path.cwd()]

import typer

from cluster import commands, display, environment
from cluster.accounting import orders
from cluster.accounting.books import Books
from cluster.commands import Elsewhere, Json, Server
from cluster.errors import PurserError, Refused, UsageError, without_content
from cluster.screen import Screen
from cluster.service import open_desk
from training.commands import releases

app = typer.Typer(
    help="Private training and tuning under one enforced (ε, δ).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
budget = typer.Typer(help="The books: accounts and everything they were charged.", no_args_is_help=True)
app.add_typer(budget, name="budget")
app.add_typer(commands.accountant, name="accountant")
app.add_typer(commands.jobs)
app.add_typer(releases)

JobFile = Annotated[Path, typer.Argument(metavar="JOB", help="A job file, such as infra/jobs/digits.yaml.")]
OptionalJob = Annotated[Path | None, typer.Argument(metavar="JOB", help="A job file; not with --resume.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Values that override the job file's.")
]
AccountName = Annotated[str, typer.Argument(metavar="ACCOUNT", help="digits/train; digits alone means digits/train.")]
Name = Annotated[
    str | None, typer.Option(metavar="NAME", help="What it is called; the same job under the same name goes on.")
]


def main() -> None:
    """Run the command; an error ends as one sentence on stderr and an exit code, never as a traceback."""
    environment.secure_ray()
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except PurserError as error:
        _end(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _end("interrupted; what was authorised is spent, what was only reserved is released.", 1)
    except Exception as error:  # noqa: BLE001 (the last door: whatever it is, a person gets a sentence)
        if hasattr(error, "format_message"):  # typer's own errors of usage
            _end(error.format_message() or "a command is missing; see purser --help.", 2)
        _end(f"a bug in Purser ({without_content(error)}); nothing more is charged, please report it.", 1)


def _end(sentence: str, code: int) -> None:
    sys.stderr.write(f"purser: {sentence}\n")
    sys.exit(code)


def _job(path: Path, overrides: list[str] | None, elsewhere: bool = False) -> Any:
    from training.jobfile import load
    from tuning.config import SweepJob

    return load(SweepJob, path.absolute(), overrides or [], elsewhere=elsewhere)


def _chosen(job: Path | None, overrides: list[str] | None, resume: str | None, what: str, name: str | None) -> Any:
    """The job of a file, or the one that a run or sweep began with."""
    if resume is not None and name is not None:
        raise UsageError(f"--name: with --resume {what} it has its name; leave one of them out.")
    if (job is None) == (resume is None):
        raise UsageError(f"JOB: give a job file, or --resume {what} alone.")
    if resume is None:
        assert job is not None
        return _job(job, overrides)
    from training.folder import resumed
    from tuning.config import SweepJob

    return resumed(SweepJob, resume)


def _books() -> Books:
    return open_desk().books


def _elsewhere(address: str, screen: Screen, *words: str, job: Any = None) -> NoReturn:
    """Run `purser budget WORDS [job]` on a cluster, and end as it ends."""
    from cluster.handover import ask

    raise typer.Exit(ask(address, ["budget", *words], screen, job and job.model_dump(mode="json")))


def _finish(screen: Screen, result: dict[str, Any]) -> None:
    """Print what a run or sweep came to; a refusal or failure ends with its sentence and exit code."""
    screen.result(result)
    if result["status"] == "refused":
        raise Refused(f"refused: {result['why']}")
    if result["status"] == "failed":
        raise PurserError(f"failed: {result['why']}")


@app.command("init")
def init_job(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="A .csv, .tsv, .parquet or .jsonl file, or a folder.")],
    unit: Annotated[
        str, typer.Option(metavar="COL", help="Whom a record belongs to; a row protects each alone.")
    ] = "row",
    label: Annotated[str | None, typer.Option(metavar="COL", help="The column to predict.")] = None,
    text: Annotated[str | None, typer.Option(metavar="COL", help="The column that a language model reads.")] = None,
    prompt: Annotated[str | None, typer.Option(metavar="COL", help="A column that stands before the text.")] = None,
    out: Annotated[Path, typer.Option(metavar="JOB", help="The job file; none is overwritten.")] = Path("job.yaml"),
    as_json: Json = False,
) -> None:
    """A commented job file from a file's declared columns; no record is read."""
    from training.scaffold import Wanted, write_job

    screen = Screen(as_json)
    marked = write_job(data, Wanted(unit, label, text, prompt), out)
    screen.say(
        f"Wrote {out} from the names of columns alone. {marked} lines in it are marked for you to fill in.",
        markup=False,
    )
    screen.say(f"Next: fill them in, then purser plan {shlex.quote(str(out))}", markup=False)
    screen.result({"job": str(out.absolute())})


@app.command()
def plan(job: JobFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """What a job would cost; touches no data and spends nothing."""
    from rich.markup import escape

    from tuning.display import plan_curve, plan_table, plan_verdict
    from tuning.plan import make

    screen = Screen(as_json)
    books = _books()
    made = make(books, _job(job, overrides))
    screen.say(f"Ledger {books.place}")
    screen.say(plan_table(made))
    screen.say(plan_curve(made))
    screen.say()
    screen.say(plan_verdict(made))
    if not made.exists:
        screen.say("There is no such account yet; these are the orders it would be given.")
    shown = made.as_json()
    if made.job.audit.canaries:
        from training.audit.display import planned
        from training.audit.plan import plan as of_audit

        shown["audit"] = of_audit(made.job).as_json()
        screen.say(planned(shown["audit"]))
    what = "train" if made.job.audit.canaries else "tune"  # a sweep has no canaries
    screen.say(escape(f"Next: purser {what} {shlex.join([str(job), *(overrides or [])])}"))
    screen.result(shown)


@app.command()
def train(
    job: OptionalJob = None,
    overrides: Overrides = None,
    rehearse: Annotated[bool, typer.Option(help="Synthetic inputs only; nothing is charged.")] = False,
    resume: Annotated[str | None, typer.Option(metavar="RUN", help="Go on with a run that did not complete.")] = None,
    name: Name = None,
    as_json: Json = False,
) -> None:
    """One private run under a lease."""
    screen = Screen(as_json)
    whole = _chosen(job, overrides, resume, "RUN", name)
    from training.command import rehearse as rehearsal
    from training.command import run
    from tuning.plan import planned

    if rehearse and resume is None:
        screen.result(rehearsal(whole.plain, screen))
        return
    _finish(screen, run(whole.plain, planned(whole), whole.tuning.trials, screen, resume, name))


@app.command()
def tune(
    job: OptionalJob = None,
    overrides: Overrides = None,
    resume: Annotated[str | None, typer.Option(metavar="SWEEP", help="Go on with an interrupted sweep.")] = None,
    name: Name = None,
    as_json: Json = False,
) -> None:
    """A private hyper-parameter sweep; every trial is admitted by the accountant or refused."""
    screen = Screen(as_json)
    whole = _chosen(job, overrides, resume, "SWEEP", name)
    if resume is None:
        whole.check_swept()
        whole.corners()  # a space that holds an impossible run is found before anything heavy is imported
    if whole.tuning.mode == "select":
        from tuning.select import select as sweep
    else:
        from tuning.command import tune as sweep

    _finish(screen, sweep(whole, screen, resume, name))


@app.command()
def audit(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A finished run of a job with audit.canaries.")],
    shadows: Annotated[
        int, typer.Option(metavar="N", help="Shadow models for the likelihood-ratio attack, such as 16; 0 is none.")
    ] = 0,
    as_json: Json = False,
) -> None:
    """What can be shown of a run's ε by its canaries: a lower bound, and whether it contradicts the claim."""
    screen = Screen(as_json)
    from training.folder import resumed
    from tuning.config import SweepJob

    job = resumed(SweepJob, run).plain
    from training.audit.command import audit as assess
    from training.audit.display import audit_table

    result = assess(run, job, screen, shadows)
    for line in audit_table(result):
        screen.say(line)
    screen.say(f"Next: purser report {run}")
    screen.result(result)


@app.command()
def submit(
    address: Server,
    job: OptionalJob = None,
    overrides: Overrides = None,
    what: Annotated[
        str | None, typer.Option("--as", metavar="train|tune", help="tune where the job has a space to search.")
    ] = None,
    resume: Annotated[str | None, typer.Option(metavar="RUN", help="Go on with a run or sweep there.")] = None,
    name: Annotated[str, typer.Option(metavar="NAME", help="Tells apart what would else be one submission.")] = "",
    requirements: Annotated[
        Path | None, typer.Option(metavar="FILE", help="package==version lines that the job's processes need.")
    ] = None,
    entrypoint_num_cpus: Annotated[
        float | None, typer.Option(help="0 runs the command on the head, more on any node; 1 where the head has none.")
    ] = None,
    wait: Annotated[bool, typer.Option("--follow", help="Until the job has ended, and with its exit code.")] = False,
    as_json: Json = False,
) -> None:
    """The same job on a cluster, through Ray's job API; the same submitted twice runs once."""
    from cluster.handover import submit as hand_over
    from cluster.jobs import requirements as pinned
    from tuning.submission import submission

    screen = Screen(as_json)
    if (job is None) == (resume is None):
        raise UsageError("JOB: give a job file, or --resume RUN alone.")
    shipped = None if job is None else _job(job, overrides, elsewhere=True)
    said = submission(shipped, what, resume, name)
    pip = pinned(requirements) if requirements else []
    made = hand_over(address, said, pip, entrypoint_num_cpus, screen, wait)
    if made:
        screen.result(made)


@budget.command()
def create(job: JobFile, overrides: Overrides = None, address: Elsewhere = None, as_json: Json = False) -> None:
    """Make the dataset and its accounts as the job says; prints how the order of each is chosen."""
    screen = Screen(as_json)
    if address is not None:
        _elsewhere(address, screen, "create", job=_job(job, overrides, elsewhere=True))
    from training.admission import source_of
    from tuning.plan import planned

    whole = _job(job, overrides)
    books = _books()
    screen.say(f"Ledger {books.place}")
    dataset, plans, privacy = whole.dataset([source_of(books, whole.plain)]), planned(whole), whole.privacy
    accounts = books.create(dataset, privacy.epsilon, privacy.delta, plans, whole.tuning.trials)
    for name in whole.accounts:
        rows = orders.order_table(privacy.epsilon, privacy.delta, plans[name], whole.tuning.trials)
        screen.say(display.order_table(name, rows))
    screen.say(display.accounts_table(accounts))
    screen.say(f"Next: purser plan {job}")
    screen.result({"accounts": [account.as_json() for account in accounts]})


@budget.command("list")
def list_accounts(address: Elsewhere = None, as_json: Json = False) -> None:
    """Every account of this ledger."""
    screen = Screen(as_json)
    if address is not None:
        _elsewhere(address, screen, "list")
    books = _books()
    accounts = [books.show(name) for name in books.names()]
    screen.say(f"Ledger {books.place}")
    screen.say(display.accounts_table(accounts) if accounts else "No accounts yet. Next: purser budget create JOB")
    screen.result({"accounts": [account.as_json() for account in accounts]})


@budget.command()
def show(account: AccountName, address: Elsewhere = None, as_json: Json = False) -> None:
    """One account: what is spent, reserved and left, and how many more runs fit."""
    screen = Screen(as_json)
    if address is not None:
        _elsewhere(address, screen, "show", account)
    desk = open_desk()
    books = desk.books
    shown = books.show(books.resolve(account))
    both = [shown] if "/" in account else [books.show(name) for name in shown.dataset.accounts()]
    holds = {one.account: desk.leases.holds(one.account) for one in both}
    screen.say(f"Ledger {books.place}")
    for one in both:
        screen.say(display.account_card(one, books.last_run(one.account), holds[one.account]))
        screen.say()
    screen.say(f"Next: purser budget history {shown.account}")
    screen.result({**shown.as_json(), "reserved_by": [asdict(hold) for hold in holds[shown.account]]})


@budget.command()
def history(account: AccountName, address: Elsewhere = None, as_json: Json = False) -> None:
    """Every entry of an account, like a bank statement."""
    screen = Screen(as_json)
    if address is not None:
        _elsewhere(address, screen, "history", account)
    books = _books()
    shown = books.show(books.resolve(account))
    rows = list(books.history(shown.account))
    screen.say(f"Ledger {books.place}")
    screen.say(display.history_table(rows, shown.budget_cost))
    screen.say(f"Next: purser budget verify {shown.account} --head {shown.head['seq']}:{shown.head['hash']}")
    screen.result({"account": shown.account, "entries": rows})


@budget.command()
def verify(
    account: AccountName,
    head: Annotated[str | None, typer.Option(metavar="SEQ:HASH", help="A head that was kept elsewhere.")] = None,
    address: Elsewhere = None,
    as_json: Json = False,
) -> None:
    """Recompute the hash chain and the totals; with --head, also find a cut or rewritten chain."""
    from cluster.accounting.verify import parse_head

    screen = Screen(as_json)
    if address is not None:
        _elsewhere(address, screen, "verify", account, *(["--head", head] if head else []))
    books = _books()
    name = books.resolve(account)
    verdict = books.verify(name, parse_head(head) if head else None)
    screen.say(f"Ledger {books.place}")
    word = "[green]valid[/]" if verdict.valid else "[red]not valid[/]"
    screen.say(f"{name}: {word}: {verdict.why}.")
    if verdict.head:
        screen.say(f"Head {verdict.head['seq']}:{verdict.head['hash']}; keep it somewhere else.")
    screen.result({k: getattr(verdict, k) for k in ("account", "valid", "first_bad_seq", "head", "why")})
    raise typer.Exit(0 if verdict.valid else 1)


if __name__ == "__main__":
    main()
