"""`purser audit RUN`: from what a run saw of its canaries, and the steps that the ledger charged, to a verdict in words
that promise nothing (P14); and what cannot be audited is refused in a sentence."""

from __future__ import annotations

import json

import numpy as np
import pytest
from product import DIGITS

from cluster.accounting.books import Books
from cluster.accounting.leases import Leases
from cluster.accounting.ledger import Ledger
from training.admission import admit, plans_of
from training.audit.canaries import Canaries, draw
from training.audit.claim import tight_epsilon
from training.audit.command import CONTRADICTS
from training.audit.plan import SCORES, plan
from training.driver import COMPLETED, FAILED, Outcome
from training.jobfile import load
from tuning.config import SweepJob

RUN, CANARIES = "digits-20260101-000000-abcd", 200
KEYS = {
    *("method", "canaries", "guesses", "correct", "epsilon_lower_bound", "ceiling", "epsilon_claimed", "verdict"),
    *("confidence", "delta", "power", "scores", "membership", "exposure", "run", "kind", "sealed"),
}


def seen_of(folder, sealed, inside, seen, numbers, rank):
    """One rank's file; canaries that were in have scores that are higher by `seen`."""
    random = np.random.default_rng(rank)
    scores = {name: random.normal(size=len(numbers)) + seen * inside[numbers] for name in SCORES}
    loss = 2 - scores[SCORES[0]].clip(-1, 1)
    rank_of = np.ones(len(numbers), np.int64)
    np.savez(folder / f"canaries-{rank}.npz", **scores, number=numbers, loss=loss, rank=rank_of, sealed=sealed)


@pytest.fixture
def run(home, purser, monkeypatch):
    """A run of the digits that was charged for 40 of its 80 steps and is at its end; `seen` by two ranks."""
    job = load(SweepJob, DIGITS, [f"audit.canaries={CANARIES}", "audit.guesses=100"])
    folder = purser.home / "runs" / RUN
    folder.mkdir(parents=True)
    books = Books(Ledger(f"sqlite:///{purser.home}/ledger.db"))
    admit(books, job.plain, plans_of([job.charges()]), 1)
    leases = Leases(books)
    leases.reserve(RUN, RUN, job.charges())
    epoch = leases.open(RUN, "nonce", 0).epoch
    for block in (1, 2):
        leases.authorise(RUN, epoch, "digits/train", block)
    leases.close(RUN, "settle", "stopped")
    (folder / "job.json").write_text(job.model_dump_json())
    Outcome(COMPLETED).keep(folder)
    canaries = draw(job.plain, 100)
    sealed = canaries.seal(folder)

    def seen(much):
        for rank in range(2):
            seen_of(folder, sealed, canaries.inside, much, canaries.part(rank, 2), rank)
        return folder

    return seen


def test_a_run_whose_canaries_show_contradicts_its_claim(run, purser):
    """Exit code 0: the audit did what it was asked to."""
    run(20.0)
    done = purser.here("audit", RUN, "--json")
    assert done.code == 0, done.err
    said = done.json
    assert set(said) >= KEYS
    assert (said["canaries"], said["guesses"], said["correct"]) == (CANARIES, 100, 100)
    assert said["verdict"] == CONTRADICTS == "contradicts the claim"
    assert said["epsilon_lower_bound"] == said["ceiling"] > said["epsilon_claimed"]
    assert said["membership"]["loss"]["auc"] > 0.9
    assert said["membership"]["lira"] is None
    assert said["exposure"] is None, "digits are no text"
    heuristic = said["heuristic"]
    assert all(one["heuristic"] == heuristic["ceiling"] > said["epsilon_claimed"] for one in said["scores"])
    assert heuristic["power"] > 0.5
    assert json.loads((run(20.0) / "audit.json").read_text()) == said


def test_what_is_claimed_is_of_the_steps_that_were_charged(run, purser):
    """Not of those that were planned, and at a δ at which there is something to show."""
    run(0.0)
    said = purser.here("audit", RUN, "--json").json
    rate = 360 / (1797 * 0.8 + CANARIES / 2)
    assert said["delta"] == 1e-9
    assert said["epsilon_claimed"] == tight_epsilon(rate, 8.0, 40, 1e-9) < tight_epsilon(rate, 8.0, 80, 1e-9)


def test_a_run_whose_canaries_show_nothing_does_not(run, purser):
    """Scores that know no coin: a false alarm has a chance below 1e-13, of 86 right guesses of 100."""
    run(0.0)
    done = purser.here("audit", RUN)
    assert done.code == 0, done.err
    assert "At 95% confidence ε is at least " in done.out
    assert "this does not contradict it; this audit could have shown at most ε = " in done.out
    assert "private" not in done.out.replace(str(purser.home), "")
    assert "right guesses would contradict that" in done.out
    assert "as if canaries of one run were independent runs; it could have shown at most ε = " in done.out
    for name in SCORES:
        assert name in done.out
    assert f"Next: purser report {RUN}" in done.out


