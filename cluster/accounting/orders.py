"""Choosing the one Rényi order of an account, from the job that is planned on it.

The order is fixed when the account is made and never changes: "continue while some order still fits" is not sound
when parameters depend on earlier outputs. No data is touched here; only declared numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.accounting.costs import FINE, block_cost, budget_cost, price, step_cost
from cluster.accounting.mechanisms import Charge, Composition, Mechanism, RepeatAndSelect
from cluster.accounting.selection import POISSON, repetitions_of
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
    """The usable orders for the candidate `plans` (each one run's charge on this account, or one selection's).

    `worst_ratio` is, over the plans, the smallest share of the runs that the plan's own best order would admit; the
    order with the largest worst ratio is never far from best for any candidate (maximin).
    """
    budgets = {order: budget_cost(epsilon, delta, order) for order in CANDIDATES}
    usable = [order for order in CANDIDATES if budgets[order] > 0]
    if not usable:
        raise UsageError(
            f"privacy.epsilon: {epsilon:g} at delta {delta:g} leaves nothing to spend; allow more of either."
        )
    fits = {order: [_runs(plan, order, budgets[order]) for plan in plans] for order in usable}
    best = [max(1e-300, *(fits[order][i] for order in usable)) for i in range(len(plans))]
    runs_only = not any(isinstance(plan.mechanism, RepeatAndSelect) for plan in plans)
    selection = selection_of(plans, trials) if trials > 1 and runs_only else None
    rows = []
    for order in usable:
        ratio = min(runs / most for runs, most in zip(fits[order], best, strict=True))
        rows.append(
            OrderRow(
                order,
                budgets[order],
                (math.floor(max(fits[order])), math.floor(min(fits[order]))),
                _fits(selection, plans, order, budgets[order]),
                ratio,
            )
        )
    return rows


def _runs(plan: Charge, order: int, budget: int) -> float:
    """How many times `plan` fits."""
    try:
        return budget / (step_cost(plan.mechanism, order) * plan.steps / FINE)
    except UsageError:  # beyond what any ledger can hold
        return 0.0


def _fits(selection: RepeatAndSelect | None, plans: Sequence[Charge], order: int, budget: int) -> bool:
    try:
        cost = block_cost(selection, order, 0, 1) if selection else max(price(plan, order) for plan in plans)
    except UsageError:  # beyond what any ledger can hold
        return False
    return cost <= budget


def choose(rows: Sequence[OrderRow]) -> int:
    """The maximin order of a table; the smaller one among equals."""
    return max(rows, key=lambda row: (row.worst_ratio, -row.order)).order


def select_price(plans: Sequence[Charge], order: int, mean_trials: int, shape: float = 0.5) -> int:
    """Cost at `order` of releasing only the best of a random number K of i.i.d. candidates, each one of `plans`.

    K has the mean `mean_trials`, and `shape` says its distribution (`selection.repetitions_of`); the price is that of
    the mechanism that `selection_of` describes.

    Raises:
        UsageError: more than the ledger can hold, or more different plans than one mechanism may list.
    """
    if mean_trials <= 1 and shape != POISSON:
        return max(price(plan, order) for plan in plans)
    return block_cost(selection_of(plans, mean_trials, shape), order, 0, 1)


def selection_of(plans: Sequence[Charge], mean_trials: int, shape: float = 0.5) -> RepeatAndSelect:
    """The selection among `plans` as a mechanism. The account and the blocks of the plans play no part."""
    steps: dict[Mechanism, int] = {}
    for plan in plans:  # of two plans of one mechanism the longer costs more at every order
        steps[plan.mechanism] = max(plan.steps, steps.get(plan.mechanism, 0))
    candidates = tuple(Composition((run,)) for run in steps.items())
    return RepeatAndSelect(candidates, repetitions_of(mean_trials, shape))
