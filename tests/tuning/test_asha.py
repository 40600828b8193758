"""Rungs and reports of a sweep with ASHA: where trials are judged and what that costs, which trials it stops, and what
may enter Tune at all (P13). See `test_forty_trials` for all of it under Ray Tune."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from product import DIGITS
from ray.tune.integration.ray_train import TuneReportCallback

from cluster.errors import UsageError
from training.driver import FAILED
from training.jobfile import load
from training.metrics import ACCURACY, PUBLIC
from tuning.config import SweepJob
from tuning.sweep import Halving, Reports, told

JUDGED = dict.fromkeys(ACCURACY, 0)


def job_of(*assignments):
    return load(SweepJob, DIGITS, ["tuning.scheduler=asha", "tuning.space={}", *assignments])


@pytest.mark.parametrize(
    ("assignments", "rungs"),
    [
        ((), (20, 60)),
        (("tuning.asha.reduction_factor=2",), (20, 40)),
        (("tuning.asha={grace_period: 40, reduction_factor: 4}",), (40,)),
        (("training.steps=20",), ()),
        (("training.steps=10",), ()),
        (("training.steps=1000", "training.block=50"), (50, 150, 450)),
    ],
)
def test_rungs_are_below_the_steps_between_blocks_and_charged(assignments, rungs):
    run = job_of(*assignments).candidate({})
    assert run.rungs == rungs
    assert all(rung % run.training.block == 0 for rung in rungs)
    assert run.charges()[1].steps == len(rungs) + 1
    assert run.charges()[1].block == 1


def test_each_candidate_has_the_rungs_of_its_own_steps():
    job = job_of("tuning.space={training.steps: {choice: [40, 200]}}", "tuning.reserve_for_final=200")
    assert job.candidate({"training.steps": 40}).rungs == (20,)
    assert job.candidate({"training.steps": 200}).rungs == (20, 60, 180)
    assert job.plain.rungs == job.final({"training.steps": 40}).rungs == ()


@pytest.mark.parametrize(
    ("assignments", "said"),
    [
        (("tuning.asha.grace_period=30",), "tuning.asha.grace_period: 30 was given"),
        (("tuning.asha.reduction_factor=5",), "tuning.asha.reduction_factor: 5 was given"),
        (("evaluation.rungs=[20]",), "evaluation.rungs: tuning.asha says"),
        (("tuning.scheduler=none", "evaluation.rungs=[20, 30]"), "evaluation.rungs: 30 was given"),
        (("tuning.scheduler=none", "evaluation.rungs=[40, 20]"), "evaluation.rungs: each must be above"),
        (("tuning.scheduler=none", "tuning.mode=select", "evaluation.rungs=[40]"), "evaluation.rungs: mode: select"),
    ],
)
def test_rungs_that_cannot_be_are_refused_by_their_field(assignments, said):
    with pytest.raises(UsageError) as raised:
        job_of(*assignments)
    assert str(raised.value).startswith(said)


def test_a_space_whose_blocks_miss_the_rungs_is_refused_before_the_first():
    with pytest.raises(UsageError, match=r"^evaluation\.rungs: 20 was given"):
        job_of("tuning.space={training.block: {choice: [20, 16]}}").corners()


def trial(number):
    return SimpleNamespace(trial_id=f"trial-{number}", config={"number": number})


def test_the_worse_at_a_rung_are_stopped_and_known_with_their_rung():
    halving = Halving(20, 2)
    for number in range(1, 5):
        halving.on_trial_add(None, trial(number))

    def report(number, steps, **metrics):
        return halving.on_trial_result(None, trial(number), {"steps": steps, "training_iteration": 1, **metrics})

    assert report(1, 20, **JUDGED | {"accuracy": 0.8}) == Halving.CONTINUE
    assert report(2, 20, **JUDGED | {"accuracy": 0.5}) == Halving.STOP
    assert report(3, 20) == Halving.CONTINUE, "a report without an accuracy decides nothing"
    assert report(3, 40, **JUDGED | {"accuracy": 0.9}) == Halving.CONTINUE
    assert report(1, 80) == Halving.CONTINUE
    assert halving.stopped == {2: {"steps": 20, **JUDGED, "accuracy": 0.5}}


def test_no_trial_is_stopped_by_how_long_it_runs():
    halving = Halving(20, 2)
    halving.on_trial_add(None, trial(1))
    for steps in (20, 40, 80, 160, 10_000_000):
        report = {"steps": steps, **JUDGED, "accuracy": 0.1}
        assert halving.on_trial_result(None, trial(1), report) == Halving.CONTINUE


def test_only_public_and_noised_keys_enter():
    report = dict.fromkeys(PUBLIC, 1)
    assert told(report) == report
    for key in ("val_loss", "loss", "grad_norm", "batch_size", "Accuracy", "checkpoint_path"):
        said = told({**report, key: 0.123456789})
        assert set(said) == {"outcome"}
        assert said["outcome"]["status"] == FAILED
        assert not said["outcome"]["metrics"]
        assert f"'{key}'" in said["outcome"]["why"]
        assert "0.123456789" not in str(said)


@pytest.fixture
def door(monkeypatch):
    """The callback of a run, and what came through it."""
    through = []
    monkeypatch.setattr(TuneReportCallback, "__init__", lambda self: None)
    monkeypatch.setattr(TuneReportCallback, "after_report", lambda self, context, metrics, checkpoint: through.append(
        (metrics, checkpoint)))  # fmt: skip
    return Reports(), through


def test_a_worker_s_raw_metric_ends_its_trial_at_the_door(door):
    reports, through = door
    reports.after_report(None, [{"steps": 20, "attempt": 1, "val_loss": 0.5}, {"steps": 20}], "checkpoint")
    (((said,), checkpoint),) = through
    assert said["outcome"]["status"] == FAILED
    assert "0.5" not in str(said)
    assert checkpoint is None


def test_the_end_of_a_run_is_its_driver_s_to_tell(door):
    """A scheduler that saw it could stop what is complete."""
    reports, through = door
    reports.after_report(None, [{"steps": 20, "attempt": 1}], None)
    reports.after_report(None, [{"steps": 80, "attempt": 1, "status": "completed", **JUDGED}], None)
    assert through == [([{"steps": 20, "attempt": 1}], None)]


def test_of_losses_the_larger_are_stopped():
    halving = Halving(20, 2, loss=True)
    for number, loss, answer in ((1, 0.5, Halving.CONTINUE), (2, 0.8, Halving.STOP), (3, 0.2, Halving.CONTINUE)):
        halving.on_trial_add(None, trial(number))
        report = {"steps": 20, "training_iteration": 1, "clipped_loss": loss, "clipped_loss_error": 0.1}
        assert halving.on_trial_result(None, trial(number), report) == answer
    assert halving.stopped == {2: {"steps": 20, "clipped_loss": 0.8, "clipped_loss_error": 0.1}}
