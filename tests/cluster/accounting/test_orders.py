"""The one order of an account: maximin over the planned runs, and the price of private selection as in Papernot and
Steinke's theorem and dp_accounting's code (P6, P14)."""

from __future__ import annotations

import math

import dp_accounting
import pytest
from dp_accounting.dp_event import RepeatAndSelectDpEvent
from dp_accounting.rdp import rdp_privacy_accountant

from cluster.accounting.costs import FINE, UNIT, budget_cost, epsilon_of, price, step_cost
from cluster.accounting.mechanisms import Charge, PoissonSubsampledGaussian
from cluster.accounting.orders import (
    CANDIDATES,
    OrderRow,
    choose,
    order_table,
    select_price,
    tnb_gamma,
    tnb_quantile,
)
from cluster.errors import UsageError

JOB = Charge("digits/train", PoissonSubsampledGaussian(0.25, 8.0), 80, 20)
SELECT_GRID = (*range(2, 17), 20, 24, 28, 32, 40, 48, 64)


def mass_function(mean, eta, least_left=1e-13):
    """P[K = k] for k = 1, 2, … of the truncated negative binomial, until the terms no longer matter."""
    gamma = tnb_gamma(mean, eta)
    scale = 1 / (gamma**-eta - 1)
    k, rising = 1, eta
    while True:
        mass = (1 - gamma) ** k * scale * rising
        yield k, mass
        if k > mean and k * mass < least_left:
            return
        rising *= (k + eta) / (k + 1)
        k += 1


def test_the_job_of_the_documents():
    rows = order_table(3.0, 1e-4, [JOB], 8)
    order = choose(rows)
    row = next(row for row in rows if row.order == order)
    assert order == 6
    assert row.runs_that_fit == (7, 7)
    assert row.budget_cost == budget_cost(3.0, 1e-4, 6)
    assert 7 * price(JOB, 6) <= row.budget_cost < 8 * price(JOB, 6)


def test_no_other_order_fits_more_runs_of_a_single_plan():
    rows = order_table(3.0, 1e-4, [JOB], 8)
    exact = {row.order: row.budget_cost / price(JOB, row.order) for row in rows}
    assert choose(rows) == max(exact, key=exact.get)


def test_maximin_over_unlike_plans():
    """Each plan alone would choose its own order; together neither may be sacrificed to the other."""
    coarse = Charge("digits/train", PoissonSubsampledGaussian(0.01, 0.5), 50, 10)
    fine = Charge("digits/train", PoissonSubsampledGaussian(0.25, 20.0), 80, 20)
    both = order_table(3.0, 1e-4, [coarse, fine], 8)

    def share(order, plan):
        runs = {o: budget_cost(3.0, 1e-4, o) / price(plan, o) for o in (row.order for row in both)}
        return runs[order] / max(runs.values())

    worst = {row.order: min(share(row.order, coarse), share(row.order, fine)) for row in both}
    chosen = choose(both)
    alone = {choose(order_table(3.0, 1e-4, [plan], 8)) for plan in (coarse, fine)}
    assert worst[chosen] == pytest.approx(max(worst.values()), rel=1e-6)
    assert len(alone) == 2
    assert all(worst[order] < worst[chosen] for order in alone)  # "best for one plan" is seen to be worse


def test_the_smaller_order_wins_among_equals():
    rows = [OrderRow(order, 1, (1, 1), True, 0.5) for order in (9, 4, 7)]
    assert choose(rows) == 4


def test_select_fits_says_what_the_price_says():
    for trials in (2, 8, 64):
        for row in order_table(3.0, 1e-4, [JOB], trials):
            assert row.select_fits == (select_price([JOB], row.order, trials) <= row.budget_cost)


def test_orders_that_leave_no_budget_are_not_offered():
    rows = order_table(3.0, 1e-4, [JOB], 8)
    assert all(row.budget_cost > 0 for row in rows)
    assert {row.order for row in rows} == {o for o in CANDIDATES if budget_cost(3.0, 1e-4, o) > 0}
    with pytest.raises(UsageError, match=r"privacy\.epsilon"):
        order_table(0.001, 1e-30, [JOB], 8)


