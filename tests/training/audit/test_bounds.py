"""The lower bound on ε is the published one, holds where the true ε is known, and each usual way of getting it wrong is
seen: a forgotten δ, guesses chosen by their outcome, ties that know the answer, abstentions that count.

False alarms: each statistical check has a rate of at most 1e-7, or the one it states; there are fewer than ten.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from scipy.stats import binom, norm

from cluster.errors import PurserError, UsageError
from training.audit import bounds
from training.audit.bounds import ceiling, clopper_pearson, guessed, heuristic, needed, one_run

DELTA, BETA, RARE = 1e-5, 0.05, 1e-7
RUNS = 1000


def exact_p_value(m, r, v, delta, odds):
    """The formula as it is written, in rational numbers, for ε = log(`odds`)."""
    q = Fraction(odds) / (Fraction(odds) + 1)
    mass = [math.comb(r, k) * q**k * (1 - q) ** (r - k) for k in range(r + 1)]
    least = [sum(mass[v - i : v]) / i for i in range(1, v + 1)]
    return sum(mass[v:]) + 2 * m * Fraction(delta) * max(least, default=0)


def slow_one_run(m, r, v, delta, beta, step=1e-3):
    """The bound by walking ε up, with SciPy's binomial."""
    i = np.arange(1, v + 1)
    for epsilon in np.arange(0.0, 50.0, step):
        q = 1 / (1 + math.exp(-epsilon))
        alpha = ((binom.cdf(v - 1, r, q) - binom.cdf(v - i - 1, r, q)) / i).max()
        if binom.sf(v - 1, r, q) + 2 * m * delta * alpha > beta:
            return epsilon - step
    raise AssertionError("no end")


def responses(rng, epsilon, delta=0.0, canaries=1000):
    """Randomised response, (ε, δ)-DP and no better: with probability δ a canary's score gives it away, or else its sign
    tells the truth with probability e^ε / (1 + e^ε)."""
    inside = rng.random(canaries) < 0.5
    told = inside ^ (rng.random(canaries) > 1 / (1 + math.exp(-epsilon)))
    away = rng.random(canaries) < delta
    return np.where(away, np.where(inside, 9.0, -9.0), np.where(told, 1.0, -1.0) * rng.random(canaries)), inside


def gaussian_delta(epsilon, mu):
    """The δ at `epsilon` of a Gaussian mechanism whose outputs on neighbours lie μ standard deviations apart."""
    return norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)


def most_false(rate, runs=RUNS):
    """More false alarms than this among `runs`, of at most `rate` each, come with probability RARE."""
    return binom.isf(RARE, runs, rate)


def test_the_published_number():
    assert round(one_run(1000, 100, 75, 1e-4, 0.05), 3) == 0.673


@pytest.mark.parametrize(("canaries", "most", "by_proportions"), [
    (100, 3.49, 3.28), (500, 5.10, 4.91), (1000, 5.78, 5.60), (5000, 7.28, 7.21),
])  # fmt: skip
def test_ceilings_of_all_guessed(canaries, most, by_proportions):
    assert round(ceiling(canaries, canaries, DELTA, BETA), 2) == most
    assert round(heuristic(canaries, canaries, 0, canaries, DELTA, BETA), 2) == by_proportions


@pytest.mark.parametrize(("guesses", "most"), [(10, 1.01), (20, 1.79), (50, 2.76), (100, 3.47), (200, 4.17)])
def test_ceilings_of_some_guessed(guesses, most):
    assert abs(ceiling(1000, guesses, DELTA, BETA) - most) <= 0.00501


@pytest.mark.parametrize("odds", [1, 2, Fraction(5, 2), 20, 10**6])
@pytest.mark.parametrize(("canaries", "guesses"), [(1, 1), (7, 7), (60, 24), (1000, 40)])
def test_p_values_are_those_of_the_formula(canaries, guesses, odds):
    epsilon = math.log(odds)
    for correct in range(guesses + 1):
        for delta in (0, 1e-5, 0.01):
            expected = float(exact_p_value(canaries, guesses, correct, delta, odds))
            ours = bounds._p_value(canaries, guesses, correct, delta, epsilon)
            assert ours == pytest.approx(expected, rel=1e-10, abs=1e-300)


