"""The price before the purchase: what a job costs in each mode, what fits, what is left, and how it grows with trials.

Touches no data: declared numbers and the ledger's totals only. Every number is a cost that the books would charge, or
an ε that such a cost comes to at an account's order (P14); where trials are drawn at random and differ in price, it is
that of the dearest.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cluster.accounting import orders
from cluster.accounting.books import Books
from cluster.accounting.costs import budget_cost, epsilon_of, price
from cluster.accounting.mechanisms import NOISE_MULTIPLIER_BOUNDS, Charge, DiscreteGaussian
from cluster.accounting.selection import POISSON, quantile, repetitions_of
from cluster.errors import UsageError
from training.admission import plans_of
from training.config import Job
from tuning.config import SweepJob
from tuning.curve import Point, highest, largest, sizes

MOST_EPSILON = 100.0  # that may be granted: the bound of privacy.epsilon
MOST_TRIALS = 10_000  # that may be asked for: the bound of tuning.trials


@dataclass(frozen=True)
class Line:
    """One account's part of a plan. Costs are RDP at `order` in units of 1e-12.

    `filter_…` is of all trials of filter mode, each of them charged, and of the final run; `final_cost` is what is held
    back for that run, 0 without one; `select_…` is of one private selection among
    `tuning.trials` candidates in the mean, whatever K turns out to be. Not `filter_exact`: trials that differ in price
    are drawn at random, and all of them cost no more than this. `…_epsilon` is of the job alone. `…_left` is the
    share of the budget that is left afterwards, None where it does not fit. `…_least_epsilon` counts what is already
    spent and reserved, in thousandths and rounded up; None where no ε that may be granted is enough. What cannot be
    priced at all is None, and `select_unpriced` says why.
    """

    account: str
    order: int
    budget_cost: int
    remaining_cost: int
    trial_cost: int
    trial_cost_least: int
    trial_cost_most: int
    trials_that_fit: int
    trials_that_fit_least: int
    final_cost: int
    filter_cost: int
    filter_exact: bool
    filter_epsilon: float
    filter_left: float | None
    filter_least_epsilon: float | None
    filter_fits: bool
    select_cost: int | None
    select_epsilon: float | None
    select_left: float | None
    select_least_epsilon: float | None
    select_fits: bool
    select_trials_that_fit: int | None
    select_unpriced: str | None
    curve: tuple[Point, ...]


@dataclass(frozen=True)
class Plan:
    """What a job would cost, with a line for each account that it is charged on; that of train comes first.

    `filter_trials`: how many trials filter mode would run; fewer than `tuning.trials` where the grid ends before.
    """

    job: SweepJob
    lines: tuple[Line, ...]
    exists: bool
    filter_trials: int
    select_trials_p99: int

    def as_json(self) -> dict[str, Any]:
        """The contract's keys and more. Order and costs are those of the train account, each ε is the larger of all
        accounts', and what fits or is left is the smaller."""
        train, lines = self.lines[0], self.lines
        return {
            "account": self.job.account,
            "epsilon": self.job.privacy.epsilon,
            "delta": self.job.privacy.delta,
            "order": train.order,
            "mode": self.job.tuning.mode,
            "trials": self.job.tuning.trials,
            "trial_cost": train.trial_cost,
            "trials_that_fit": min(line.trials_that_fit for line in lines),
            "filter_trials": self.filter_trials,
            "final_cost": train.final_cost,
            "filter_cost": train.filter_cost,
            "filter_epsilon": max(line.filter_epsilon for line in lines),
            "filter_left": _smallest([line.filter_left for line in lines]),
            "filter_least_epsilon": largest([line.filter_least_epsilon for line in lines]),
            "select_cost": train.select_cost,
            "select_epsilon": largest([line.select_epsilon for line in lines]),
            "select_left": _smallest([line.select_left for line in lines]),
            "select_least_epsilon": largest([line.select_least_epsilon for line in lines]),
            "select_trials_that_fit": _smallest([line.select_trials_that_fit for line in lines]),
            "select_trials_p99": self.select_trials_p99,
            "curve": [asdict(point) for point in highest([line.curve for line in lines])],
            "partitions": [{**asdict(line), "curve": [asdict(point) for point in line.curve]} for line in lines],
        }


def candidates(job: SweepJob, order: int | None = None) -> list[Job]:
    """The runs that the plan is made for: the grid in its order, else the corners of the space.

    Args:
        order: of the train account, at which a field that is auto is solved.
    """
    if _in_order(job):
        grid = zip(job.grid(), range(job.tuning.trials), strict=False)
        return [job.candidate(job.solved(values, order)) for values, _ in grid]
    return job.corners(order)


