"""A statement is compared with the ledger alone (P5, P14): what is changed in either is found and named, whatever is
changed, or it is on the list of what no ledger knows. A ledger that only grew says the same as before."""

from __future__ import annotations

import copy
import json
import random
import sqlite3
from contextlib import closing

import pytest
from pydantic import ValidationError
from records import JOB, RUN, books_at, said_of

from cluster.accounting.books import Books
from cluster.accounting.leases import Leases
from cluster.accounting.ledger import Ledger
from cluster.accounting.schema import GENESIS, canonical, entry_hash
from cluster.errors import UsageError
from training import proof as room
from training.proof import prove
from training.statement import Statement
from tuning.config import SweepJob

TRAIN, VALIDATION = JOB.accounts


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("books") / "ledger.db"


@pytest.fixture(scope="module")
def books(file):
    return books_at(file)


@pytest.fixture(scope="module")
def said(books):
    return said_of(books)


@pytest.fixture(scope="module")
def selection(tmp_path_factory):
    """Books on which a private selection was charged, and the statement of its winner."""
    sweep = SweepJob.model_validate(
        {
            **JOB.model_dump(mode="json"),
            "tuning": {"mode": "select", "space": {"training.noise_multiplier": {"choice": [6.0, 8.0, 10.0]}}},
        }
    )
    books = Books(Ledger(f"sqlite:///{tmp_path_factory.mktemp('select')}/ledger.db"))
    plans = {charge.account: [charge] for charge in sweep.selection()}
    train, _ = books.create(JOB.dataset(["ab" * 32]), 3.0, 1e-4, plans, 8)
    leases, charges = Leases(books), sweep.selection(train.order)
    assert leases.reserve("best-select", "best", charges).fits
    epoch = leases.open("best-select", "nonce").epoch
    assert all(leases.authorise("best-select", epoch, charge.account, 1) for charge in charges)
    leases.close("best-select", "settle", "completed")
    winner = sweep.candidate({"training.noise_multiplier": 8.0})
    return books, said_of(books, winner, "best-select", mode="select", planned=charges)


def broken(proof) -> set[str]:
    """The names of the checks that do not hold."""
    return {finding.check for finding in proof.findings if not finding.holds}


def changed(said: Statement, *path, to) -> Statement:
    """The statement as somebody has edited its file."""
    whole = copy.deepcopy(said.as_json())
    at = whole
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = to(at[path[-1]]) if callable(to) else to
    return Statement.model_validate_json(json.dumps(whole))


def test_an_honest_statement_holds(books, said):
    proof = prove(said, books)
    assert broken(proof) == set()
    assert proof.valid
    assert len(proof.findings) > 30
    assert json.loads(json.dumps(proof.as_json(), allow_nan=False))["valid"] is True


def test_the_statement_of_a_selection_holds(selection):
    books, said = selection
    proof = prove(said, books)
    assert broken(proof) == set()
    assert {"training.noise_multiplier", "training.sample_rate", "training.planned_steps"} <= set(proof.not_in_ledger)
    assert "mode" not in proof.not_in_ledger


@pytest.mark.parametrize("sigma", [5.9, 0.01, 1e9])
def test_a_winner_that_the_selection_does_not_cover_is_found(selection, sigma):
    books, said = selection
    wrong = changed(said, "training", "noise_multiplier", to=sigma)
    assert broken(prove(wrong, books)) == {"training: covered by the selection"}


# What is changed in the statement.


def leaves(value, path=()):
    """The path of every number, truth value and text."""
    if isinstance(value, (dict, list)):
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(one, (*path, key))
    else:
        yield path, value