def test_p_values_of_a_hundred_thousand_guesses():
    r = 100_000
    for correct, epsilon in ((51_000, 0.01), (75_000, 1.0), (75_000, 1.09), (99_990, 8.0), (r, 10.0)):
        q = 1 / (1 + math.exp(-epsilon))
        masses = binom.pmf(np.arange(correct - 1, -1, -1), r, q)
        expected = binom.sf(correct - 1, r, q) + 2 * r * 1e-6 * (np.cumsum(masses) / np.arange(1, correct + 1)).max()
        assert bounds._p_value(r, r, correct, 1e-6, epsilon) == pytest.approx(expected, rel=1e-8)
    assert 10 < one_run(r, r, r, 1e-9, BETA) < math.log(r)


@pytest.mark.parametrize(("canaries", "guesses", "correct", "delta"), [
    (100, 100, 80, 1e-5), (1000, 50, 50, 1e-4), (300, 101, 64, 1e-3), (1000, 20, 19, 0.0), (40, 10, 5, 1e-5),
])  # fmt: skip
def test_bounds_are_where_the_formula_crosses(canaries, guesses, correct, delta):
    """From below: never more than a slow walk finds, and within its step."""
    slow = slow_one_run(canaries, guesses, correct, delta, BETA)
    assert max(slow, 0.0) - 1e-5 <= one_run(canaries, guesses, correct, delta, BETA) <= max(slow, 0.0) + 1e-3


@pytest.mark.parametrize(("guesses", "correct"), [(10, 10), (100, 75), (100, 100), (777, 500), (1000, 999)])
def test_bounds_are_rounded_down(guesses, correct):
    bound = one_run(1000, guesses, correct, DELTA, BETA)
    assert bound == round(bound, 6)
    at, above = (bounds._p_value(1000, guesses, correct, DELTA, e) for e in (bound, bound + 3e-6))
    assert at <= BETA < above


@pytest.mark.parametrize("delta", [0.0, 1e-5, 1e-3, 0.1])
def test_p_values_grow_with_epsilon_up_to_the_bound(delta):
    """Else there would be an ε below the bound that is not refuted."""
    for guesses, correct in ((10, 9), (100, 75), (100, 100), (1000, 700)):
        values = [bounds._p_value(1000, guesses, correct, delta, e) for e in np.arange(0.0, 12.0, 0.01)]
        falls = [a for a, b in zip(values, values[1:], strict=False) if b < a * (1 - 1e-9)]
        assert all(value > BETA for value in falls)


@pytest.mark.parametrize(("canaries", "guesses", "delta"), [(100, 100, 1e-5), (1000, 50, 1e-4), (30, 7, 0.0)])
@pytest.mark.parametrize("epsilon", [0.0, 0.5, 1.07, 3.0, 8.0, math.inf])
def test_as_many_as_needed_and_no_fewer(canaries, guesses, delta, epsilon):
    enough = [v for v in range(guesses + 1) if one_run(canaries, guesses, v, delta, BETA) > epsilon]
    assert enough == list(range(enough[0], guesses + 1)) if enough else True
    assert needed(canaries, guesses, delta, BETA, epsilon) == (enough[0] if enough else None)


def test_bounds_hold_on_a_gaussian_whose_epsilon_is_known():
    """μ = 1, a direction of its own for each canary: ε is 4.38 at this δ. None of 200 bounds at 1 − 2.5e-9 exceeds that
    but once in two million tests. A claim as if μ were 0.1, ε = 0.35, is contradicted each time at 95 %: 68 right
    guesses of 100 are enough, each is right with probability 0.9, and in none of 100 runs are there fewer but once in
    three million tests."""
    rng, mu = np.random.default_rng(1), 1.0
    assert gaussian_delta(4.37, mu) > DELTA > gaussian_delta(4.39, mu)
    assert gaussian_delta(0.34, mu / 10) > DELTA > gaussian_delta(0.36, mu / 10)
    for _ in range(100):
        inside = rng.random(1000) < 0.5
        scores = rng.normal(size=1000) + mu * inside
        few, all_of_them = (guessed(scores, inside, guesses) for guesses in (100, 1000))
        assert one_run(1000, 100, few, DELTA, 2.5e-9) <= 4.38
        assert one_run(1000, 1000, all_of_them, DELTA, 2.5e-9) <= 4.38
        assert one_run(1000, 100, few, DELTA, BETA) > 0.36


