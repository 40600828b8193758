"""How plans and sweeps look on a terminal. Public and noised numbers only; decides nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.table import Column, Table

from tuning.plan import Plan

if TYPE_CHECKING:
    from tuning.trials import Trial


def plan_table(plan: Plan) -> Table:
    """Per account: the price of a trial, how many fit, and the ε of the whole in both modes."""
    trials = plan.job.tuning.trials
    privacy = plan.job.privacy
    title = f"{plan.job.account}: {trials} trials under ε = {privacy.epsilon:g}, δ = {privacy.delta:g}"
    table = Table(
        "account",
        "order",
        "left",
        "a trial costs",
        "trials that fit",
        "ε of all, filter",
        "ε of all, select",
        title=title,
    )
    for line in plan.lines:
        least, mean, most = (
            f"{cost / line.budget_cost:.1%}" for cost in (line.trial_cost_least, line.trial_cost, line.trial_cost_most)
        )
        table.add_row(
            line.account,
            str(line.order),
            f"{line.remaining_cost / line.budget_cost:.1%}",
            mean if least == most else f"{least} to {most}, mean {mean}",
            str(line.trials_that_fit),
            f"{line.filter_epsilon:.2f}",
            f"{line.select_epsilon:.2f}",
        )
    return table


def sweep_table(trials: Sequence[Trial], best: Trial | None, budget_cost: int) -> Table:
    """Every trial: its values, how it ended, what it was charged, its noised accuracy."""
    names = list(dict.fromkeys(name for trial in trials for name in trial.values))
    # Narrow heads over values that are never broken, so that a terminal of 80 columns shows all of it.
    heads = [
        "trial",
        *(name.rpartition(".")[2].replace("_", "\n") for name in names),
        "status",
        "steps",
        "cost",
        "accuracy",
    ]
    columns = [Column(head, no_wrap=True) for head in heads]
    table = Table(*columns, title="The sweep", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for trial in trials:
        metrics = trial.outcome.metrics
        steps = trial.charges.steps if trial.charges else 0
        cost = trial.charges.cost if trial.charges else 0
        colour = {"completed": "green", "refused": "yellow", "failed": "red"}.get(trial.outcome.status, "white")
        table.add_row(
            f"{trial.number}" + (" ★" if trial is best else ""),
            *(
                f"{trial.values[name]:g}" if isinstance(trial.values[name], float) else str(trial.values[name])
                for name in names
            ),
            f"[{colour}]{trial.outcome.status}[/]",
            f"{steps}/{trial.job.training.steps}",
            f"{cost / budget_cost:.1%}",
            f"{metrics['accuracy']:.3f} ± {metrics['accuracy_error']:.3f}" if metrics else "",
        )
    return table
