"""The one order of an account: maximin over the planned runs, and the price of private selection among them (P6, P14).

The prices themselves are checked in `test_selection` and `test_agreement`.
"""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from cluster.accounting.costs import FINE, UNIT, budget_cost, epsilon_of, price, step_cost
from cluster.accounting.mechanisms import Charge, PoissonSubsampledGaussian
from cluster.accounting.orders import (
    CANDIDATES,
    OrderRow,
    choose,
    order_table,
    select_price,
    selection_of,
)
from cluster.accounting.selection import tnb_gamma, tnb_mean
from cluster.errors import UsageError

JOB = Charge("digits/train", PoissonSubsampledGaussian(0.25, 8.0), 80, 20)


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


def test_a_selection_lists_what_may_run():
    longer = Charge("digits/train", JOB.mechanism, 90, 10)
    other = Charge("digits/train", PoissonSubsampledGaussian(0.25, 7.0), 80, 20)
    selection = selection_of([JOB, other, longer, JOB], 8, 0.0)
    assert [candidate.parts for candidate in selection.candidates] == [((JOB.mechanism, 90),), ((other.mechanism, 80),)]
    assert (selection.repetitions.shape, selection.repetitions.gamma) == (0.0, tnb_gamma(8, 0.0))
    assert tnb_mean(selection.repetitions.gamma, 0.0) == pytest.approx(8)
    assert select_price([JOB, longer], 6, 8) == select_price([longer], 6, 8) > select_price([JOB], 6, 8)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("order", [2, 6, 33, 128, 1024])
def test_select_price_is_the_price_of_the_mechanism(order, eta):
    assert select_price([JOB], order, 8, eta) == math.ceil(step_cost(selection_of([JOB], 8, eta), order) / FINE)


def test_select_price_covers_the_pointwise_maximum():
    """Two candidates whose curves cross: the price must bound each of them at every order it uses, so it is above the
    dearer of the two prices taken alone."""
    flat = Charge("digits/train", PoissonSubsampledGaussian(0.25, 8.0), 80, 20)
    steep = Charge("digits/train", PoissonSubsampledGaussian(0.01, 0.9), 30, 10)
    assert {price(flat, order) > price(steep, order) for order in CANDIDATES} == {True, False}
    for order in (2, 6, 16):
        alone = max(select_price([plan], order, 8) for plan in (flat, steep))
        assert select_price([flat, steep], order, 8) > alone


def test_select_price_never_falls_as_the_order_rises():
    """A divergence does not, so a larger order's bound holds at a smaller one; without that, order 2 asks for the whole
    of log E[K]."""
    costs = [select_price([JOB], order, 8) for order in CANDIDATES]
    assert costs == sorted(costs)
    alone = price(JOB, 2) + math.log(8) * UNIT
    assert costs[0] < alone


def test_a_selection_beyond_every_ledger_does_not_fit():
    dear = Charge("a/train", PoissonSubsampledGaussian(1.0, 0.1), 10_000, 1)
    assert not any(row.select_fits for row in order_table(3.0, 1e-4, [dear], 8))
    with pytest.raises(UsageError, match="noise"):
        select_price([dear], 128, 8)


def test_select_of_one_trial_is_one_run():
    assert select_price([JOB], 6, 1) == price(JOB, 6)


def test_many_selected_trials_cost_about_twice_one():
    """64 trials of ε = 1 at a good order: near 2.3, not 10 (composed) or 64 (added)."""
    plan = Charge("digits/train", PoissonSubsampledGaussian(0.01, 1.513), 1000, 20)
    least = min(epsilon_of(select_price([plan], order, 64), 1e-5, order) for order in CANDIDATES)
    assert 2.3 <= least <= 2.6


FIRST_TABLES = """
import time
from cluster.accounting.mechanisms import Charge, DiscreteGaussian, PoissonSubsampledGaussian
from cluster.accounting.orders import order_table
steps = [PoissonSubsampledGaussian(360 / (1797 * 0.8), noise) for noise in (8.0, 7.0, 12.0)]
plans = [Charge("digits/train", step, 80, 20) for step in steps]
began = time.process_time()
order_table(3.0, 1e-4, plans, 8)
order_table(3.0, 1e-4, [Charge("digits/validation", DiscreteGaussian(5.0, 1), 1, 1)], 8)
print(time.process_time() - began)
"""


def test_the_first_tables_are_quick():
    """`purser budget create` answers in half a second; its tables are the larger part of what it computes. They take
    30 ms here, and 180 where an exponential is taken for each term."""
    seconds = [
        float(subprocess.run([sys.executable, "-c", FIRST_TABLES], capture_output=True, check=True).stdout)
        for _ in range(3)
    ]
    assert min(seconds) < 0.12