@pytest.mark.parametrize(("epsilon", "delta"), [(0.0, 0.0), (1.0, 0.0), (3.0, 0.0), (1.0, 1e-4)])
def test_no_more_false_alarms_than_stated_where_the_bound_is_tight(epsilon, delta):
    rng, fewest = np.random.default_rng(2), needed(1000, 100, delta, BETA, epsilon)
    false = sum(guessed(*responses(rng, epsilon, delta), 100) >= (fewest or 101) for _ in range(RUNS))
    assert false <= most_false(BETA)


def test_a_bound_without_its_delta_is_seen():
    """One canary in a hundred is given away, as δ = 0.01 permits, and those are guessed first. Ten are in over half of
    the runs, so that fewer than 178 such runs of 1,000 have a probability below 1e-80."""
    rng, forgotten = np.random.default_rng(3), needed(1000, 10, 0.0, BETA, 0.5)
    counts = [guessed(*responses(rng, 0.5, 0.01), 10) for _ in range(RUNS)]
    assert sum(one_run(1000, 10, count, 0.01, BETA) > 0.5 for count in counts) <= most_false(BETA)
    assert sum(count >= forgotten for count in counts) > 2 * most_false(BETA)


def test_the_best_of_many_numbers_of_guesses_is_seen():
    """Scores that know nothing, 50 numbers of guesses. One or another of them exceeds 0 in about a quarter of the runs,
    not in 5 %: that fewer than 150 of 1,000 show it has a probability below 1e-9. Shared out among the 50, β holds."""
    rng, grid = np.random.default_rng(4), range(20, 1001, 20)
    runs = []
    for _ in range(RUNS):
        scores, inside = rng.normal(size=1000), rng.random(1000) < 0.5
        runs.append([guessed(scores, inside, guesses) for guesses in grid])

    def alarms(beta, columns):
        fewest = [needed(1000, guesses, 0.0, beta, 0.0) or math.inf for guesses in grid]
        return sum(any(run[i] >= fewest[i] for i in columns) for run in runs)

    assert alarms(BETA, [grid.index(100)]) <= most_false(BETA)
    assert alarms(BETA / len(grid), range(len(grid))) <= most_false(BETA)
    assert alarms(BETA, range(len(grid))) > 150 > most_false(BETA)


