"""How plans and sweeps look on a terminal. Public and noised numbers only; decides nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group
from rich.table import Column, Table

from cluster.accounting.costs import epsilon_of
from training.metrics import figure
from tuning.curve import drawn, epsilon_for_people
from tuning.plan import MOST_EPSILON, MOST_TRIALS, Line, Plan

if TYPE_CHECKING:
    from tuning.trials import Trial


def plan_table(plan: Plan) -> Table:
    """What the job asks of each account: a column per partition, a section per mode. Costs are shares of the budget
    and rounded up, as every ε is; what is left is rounded down."""
    tuning, privacy, lines = plan.job.tuning, plan.job.privacy, plan.lines
    title = (
        f"{plan.job.account}: {_trials(tuning.trials)}, {tuning.search} search, {tuning.mode} mode, "
        f"under ε = {privacy.epsilon:g}, δ = {privacy.delta:g}"
    )
    heads = [Column(line.account.rpartition("/")[2]) for line in lines]
    table = Table(
        Column("share of the budget"), *heads, title=title, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left"
    )

    def row(label: str, value: Callable[[Line], str]) -> None:
        table.add_row(label, *map(value, lines))

    def cost(line: Line, one: int) -> str:
        return _percent(-(-one * 1000 // line.budget_cost))

    used = any(line.remaining_cost < line.budget_cost for line in lines)
    least = "least ε, with what is spent" if used else "least ε that is enough"
    if plan.job.evaluation.on == "public":
        table.caption = "Models are judged on public records, which costs nothing."
    row("order", lambda line: str(line.order))
    row("left before", lambda line: _left(line, 0))
    row("one trial costs", lambda line: _range(line, cost))
    table.add_section()
    table.add_row("[bold]filter: every trial charged[/]")
    if tuning.reserve_for_final:
        row("held for the final run", lambda line: cost(line, line.final_cost))
    and_final = ", and the final run," if tuning.reserve_for_final else ""
    row(f"{_all_trials(plan)}{and_final} cost", lambda line: f"{_at_most(line)}{cost(line, line.filter_cost)}")
    row("total ε", lambda line: f"{_at_most(line)}{epsilon_for_people(line.filter_epsilon)}")
    row("trials that fit", _fit)
    row("left afterwards", lambda line: _left(line, line.filter_cost))
    row(least, lambda line: _enough(line.filter_least_epsilon))
    table.add_section()
    table.add_row("[bold]select: the best of K released[/]")
    row("all, whatever K, cost", lambda line: _priced(line, lambda one: cost(line, one), f"{line.select_unpriced}"))
    row("total ε", lambda line: _priced(line, lambda _: epsilon_for_people(line.select_epsilon)))
    row("a trial, at the mean of K", lambda line: _priced(line, lambda one: cost(line, -(-one // tuning.trials))))
    row("largest mean of K that fits", lambda line: _priced(line, lambda _: _count(line.select_trials_that_fit)))
    row("left afterwards", lambda line: _priced(line, lambda one: _left(line, one)))
    row(least, lambda line: _priced(line, lambda _: _enough(line.select_least_epsilon)))
    table.add_row("K, in 99 of 100 sweeps", f"at most {plan.select_trials_p99:,}")
    return table


def plan_curve(plan: Plan) -> Group:
    """The curve of the account on which the job, in its mode, comes nearest to the end or goes furthest past it."""

    def used(line: Line) -> float:
        cost = line.select_cost if plan.job.tuning.mode == "select" else line.filter_cost
        return math.inf if cost is None or line.remaining_cost <= 0 else cost / line.remaining_cost

    line = max(plan.lines, key=used)
    left = epsilon_of(line.remaining_cost, plan.job.privacy.delta, line.order)
    return drawn(line.curve, plan.job.tuning.trials, left, line.account)


def plan_verdict(plan: Plan) -> str:
    """One sentence: does the job fit in its mode, and what else would?"""
    tuning, lines = plan.job.tuning, plan.lines
    said = plan.as_json()
    fits = {"filter": all(line.filter_fits for line in lines), "select": all(line.select_fits for line in lines)}
    ways = []
    if tuning.mode == "filter":
        other, least_epsilon = "select", said["filter_least_epsilon"]
        costs = [line.filter_cost for line in lines]
        fit = f"{min(line.trials_that_fit_least for line in lines):,} of {_trials(plan.filter_trials)} fit"
        exact = all(line.filter_exact for line in lines)
        what = fit if exact else f"{fit} if the dearest are drawn, about {said['trials_that_fit']:,} at the mean price"
    else:
        other, least_epsilon = "filter", said["select_least_epsilon"]
        costs = [line.select_cost or 0 for line in lines]
        what = f"a selection among {_trials(tuning.trials)} in the mean would be refused"
        if said["select_trials_that_fit"]:
            ways.append(f"tuning.trials={said['select_trials_that_fit']}")
    if fits[tuning.mode]:
        left = min(_left_thousandths(line, cost) for line, cost in zip(lines, costs, strict=True))
        return f"[green]It fits[/]: {_percent(left)} or more of each budget is left afterwards."
    if fits[other]:
        ways.append(f"tuning.mode={other}")
    if least_epsilon is not None and not plan.exists:
        ways.append(f"privacy.epsilon={_enough(least_epsilon)}")
    offer = f" What would fit: {', or '.join(ways)}." if ways else ""
    return f"[yellow]Not all of it fits[/]: {what}.{offer}"


def _trials(number: int) -> str:
    return f"{number:,} trial{'s' * (number != 1)}"


def _all_trials(plan: Plan) -> str:
    ended = plan.filter_trials < plan.job.tuning.trials
    return f"{_trials(plan.filter_trials)}{' (the whole grid)' * ended}"


def _percent(thousandths: int) -> str:
    return f"{thousandths // 10:,}.{thousandths % 10}%"


def _range(line: Line, cost: Callable[[Line, int], str]) -> str:
    least, mean, most = (cost(line, one) for one in (line.trial_cost_least, line.trial_cost, line.trial_cost_most))
    return mean if least == most else f"{least} to {most}"


def _left(line: Line, cost: int) -> str:
    """What is left of the budget after `cost`; a negative share is never shown."""
    left = _left_thousandths(line, cost)
    return "[yellow]does not fit[/]" if left < 0 else _percent(left)


def _left_thousandths(line: Line, cost: int) -> int:
    return (line.remaining_cost - cost) * 1000 // line.budget_cost


def _at_most(line: Line) -> str:
    return "" if line.filter_exact else "at most "


def _fit(line: Line) -> str:
    if line.filter_exact:
        return f"{line.trials_that_fit:,}"
    return f"{line.trials_that_fit_least:,} at least, about {line.trials_that_fit:,}"


def _enough(epsilon: float | None) -> str:
    return f"above {MOST_EPSILON:g}" if epsilon is None else f"{epsilon:.3f}"  # it is in thousandths already


def _count(number: int | None) -> str:
    return f"{number:,}{' or more' * (number >= MOST_TRIALS)}" if number is not None else "–"


def _priced(line: Line, text: Callable[[int], str], otherwise: str = "–") -> str:
    """`text` of the selection's cost, or what to say where it has no price."""
    return f"[yellow]{otherwise}[/]" if line.select_cost is None else text(line.select_cost)


