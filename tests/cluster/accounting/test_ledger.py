"""The ledger on either database: appended to and never changed (P5), written by one at a time (P1), whole or not at
all, and at work again at once after whatever failed."""

from __future__ import annotations

import math

import pytest
import sqlalchemy as sa
from bookkeeping import DELTA, EPSILON, TRAIN, VALIDATION, Desk, digits, evaluation, plans, run_attempt, training
from broken import TrustsMemo
from crashes import Faults, outcome

from cluster.accounting import ledger, views
from cluster.accounting.schema import canonical, hidden
from cluster.errors import PurserError, UsageError


@pytest.fixture
def desk(started) -> Desk:
    return started


@pytest.mark.parametrize("table", ["entries", "secrets"])
@pytest.mark.parametrize("act", ["UPDATE {} SET {} = 'x'", "DELETE FROM {}"])
def test_not_even_the_ledger_itself_can_change_or_remove(place, desk, table, act):
    statement, before = act.format(table, "key" if table == "entries" else "value"), place.contents()
    with pytest.raises(PurserError, match="nothing was changed"):
        desk.ledger.write(lambda draft: draft._connection.exec_driver_sql(statement))
    assert place.contents() == before


def test_one_key_is_never_used_twice(desk):
    before, key = desk.totals(), desk.rows()[3]["key"]
    with pytest.raises(PurserError, match="already used"):
        desk.ledger.write(lambda draft: draft.append(account=VALIDATION, kind="refuse", key=key, body={}))
    assert desk.totals() == before


def test_one_place_in_a_chain_is_never_taken_twice(place, desk):
    """Were an accountant ever to decide on totals that are no longer the last, its entry has no place to go."""
    stale = desk.rows()[-2]

    def add(draft):
        draft._last[TRAIN] = stale
        draft.append(account=TRAIN, kind="refuse", key="from a stale head", body={})

    before = place.contents()
    with pytest.raises(PurserError, match="nothing was changed"):
        desk.ledger.write(add)
    assert place.contents() == before


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_number_without_a_value_enters_a_body(desk, value):
    before = desk.totals()
    body = {"deep": [{"epsilon": value}]}
    with pytest.raises(ValueError, match="JSON"):
        desk.ledger.write(lambda draft: draft.append(account=TRAIN, kind="refuse", key="k", body=body))
    assert desk.totals() == before
    with pytest.raises(ValueError, match="JSON"):
        canonical(value)


@pytest.mark.parametrize("error", [RuntimeError, UsageError, KeyboardInterrupt])
def test_a_failed_transaction_leaves_nothing(place, desk, error):
    before = place.contents()

    def fail(draft):
        draft.append(account=TRAIN, kind="refuse", key="k1", body={})
        draft.append(account=VALIDATION, kind="refuse", key="k2", body={})
        draft.hide("partition:half")
        raise error

    with pytest.raises(error):
        desk.ledger.write(fail)
    assert place.contents() == before
    assert run_attempt(desk, "lease", "after it", 1)
    assert desk.all_valid()


def broken_key(desk, _faults):
    desk.ledger.write(lambda draft: draft.append(account=TRAIN, kind="refuse", key=f"account:{TRAIN}", body={}))


def broken_statement(desk, _faults):
    desk.ledger.write(lambda draft: draft._connection.exec_driver_sql("SELECT nonsense"))


def failed_commit(desk, faults):
    faults.next = ["before"]
    desk.leases.reserve("unlucky", "run", [training(20)])


def bug(desk, _faults):
    def fail(draft):
        draft.last(TRAIN)
        raise RuntimeError

    desk.ledger.write(fail)


@pytest.mark.parametrize("fail", [broken_key, broken_statement, failed_commit, bug])
def test_whoever_fails_lets_go_of_the_lock(place, desk, impatient, fail):
    """Also while somebody still holds the exception, and with it everything that was on the stack: an accountant that
    keeps the writers' lock after an error stops every run on the ledger."""
    failing, other = place.desk(), place.desk()
    failing.leases.reserve("warm", "run", [training(20)])
    with pytest.raises((PurserError, RuntimeError)) as raised:
        fail(failing, Faults(failing))
    assert other.leases.reserve("b", "run", [training(20)]).fits
    assert failing.leases.reserve("a", "run", [training(20)]).fits
    assert raised.value
    assert desk.all_valid()


def test_opening_again_changes_nothing(place, desk):
    before = place.contents()
    keys = desk.books.source_key(), desk.books.partition_key("digits")
    again = place.desk()
    assert (again.books.source_key(), again.books.partition_key("digits")) == keys
    assert place.contents() == before


def test_identity_belongs_to_the_ledger_and_gives_nothing_away(places, place, desk):
    assert place.desk().ledger.identity == desk.ledger.identity
    assert places.new().desk().ledger.identity != desk.ledger.identity
    assert desk.ledger.identity not in desk.ledger.secret("ledger:hmac")
    with pytest.raises(UsageError, match="ledger"):
        desk.ledger.secret("partition:nobody")


