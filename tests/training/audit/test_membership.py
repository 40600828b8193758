"""Membership attacks, measured: AUC and rates by brute force, intervals that hold, and shadow models only of those that
never saw the canary.

False alarms: 1e-7 for each of the few statistical checks.
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy.stats import binom, norm

from cluster.errors import PurserError, UsageError
from training.audit.bounds import clopper_pearson
from training.audit.membership import attack, exposure, lira

BETA, RARE = 0.05, 1e-7
SIX = 6.0


def told_apart(rng, members, others, mu):
    """Scores N(μ, 1) of members and N(0, 1) of others, in an order that says nothing."""
    inside = rng.permutation(np.arange(members + others) < members)
    return rng.normal(size=members + others) + mu * inside, inside


@pytest.mark.parametrize("seed", range(5))
def test_auc_is_the_share_of_pairs_in_order_and_ties_count_half(seed):
    rng = np.random.default_rng(seed)
    scores, inside = rng.integers(0, 8, 60) + 0.0, rng.random(60) < 0.4
    pairs = scores[inside][:, None] - scores[~inside][None, :]
    assert attack(scores, inside).auc == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean())


@pytest.mark.parametrize("others", [50, 999, 1000, 2900, 3000])
@pytest.mark.parametrize("distinct", [5, 200, 10**9])
def test_rates_are_those_of_the_lowest_threshold_that_is_allowed(others, distinct):
    rng = np.random.default_rng(others)
    scores, inside = told_apart(rng, 300, others, 1.5)
    scores = np.round(scores * distinct / 8)
    for rate, each in zip(attack(scores, inside).rates, (1, 10), strict=True):  # in a thousand
        allowed = [
            ((scores[inside] >= t).sum(), false)
            for t in [*np.unique(scores), np.inf]
            if (false := (scores[~inside] >= t).sum()) * 1000 <= each * others
        ]
        found, false = max(allowed)
        assert (rate.target, rate.tpr) == (each / 1000, found / 300)
        assert rate.false_positives == max(false for hit, false in allowed if hit == found)
        assert (rate.low, rate.high) == clopper_pearson(int(found), 300, BETA)
        if others * each < 1000:
            assert rate.false_positives == 0


@pytest.mark.parametrize("mu", [0.0, 1.0, 3.0])
def test_intervals_of_the_auc_hold(mu):
    """About 5 % miss; more than 8 % of runs would be an interval that is too short. 120 members of 300."""
    rng, true, runs = np.random.default_rng(1), norm.cdf(mu / math.sqrt(2)), 600
    found = [attack(*told_apart(rng, 120, 180, mu)) for _ in range(runs)]
    assert sum(not one.auc_low <= true <= one.auc_high for one in found) <= binom.isf(RARE, runs, 0.08)
    assert all(0 < one.auc_low < one.auc < one.auc_high < 1 for one in found if one.auc < 1)
    # Broken: members and others taken for pairs that are independent of each other, √120 times too sure.
    short = sum(abs(one.auc - true) > (one.auc_high - one.auc_low) / 2 / math.sqrt(120) for one in found)
    assert short > binom.isf(RARE, runs, 0.08)


@pytest.mark.parametrize(("members", "others"), [(500, 500), (40, 1000), (1000, 40), (1, 7)])
def test_perfect_separation_has_an_interval_of_some_width(members, others):
    inside = np.arange(members + others) < members
    perfect, reverse = attack(inside + 0.0, inside), attack(0.0 - inside, inside)
    pairs = min(members, others)
    assert perfect.auc == perfect.auc_high == 1
    assert perfect.auc_low == pytest.approx((BETA / 2) ** (1 / pairs))
    assert (reverse.auc, reverse.auc_low) == (0, 0)
    assert reverse.auc_high == pytest.approx(1 - perfect.auc_low)
    assert [rate.tpr for rate in perfect.rates] == [1, 1]
    assert all(rate.low < 1 for rate in perfect.rates)


def test_scores_that_are_all_alike_tell_nothing_and_say_so():
    told = attack(np.zeros(100), np.arange(100) < 50)
    assert told.auc == 0.5
    assert told.auc_low == pytest.approx(0.5 - math.sqrt(math.log(2 / BETA) / 100))
    assert [(rate.tpr, rate.false_positives) for rate in told.rates] == [(0, 0), (0, 0)]


def test_one_member_has_an_interval_too():
    told = attack(np.array([1.0, 0.0, 2.0]), np.array([True, False, False]))
    assert (told.auc, told.auc_low, told.auc_high) == (0.5, 0, 1)


def test_the_form_for_reports():
    scores, inside = told_apart(np.random.default_rng(2), 30, 50, 1.0)
    form = json.loads(json.dumps(attack(scores, inside).as_json()))
    assert set(form) == {"members", "others", "auc", "auc_low", "auc_high", "rates", "resolution"}
    assert (form["members"], form["others"], form["resolution"]) == (30, 50, 0.02)
    assert [set(rate) for rate in form["rates"]] == [{"target", "false_positives", "tpr", "low", "high"}] * 2


def test_what_cannot_be_told_apart_is_refused():
    scores = np.arange(4.0)
    for inside in (np.zeros(4, bool), np.ones(4, bool)):
        with pytest.raises(PurserError, match="nothing to tell apart"):
            attack(scores, inside)
    with pytest.raises(PurserError, match="not finite"):
        attack(np.array([0.0, math.nan, 1.0, 2.0]), scores < 2)
    with pytest.raises(UsageError, match="^beta: nan"):
        attack(scores, scores < 2, math.nan)


def shadowed(rng, models, canaries=2000):
    """Statistics with a mean of each canary's own, which having it in the training raises by 1 to 6."""
    base, rise = rng.normal(scale=20, size=canaries), rng.uniform(1, 6, canaries)
    had, inside = rng.random((models, canaries)) < 0.5, rng.random(canaries) < 0.5
    had[:3] = False
    shadows = base + had * rise + rng.normal(size=had.shape)
    return base + inside * rise + rng.normal(size=canaries), shadows, had, inside


