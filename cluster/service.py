"""Which books a command works on: the embedded ledger of this machine, or those of the cluster it runs in.

On a cluster the accountant answers for the ledger, and a command that runs there holds no URL of one. Only the commands
of the accountant itself start or replace it; a job that finds none says what to do.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import environment
from cluster.accounting.books import Books
from cluster.accounting.leases import PROTOCOL, Leases
from cluster.accounting.ledger import Ledger
from cluster.accounting.presence import Presence
from cluster.errors import PurserError, UsageError

if TYPE_CHECKING:
    from cluster.accounting.actor import AccountantClient


@dataclass(frozen=True)
class Desk:
    """The books and leases that a command works on.

    Args:
        ray: folder of a run → Ray for the length of a block, as the accountant's client and the dashboard's address.
    """

    books: Books
    leases: Leases
    ray: Callable[[Path], AbstractContextManager[tuple[AccountantClient, str]]]


def open_desk() -> Desk:
    """The desk of this command: at the cluster's accountant inside a Ray job or where RAY_ADDRESS says so, else here.

    Raises:
        UsageError: the cluster has no accountant, or one of another version.
    """
    address = environment.cluster_address()
    return _here() if address is None else _there(address)


def _here() -> Desk:
    ledger = Ledger(environment.ledger_url())
    books = Books(ledger)

    @contextmanager
    def ray(folder: Path) -> Iterator[tuple[AccountantClient, str]]:
        from cluster.accounting.actor import start
        from cluster.session import local_ray

        with local_ray(folder) as dashboard:
            yield start(ledger.url), dashboard

    return Desk(books, Leases(books, Presence(ledger).is_alive), ray)


def _there(address: str) -> Desk:
    from cluster.accounting.actor import connect
    from cluster.accounting.remote import RemoteBooks, RemoteLeases
    from cluster.session import join

    os.environ.pop(environment.LEDGER, None)
    dashboard = join(address)
    client = connect()
    described = client.described or {}
    if described["file"]:  # one machine: the accountant knows its lease holders by their lock files beside it
        os.environ[environment.LEDGER] = described["file"]

    @contextmanager
    def ray(folder: Path) -> Iterator[tuple[AccountantClient, str]]:
        os.chdir(folder)
        yield client, dashboard

    books = RemoteBooks(client, described)
    return Desk(books, RemoteLeases(books, client), ray)


def start_accountant(single_machine: bool) -> dict[str, Any]:
    """Start the accountant of the cluster that runs on this machine, or replace one of another version.

    What was replaced had nothing that the ledger does not have: those who hold leases turn to the new one, which gives
    them the full grace.

    Raises:
        UsageError: a ledger that this cluster cannot share or that is not there, or an accountant over another one.
    """
    url, file = environment.ledger_url(), environment.ledger_file()
    if file is not None:
        url = f"sqlite:///{file.absolute()}"
        _check_file(file, url, single_machine)
    ledger = Ledger(url)
    _join()
    from cluster.accounting import actor

    if file is not None:
        _check_single_machine()
    if (handle := actor.found()) is not None:
        described = actor.AccountantClient(handle).describe()
        if described.get("ledger") != ledger.identity:
            raise UsageError(
                f"accountant: the one in this cluster keeps {described.get('place', 'another ledger')}, not "
                f"{ledger.place}; end it with `purser accountant stop` first, if that is meant."
            )
        if (described.get("protocol"), described.get("code")) != (PROTOCOL, environment.code_hash()):
            actor.stop()
    actor.start(url, variables={environment.LEDGER: url} if file else None)
    return accountant_status()


def _check_file(file: Path, url: str, single_machine: bool) -> None:
    if not single_machine:
        raise UsageError(
            f"{environment.LEDGER}: {url} is a file of this machine's; a cluster needs a PostgreSQL there, or "
            "--single-machine where all of its nodes are this one."
        )
    if not file.is_file():
        raise UsageError(
            f"{environment.LEDGER}: {url} is not there; `purser accountant init` makes it, once. If it held books "
            "before, restore it: an empty ledger grants nothing."
        )


def _check_single_machine() -> None:
    import ray

    nodes = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if len(nodes) > 1:
        raise UsageError(
            f"--single-machine: this cluster has {len(nodes)} machines, which cannot share a SQLite file; put the "
            f"ledger on a PostgreSQL and its URL into {environment.LEDGER}."
        )


def accountant_status() -> dict[str, Any]:
    """What the cluster's accountant says of itself, with the accounts that it keeps.

    Raises:
        UsageError: there is none, or one of another version.
    """
    _join()
    from cluster.accounting.actor import connect

    client = connect()
    return {**(client.described or {}), "accounts": client.books("names")}


def stop_accountant() -> None:
    """End the cluster's accountant; the ledger has everything it knew. Runs wait a minute for another, then stop."""
    _join()
    from cluster.accounting.actor import stop

    if not stop():
        raise PurserError("accountant: none runs in this Ray cluster; there is nothing to stop.")


def _join() -> None:
    from cluster.session import join

    join(environment.cluster_address() or "auto")