def others(value):
    """What a leaf may be changed to; of a hash also its first digits, which a chain would be valid for."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value - 1]
    if isinstance(value, float):
        return [value * (1 + 1e-12) + 5e-324, value / 2, value + 1]
    if value is not None and len(value) == 64:
        return [value[:-1] + ("0" if value[-1] != "0" else "1"), value[:13], ""]
    return [] if value is None else [value + "x"]


def unseen(said: Statement, books, prove=prove) -> list[str]:
    """Which leaves of the statement can be changed without being found, and are not listed as unknowable."""
    seen_by_nobody = []
    for path, value in leaves(said.as_json()):
        name = ".".join(map(str, path))
        if name in ("schema", "run"):  # it would be another's statement, and is refused before anything is compared
            continue
        for other in others(value):
            try:
                edited = changed(said, *path, to=other)
            except ValidationError:  # it is no statement any more, and refused as one
                continue
            proof = prove(edited, books)
            listed = any(name == one or name.startswith(f"{one}.") for one in proof.not_in_ledger)
            if listed == (not proof.valid):
                seen_by_nobody.append(f"{name} to {other}")
    return seen_by_nobody


def test_whatever_is_changed_is_found_or_listed(books, said):
    """Every leaf is one or the other, and never both."""
    assert unseen(said, books) == []


def test_whatever_is_changed_in_a_selection_is_found_or_listed(selection):
    """But for what is listed there and out of all bounds: a winner so cheap or so dear is found."""
    books, said = selection
    found = unseen(said, books)
    assert {line.split(" to ")[0] for line in found} <= set(room.OF_A_CANDIDATE)


@pytest.mark.parametrize("forgotten", ["_of_account", "_of_all", "_trained"])
def test_a_proof_that_forgets_a_check_is_seen(books, said, monkeypatch, forgotten):
    monkeypatch.setattr(room, forgotten, lambda *_: iter(()))
    assert unseen(said, books)


@pytest.mark.parametrize(
    ("path", "to", "check"),
    [
        (("partitions", 0, "charges", 1, "cost"), lambda cost: cost - 1, f"{TRAIN}: charges"),
        (("partitions", 0, "cost_of_run"), lambda cost: cost // 2, f"{TRAIN}: cost_of_run"),
        (("partitions", 0, "epsilon_of_run"), 0.1, f"{TRAIN}: epsilon_of_run"),
        (("partitions", 0, "authorised_steps"), 20, f"{TRAIN}: authorised_steps"),
        (("partitions", 0, "order"), 2, f"{TRAIN}: order"),
        (("partitions", 0, "planned", "steps"), 40, f"{TRAIN}: planned"),
        (("partitions", 1, "planned"), None, f"{VALIDATION}: planned"),
        (("partitions", 0, "head", "seq"), lambda seq: seq + 1, f"{TRAIN}: chain and head"),
        (("guarantee", "epsilon"), 1.0, "guarantee.epsilon"),
        (("training", "noise_multiplier"), 60.0, "training.noise_multiplier"),
        (("protected", "declared_units"), 20000, "protected.declared_units"),
        (("mode",), "select", "mode"),
    ],
)
def test_what_is_changed_is_named(books, said, path, to, check):
    proof = prove(changed(said, *path, to=to), books)
    assert check in broken(proof)
    (finding,) = (finding for finding in proof.findings if finding.check == check)
    assert finding.statement != finding.ledger


def test_a_charge_that_is_dropped_added_or_moved_is_found(books, said):
    charges = said.as_json()["partitions"][0]["charges"]
    earlier = {**charges[0], "seq": 4, "hash": "0" * 64}
    for forged in (charges[:1], charges[1:], [], [*charges, charges[0]], charges[::-1], [earlier, *charges]):
        assert f"{TRAIN}: charges" in broken(prove(changed(said, "partitions", 0, "charges", to=forged), books))


def test_a_partition_that_is_dropped_doubled_or_renamed_is_found(books, said):
    both = said.as_json()["partitions"]
    for forged in (both[:1], both[1:], [], both[::-1], [*both, both[0]], [{**both[0], "account": VALIDATION}, both[1]]):
        assert "partitions" in broken(prove(changed(said, "partitions", to=forged), books))


def as_of(said: Statement, books, *heads: int) -> Statement:
    """The statement as one would forge it who names an older head of each account, and hides what was charged since."""
    parts = []
    for part, seq in zip(said.partitions, heads, strict=True):
        row = list(books.history(part.account))[seq - 1]
        charges = tuple(charge for charge in part.charges if charge.seq <= seq)
        cost = sum(charge.cost for charge in charges)
        known = any(one["kind"] == "reserve" and one["lease"] == RUN for one in list(books.history(part.account))[:seq])
        changes = {
            "head": {"seq": seq, "hash": row["hash"]},
            "spent_cost": row["spent_after"],
            "charges": charges,
            "planned": part.planned if known else None,
            "authorised_steps": sum(charge.steps for charge in charges),
            "cost_of_run": cost,
            "epsilon_of_run": books.show(part.account).epsilon_of(cost),
        }
        parts.append(type(part).model_validate({**part.model_dump(), **changes}))
    return said.model_copy(update={"partitions": tuple(parts)})


def test_a_head_of_before_the_run_s_end_hides_nothing(books, said):
    """Every older head of either account, with all else as it was then: charges after it are found, whoever is not
    told of them. Only what follows the last charge may be missing."""
    last = {
        name: max(row["seq"] for row in books.history(name) if row["lease"] == RUN and row["kind"] == "authorise")
        for name in JOB.accounts
    }
    newest = [part.head.seq for part in said.partitions]
    for place, name in enumerate(JOB.accounts):
        for seq in range(1, newest[place] + 1):
            heads = [*newest]
            heads[place] = seq
            proof = prove(as_of(said, books, *heads), books)
            assert proof.valid == (seq >= last[name]), (name, seq)
            assert seq >= last[name] or f"{name}: nothing of the run after the head" in broken(proof)


def test_what_only_both_together_say_is_listed(books, said):
    """A batch and canaries that make the same sample rate: the ledger knows no more than that."""
    training = said.training.model_copy(update={"expected_batch_size": 400, "canaries": 3200})
    proof = prove(said.model_copy(update={"training": training}), books)
    assert proof.valid
    assert "training.expected_batch_size together with training.canaries" in proof.not_in_ledger
    fewer = said.training.model_copy(update={"canaries": 100})
    assert not prove(said.model_copy(update={"training": fewer}), books).valid


def test_another_ledger_does_not_hold_its_head(said, tmp_path):
    empty = Books(Ledger(f"sqlite:///{tmp_path}/other.db"))
    assert f"{TRAIN}: chain and head" in broken(prove(said, empty))
    twin = books_at(tmp_path / "twin.db")
    assert f"{TRAIN}: chain and head" in broken(prove(said, twin)), "the same life, but other moments and nonces"


# What is changed in the ledger.


def rows_of(file):
    with closing(sqlite3.connect(file)) as connection:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute("SELECT * FROM entries ORDER BY account, seq")]


def forged(file, target, rows) -> Books:
    """The ledger in `file` with other entries, as whoever owns the disk can make it."""
    with closing(sqlite3.connect(file)) as source, closing(sqlite3.connect(target)) as copied:
        source.backup(copied)
        triggers = copied.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall()
        for (name,) in triggers:
            copied.execute(f"DROP TRIGGER {name}")
        copied.execute("DELETE FROM entries")
        names = list(rows[0])
        copied.executemany(
            f"INSERT INTO entries ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})",
            [[row[name] for name in names] for row in rows],
        )
        copied.commit()
    return Books(Ledger(f"sqlite:///{target}"))


def rehashed(rows):
    """The same entries with totals, numbers and hashes that follow from each other: a chain rewritten as a whole."""
    again, last = [], {}
    held: dict[tuple[str, str], int] = {}
    effects = {"reserve": (0, 1), "open": (0, 1), "authorise": (1, -1), "settle": (0, -1), "release": (0, -1)}
    for row in rows:
        before = last.get(row["account"], {"seq": 0, "hash": GENESIS, "spent_after": 0, "reserved_after": 0})
        spent, reserved = effects.get(row["kind"], (0, 0))
        key = row["account"], row["lease"]
        cost = held.get(key, 0) if row["kind"] == "settle" else row["cost"]
        held[key] = held.get(key, 0) + reserved * cost
        new = {
            **row,
            "cost": cost,
            "seq": before["seq"] + 1,
            "prev_hash": before["hash"],
            "spent_after": before["spent_after"] + spent * cost,
            "reserved_after": before["reserved_after"] + reserved * cost,
            "lease_reserved_after": held[key] if row["lease"] else 0,
        }
        last[row["account"]] = new | {"hash": entry_hash(new)}
        again.append(last[row["account"]])
    return again


def is_charge(row, block=None):
    return (
        row["kind"] == "authorise" and row["account"] == TRAIN and row["lease"] == RUN and block in (None, row["block"])
    )


def with_body(row, **fields):
    return {**row, "body": canonical({**json.loads(row["body"]), **fields})}


CHEAPER = {"kind": "poisson_subsampled_gaussian", "version": 1, "sample_rate": 0.125, "noise_multiplier": 60.0}
# What a forger makes of one entry at a time.
FORGERIES = {
    "a cheaper charge": lambda row: {**row, "cost": row["cost"] // 2} if is_charge(row, 2) else row,
    "a dearer charge": lambda row: {**row, "cost": row["cost"] + 1} if is_charge(row, 2) else row,
    "a cheaper mechanism": lambda row: with_body(row, mechanism=CHEAPER) if is_charge(row) else row,
    "fewer steps": lambda row: with_body(row, steps=1) if is_charge(row, 1) else row,
    "a block out of turn": lambda row: {**row, "block": 3} if is_charge(row, 2) else row,
    "a charge of an earlier run": lambda row: (
        {**row, "cost": 1} if row["kind"] == "authorise" and row["lease"] == "earlier" else row
    ),
    "an account of more": lambda row: with_body(row, budget_cost=10**13) if row["kind"] == "account" else row,
    "an account at another order": lambda row: with_body(row, order=3) if row["kind"] == "account" else row,
    "no reservation": lambda row: None if row["kind"] == "reserve" and row["lease"] == RUN else row,
    "no attempt": lambda row: None if row["kind"] == "open" and row["lease"] == RUN else row,
    "no numbers": lambda row: {**row, "body": "[]"} if is_charge(row, 2) else row,
    "no JSON": lambda row: {**row, "body": "{"} if is_charge(row, 2) else row,
}
SEEN = {
    "a charge of an earlier run": f"{TRAIN}: every charge before the head",
    "an account of more": f"{TRAIN}: the account's own budget_cost",
    "no reservation": f"{TRAIN}: chain and head",  # a lease that gives back what it never held
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_ledger_is_found_by_a_statement_that_was_kept(file, said, tmp_path, forgery):
    rows = [new for row in rows_of(file) if (new := FORGERIES[forgery](row))]
    plain = broken(prove(said, forged(file, tmp_path / "plain.db", rows)))
    assert f"{TRAIN}: chain and head" in plain, "an edit that nobody hashed again"
    whole = broken(prove(said, forged(file, tmp_path / "whole.db", rehashed(rows))))
    assert f"{TRAIN}: chain and head" in whole, "one that was"


@pytest.mark.parametrize("forgery", FORGERIES)
def test_an_accountant_that_cheats_is_found_even_by_the_statement_that_it_made(file, tmp_path, forgery):
    """A ledger that was false before the statement was made of it, with hashes that are all right."""
    rows = rehashed([new for row in rows_of(file) if (new := FORGERIES[forgery](row))])
    books = forged(file, tmp_path / "false.db", rows)
    try:
        false = said_of(books)
    except (AttributeError, ValueError):  # of such entries no statement can be made: an honest one is compared
        honest = said_of(books_at(tmp_path / "honest.db")).as_json()
        for part in honest["partitions"]:
            last = [row for row in rows if row["account"] == part["account"]][-1]
            part["head"] = {"seq": last["seq"], "hash": last["hash"]}
        false = Statement.model_validate_json(json.dumps(honest))
    seen = broken(prove(false, books))
    assert (f"{TRAIN}: chain and head" in seen) == (forgery == "no reservation")
    assert SEEN.get(forgery) in seen or f"{TRAIN}: entries" in seen or f"{TRAIN}: cost of each charge" in seen, seen


def test_the_forger_of_these_tests_changes_nothing_by_itself(file, said, books, tmp_path):
    assert rehashed(rows_of(file)) == rows_of(file)
    assert prove(said, forged(file, tmp_path / "same.db", rows_of(file))).valid


def test_a_ledger_that_was_cut_before_the_head_is_found(file, said, tmp_path):
    rows = rows_of(file)
    for account in (TRAIN, VALIDATION):
        last = max(row["seq"] for row in rows if row["account"] == account)
        cut = [row for row in rows if (row["account"], row["seq"]) != (account, last)]
        proof = prove(said, forged(file, tmp_path / f"cut-{account.partition('/')[2]}.db", cut))
        assert f"{account}: chain and head" in broken(proof)
        assert "before the head that was kept" in next(f.ledger for f in proof.findings if not f.holds)


def test_a_ledger_that_only_grew_says_the_same(file, said, tmp_path):
    grown = forged(file, tmp_path / "grown.db", rows_of(file))
    leases = Leases(grown)
    assert leases.reserve("later", "later", JOB.charges()).fits
    epoch = leases.open("later", "nonce").epoch
    assert leases.authorise("later", epoch, TRAIN, 1)
    assert grown.show(TRAIN).head["seq"] > said.partitions[0].head.seq
    assert prove(said, grown).valid


def test_attempts_that_crashed_are_part_of_the_price(tmp_path):
    """A run that died after a block and went on from its checkpoint: what ran twice was charged twice."""
    books = Books(Ledger(f"sqlite:///{tmp_path}/ledger.db"))
    books.create(JOB.dataset(["ab" * 32]), 3.0, 1e-4, {c.account: [c] for c in JOB.charges()}, 8)
    leases = Leases(books)
    assert leases.reserve(RUN, RUN, JOB.charges()).fits
    for nonce, done, blocks in (("first", 0, 2), ("second", 20, 2), ("third", 50, 0)):
        epoch = leases.open(RUN, nonce, done).epoch
        assert all(leases.authorise(RUN, epoch, TRAIN, block) for block in range(1, blocks + 1))
    leases.close(RUN, "settle", "completed")
    said = said_of(books)
    assert said.partitions[0].authorised_steps == 40 + 30
    assert prove(said, books).valid


def life(books, leases, draw, number):
    """One run that is cut, crashes, is judged or not, and goes on or not, as it is drawn; its job and its lease."""
    sizes = {"training.steps": draw.randint(1, 90), "training.block": draw.choice([1, 7, 20, 100])}
    job = JOB.with_values({**sizes, "training.noise_multiplier": draw.choice([2.5, 6.0]), "evaluation.noise": 20.0})
    lease, (train, validation) = f"run-{number}", job.accounts
    if not leases.reserve(lease, lease, job.charges()).fits:
        return None
    done = 0
    for attempt in range(draw.randint(1, 3)):
        try:
            begun = leases.open(lease, f"{lease}-{attempt}", done)
        except UsageError:
            break
        block = 0
        while draw.random() < 0.9 and (grant := leases.authorise(lease, begun.epoch, train, block + 1)):
            block, done = block + 1, min(job.training.steps, done + grant.stop - grant.start)
        done = max(0, done - draw.choice([0, 0, job.training.block]))
        if draw.random() < 0.7:
            leases.authorise(lease, begun.epoch, validation, 1)
    leases.close(lease, draw.choice(["settle", "release", "expire"]), "over")
    return job, lease


@pytest.mark.parametrize("seed", range(6))
def test_whatever_an_honest_ledger_has_seen_its_statements_hold(tmp_path, seed):
    draw = random.Random(seed)
    books = Books(Ledger(f"sqlite:///{tmp_path}/ledger.db"))
    books.create(JOB.dataset(["ab" * 32]), 3.0, 1e-4, {c.account: [c] for c in JOB.charges()}, 8)
    lives = [life(books, Leases(books), draw, number) for number in range(12)]
    seen = [said_of(books, *one) for one in filter(None, lives)]
    assert len(seen) > 2
    for said in seen:
        assert broken(prove(said, books)) == set()
    attempts = {row["attempt"] for row in books.history(TRAIN) if row["kind"] == "authorise"}
    assert len(attempts) > 1, "runs that went on"


# The front door.
