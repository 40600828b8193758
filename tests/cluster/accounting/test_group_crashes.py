"""Crashes around a commit that many wait for: nobody is given an answer that is not in the ledger (P2), nobody waits
for ever, and the same calls again end in the same entries, once each (P1)."""

from __future__ import annotations

import itertools
import signal
import threading
import time
from random import Random

import pytest
from bookkeeping import TRAIN
from crashes import Killed, outcome, together
from sharing import NAMES, begin, failures, first_blocks, paid, until

from cluster.accounting.ledger import _Request
from cluster.errors import PurserError, Unreachable


@pytest.mark.parametrize("fault", ["before", "after"])
def test_a_commit_that_fails_is_done_again_once(place, desk, faults, running, fault):
    """What a client sees of a lost connection or a failing disk: an error or an answer, never an answer that is not in
    the ledger; and the same calls again end in the same entries, once each."""
    faults.next = [fault]
    calls = first_blocks(desk, running)
    done = together(desk.ledger, *calls)
    if place.kind == "postgresql":
        assert all(isinstance(entry.error, Unreachable) for entry in done)
        assert paid(place) == ([] if fault == "before" else list(NAMES))
    else:
        assert all(entry.error is None for entry in done), "each is tried on its own"
    again = [entry.get() for entry in together(desk.ledger, *calls)]
    assert sorted(paid(place)) == list(NAMES)
    assert sum(grant.cost for grant in again) == desk.account().spent_cost
    if place.kind == "sqlite":
        assert again == [entry.value for entry in done]
    assert desk.all_valid()


@pytest.mark.parametrize("fault", ["killed before", "killed after"])
def test_a_process_that_ends_in_the_commit_answers_nobody(place, desk, faults, running, fault):
    faults.next = [fault]
    done = together(desk.ledger, *first_blocks(desk, running))
    assert sum(isinstance(entry.error, Killed) for entry in done) == 1, "the thread that committed"
    assert all(entry.error for entry in done)
    assert paid(place) == ([] if fault == "killed before" else list(NAMES))
    other = place.desk()  # the process that takes its place
    again = [entry.get() for entry in together(other.ledger, *first_blocks(other, running))]
    assert sorted(paid(place)) == list(NAMES)
    assert sum(grant.cost for grant in again) == other.account().spent_cost
    assert other.all_valid()


@pytest.mark.parametrize("fault", ["killed before", "killed after"])
@pytest.mark.parametrize("at", [0, 8])
def test_an_interrupt_while_each_is_tried_on_its_own_answers_nobody_else(place, desk, faults, running, fault, at):
    """Ctrl-C in the thread that serves the others, after a first common try had failed: the answers of that try were
    never committed, and must not be given."""
    act, _ = failures(desk)["bug"]
    calls = first_blocks(desk, running)
    calls.insert(at, lambda: desk.ledger.write(act))
    faults.next = ["", fault]  # the first block alone is committed, then comes the interrupt
    done = together(desk.ledger, *calls)
    del done[at]
    assert not faults.next
    answered = [name for name, entry in zip(running, done, strict=True) if entry.error is None]
    assert set(answered) <= set(paid(place)), "granted, and not in the ledger"
    assert all(isinstance(entry.error, (PurserError, Killed)) for entry in done if entry.error)
    again = [entry.get() for entry in together(desk.ledger, *first_blocks(desk, running))]
    assert sorted(paid(place)) == list(NAMES)
    assert sum(grant.cost for grant in again) == desk.account().spent_cost


