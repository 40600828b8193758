"""The whole training path is audited: of the engine as it is the claim is not contradicted, and of engines that are
broken on purpose, each in one way that no look at their results would show, it is.

False alarms: the claim is a bound on the engine's ε, so that at confidence 1 − 1e-7 it is contradicted with a
probability below 1e-7. Misses: 151 right guesses of 200 contradict the claim at 95 %; what was seen in 25 runs of the
engine nearest to that, with a tenth of its noise, was 186 with a deviation of 3, ten deviations away (1e-23 where it is
normal); the others have at least 196.
"""

from __future__ import annotations

import math

import pytest
import torch
from audited import BROKEN, digits_file, digits_job, verdict

from training.audit.command import CONTRADICTS
from training.audit.plan import SCORES

FALSE_ALARM = 1e-7


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Its records are prepared once."""
    torch.set_num_threads(1)
    return digits_job(digits_file(tmp_path_factory.mktemp("digits") / "digits.csv"))


@pytest.fixture(autouse=True)
def _home(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("PURSER_HOME", str(tmp_path_factory.getbasetemp() / "audited"))


def test_the_engine_is_not_contradicted(job, tmp_path):
    said = verdict(job, tmp_path, confidence=1 - FALSE_ALARM)
    assert not said["contradicted"]
    assert said["epsilon_lower_bound"] < said["epsilon_claimed"] < 1
    most = math.floor(100 * said["ceiling"]) / 100
    assert said["verdict"] == f"does not contradict it; this audit could have shown at most ε = {most:.2f}"
    assert said["ceiling"] > said["epsilon_claimed"], "it could have been"
    assert said["power"] > 0.5


@pytest.mark.parametrize("engine", [name for name in BROKEN if name != "true"])
def test_a_broken_engine_is_contradicted(job, tmp_path, engine):
    said = verdict(job, tmp_path, engine)
    assert said["contradicted"]
    assert said["verdict"] == CONTRADICTS
    assert said["epsilon_lower_bound"] > said["epsilon_claimed"]
    assert [one["score"] for one in said["scores"]] == list(SCORES)
    seen = {one["score"]: one["correct"] >= said["needed"] for one in said["scores"]}
    assert seen["white-box, changes" if engine == "same noise replayed" else "white-box"], "each way is needed"
    if engine == "same noise replayed":
        assert not seen["black-box"]


def test_an_audit_that_knows_no_coin_says_nothing(job, tmp_path):
    """The verdict rests on the coins: by others, as fair, even an engine without noise is not contradicted. False
    alarm 1e-7."""
    from training.audit.canaries import Canaries, draw

    def exchanged(canaries):
        return Canaries(canaries.arrays, draw(job, 200).inside, canaries.candidates, canaries.facts)

    said = verdict(job, tmp_path, "no noise", confidence=1 - FALSE_ALARM, coins=exchanged)
    assert not said["contradicted"]
