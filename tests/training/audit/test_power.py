"""The plan of an audit: the ideal channel has the law that it states, power is what the channel's runs show, and the
number of guesses follows its rule from public numbers alone.

False alarms: six standard errors, 2e-9 for each of the few statistical checks. The module's own draws have a constant
seed, and come out alike each time.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binom, norm

from cluster.errors import UsageError
from training.audit.bounds import ceiling, needed
from training.audit.power import Channel, planned_guesses, power

DELTA, BETA, SIX = 1e-5, 0.05, 6.0
DIGITS = Channel(sample_rate=0.25, noise_multiplier=8.0, steps=80)
CLAIM = 1.07  # of such a run


def test_scores_of_members_are_binomial_and_of_others_nothing_but_noise():
    inside = np.arange(200_000) < 100_000
    clear = replace(DIGITS, noise_multiplier=0.0).scores(inside, np.random.default_rng(1))
    assert not clear[~inside].any()
    members = clear[inside]
    assert abs(members.mean() - 20) < SIX * math.sqrt(15 / 1e5)
    assert abs(members.var() / 15 - 1) < SIX * math.sqrt(2 / 1e5)
    noisy = DIGITS.scores(inside, np.random.default_rng(2))
    assert abs(noisy[~inside].mean()) < SIX * math.sqrt(80 * 64 / 1e5)
    assert abs(noisy[~inside].var() / (80 * 64) - 1) < SIX * math.sqrt(2 / 1e5)
    assert abs(noisy[inside].mean() - 20) < SIX * math.sqrt((80 * 64 + 15) / 1e5)


def test_an_honest_run_is_not_contradicted_and_broken_ones_are():
    """Without noise, with a tenth of it, and, at its own claim, as declared."""
    assert power(DIGITS, 1000, 100, DELTA, BETA, CLAIM) == 0
    for noise in (0.0, 0.8):
        assert power(replace(DIGITS, noise_multiplier=noise), 1000, 100, DELTA, BETA, CLAIM) == 1


def test_as_many_right_guesses_as_are_needed_are_enough():
    """Without noise or sampling all are right, and all must be."""
    assert needed(100, 10, 0.0, BETA, 1.0) == 10
    assert power(Channel(1.0, 0.0, 1), 100, 10, 0.0, BETA, 1.0) == 1
    assert power(Channel(1.0, 0.0, 1), 100, 10, 0.0, BETA, 1.1) == 0


def test_power_is_the_binomial_s_where_all_are_guessed():
    """One step without sampling, scores N(in, σ²): the better half of 400 are called in. Against ε = 0 a run of much
    noise is contradicted with about β, and one of σ = 4 about as often as guesses that are right each for itself."""
    fewest = needed(400, 400, 0.0, BETA, 0.0)
    for noise in (1e5, 4.0):
        channel = Channel(1.0, noise, 1)
        expected = binom.sf(fewest - 1, 400, norm.cdf(1 / (2 * noise)))
        found = power(channel, 400, 400, 0.0, BETA, 0.0, replicas=2000)
        assert abs(found - expected) < SIX * math.sqrt(expected * (1 - expected) / 2000) + 0.02
    assert expected > 0.5


def test_plans_come_out_alike_and_leave_numpy_s_own_state_alone():
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    weak = replace(DIGITS, noise_multiplier=2.0)
    first = power(weak, 200, 40, DELTA, BETA, 0.5), planned_guesses(DIGITS, 200, DELTA, BETA, CLAIM)
    np.random.seed(1)
    assert (power(weak, 200, 40, DELTA, BETA, 0.5), planned_guesses(DIGITS, 200, DELTA, BETA, CLAIM)) == first
    assert 0 < first[0] < 1
    np.random.seed(0)
    assert (np.random.get_state()[1] == before).all()


@pytest.mark.parametrize("canaries", [2, 3, 5, 9, 10, 50, 101, 1000])
@pytest.mark.parametrize("epsilon", [0.0, CLAIM, 8.0, math.inf])
def test_planned_guesses_are_even_and_no_more_than_there_are(canaries, epsilon):
    planned = planned_guesses(DIGITS, canaries, DELTA, BETA, epsilon)
    assert planned % 2 == 0
    assert 2 <= planned <= canaries
    assert type(planned) is int


def test_the_plan_with_the_highest_power_against_a_tenth_of_the_noise_is_taken():
    """A run whose tenth of noise is still much: the plans differ in power. By its own noise, which shows nothing,
    another would be taken."""
    loud, grid = Channel(0.25, 60.0, 80), (200, 500, 1000)
    own, tenth = (
        {guesses: power(replace(loud, noise_multiplier=noise), 1000, guesses, DELTA, BETA, 0.1) for guesses in grid}
        for noise in (60.0, 6.0)
    )
    planned = planned_guesses(loud, 1000, DELTA, BETA, 0.1)
    assert tenth[planned] == max(tenth.values()) > min(tenth.values())
    assert own[planned] < max(own.values())


def test_of_equal_plans_the_smallest_that_can_exceed_the_claim_is_taken():
    hopeless = Channel(0.25, 1e5, 80)  # no plan ever contradicts anything
    assert ceiling(1000, 200, DELTA, BETA) < 4.5 < ceiling(1000, 500, DELTA, BETA)
    assert planned_guesses(hopeless, 1000, DELTA, BETA, 4.5) == 500
    assert planned_guesses(DIGITS, 1000, DELTA, BETA, CLAIM) == 200  # each finds a tenth of the noise
    assert planned_guesses(hopeless, 1000, DELTA, BETA, 50.0) == 1000


@pytest.mark.parametrize(("changed", "field"), [
    ({"sample_rate": math.nan}, "sample_rate"),
    ({"sample_rate": 0.0}, "sample_rate"),
    ({"noise_multiplier": math.nan}, "noise_multiplier"),
    ({"noise_multiplier": -1.0}, "noise_multiplier"),
    ({"steps": 0}, "steps"),
])  # fmt: skip
def test_what_is_no_channel_is_refused(changed, field):
    with pytest.raises(UsageError, match=f"^{field}: "):
        replace(DIGITS, **changed)


def test_what_is_no_plan_is_refused():
    for canaries, field in ((1, "audit.canaries"), (10.0, "audit.canaries"), (100_001, "audit.canaries")):
        with pytest.raises(UsageError, match=f"^{field}: "):
            planned_guesses(DIGITS, canaries, DELTA, BETA, CLAIM)
    with pytest.raises(UsageError, match="^epsilon: nan"):
        planned_guesses(DIGITS, 10, DELTA, BETA, math.nan)
    with pytest.raises(UsageError, match="^audit.guesses: 12"):
        power(DIGITS, 10, 12, DELTA, BETA, CLAIM)
    with pytest.raises(UsageError, match="^replicas: 0"):
        power(DIGITS, 10, 2, DELTA, BETA, CLAIM, replicas=0)