def test_what_the_ledger_and_the_seal_say_counts_and_no_file_beside_them(run, purser):
    """Whatever the job's file says afterwards of noise, guesses or confidence; and coins that are not those of the run
    are found."""
    folder = run(1.0)
    before = purser.here("audit", RUN, "--json").json
    job = json.loads((folder / "job.json").read_text())
    job["audit"] |= {"guesses": 2, "confidence": 0.5}
    job["training"] |= {"noise_multiplier": 0.5, "expected_batch_size": 36}
    (folder / "job.json").write_text(json.dumps(job))
    assert purser.here("audit", RUN, "--json").json == before
    draw(load(SweepJob, DIGITS, [f"audit.canaries={CANARIES}"]).plain, 100).seal(folder)
    refused(purser, "audit.canaries: those that the run was begun with are not in")


def test_canaries_that_were_all_in_tell_nothing_apart(run, purser, tmp_path):
    """As may happen by chance where there are few: a bound there is, and it is 0."""
    folder = run(0.0)
    made = Canaries.unsealed(folder)
    sealed = Canaries(made.arrays, np.ones(CANARIES, bool), made.candidates, made.facts).seal(folder)
    for rank in range(2):
        seen_of(folder, sealed, made.inside, 0.0, made.part(rank, 2), rank)
    said = purser.here("audit", RUN, "--json").json
    assert said["membership"] == {"loss": None, "lira": None}
    assert (said["correct"], said["epsilon_lower_bound"]) == (50, 0.0)


def test_shadow_models_are_trained_on_canaries_alone(run, purser, monkeypatch):
    """Nothing is charged and no record is read: the prepared folder is not even there."""
    import torch

    torch.set_num_threads(1)
    run(0.0)
    before = purser.here("budget", "show", "digits", "--json").json
    done = purser.here("audit", RUN, "--shadows", "4", "--json")
    assert done.code == 0, done.err
    lira = done.json["membership"]["lira"]
    assert lira["shadows"] == 4
    assert 0 <= lira["auc_low"] <= lira["auc"] <= lira["auc_high"] <= 1
    assert purser.here("budget", "show", "digits", "--json").json == before
    assert not (purser.home / "prepared").exists() or not list(
        (purser.home / "prepared").glob("digits/*/manifest.json")
    )


def refused(purser, sentence, *more):
    done = purser.here("audit", RUN, *more)
    assert done.code == 2, done.out
    assert sentence in done.err
    assert done.err.count("\n") == 1


def test_what_cannot_be_audited_is_refused_in_a_sentence(run, purser):
    folder = run(1.0)
    refused(purser, "--shadows: 3 was given", "--shadows", "3")
    (folder / "canaries-1.npz").rename(folder / "gone")
    refused(purser, "saw of its canaries is not whole")
    (folder / "gone").rename(folder / "canaries-1.npz")
    Outcome(FAILED).keep(folder)
    refused(purser, f"RUN: {RUN} is not at its end; purser train --resume {RUN} goes on with it")
    Outcome(COMPLETED).keep(folder)
    job = json.loads((folder / "job.json").read_text())
    (folder / "job.json").write_text(json.dumps(job | {"audit": {}}))
    refused(purser, "was trained without canaries")


def test_guesses_are_planned_from_public_numbers_before_the_run():
    """The same each time, as many as the ideal attack would do best with, and never from a score."""
    job = load(SweepJob, DIGITS, ["audit.canaries=500"]).plain
    made = {plan(job).guesses for _ in range(3)}
    assert made == {100}
    assert plan(job.with_values({"audit.guesses": 44})).guesses == 44


def test_a_plan_says_what_an_audit_could_show(run, purser):
    """Before anything is spent, and the same that the audit says afterwards of a run of as many steps."""
    overrides = (f"audit.canaries={CANARIES}", "audit.guesses=100", "training.steps=40")
    done = purser.here("plan", DIGITS, *overrides, "--json")
    assert done.code == 0, done.err
    run(0.0)
    said = purser.here("audit", RUN, "--json").json
    assert done.json["audit"] == {key: said[key] for key in done.json["audit"]}
    assert "Audit: 200 canaries, 100 guesses of each score; it could show at most ε = " in done.err
    assert "Next: purser train" in done.err
    assert "audit" not in purser.here("plan", DIGITS, "--json").json


def test_a_sweep_with_canaries_is_refused_by_the_command(purser):
    done = purser.here("tune", DIGITS, "audit.canaries=100")
    assert done.code == 2
    assert done.err.startswith("purser: audit.canaries: 100 was given, and a sweep is not audited")