def sweep_table(trials: Sequence[Trial], best: Trial | None, budget_cost: int) -> Table:
    """Every trial: its values, how it ended, what it was charged, what was released of it."""
    names = list(dict.fromkeys(name for trial in trials for name in trial.values))
    # Narrow heads over values that are never broken, so that a terminal of 80 columns shows all of it.
    heads = [
        "trial",
        *(name.rpartition(".")[2].replace("_", "\n") for name in names),
        "status",
        "steps",
        "cost",
        trials[0].job.evaluation.metric if trials else "accuracy",
    ]
    columns = [Column(head, no_wrap=True) for head in heads]
    table = Table(*columns, title="The sweep", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for trial in trials:
        steps = trial.charges.steps if trial.charges else 0
        cost = trial.charges.cost if trial.charges else 0
        colour = {"completed": "green", "refused": "yellow", "failed": "red"}.get(trial.outcome.status, "white")
        table.add_row(
            trial.label + (" ★" if trial is best else ""),
            *(
                f"{trial.values[name]:g}" if isinstance(trial.values[name], float) else str(trial.values[name])
                for name in names
            ),
            f"[{colour}]{trial.outcome.status}[/]",
            f"{steps}/{trial.job.training.steps}",
            f"{cost / budget_cost:.1%}",
            str(figure(trial.outcome.metrics) or ""),
        )
    return table