def planned(job: SweepJob) -> dict[str, list[Charge]]:
    """account → the charges by which the order of a new account is chosen: the job as it stands, every corner of its
    space, and the candidates that come first; in select mode the selection, which is all that it will pay for. A field
    that is auto stays as it stands: it is solved at that order."""
    if job.tuning.mode == "select":
        plans = plans_of([job.selection()])
    else:
        plans = plans_of([run.charges() for run in (job.plain, *job.corners(), *candidates(job))])
    for name in job.accounts:
        if name not in plans:  # a validation account that this job does not use is made for runs that will
            most = job.privacy.max_records_per_unit
            noise = min(max(job.evaluation.noise, most), NOISE_MULTIPLIER_BOUNDS[1])
            plans[name] = [Charge(name, DiscreteGaussian(noise, most), 1, 1)]
    return plans


def make(books: Books, job: SweepJob) -> Plan:
    """Price `job` against its accounts as they stand, or as they would be made.

    Raises:
        UsageError: the job does not say what the owner said, its space has too many corners, or one run alone is
            beyond what the ledger can hold.
    """
    exists = books.exists(job.account)
    if exists:
        books.check_terms(job.dataset(), job.privacy.epsilon, job.privacy.delta)
    plans = planned(job)
    chosen = {name: _chooser(job, plans[name]) for name in job.charged}
    at = {name: books.show(name).order if exists else chosen[name](job.privacy.epsilon) for name in job.charged}
    first = at[job.accounts[0]]
    runs, lines = candidates(job, first), []
    for i, name in enumerate(job.charged):
        asked = _asked(job, i, first)
        choose, order = chosen[name], at[name]
        if exists:
            account = books.show(name)
            budget, remaining = account.budget_cost, account.remaining_cost
        else:
            budget = remaining = budget_cost(job.privacy.epsilon, job.privacy.delta, order)
        lines.append(_line(name, asked, order, budget, remaining, job.privacy.delta, None if exists else choose))
    p99 = _p99(job.tuning.trials, job.tuning.repeats.shape)
    return Plan(job, tuple(lines), exists, len(runs) if _in_order(job) else job.tuning.trials, p99)


def _p99(mean: int, shape: float) -> int:
    return 1 if mean <= 1 and shape != POISSON else quantile(repetitions_of(mean, shape), 0.99)


def _in_order(job: SweepJob) -> bool:
    return job.tuning.search == "grid" and bool(job.tuning.space)


def _smallest(values: Sequence[Any]) -> Any:
    """The smallest of `values`; None if one of them is none."""
    return None if None in values else min(values)


@dataclass(frozen=True)
class _Asked:
    """What a job asks of one account.

    Args:
        runs: order → the charge of each trial of filter mode, which depends on the order where a field is auto: one
            after the other where `in_order`, else any of them may come.
        pool: the different charges that a selection may draw from: the whole space.
        last: order → the charges that a final run after the trials may make; none where there is none.
        shape: of the distribution of K.
    """

    runs: Callable[[int], Sequence[Charge]]
    pool: Sequence[Charge]
    last: Callable[[int], Sequence[Charge]]
    in_order: bool
    trials: int
    shape: float

    def prices(self, order: int) -> list[int]:
        return [price(charge, order) for charge in self.runs(order)]

    def final_cost(self, order: int) -> int:
        """What is held back for the final run: the price of the dearest."""
        return max((price(charge, order) for charge in self.last(order)), default=0)

    def filter_cost(self, order: int, trials: int) -> int:
        """Of the first `trials` of the grid, which begins again at its end; of drawn trials no more than this; and of
        the final run no more than is held back."""
        prices, final = self.prices(order), self.final_cost(order)
        if not self.in_order:
            return max(prices) * trials + final
        rounds, rest = divmod(trials, len(prices))
        return rounds * sum(prices) + sum(prices[:rest]) + final

    def select_cost(self, order: int, mean_trials: int) -> int | None:
        try:
            return orders.select_price(self.pool, order, mean_trials, self.shape)
        except UsageError:
            return None

    def why_unpriced(self) -> str:
        try:
            orders.selection_of(self.pool, self.trials, self.shape)
        except UsageError:
            return "too many different candidates"
        return "more than the ledger holds"


def _asked(job: SweepJob, i: int, first: int) -> _Asked:
    """What `job` asks of its account number `i`; `first` is the order of its train account."""

    def at(order: int) -> int:  # on train whatever order is asked about; on validation, what is solved on train
        return order if i == 0 else first

    @functools.cache
    def runs(order: int) -> list[Charge]:
        return [run.charges()[i] for run in candidates(job, order)]

    @functools.cache
    def last(order: int) -> list[Charge]:
        finals = job.extremes(order) if job.tuning.reserve_for_final else []
        return [job.final(values).charges()[i] for values in finals]

    # A private selection has no scheduler, and so no rungs.
    unscheduled = job.model_copy(update={"tuning": job.tuning.model_copy(update={"scheduler": "none"})})
    return _Asked(
        runs=lambda order: runs(at(order)),
        pool=list(dict.fromkeys(run.charges()[i] for run in unscheduled.corners(first))),
        last=lambda order: last(at(order)),
        in_order=_in_order(job),
        trials=job.tuning.trials,
        shape=job.tuning.repeats.shape,
    )