@pytest.mark.parametrize("fixed_variance", [False, True])
def test_canaries_that_were_not_in_score_as_the_shadows_without_them(fixed_variance):
    """Mean 0 and the variance of a prediction from n draws, (1 + 1/n), times (n−1)/(n−3) where each has its own."""
    target, shadows, had, inside = shadowed(np.random.default_rng(3), 64)
    out = lira(target, shadows, had, fixed_variance)[~inside]
    n = (~had).sum(axis=0)[~inside]
    variance = ((1 + 1 / n) * (1 if fixed_variance else (n - 1) / (n - 3))).mean()
    assert abs(out.mean()) < SIX * math.sqrt(variance / len(out))
    assert abs(out.var() / variance - 1) < SIX * math.sqrt(3 / len(out))  # 3: t of some 30 degrees has heavier tails
    # Broken: fitted to the models that had the canary, or to all.
    for mask in (~had, np.zeros_like(had)):
        assert abs(lira(target, shadows, mask, fixed_variance)[~inside].mean()) > 0.3 > SIX * math.sqrt(2 / len(out))


def test_it_finds_members_where_the_raw_statistic_does_not():
    target, shadows, had, inside = shadowed(np.random.default_rng(4), 16)
    assert attack(target, inside).auc < 0.65
    assert attack(lira(target, shadows, had, True), inside).auc > 0.9


def test_lira_is_the_paper_s_score():
    """Φ of it is 1 − P[N(μ, σ²) > statistic], of those without the canary alone; the others may be NaN."""
    shadows = np.array([[1.0, 5.0], [3.0, 9.0], [math.nan, 7.0]])
    had = np.isnan(shadows)
    scores = lira(np.array([4.0, 7.0]), shadows, had, False)
    assert norm.cdf(scores) == pytest.approx([norm.cdf(4, 2, math.sqrt(2)), norm.cdf(7, 7, 2)])
    pooled = math.sqrt((2 + 8) / (1 + 2))
    assert lira(np.array([4.0, 7.0]), shadows, had, True) == pytest.approx([2 / pooled, 0])
    assert len(np.unique(lira(np.array([50.0, 90.0]), shadows, had, False))) == 2  # Φ of both is 1


def test_too_few_shadows_are_refused():
    target, shadows = np.zeros(3), np.arange(12.0).reshape(4, 3) ** 2
    had = np.array([[True, False, False]] * 3 + [[False] * 3])
    with pytest.raises(PurserError, match="fewer than two shadow models"):
        lira(target, shadows, had, True)
    had[0] = False
    assert np.isfinite(lira(target, shadows, had, True)).all()
    with pytest.raises(PurserError, match="not finite"):
        lira(target, np.where(had, shadows, math.nan), had, True)
    with pytest.raises(PurserError, match="one model"):
        lira(target, np.ones((4, 3)), had, True)
    with pytest.raises(PurserError, match="one statistic and one bool"):
        lira(target, shadows, had[:2], True)


def test_exposure():
    found = exposure(np.array([1, 2, 512, 1024]), 1024)
    assert found.tolist() == [10, 9, 1, 0]
    for wrong in (np.array([0]), np.array([1025]), np.array([1.0])):
        with pytest.raises(PurserError, match="from 1 to the number of candidates, 1024"):
            exposure(wrong, 1024)
    # Of ranks that are drawn at random it is x or more with probability 2^-x.
    drawn = exposure(np.random.default_rng(5).integers(1, 1025, 10_000), 1024)
    assert binom.ppf(RARE, 10_000, 1 / 8) <= (drawn >= 3).sum() <= binom.isf(RARE, 10_000, 1 / 8)
