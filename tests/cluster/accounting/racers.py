"""What the processes do that race and are killed in `test_ledger_races.py`, and how they are started."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pwd
import resource
import signal
import sqlite3
import time
from collections.abc import Callable
from multiprocessing import forkserver
from typing import Any
from unittest import mock

from bookkeeping import CHEAP, TRAIN, VALIDATION, desk_at, evaluation, run_attempt, training
from crashes import Faults, child, outcome
from postgresql import SERVICE

from cluster.accounting import databases
from cluster.accounting.ledger import Ledger, init
from cluster.accounting.mechanisms import Charge
from cluster.errors import PurserError, Unreachable

PROCESSES = 8


def processes() -> Any:
    """Processes that share nothing with this one, and yet start in no time: forks of one that imported this file."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["racers"])
    with mock.patch.dict(os.environ, child("")["env"]):
        forkserver.ensure_running()
    return context


def race(target: Callable[..., None], *arguments: Any, count: int = PROCESSES) -> list[Any]:
    """Run `target` in fresh processes that start together; returns what each put into the queue."""
    context = processes()
    barrier, answers = context.Barrier(count), context.Queue()
    racing = [context.Process(target=target, args=(*arguments, f"racer-{n}", barrier, answers)) for n in range(count)]
    for process in racing:
        process.start()
    try:
        return [answers.get(timeout=60) for _ in racing]
    finally:
        for process in racing:
            process.join(60)
            process.kill()


def apart(target: Callable[..., Any], *arguments: Any) -> Any:
    """What `target` returns in a process of its own, which may lower its limits and give up its rights."""
    context = processes()
    answers = context.Queue()
    process = context.Process(target=_answer, args=(answers, target, arguments))
    process.start()
    try:
        return answers.get(timeout=60).get()
    finally:
        process.join(60)
        process.kill()


def _answer(answers, target, arguments):
    answers.put(outcome(lambda: target(*arguments)))


def reserve_open_and_pay(url, name, barrier, answers):
    """Reserve a whole run on both accounts; whoever wins pays for its first block."""
    desk = desk_at(url)
    charges = [training(), evaluation()]
    barrier.wait(60)
    answer = desk.leases.reserve(name, name, charges)
    if answer.fits:
        epoch = run_attempt(desk, name, name, 1)
        assert desk.leases.authorise(name, epoch, VALIDATION, 1)
    answers.put((name, answer.fits))


def open_for_the_first_time(folder, name, barrier, answers):
    """Five ledgers that nobody has made yet, each opened by all processes at once."""
    identities = []
    for number in range(5):
        barrier.wait(60)
        try:
            identities.append(Ledger(f"sqlite:///{folder}/{number}.db").identity)
        except PurserError as error:
            identities.append(f"{name}: {error}")
    answers.put(tuple(identities))


def init_for_the_first_time(owner_url, url, name, barrier, answers):
    """`purser accountant init`, by several owners at once."""
    barrier.wait(60)
    try:
        init(owner_url, SERVICE)
        answers.put(Ledger(url).identity)
    except PurserError as error:
        answers.put(f"{name}: {error}")


def open_one_lease(url, name, barrier, answers):
    """Every process takes itself for the one worker group of the lease, and runs until it is told that it is not."""
    desk = desk_at(url)
    barrier.wait(60)
    attempt = desk.leases.open("lease", name)
    barrier.wait(60)
    granted = []
    with contextlib.suppress(PurserError):
        for block in (1, 2):
            granted.append(desk.leases.authorise("lease", attempt.epoch, TRAIN, block).cost)
    answers.put((attempt.epoch, granted))


def run_a_whole_lease(url, blocks, name, barrier, answers):
    """One run of many cheap blocks, from its reservation to its end."""
    desk = desk_at(url)
    barrier.wait(60)
    assert desk.leases.reserve(name, name, [Charge(TRAIN, CHEAP, blocks, 1)]).fits
    epoch = desk.leases.open(name, name).epoch
    costs = [desk.leases.authorise(name, epoch, TRAIN, block).cost for block in range(1, blocks + 1)]
    assert desk.leases.close(name, "settle", "completed") == {TRAIN: sum(costs)}
    answers.put((name, costs))


