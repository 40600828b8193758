"""Requests that wait for one commit share it, and nothing else: each gets its own answer, after that answer is durable
(P2), and one that fails takes no other down with it (P1, P3)."""

from __future__ import annotations

import json
import threading

import pytest
from bookkeeping import TRAIN, evaluation, fill, training
from broken import AnswersBeforeCommit, FailsTogether
from crashes import Faults, outcome, together
from sharing import NAMES, failures, first_blocks, paid

from cluster.accounting.ledger import Ledger
from cluster.errors import PurserError


def test_those_who_wait_share_one_commit(place, desk, faults, running):
    before = faults.commits
    grants = [done.get() for done in together(desk.ledger, *first_blocks(desk, running))]
    assert faults.commits == before + 1
    assert paid(place) == list(NAMES), "in the order in which they came"
    assert sum(grant.cost for grant in grants) == desk.account().spent_cost
    assert desk.all_valid()


def test_whoever_has_an_answer_finds_its_entry_in_the_ledger(place, desk, running):
    """Each looks with other eyes than the ledger's, at the moment in which it is told."""
    seen, lock = [], threading.Lock()

    def call(name, epoch):
        desk.leases.authorise(name, epoch, TRAIN, 1)
        with lock:
            seen.append(name in paid(place))

    together(desk.ledger, *(lambda n=name, e=epoch: call(n, e) for name, epoch in running.items()))
    assert seen == [True] * len(NAMES)


@pytest.mark.parametrize("when", ["before", "killed before"])
def test_an_answer_before_the_commit_is_caught(place, when):
    """Broken on purpose, and seen: grants of which the ledger knows nothing."""
    for kind, caught in ((Ledger, False), (AnswersBeforeCommit, True)):
        place_desk = place.desk(ledger=kind)
        name = kind.__name__
        assert place_desk.leases.reserve(name, name, [training(40)]).fits
        epoch = place_desk.leases.open(name, name).epoch
        faults = Faults(place_desk)
        faults.next = [when]
        done = outcome(lambda d=place_desk, n=name, e=epoch: d.leases.authorise(n, e, TRAIN, 1))
        phantom = done.error is None and name not in paid(place)
        assert phantom is (caught and when == "before")


FAILURES = tuple(failures(None))


def others_are_served(place, desk, running, failure, at=3):
    """Eight good requests with a bad one among them: whether the good ones all got what is in the ledger."""
    act, kind = failures(desk)[failure]
    calls = first_blocks(desk, running)
    calls.insert(at, lambda: desk.ledger.write(act))
    done = together(desk.ledger, *calls)
    bad = done.pop(at)
    assert isinstance(bad.error, kind), bad
    rows = place.contents()[0]
    assert not {row["key"] for row in rows} & {"late", "bug", "nan"}
    assert all(isinstance(entry.error, PurserError) for entry in done if entry.error)
    assert desk.all_valid()
    return all(entry.error is None for entry in done) and paid(place) == list(NAMES)


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("at", [0, 5])
def test_one_that_fails_takes_no_other_down(place, desk, running, failure, at):
    assert others_are_served(place, desk, running, failure, at)


@pytest.mark.parametrize("failure", ["refused late", "bug", "taken"])
def test_a_ledger_whose_requests_fail_together_is_caught(place, failure):
    desk = place.desk(ledger=FailsTogether)
    for name in NAMES:
        assert desk.leases.reserve(name, name, [training(40), evaluation()]).fits
    running = {name: desk.leases.open(name, name).epoch for name in NAMES}
    act, _ = failures(desk)[failure]
    done = together(desk.ledger, *first_blocks(desk, running), lambda: desk.ledger.write(act))
    assert not paid(place)
    assert all(entry.error for entry in done)


def test_two_that_fail_each_in_its_own_way(place, desk, running):
    wanted = failures(desk)
    calls = first_blocks(desk, running)
    for number, (act, _) in enumerate(wanted.values()):
        calls.insert(2 * number, lambda a=act: desk.ledger.write(a))
    done = together(desk.ledger, *calls)
    for number, (_, kind) in enumerate(wanted.values()):
        assert isinstance(done[2 * number].error, kind)
    assert sum(entry.error is None for entry in done) == len(NAMES)
    assert paid(place) == list(NAMES)
    assert desk.all_valid()


# What one does is seen by the next, though nothing is committed yet