def test_an_interrupt_leaves_nobody_waiting_for_ever(place, desk, faults, running, monkeypatch):
    """The one who serves is interrupted while each is tried on its own. Two more have come meanwhile, and the one whose
    turn it is now is told so before it has begun to listen."""
    listen, dialect = threading.Event(), desk.ledger._engine.dialect
    act, _ = failures(desk)["bug"]
    calls, late, wait = first_blocks(desk, running), [], _Request.wait

    def wait_late(request):
        if threading.current_thread() in [thread for thread, _ in late]:
            listen.wait(30)
        wait(request)

    def commit(connection):
        dialect.do_commit = faults.do_commit
        for number in (2, 3):
            late.append(begin(lambda n=number: (until(lambda: len(late) == n - 1), calls[n]())[1]))
            until(lambda n=number: len(desk.ledger._waiting) == n - 1)
        faults.next = ["killed before"]
        faults.do_commit(connection)

    monkeypatch.setattr(_Request, "wait", wait_late)
    dialect.do_commit = commit
    done = together(desk.ledger, calls[0], calls[1], lambda: desk.ledger.write(act))
    listen.set()
    for thread, _ in late:
        thread.join(30)
        assert not thread.is_alive(), "somebody waits for ever"
    assert all(isinstance(entry.error, (PurserError, Killed)) for entry in done), done
    assert all(found[0].error is None or isinstance(found[0].error, PurserError) for _, found in late), late
    again = [entry.get() for entry in together(desk.ledger, *calls)]
    assert sorted(paid(place)) == list(NAMES)
    assert sum(grant.cost for grant in again) == desk.account().spent_cost


@pytest.mark.parametrize("when", ["waiting", "being served"])
def test_ctrl_c_while_others_serve_stops_nobody_else(place, desk, faults, running, when):
    """A real signal, to the thread that gets them. Whether its own call was done shows when it is made again."""
    calls, number = first_blocks(desk, running), itertools.count()
    reached, go_on = [threading.Event(), threading.Event()], [threading.Event(), threading.Event()]

    def commit(connection):
        if (n := next(number)) < 2:
            reached[n].set()
            assert go_on[n].wait(30)
        faults.do_commit(connection)

    def interrupt():
        until(lambda: len(desk.ledger._waiting) == 2)  # the second, and this test's own thread
        if when == "being served":
            go_on[0].set()
            assert reached[1].wait(30)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    desk.ledger._engine.dialect.do_commit = commit
    first, of_first = begin(calls[0])
    assert reached[0].wait(30)
    second, of_second = begin(calls[1])
    until(lambda: len(desk.ledger._waiting) == 1)
    sender, sent = begin(interrupt)
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        mine = outcome(lambda: (calls[2](), sender.join(30), time.sleep(30)))
    finally:
        signal.signal(signal.SIGINT, inherited)
    for event in go_on:
        event.set()
    for thread in (first, second, sender):
        thread.join(30)
        assert not thread.is_alive(), "somebody waits for ever"
    assert sent[0].error is None
    assert isinstance(mine.error, KeyboardInterrupt)
    assert of_first[0].get().cost == of_second[0].get().cost == calls[2]().cost
    assert sorted(paid(place)) == ["a", "b", "c"]
    assert desk.all_valid()


def test_interrupts_and_failures_at_random_lose_and_double_nothing(place, desk, faults, running):
    """Every thread makes the same call until it has an answer, as clients do."""
    random, act = Random(7), failures(desk)["bug"][0]
    granted: dict[tuple[str, int], int] = {}

    def run(name):
        for block in (1, 2):
            while (name, block) not in granted:
                if random.random() < 0.2:
                    faults.next = random.choice([["killed before"], ["", "killed after"], ["after"], ["", "before"]])
                bug = outcome(lambda: desk.ledger.write(act)) if random.random() < 0.3 else None
                assert bug is None or isinstance(bug.error, (RuntimeError, PurserError, Killed)), bug
                assert bug is None or str(bug.error) in ("bug", "") or isinstance(bug.error, PurserError), bug
                done = outcome(lambda b=block: desk.leases.authorise(name, running[name], TRAIN, b))
                assert done.error is None or isinstance(done.error, (PurserError, Killed)), done
                if done.error is None:
                    granted[name, block] = done.value.cost

    running_threads = [begin(lambda n=name: run(n)) for name in NAMES]
    for thread, found in running_threads:
        thread.join(60)
        assert not thread.is_alive(), "somebody waits for ever"
        assert found[0].error is None, found
    rows = [row for row in place.rows(TRAIN) if row["kind"] == "authorise"]
    assert {(row["lease"], row["block"]): row["cost"] for row in rows} == granted
    assert len(rows) == len(granted) == 2 * len(NAMES)
    assert desk.account().spent_cost == sum(granted.values())
    assert desk.all_valid()
