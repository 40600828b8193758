"""Choosing the one Rényi order of an account, from the job that is planned on it.

The order is fixed when the account is made and never changes: "continue while some order still fits" is not sound
when parameters depend on earlier outputs. No data is touched here; only declared numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.accounting.costs import FINE, UNIT, budget_cost, price, step_cost
from cluster.accounting.mechanisms import Charge
from cluster.errors import UsageError

CANDIDATES = (*range(2, 33), 36, 40, 48, 56, 64, 80, 96, 128)


@dataclass(frozen=True)
class OrderRow:
    """One order of the table: how many of the cheapest and of the dearest planned run fit, and whether a private
    selection over the planned number of runs fits."""

    order: int
    budget_cost: int
    runs_that_fit: tuple[int, int]
    select_fits: bool
    worst_ratio: float


def order_table(epsilon: float, delta: float, plans: Sequence[Charge], trials: int) -> list[OrderRow]:
    """The usable orders for the candidate `plans` (each one run's charge on this account).

    `worst_ratio` is, over the plans, the smallest share of the runs that the plan's own best order would admit; the
    order with the largest worst ratio is never far from best for any candidate (maximin).
    """
    budgets = {order: budget_cost(epsilon, delta, order) for order in CANDIDATES}
    usable = [order for order in CANDIDATES if budgets[order] > 0]
    if not usable:
        raise UsageError(
            f"privacy.epsilon: {epsilon:g} at delta {delta:g} leaves nothing to spend; allow more of either."
        )
    fits = {
        order: [budgets[order] / (step_cost(plan.mechanism, order) * plan.steps / FINE) for plan in plans]
        for order in usable
    }
    best = [max(fits[order][i] for order in usable) for i in range(len(plans))]
    rows = []
    for order in usable:
        ratio = min(runs / most for runs, most in zip(fits[order], best, strict=True))
        rows.append(
            OrderRow(
                order,
                budgets[order],
                (math.floor(max(fits[order])), math.floor(min(fits[order]))),
                select_price(plans, order, trials) <= budgets[order],
                ratio,
            )
        )
    return rows


def choose(rows: Sequence[OrderRow]) -> int:
    """The maximin order of a table; the smaller one among equals."""
    return max(rows, key=lambda row: (row.worst_ratio, -row.order)).order


def select_price(plans: Sequence[Charge], order: int, mean_trials: int, eta: float = 0.5) -> int:
    """RDP cost at `order` of releasing only the best of a random number of i.i.d. candidates, rounded up.

    K is truncated negative binomial with shape `eta` and mean `mean_trials`; the base mechanism is the pointwise
    maximum of the candidates' RDP curves. ε'(α) = ε(α) + log E[K]/(α−1) + (1+η) min over α' of
    ((1−1/α')ε(α') + log(1/γ)/α') (Papernot and Steinke 2022, theorem 2). Any set of α' gives a valid bound.
    """
    if mean_trials <= 1:
        return max(price(plan, order) for plan in plans)
    gamma = tnb_gamma(mean_trials, eta)

    def curve(at: int) -> float:
        return max(step_cost(plan.mechanism, at) * plan.steps for plan in plans) / (UNIT * FINE)

    grid = (*range(2, 17), 20, 24, 28, 32, 40, 48, 64)
    least = min((1 - 1 / at) * curve(at) + math.log(1 / gamma) / at for at in grid)
    return math.ceil((curve(order) + math.log(mean_trials) / (order - 1) + (1 + eta) * least) * UNIT)


def tnb_gamma(mean: float, eta: float) -> float:
    """γ of the truncated negative binomial with shape `eta` > 0 whose mean is `mean`, by bisection.

    E[K] = η(1−γ) / (γ(1−γ^η)) (Papernot and Steinke 2022, definition 1); falls from infinity to 1 as γ rises to 1.
    """
    low, high = 1e-12, 1 - 1e-12
    for _ in range(200):
        middle = math.sqrt(low * high)
        if eta * (1 - middle) / (middle * (1 - middle**eta)) > mean:
            low = middle
        else:
            high = middle
    return low


def tnb_quantile(mean: float, eta: float, share: float) -> int:
    """The smallest k with P[K ≤ k] ≥ `share` for the truncated negative binomial."""
    if mean <= 1:
        return 1
    gamma = tnb_gamma(mean, eta)
    # P[K=k] = (1−γ)^k / (γ^−η − 1) · Π_{l<k} (l+η)/(l+1)
    mass = (1 - gamma) * eta / (gamma**-eta - 1)
    total, k = mass, 1
    while total < share:
        mass *= (1 - gamma) * (k + eta) / (k + 1)
        total, k = total + mass, k + 1
    return k