def test_the_last_of_the_budget_goes_to_one_of_those_who_share_a_commit(place, desk, faults):
    fill(desk, leaving=1)
    before = faults.commits
    calls = [lambda n=name: desk.leases.reserve(n, n, [training(), evaluation()]) for name in NAMES]
    answers = [done.get() for done in together(desk.ledger, *calls)]
    assert faults.commits == before + 1
    assert [answer.fits for answer in answers] == [True] + [False] * 7
    rows = place.rows(TRAIN)
    assert [row["lease"] for row in rows if row["kind"] == "refuse"] == list(NAMES[1:])
    assert desk.all_valid()


def test_one_call_made_twice_in_one_commit_counts_once(place, desk, faults, running):
    calls = [
        lambda: desk.leases.reserve("new", "new", [training(20)]),
        lambda: desk.leases.open("a", "second"),
        lambda: desk.leases.authorise("b", running["b"], TRAIN, 1),
        lambda: desk.leases.close("c", "settle", "done"),
    ]
    done = [entry.get() for entry in together(desk.ledger, *(call for call in calls for _ in range(3)))]
    for number in range(len(calls)):
        assert done[3 * number] == done[3 * number + 1] == done[3 * number + 2]
    seen = [(row["kind"], row["lease"]) for row in place.rows(TRAIN)[-4:]]
    assert seen == [("reserve", "new"), ("open", "a"), ("authorise", "b"), ("settle", "c")]
    assert desk.all_valid()


def test_two_processes_that_open_in_one_commit_get_two_epochs_and_one_may_go_on(place, desk, running):
    first, second = together(
        desk.ledger, lambda: desk.leases.open("a", "one"), lambda: desk.leases.open("a", "another")
    )
    assert first.get().epoch < second.get().epoch
    stale, fresh = together(
        desk.ledger,
        lambda: desk.leases.authorise("a", first.value.epoch, TRAIN, 1),
        lambda: desk.leases.authorise("a", second.value.epoch, TRAIN, 1),
    )
    assert isinstance(stale.error, PurserError)
    assert fresh.get().cost > 0


@pytest.mark.parametrize("fence", ["open", "release", "expire"])
@pytest.mark.parametrize("first", ["fence", "block"])
def test_a_fence_and_a_block_in_one_commit_keep_their_order(place, desk, running, fence, first):
    def shut():
        if fence == "open":
            return desk.leases.open("a", "another", 20)
        return desk.leases.close("a", fence, "over")

    def block():
        return desk.leases.authorise("a", running["a"], TRAIN, 1)

    calls = [shut, block] if first == "fence" else [block, shut]
    done = together(desk.ledger, *calls)
    granted = done[calls.index(block)]
    assert (granted.error is None) is (first == "block")
    assert paid(place) == (["a"] if first == "block" else [])
    if fence != "open":
        assert place.rows(TRAIN)[-1]["lease_reserved_after"] == 0
    assert desk.all_valid()


def test_a_thousand_requests_of_thirty_threads_and_two_accountants(place, desk, running):
    """Nothing is lost, doubled or answered with another's answer when commits are shared at random."""
    other = place.desk()
    wanted = {name: desk.leases.open(name, f"again-{name}").epoch for name in NAMES}
    answers: dict[tuple[str, int], set] = {(name, block): set() for name in NAMES for block in (1, 2)}
    barrier = threading.Barrier(4 * len(NAMES), timeout=60)

    def run(who, name):
        barrier.wait()
        for _ in range(5):
            for block in (1, 2):
                got = outcome(lambda b=block: who.leases.authorise(name, wanted[name], TRAIN, b))
                if got.error is None:
                    answers[name, block].add(got.value)
                else:
                    assert "out of turn" in str(got.error)

    threads = [threading.Thread(target=run, args=(who, name)) for name in NAMES for who in (desk, other, desk, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert all(len(got) == 1 for got in answers.values())
    rows = [row for row in place.rows(TRAIN) if row["kind"] == "authorise"]
    assert len(rows) == 2 * len(NAMES)
    for row in rows:
        (grant,) = answers[row["lease"], row["block"]]
        assert grant.cost == row["cost"]
        assert json.loads(row["body"])["epoch"] == wanted[row["lease"]]
    assert desk.account().spent_cost == sum(row["cost"] for row in rows)
    assert desk.all_valid()
