"""Optuna behind the gate: candidates are on disk before anybody asks for them, a resumed sweep has the same ones and
feeds back what it knows, and nothing but a noised accuracy is learnt (P13)."""

from __future__ import annotations

import pytest
from optuna.trial import TrialState
from product import DIGITS

from cluster.errors import UsageError
from training.driver import COMPLETED, FAILED, REFUSED, STOPPED, Outcome
from training.jobfile import load
from tuning.config import SweepJob
from tuning.search import TreeParzen
from tuning.trials import Trial, keep_candidates, kept_candidates

SPACE = (
    "{training.noise_multiplier: auto, training.expected_batch_size: {choice: [128, 256]}, "
    "training.optimizer.learning_rate: {loguniform: [0.5, 16]}, training.max_grad_norm: {uniform: [0.1, 2]}, "
    "training.physical_batch_size: {int: [16, 64]}}"
)
JOB = load(SweepJob, DIGITS, [f"tuning={{search: optuna, trials: 12, space: {SPACE}}}"])


def source(kept, known=()):
    return TreeParzen(JOB, 6, known, lambda number, values: kept.append((number, values)))


def trial(number, values, outcome=None):
    made = Trial(number, f"sweep-{number:02d}", values, JOB.candidate(values))
    made.outcome = outcome or made.outcome
    return made


def accuracy(value, **more):
    return {"accuracy": value, "accuracy_error": 0.02, "correct": 300, "wrong": 60, **more}


def test_a_candidate_is_kept_before_it_is_handed_out(tmp_path):
    drawn = []

    def keep(number, values):
        drawn.append(values)
        keep_candidates(tmp_path, drawn)

    parzen = TreeParzen(JOB, 6, [], keep)
    for number in range(1, 13):
        handed = parzen.next()
        assert handed == (number, kept_candidates(tmp_path)[-1])
        run = JOB.candidate(handed[1])
        assert 0.5 <= run.training.optimizer.learning_rate <= 16
        assert run.training.expected_batch_size in (128, 256)
        assert run.training.noise_multiplier != JOB.training.noise_multiplier, "solved"
    assert parzen.next() is None


def test_one_that_cannot_be_kept_is_not_handed_out():
    def fails(number, values):
        raise OSError

    parzen = TreeParzen(JOB, 6, [], fails)
    with pytest.raises(OSError):  # noqa: PT011
        parzen.next()


def test_only_the_noised_accuracy_is_learnt():
    parzen = source([])
    outcomes = [
        Outcome(COMPLETED, accuracy(0.5, val_loss=123.0)),
        Outcome(STOPPED, accuracy(0.25), "stopped early by ASHA at 20 of 80 steps", rung=20),
        Outcome(FAILED, accuracy(0.9), "its process died"),
        Outcome(REFUSED),
        Outcome(STOPPED, accuracy(0.75), "the budget could not pay for all of its steps"),
    ]
    for outcome in outcomes:
        number, _ = parzen.next()
        parzen.learn(number, outcome)
    seen = [(one.state, one.value, one.intermediate_values) for one in parzen._study.trials]
    assert seen == [
        (TrialState.COMPLETE, 0.5, {}),
        (TrialState.PRUNED, 0.25, {20: 0.25}),
        (TrialState.FAIL, None, {}),
        (TrialState.FAIL, None, {}),
        (TrialState.COMPLETE, 0.75, {}),
    ]
    for one in parzen._study.trials:
        assert (one.user_attrs, set(one.params)) == ({}, set(JOB.tuning.searched))


def test_a_resumed_sweep_has_the_same_candidates_and_knows_what_they_came_to():
    drawn = []
    first = source(drawn)
    for _ in range(5):
        first.next()
    over = {1: Outcome(COMPLETED, accuracy(0.5)), 2: Outcome(REFUSED), 4: Outcome(STOPPED, accuracy(0.3), rung=20)}
    known = [trial(number, values, over.get(number)) for number, values in drawn]
    later = []
    again = source(later, known)
    states = [one.state for one in again._study.trials]
    assert states == [TrialState.COMPLETE, TrialState.FAIL, TrialState.PRUNED]
    assert [again.next(), again.next()] == [drawn[2], drawn[4]], "the unfinished come first, as they were"
    assert later == []
    running = [one.params for one in again._study.trials if one.state == TrialState.RUNNING]
    for params, (_, values) in zip(running, (drawn[2], drawn[4]), strict=True):
        assert params["training.optimizer.learning_rate"] == values["training.optimizer.learning_rate"]
    again.learn(3, Outcome(COMPLETED, accuracy(0.7)))
    assert again._study.best_value == 0.7
    assert [again.next()[0] for _ in range(7)] == list(range(6, 13))
    assert again.next() is None


def test_a_selection_refuses_what_learns():
    for option, said in (
        ("search: optuna", "search"),
        ("scheduler: asha", "scheduler"),
        ("reserve_for_final: 5", "res"),
    ):
        with pytest.raises(UsageError, match=rf"^tuning\.{said}"):
            load(SweepJob, DIGITS, [f"tuning={{mode: select, {option}}}"])