def with_ties_by_membership(scores, inside, guesses):
    """Broken: of equal scores, a member counts as the higher."""
    order = np.lexsort((inside, scores))
    called_in, called_out = order[len(order) - guesses // 2 :], order[: guesses - guesses // 2]
    return int(inside[called_in].sum() + (~inside[called_out]).sum())


@pytest.mark.parametrize("guesses", [1, 2, 99, 100, 1000])
def test_ties_do_not_know_the_answer(guesses):
    """Whoever is guessed is right either of a membership or of its opposite, if the guesses are the same for both."""
    rng = np.random.default_rng(5)
    scores, inside = rng.integers(0, 3, 1000).astype(float), rng.random(1000) < 0.5
    for guess, honest in ((guessed, True), (with_ties_by_membership, False)):
        same = guess(scores, inside, guesses) + guess(scores, ~inside, guesses) == guesses
        assert same if honest else not same


@pytest.mark.parametrize("guesses", [1, 20, 501])
def test_of_ties_the_earlier_is_the_lower(guesses):
    rng = np.random.default_rng(8)
    scores, inside = rng.integers(-1, 2, 1000) * 1.0, rng.random(1000) < 0.5
    scores[scores == 0] *= rng.choice([-1, 1], (scores == 0).sum())  # 0.0 and -0.0 are equal, too
    order = sorted(range(1000), key=lambda i: (scores[i], i))
    expected = inside[order[1000 - guesses // 2 :]].sum() + (~inside)[order[: guesses - guesses // 2]].sum()
    assert guessed(scores, inside, guesses) == expected


def test_ties_by_membership_would_be_believed():
    inside = np.random.default_rng(6).random(1000) < 0.5
    alike = np.zeros(1000)
    assert one_run(1000, 100, with_ties_by_membership(alike, inside, 100), DELTA, BETA) == ceiling(
        1000, 100, DELTA, BETA
    )
    # Half are right on average; that 75 of 100 are has a probability of 3e-7.
    assert one_run(1000, 100, guessed(alike, inside, 100), DELTA, BETA) < 0.7


def test_abstentions_are_not_right():
    """Scores that know nothing: what is not guessed may not count, or any run would be refuted."""
    rng = np.random.default_rng(7)
    scores, inside = rng.normal(size=1000), rng.random(1000) < 0.5
    correct = guessed(scores, inside, 100)
    assert correct <= 100
    assert one_run(1000, 100, correct, DELTA, BETA) < 0.7  # as above
    assert one_run(1000, 1000, correct + 900, DELTA, BETA) > 2


def test_the_highest_are_guessed_in_and_the_lowest_out():
    scores, inside = np.array([5.0, -1.0, 3.0, 2.0, 0.0]), np.array([True, False, False, True, True])
    assert [guessed(scores, inside, guesses) for guesses in range(1, 6)] == [1, 2, 2, 2, 2]
    assert guessed(-scores, inside, 2) == 0
    assert type(guessed(scores, inside, 2)) is int


@pytest.mark.parametrize(("correct", "of"), [(0, 10), (3, 10), (10, 10), (499, 500)])
def test_intervals_of_a_proportion_end_where_the_tails_are_half_beta(correct, of):
    low, high = clopper_pearson(correct, of, BETA)
    assert binom.sf(correct - 1, of, low) == pytest.approx(BETA / 2) if correct else low == 0
    assert binom.cdf(correct, of, high) == pytest.approx(BETA / 2) if correct < of else high == 1


def test_the_heuristic_looks_both_ways_and_is_never_negative():
    assert heuristic(50, 100, 50, 100, DELTA, BETA) == 0
    assert heuristic(10, 100, 90, 100, DELTA, BETA) == 0
    assert heuristic(20, 100, 0, 100, DELTA, BETA) == pytest.approx(heuristic(100, 100, 80, 100, DELTA, BETA))
    assert heuristic(20, 100, 0, 100, 0.5, BETA) == 0


@pytest.mark.parametrize(("changed", "field"), [
    ({"canaries": 0}, "audit.canaries"),
    ({"canaries": 100_001}, "audit.canaries"),
    ({"guesses": 101}, "audit.guesses"),
    ({"guesses": 0}, "audit.guesses"),
    ({"guesses": 10.0}, "audit.guesses"),
    ({"correct": 11}, "correct"),
    ({"correct": -1}, "correct"),
    ({"delta": math.nan}, "delta"),
    ({"delta": -1e-5}, "delta"),
    ({"beta": math.nan}, "beta"),
    ({"beta": 0.0}, "beta"),
    ({"beta": 1.0}, "beta"),
])  # fmt: skip
def test_what_is_no_audit_is_refused(changed, field):
    good = {"canaries": 100, "guesses": 10, "correct": 9, "delta": DELTA, "beta": BETA}
    assert one_run(**good) > 0
    with pytest.raises(UsageError, match=f"^{field}: .* was given; it must be"):
        one_run(**good | changed)


def test_guesses_of_no_scores_are_refused():
    scores, inside = np.arange(10.0), np.arange(10) < 5
    with pytest.raises(UsageError, match="^audit.guesses: 11 was given; .* from 1 to audit.canaries, 10"):
        guessed(scores, inside, 11)
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(PurserError, match="not finite"):
            guessed(np.where(scores == 3, value, scores), inside, 4)
    for wrong in (inside[:9], inside.astype(int), inside.reshape(2, 5)):
        with pytest.raises(PurserError, match="one score, and one bool"):
            guessed(scores, wrong, 4)
    with pytest.raises(UsageError, match="^epsilon: nan"):
        needed(100, 10, DELTA, BETA, math.nan)
