"""The commands about a cluster as a whole: its accountant, and the jobs that were submitted to it.

Part of the front door: they parse, hand over and print. Heavy imports are local.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cluster import environment
from cluster.errors import PurserError
from cluster.screen import Screen

accountant = typer.Typer(help="The shared ledger of a cluster.", no_args_is_help=True)
jobs = typer.Typer()

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
Server = Annotated[
    str,
    typer.Option(metavar="URL", envvar="RAY_API_SERVER_ADDRESS", help="The cluster's dashboard, http://HEAD:8265."),
]
Elsewhere = Annotated[
    str | None, typer.Option(metavar="URL", help="Ask a cluster, by its dashboard: http://HEAD:8265.")
]
SubmissionName = Annotated[str, typer.Argument(metavar="SUBMISSION", help="The id that purser submit printed.")]


@accountant.command()
def init(
    service: Annotated[str | None, typer.Option(metavar="ROLE", help="Who may read and append, and no more.")] = None,
    as_json: Json = False,
) -> None:
    """Make the ledger that PURSER_LEDGER names, as the role that owns its database; harmless if it is there."""
    from cluster.accounting.books import Books
    from cluster.accounting.leases import PROTOCOL
    from cluster.accounting.ledger import Ledger
    from cluster.accounting.ledger import init as make

    screen = Screen(as_json)
    make(environment.ledger_url(), service)
    books = Books(Ledger(environment.ledger_url()))
    screen.say(f"Ledger {books.place} is made.")
    if service:
        screen.say(f"Set PURSER_LEDGER to the URL of {service} from here on: it may read and append, and nothing else.")
    screen.say("Next: purser budget create JOB")
    screen.result({"protocol": PROTOCOL, "ledger": books.identity, "accounts": books.names()})


@accountant.command()
def start(
    single_machine: Annotated[
        bool, typer.Option(help="Let a SQLite ledger serve a cluster whose nodes are all this machine.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Start the accountant of the cluster on this machine over PURSER_LEDGER, or replace one of another version."""
    from cluster.service import start_accountant

    screen = Screen(as_json)
    _described(screen, start_accountant(single_machine))
    screen.say("Next: purser budget create JOB --address http://HEAD:8265")


@accountant.command("status")
def accountant_status(address: Elsewhere = None, as_json: Json = False) -> None:
    """What the cluster's accountant says of itself."""
    screen = Screen(as_json)
    if address is not None:
        raise typer.Exit(_ask(address, ["accountant", "status"], screen))
    from cluster.service import accountant_status as asked

    _described(screen, asked())


@accountant.command("stop")
def stop_accountant(address: Elsewhere = None, as_json: Json = False) -> None:
    """End the cluster's accountant; the ledger keeps everything. Runs wait a minute for another, then stop."""
    screen = Screen(as_json)
    if address is not None:
        raise typer.Exit(_ask(address, ["accountant", "stop"], screen))
    from cluster.service import stop_accountant as end

    end()
    screen.say("The accountant has ended; the ledger has everything it knew. Next: purser accountant start")
    screen.result({"protocol": None, "ledger": None, "accounts": []})


def _described(screen: Screen, described: dict[str, Any]) -> None:
    screen.say(f"Ledger {described['place']}", markup=False)
    screen.say(f"The accountant runs: protocol {described['protocol']}, {len(described['accounts'])} accounts.")
    screen.result({key: described[key] for key in ("protocol", "ledger", "place", "code", "accounts")})


def _ask(address: str, words: list[str], screen: Screen) -> int:
    from cluster.handover import ask

    return ask(address, words, screen)


@jobs.command()
def status(name: SubmissionName, address: Server, as_json: Json = False) -> None:
    """How a submitted job stands."""
    from cluster.jobs import JobServer

    screen = Screen(as_json)
    now = JobServer(address).status(name)
    screen.say(f"Submission {name}: {now.status}")
    screen.result({"submission_id": name, "status": now.status})


@jobs.command()
def logs(
    name: SubmissionName,
    address: Server,
    wait: Annotated[bool, typer.Option("--follow", help="Until the job has ended.")] = False,
    as_json: Json = False,
) -> None:
    """What a submitted job has said; with --follow until its end, and with its exit code."""
    from cluster.handover import Transcript, end, follow
    from cluster.jobs import JobServer

    screen, server = Screen(as_json), JobServer(address)
    if wait:
        now, told = follow(server, name, screen)
    else:
        now, told = server.status(name), Transcript(lambda line: screen.say(line, markup=False))
        for line in server.log(name).splitlines():
            told.take(line)
    screen.result({"submission_id": name, "status": now.status, "result": told.result})
    if now.over:
        end(now, told)


@jobs.command()
def stop(name: SubmissionName, address: Server, as_json: Json = False) -> None:
    """End a submitted job; what it was charged stays charged, what it only held is free within minutes."""
    from cluster.jobs import JobServer

    screen = Screen(as_json)
    now = JobServer(address).stop(name)
    if now.status != "stopped":
        raise PurserError(f"SUBMISSION: {name} had ended before; it is {now.status}.")
    screen.say(f"Submission {name}: stopped. What it was charged stays charged; a run or sweep goes on with --resume.")
    screen.result({"submission_id": name, "status": now.status})