@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("mean", [2, 8, 64])
def test_tnb_gamma_gives_the_asked_mean(mean, eta):
    masses = list(mass_function(mean, eta))
    assert math.fsum(mass for _, mass in masses) == pytest.approx(1, abs=1e-9)
    assert math.fsum(k * mass for k, mass in masses) == pytest.approx(mean, rel=1e-8)


@pytest.mark.parametrize(("mean", "eta", "share"), [(64, 0.5, 0.99), (8, 0.5, 0.99), (8, 1.0, 0.5), (3, 0.5, 0.9)])
def test_tnb_quantile_is_the_first_to_reach_the_share(mean, eta, share):
    total, quantile = 0.0, 0
    for k, mass in mass_function(mean, eta):
        total, quantile = total + mass, k
        if total >= share:
            break
    assert tnb_quantile(mean, eta, share) == quantile


def test_the_quantile_that_plan_shows():
    assert tnb_quantile(64, 0.5, 0.99) == 397
    assert tnb_quantile(1, 0.5, 0.99) == 1


@pytest.mark.parametrize("order", [3, 6, 16, 32])
@pytest.mark.parametrize(
    ("q", "sigma", "steps", "mean"), [(0.25, 8.0, 80, 8), (0.01, 1.513, 1000, 64), (0.1, 4, 50, 2)]
)
def test_select_price_agrees_with_dp_accounting(q, sigma, steps, mean, order):
    """dp_accounting minimises over the accountant's own orders, so it is given our grid; then it takes the least bound
    of all larger orders (RDP only rises with the order), so the same is done to ours."""
    plan = Charge("digits/train", PoissonSubsampledGaussian(q, sigma), steps, 20)
    run = dp_accounting.SelfComposedDpEvent(
        dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma)), steps
    )
    accountant = rdp_privacy_accountant.RdpAccountant(orders=list(SELECT_GRID))
    accountant.compose(RepeatAndSelectDpEvent(run, mean, 0.5))
    theirs = accountant._rdp[SELECT_GRID.index(order)]
    ours = min(select_price([plan], larger, mean) for larger in SELECT_GRID if larger >= order)
    assert ours / UNIT == pytest.approx(theirs, rel=1e-6)
    assert select_price([plan], order, mean) / UNIT >= theirs * (1 - 1e-9)


def test_select_price_covers_the_pointwise_maximum():
    """Two candidates whose curves cross: the price must bound each of them at every order it uses, so it is above the
    dearer of the two prices taken alone."""
    flat = Charge("digits/train", PoissonSubsampledGaussian(0.25, 8.0), 80, 20)
    steep = Charge("digits/train", PoissonSubsampledGaussian(0.01, 0.9), 30, 10)
    curves = {o: [step_cost(p.mechanism, o) * p.steps for p in (flat, steep)] for o in SELECT_GRID}
    assert {a > b for a, b in curves.values()} == {True, False}, "the example's curves do not cross"
    for order in (2, 6, 16):
        alone = max(select_price([plan], order, 8) for plan in (flat, steep))
        assert select_price([flat, steep], order, 8) >= alone

    def upper(at):
        return max(curves[at]) / (UNIT * FINE)

    gamma = tnb_gamma(8, 0.5)
    least = min((1 - 1 / at) * upper(at) + math.log(1 / gamma) / at for at in SELECT_GRID)
    expected = upper(6) + math.log(8) / 5 + 1.5 * least
    assert select_price([flat, steep], 6, 8) / UNIT == pytest.approx(expected, rel=1e-9)


def test_select_of_one_trial_is_one_run():
    assert select_price([JOB], 6, 1) == price(JOB, 6)


def test_many_selected_trials_cost_about_twice_one():
    """64 trials of ε = 1 at a good order: near 2.3, not 10 (composed) or 64 (added)."""
    plan = Charge("digits/train", PoissonSubsampledGaussian(0.01, 1.513), 1000, 20)
    least = min(epsilon_of(select_price([plan], order, 64), 1e-5, order) for order in CANDIDATES)
    assert 2.3 <= least <= 2.6