def test_secrets_are_made_once(desk):
    desk.ledger.write(lambda draft: draft.hide("partition:new"))
    made = desk.ledger.secret("partition:new")
    desk.ledger.write(lambda draft: draft.hide("partition:new"))
    assert desk.ledger.secret("partition:new") == made
    with desk.ledger.reading() as view:
        values = view._ask(sa.select(hidden.c.value)).scalars().all()
    assert len(set(values)) == len(values) == 4
    assert all(len(value) == 64 for value in values)


def test_a_new_ledger_knows_no_account(places):
    desk = places.empty().desk()
    assert desk.books.names() == []
    verdict = desk.verdict()
    assert (verdict.valid, verdict.first_bad_seq, verdict.head) == (False, 1, None)


def test_two_data_sets_are_two_chains(desk):
    desk.books.create(digits("letters"), EPSILON, DELTA, plans(digits("letters")), 8)
    for account in desk.books.names():
        assert desk.verdict(account).valid
    assert desk.books.names() == ["digits/train", "digits/validation", "letters/train", "letters/validation"]


def test_names_are_ordered_and_told_apart_by_bytes(desk):
    """A server's collation may take ä for a, or ignore '-': a key range would then answer for another lease."""
    for name in ("a", "A", "a-", "a.", "aa", "a_b", "a-b"):
        desk.leases.reserve(name, "run", [training(2 + len(name))])
    for name in ("a", "A", "a-", "a.", "aa", "a_b", "a-b"):
        with desk.ledger.reading() as view:
            assert view.accounts_of_lease(name) == [TRAIN]
            assert view.newest(name, TRAIN)["lease"] == name
    for name in ("ä", "Z", "a b"):
        desk.books.create(digits(name), EPSILON, DELTA, plans(digits(name)), 8)
    assert [name for name in desk.books.names() if name.endswith("/train")] == [
        "Z/train",
        "a b/train",
        "digits/train",
        "ä/train",
    ]


def test_a_reader_sees_one_moment_and_a_writer_need_not_wait_for_it(place, desk):
    """`show` of two accounts, or a walk over a chain, must not mix before and after."""
    other = place.desk()
    with desk.ledger.reading() as view:
        first = view.last(TRAIN)
        assert other.leases.authorise("lease", 1, TRAIN, 2)
        assert view.last(TRAIN) == first
        assert [row["seq"] for row in view.of_account(TRAIN)] == list(range(1, first["seq"] + 1))
        assert view.charged("lease", TRAIN) == first["spent_after"]
    with desk.ledger.reading() as view:
        assert view.last(TRAIN)["seq"] == first["seq"] + 1


def restored_behind_its_back(place, **kinds):
    """An older copy is put back under an accountant at work; returns what it grants for the block that came after."""
    desk = place.desk(**kinds)
    desk.leases.reserve("lease", "run", [training(), evaluation()])
    epoch = run_attempt(desk, "lease", "nonce", 1)
    backup = place.contents()
    for block in (2, 3):
        assert desk.leases.authorise("lease", epoch, TRAIN, block)
    place.put_back(backup)
    return desk, outcome(lambda: desk.leases.authorise("lease", epoch, TRAIN, 4))


def test_what_was_remembered_is_forgotten_when_an_older_copy_is_restored(place):
    """Only a kept head finds the restoration; but from then on the books must again follow from what is in them."""
    desk, done = restored_behind_its_back(place)
    assert "out of turn; next is 2" in str(done.error)
    assert desk.leases.authorise("lease", 1, TRAIN, 2)
    assert desk.all_valid()


def test_an_accountant_that_trusts_its_memory_is_caught(place, monkeypatch):
    monkeypatch.setattr(ledger, "Draft", TrustsMemo)
    desk, done = restored_behind_its_back(place)
    assert done.error is None
    assert not desk.verdict().valid


def test_what_is_remembered_is_bounded_and_changes_no_answer(place, monkeypatch):
    """A ledger of a year serves more leases than a process should hold."""
    monkeypatch.setattr(views, "_MEMO", 2)
    desk, other = place.desk(), place.desk()
    names = tuple("abcdefgh")
    for name in names:
        assert desk.leases.reserve(name, name, [training(40)]).fits
    epochs = {name: desk.leases.open(name, name).epoch for name in names}
    for block in (1, 2):
        for name in names:
            grant = desk.leases.authorise(name, epochs[name], TRAIN, block)
            assert other.leases.authorise(name, epochs[name], TRAIN, block) == grant
            assert all(len(known) <= 2 + 2 for _, known in desk.ledger._memos.values())
    assert desk.account().reserved_cost == 0
    assert desk.all_valid()