def authorise_until_told(url, name, stop, answers):
    """One run whose client does the same call again for as long as the ledger cannot be reached."""
    tries = 0

    def insist(call, *arguments):
        nonlocal tries
        while True:
            try:
                return call(*arguments)
            except Unreachable:
                tries += 1
                time.sleep(0.01)

    desk = insist(desk_at, url)
    assert insist(desk.leases.reserve, name, name, [Charge(TRAIN, CHEAP, 100_000, 1)]).fits
    epoch = insist(desk.leases.open, name, name).epoch
    costs = []
    while not stop.is_set():
        costs.append(insist(desk.leases.authorise, name, epoch, TRAIN, len(costs) + 1).cost)
    insist(desk.leases.close, name, "settle", "completed")
    answers.put((name, tries, costs))


def die_in_the_commit(url, when, call):
    """Make one call, and be killed (as by `kill -9`) just before its commit or just after it."""
    desk = desk_at(url)
    faults = Faults(desk)

    def commit(connection):
        if when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        faults.do_commit(connection)
        os.kill(os.getpid(), signal.SIGKILL)

    desk.ledger._engine.dialect.do_commit = commit
    getattr(desk.leases, call[0])(*call[1:])


def killed_in_the_commit(url: str, when: str, *call: Any) -> None:
    """Have a process die in the commit of this call."""
    process = processes().Process(target=die_in_the_commit, args=(url, when, call))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


# In processes that are not allowed everything


def read_and_write_as(user, url, warm):
    """Open the ledger as an ordinary user, or as whom we are; returns what became of reading and of writing."""
    assert desk_at(warm).ledger.identity  # whatever is imported late is here now
    if user is not None:
        os.setgroups([])
        os.setgid(pwd.getpwnam(user).pw_gid)
        os.setuid(pwd.getpwnam(user).pw_uid)
    said = []
    try:
        desk = desk_at(url)
        said.append(type(desk.account()).__name__)
        said.append(str(desk.leases.reserve("lease", "run", [training()]).fits))
    except PurserError as error:
        said.append(f"{type(error).__name__}: {error}")
    return said


@contextlib.contextmanager
def no_file_longer_than(size):
    """As a full disk: the kernel refuses to let a file grow."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def fill_the_disk(file):
    """Authorise blocks until there is no room, three times more, and once when there is; returns errors and costs."""
    databases.PATIENCE = 1
    desk = desk_at(f"sqlite:///{file}")
    epoch = desk.leases.open("lease", "nonce").epoch
    reader = sqlite3.connect(file, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT COUNT(*) FROM entries").fetchone()  # so that the write-ahead log cannot begin anew
    said, granted = [], []

    def authorise():
        return desk.leases.authorise("lease", epoch, TRAIN, len(granted) + 1).cost

    with no_file_longer_than(160 * 1024):
        while len(said) < 3:  # it stays refused, in time, and everything that is there can still be read
            try:
                granted.append(authorise())
                assert not said
            except PurserError as error:
                said.append(f"{type(error).__name__}: {error}")
                assert desk.account().spent_cost == sum(granted)
                assert desk.all_valid()
    granted.append(authorise())
    return said, granted


def make_ledgers_on_a_full_disk(folder):
    """Make a ledger where there is no room for one, and again where there is; returns what was said, and identities."""
    said = []
    desk_at(f"sqlite:///{folder}/warm.db")
    for limit in (0, 1024, 8192, 20000):
        url = f"sqlite:///{folder}/{limit}.db"
        with no_file_longer_than(limit):
            done = outcome(lambda url=url: desk_at(url).ledger.identity)
        said.append((type(done.error).__name__, str(done.error), desk_at(url).ledger.identity))
    return said
