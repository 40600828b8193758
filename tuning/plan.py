"""The price before the purchase: what a job will cost, what fits, and what private selection would ask instead.

Touches no data: declared numbers and the ledger's totals only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.accounting import orders
from cluster.accounting.books import Books
from cluster.accounting.costs import budget_cost, epsilon_of, price
from cluster.accounting.mechanisms import Charge
from cluster.accounting.selection import tnb_quantile
from training.admission import plans_of
from training.config import Job
from tuning.config import SweepJob

ETA = 0.5  # shape of the truncated negative binomial in select mode


@dataclass(frozen=True)
class Line:
    """One account's part of a plan. Costs are RDP at `order` in units of 1e-12."""

    account: str
    order: int
    budget_cost: int
    remaining_cost: int
    trial_cost: int
    trial_cost_least: int
    trial_cost_most: int
    trials_that_fit: int
    filter_epsilon: float
    select_epsilon: float
    select_fits: bool


@dataclass(frozen=True)
class Plan:
    """What a job would cost. The line of the train account comes first."""

    job: SweepJob
    lines: tuple[Line, Line]
    exists: bool

    def as_json(self) -> dict[str, Any]:
        """The contract's keys; order and trial cost are those of the train account."""
        train = self.lines[0]
        return {
            "account": self.job.account,
            "epsilon": self.job.privacy.epsilon,
            "delta": self.job.privacy.delta,
            "order": train.order,
            "mode": self.job.tuning.mode,
            "trial_cost": train.trial_cost,
            "trials_that_fit": min(line.trials_that_fit for line in self.lines),
            "filter_epsilon": max(line.filter_epsilon for line in self.lines),
            "select_epsilon": max(line.select_epsilon for line in self.lines),
            "select_trials_p99": tnb_quantile(self.job.tuning.trials, ETA, 0.99),
            "partitions": [vars(line) for line in self.lines],
        }


def candidates(job: SweepJob) -> list[Job]:
    """The runs that the plan is made for: the grid in its order, else the corners of the space."""
    if job.tuning.search == "grid" and job.tuning.space:
        return [job.candidate(values) for values, _ in zip(job.grid(), range(job.tuning.trials), strict=False)]
    return job.corners()


def planned(job: SweepJob) -> dict[str, list[Charge]]:
    """account → the charges by which the order of a new account is chosen: the job as it stands, every corner of its
    space, and the candidates that come first."""
    return plans_of([run.charges() for run in (job.plain, *job.corners(), *candidates(job))])


def make(books: Books, job: SweepJob) -> Plan:
    """Price `job` against its accounts as they stand, or as they would be made."""
    runs = candidates(job)
    charges = [run.charges() for run in runs]
    plans = planned(job)
    exists = books.exists(job.account)
    if exists:
        books.check_terms(job.dataset(), job.privacy.epsilon, job.privacy.delta)
    lines = []
    for i, name in enumerate(job.accounts):
        if exists:
            account = books.show(name)
            order, budget, remaining = account.order, account.budget_cost, account.remaining_cost
        else:
            table = orders.order_table(job.privacy.epsilon, job.privacy.delta, plans[name], job.tuning.trials)
            order = orders.choose(table)
            budget = remaining = budget_cost(job.privacy.epsilon, job.privacy.delta, order)
        lines.append(_line(name, order, budget, remaining, [c[i] for c in charges], job))
    return Plan(job, (lines[0], lines[1]), exists)


def _line(name: str, order: int, budget: int, remaining: int, charges: Sequence[Charge], job: SweepJob) -> Line:
    prices = [price(charge, order) for charge in charges]
    trials = job.tuning.trials
    mean = math.ceil(sum(prices) / len(prices))
    in_order = job.tuning.search == "grid" and bool(job.tuning.space)
    if in_order:
        left, fit = remaining, 0
        for one in prices:
            if one <= left:
                left, fit = left - one, fit + 1
        whole = sum(prices)
    else:
        fit, whole = remaining // mean, mean * trials
    select = orders.select_price(charges, order, trials, ETA)
    delta = job.privacy.delta
    return Line(
        account=name,
        order=order,
        budget_cost=budget,
        remaining_cost=remaining,
        trial_cost=mean,
        trial_cost_least=min(prices),
        trial_cost_most=max(prices),
        trials_that_fit=fit,
        filter_epsilon=epsilon_of(whole, delta, order),
        select_epsilon=epsilon_of(select, delta, order),
        select_fits=select <= remaining,
    )