def _line(
    name: str,
    asked: _Asked,
    order: int,
    budget: int,
    remaining: int,
    delta: float,
    choose: Callable[[float], int] | None,
) -> Line:
    """`choose`: ε → the order that an account made with it would get; None where the account is made."""
    prices = asked.prices(order)
    mean, most = math.ceil(sum(prices) / len(prices)), max(prices)
    trials = len(prices) if asked.in_order else asked.trials
    final = asked.final_cost(order)
    whole, select = asked.filter_cost(order, trials), asked.select_cost(order, asked.trials)

    def epsilon(cost: int | None) -> float | None:
        return None if cost is None else epsilon_of(cost, delta, order)

    def left(cost: int | None) -> float | None:
        return None if cost is None or cost > remaining else (remaining - cost) / budget

    def least(cost: Callable[[int], int | None]) -> float | None:
        if choose is not None:
            return _least_of_new(cost, delta, choose)
        alone = cost(order)
        return None if alone is None else _least(budget - remaining + alone, delta, order)

    if asked.in_order:
        fit = at_least = _fit_in_order(prices, remaining - final)
    else:
        fit, at_least = (max(0, remaining - final) // one for one in (mean, most))
    return Line(
        account=name,
        order=order,
        budget_cost=budget,
        remaining_cost=remaining,
        trial_cost=mean,
        trial_cost_least=min(prices),
        trial_cost_most=most,
        trials_that_fit=fit,
        trials_that_fit_least=at_least,
        final_cost=final,
        filter_cost=whole,
        filter_exact=(asked.in_order or min(prices) == most)
        and len({price(one, order) for one in asked.last(order)}) < 2,
        filter_epsilon=epsilon_of(whole, delta, order),
        filter_left=left(whole),
        filter_least_epsilon=least(lambda at: _or_none(lambda: asked.filter_cost(at, trials))),
        filter_fits=whole <= remaining,
        select_cost=select,
        select_epsilon=epsilon(select),
        select_left=left(select),
        select_least_epsilon=least(lambda at: asked.select_cost(at, asked.trials)),
        select_fits=select is not None and select <= remaining,
        select_trials_that_fit=None if select is None else _mean_that_fits(asked, order, remaining),
        select_unpriced=asked.why_unpriced() if select is None else None,
        curve=tuple(
            Point(n, epsilon_of(asked.filter_cost(order, n), delta, order), epsilon(asked.select_cost(order, n)))
            for n in sizes(asked.trials)
        ),
    )


def _or_none(cost: Callable[[], int]) -> int | None:
    try:
        return cost()
    except UsageError:  # one run alone is beyond what the ledger can hold
        return None


def _fit_in_order(prices: Sequence[int], remaining: int) -> int:
    """How many trials are admitted one after the other, where those that no longer fit are passed over."""
    fit = 0
    for one in prices:
        if one <= remaining:
            remaining, fit = remaining - one, fit + 1
    return fit


def _mean_that_fits(asked: _Asked, order: int, remaining: int) -> int:
    """The largest mean of K, up to MOST_TRIALS, whose selection fits; its price rises with the mean."""
    low, high = 0, MOST_TRIALS
    while low < high:
        middle = (low + high + 1) // 2
        cost = asked.select_cost(order, middle)
        low, high = (middle, high) if cost is not None and cost <= remaining else (low, middle - 1)
    return low


def _least(cost: int, delta: float, order: int) -> float | None:
    """The least ε, in thousandths, whose budget at `order` holds `cost`; None if that is more than may be granted."""
    thousandths = max(1, math.floor(epsilon_of(cost, delta, order) * 1000))
    while thousandths <= MOST_EPSILON * 1000:
        if budget_cost(thousandths / 1000, delta, order) >= cost:
            return thousandths / 1000
        thousandths += 1
    return None


def _least_of_new(cost: Callable[[int], int | None], delta: float, choose: Callable[[float], int]) -> float | None:
    """The least ε with which an account could be made so that `cost` (order → cost, None: no price) fits it.

    The order is chosen anew for each ε, and not for this job alone, so that it need not be the one at which the job
    would be cheapest. Up from the ε of the best order, below which nothing fits, until it fits; then down again for as
    long as it does.
    """

    @functools.cache
    def need(order: int) -> float | None:
        one = cost(order)
        return None if one is None else _least(one, delta, order)

    bounds = [least for least in map(need, orders.CANDIDATES) if least is not None]
    if not bounds:
        return None
    epsilon = min(bounds)
    while (least := need(choose(epsilon))) is None or least > epsilon:
        if epsilon >= MOST_EPSILON:
            return None
        epsilon = least if least is not None else min(2 * epsilon, MOST_EPSILON)
    while least < epsilon:
        further = need(choose(least))
        if further is None or further > least:
            break
        epsilon, least = least, further
    return epsilon


def _chooser(job: SweepJob, plans: Sequence[Charge]) -> Callable[[float], int]:
    """ε → the order that the books would give to an account made with it for these plans."""

    @functools.cache
    def choose(epsilon: float) -> int:
        return orders.choose(orders.order_table(epsilon, job.privacy.delta, plans, job.tuning.trials))

    return choose
