"""The report of a sweep: one HTML page that a browser shows without network and a printer prints.

A pure function of public facts: candidates as declared, charges and heads as the ledger has them, noised metrics by
name (any other is left out, whoever put it there: P13). It decides nothing, and every ε is the books' own (P14).
"""

from __future__ import annotations

import importlib.metadata
import math
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.accounting.books import Account
from cluster.accounting.costs import epsilon_text
from cluster.errors import PurserError
from cluster.files import write_whole
from training.claims import EXCLUDED
from training.metrics import figure, in_words
from training.page import Markup, Point, chart, definitions, headed, items, table, tag, whole
from training.rendering import exact, section, share, unit_of, words
from training.reporting import REPORT
from training.statement import LIBRARIES

if TYPE_CHECKING:
    from training.statement import Statement
    from tuning.trials import Trial

_NONE = "–"


def write_report(folder: Path, page: str) -> Path:
    """Write `page` to the sweep's `folder`, whole or not at all; returns its path."""
    return write_whole(folder / REPORT, page)


def sweep_report(
    name: str,
    before: Sequence[Account],
    after: Sequence[Account],
    trials: Sequence[Trial],
    best: Trial | None,
    statement: Statement | None = None,
    why: str = "",
    final: Trial | None = None,
    selection: Sequence[tuple[str, object]] = (),
) -> str:
    """The page of the sweep called `name`.

    Args:
        before: the job's accounts, train first, as they stood when the command began. A resumed sweep had spent already
            then, which is told apart by the ledger's entry numbers.
        after: the same accounts as they stand now, read after the trials' charges were.
        trials: every candidate, with `charges` where the ledger knows its lease.
        best: the one that was released, or None.
        statement: what is said of its privacy, or None.
        why: a sentence on why trials did not run, or empty.
        final: the final run of the best, where there is one.
        selection: for select mode, the facts of the selection in place of any trial's: `trials` then is what was paid
            for as a whole, with the winner's values if there is one.

    Raises:
        PurserError: the accounts and the trials' charges contradict each other, so that a page would be wrong.
    """
    shown = [*trials, final] if final else list(trials)
    splits = [_split(old, new, shown) for old, new in zip(before, after, strict=True)]
    train = after[0]
    return whole(
        f"Privacy report of sweep {name}",
        *_summary(train, trials, best, splits, why, bool(selection)),
        tag("p", _promise(train), class_="promise"),
        headed("Budget", *(_account(*one) for one in zip(before, after, splits, strict=True))),
        headed("The selection", definitions(selection)) if selection else "",
        "" if selection else headed("Utility against cost", _figure(trials, best, train)),
        "" if selection else headed("Trials", _trials(after, shown, best), _shared(trials)),
        headed("Privacy statement of the released model", *_statement(statement)),
        headed("The ledger’s heads", *_heads(before, after)),
        headed("Not covered", items(f"{line}." for line in (statement.excluded if statement else EXCLUDED))),
        headed("Libraries", tag("p", words(_libraries(statement)), ".")),
    )


@dataclass(frozen=True)
class _Split:
    """Where one account's budget is, in units of cost. `resumed`: the part of `mine` from before the command began."""

    before: int
    mine: int
    others: int
    held: int
    left: int
    resumed: int


def _split(before: Account, after: Account, trials: Sequence[Trial]) -> _Split:
    entries = [e for trial in trials if trial.charges for e in trial.charges.entries.get(after.account, ())]
    mine = sum(entry["cost"] for entry in entries)
    resumed = sum(entry["cost"] for entry in entries if entry["seq"] <= before.head["seq"])
    elsewhere = before.spent_cost - resumed
    others = after.spent_cost - elsewhere - mine
    if before.account != after.account or min(elsewhere, others, after.remaining_cost) < 0:
        raise PurserError(
            f"report: {after.account} and the charges of this sweep contradict each other, so no report was written; "
            f"run purser budget verify {after.account}."
        )
    return _Split(elsewhere, mine, others, after.reserved_cost, after.remaining_cost, resumed)


def _best(best: Trial) -> str:
    """What was released of the best, with what its error bar means. By name: no other metric is shown."""
    return f"{in_words(best.outcome.metrics) or _NONE} ({best.job.evaluation.error})."


def _summary(
    train: Account, trials: Sequence[Trial], best: Trial | None, splits: Sequence[_Split], why: str, selection: bool
) -> list[Markup]:
    spent = f"This sweep spent {share(splits[0].mine, train.budget_cost)} of the budget of {train.account}."
    if selection:
        nothing = "Nothing is released, as may happen by chance."
        found = f"Best: {_best(best)}" if best else nothing
        opening = f"A private selection on dataset {train.dataset.name}. {spent}"
        return [tag("p", line) for line in (opening, found, why) if line]
    counts = Counter(trial.outcome.status for trial in trials)
    ended = ", ".join(f"{count} {status}" for status, count in counts.items()) or "none"
    lines = [f"{len(trials)} trial{'s' * (len(trials) != 1)} on dataset {train.dataset.name}: {ended}. "]
    lines[0] += spent
    if best is not None:
        lines.append(f"Best: trial {best.number}, {_best(best)}")
    else:
        lines.append("No trial has a model to release.")
    return [tag("p", line) for line in (*lines, why) if line]


def _promise(train: Account) -> str:
    epsilon, delta, unit = exact(train.epsilon), exact(train.delta), unit_of(train.dataset.unit)
    factor = f"{math.floor(math.exp(train.epsilon) * 100 + 1) / 100:,.2f} (e^ε)" if train.epsilon < 10 else "e^ε"
    return (
        f"What is guaranteed: everything ever released from dataset {train.dataset.name} through this ledger, every "
        f"trial, metric and model and this page, is ({epsilon}, {delta})-differentially private for each {unit}. In "
        f"plain words: whether one {unit} was in the data or not changes the probability of any conclusion from all of "
        f"it by a factor of at most {factor}, plus at most {delta}. Work that this budget could not pay for "
        "was refused, not run. What the guarantee leaves out stands under “Not covered”."
    )


def _account(before: Account, after: Account, split: _Split) -> Markup:
    budget = after.budget_cost
    parts = [
        ("before", "other work, before", split.before),
        ("mine", "this sweep", split.mine),
        ("others", "other work, meanwhile", split.others),
        ("held", "reserved", split.held),
        ("left", "left", split.left),
    ]
    shown = [part for part in parts if part[2] or part[0] in ("mine", "left")]
    said = [f"{label} {share(cost, budget)}" for _, label, cost in shown]
    bar, at = [], 0
    for kind, _, cost in shown:
        place = {"x": f"{1000 * at / budget:.3f}", "width": f"{1000 * cost / budget:.3f}"}
        bar.append(tag("rect", class_=kind, **place, y=0, height=10))
        at += cost
    swatch = [tag("svg", tag("rect", class_=kind, width=8, height=8), viewBox="0 0 8 8") for kind, _, _ in shown]
    legend = (tag("span", mark, text) for mark, text in zip(swatch, said, strict=True))
    rows = [
        [word, *(share(getattr(account, field), budget) for account in (before, after))]
        for word, field in (("spent", "spent_cost"), ("reserved", "reserved_cost"), ("left", "remaining_cost"))
    ]
    so_far = [epsilon_text(account.epsilon_of(account.spent_cost)) for account in (before, after)]
    alone = (
        f"This sweep’s cost is {split.mine:,} of {budget:,} (in 1e-12 RDP at order {after.order}); indicative ε of it "
        f"alone {epsilon_text(after.epsilon_of(split.mine))}. Indicative figures do not add up: the budget bounds all."
    )
    if split.resumed:
        alone += f" The sweep was resumed; {share(split.resumed, budget)} of the budget it had spent before that."
    return tag(
        "section",
        tag("h3", after.account),
        tag("p", f"Budget: ε = {exact(after.epsilon)}, δ = {exact(after.delta)}, order {after.order}", class_="soft"),
        tag(
            "svg",
            *bar,
            class_="bar",
            viewBox="0 0 1000 10",
            preserveAspectRatio="none",
            role="img",
            aria_label="; ".join(said),
        ),
        items(legend, class_="legend"),
        table(["of the budget", "before", "after"], [*rows, ["indicative ε so far", *so_far]], kind="small"),
        tag("small", alone),
        class_="account",
    )


def _figure(trials: Sequence[Trial], best: Trial | None, train: Account) -> Markup:
    points = []
    for trial in trials:
        if (found := figure(trial.outcome.metrics)) and trial.charges:
            cost, most = trial.charges.cost, trial.job.evaluation.most
            points.append(
                Point(trial.number, cost, cost / train.budget_cost, found.value, found.error, trial is best, most)
            )
    if not points:
        return tag("p", "No trial released a metric, so there is nothing to draw.")
    evaluation = trials[0].job.evaluation
    private = evaluation.on == "validation"
    said = (
        f"Each point is a trial under its number in the table; trials of equal cost stand side by side. Bars: "
        f"{evaluation.error}{', not the chance of which records were judged' if private else ''}. The best of several "
        f"{'noised ' if private else ''}numbers tends to look a little better than it is."
    )
    if missing := len(trials) - len(points):
        said += f" Not drawn, as no metric was released: {missing} trial{'s' * (missing != 1)}."
    drawn = chart(points, f"cost, as a share of the budget of {train.account}", evaluation.measured)
    return tag("figure", drawn, tag("figcaption", said))


def _trials(accounts: Sequence[Account], trials: Sequence[Trial], best: Trial | None) -> Markup:
    names = list(dict.fromkeys(name for trial in trials for name in trial.values))
    lasts = [name.rpartition(".")[2] for name in names]
    searched = [
        last.replace("_", " ") if lasts.count(last) == 1 else name for name, last in zip(names, lasts, strict=True)
    ]
    costs = [f"cost, {account.account.rpartition('/')[2]}" for account in accounts]
    rows = []
    for trial in trials:
        entries = trial.charges.entries if trial.charges else {}
        spent = [sum(entry["cost"] for entry in entries.get(account.account, ())) for account in accounts]
        status, why = trial.outcome.status, trial.outcome.why
        colour = {"class_": status} if status in ("completed", "stopped", "refused", "failed") else {}
        rows.append(
            [
                tag("span", f"{trial.label} ★ best", class_="whole") if trial is best else trial.label,
                *(_value(trial.values.get(name, _NONE)) for name in names),
                Markup(tag("span", status, **colour) + (tag("small", why) if why else "")),
                f"{trial.charges.steps if trial.charges else 0} of {trial.job.training.steps}",
                *(share(cost, account.budget_cost) for cost, account in zip(spent, accounts, strict=True)),
                tag("span", str(figure(trial.outcome.metrics) or _NONE), class_="whole"),
            ]
        )
    marked = next((row for row, trial in enumerate(trials) if trial is best), None)
    metric = trials[0].job.evaluation.metric if trials else "accuracy"
    return table(["trial", *searched, "status", "steps charged", *costs, metric], rows, marked)


def _value(value: object) -> object:
    """A searched value; where it is rounded, the whole of it shows on pointing at it."""
    said = words(value)
    return tag("span", said, title=value) if isinstance(value, float) and float(said) != value else said


def _shared(trials: Sequence[Trial]) -> Markup:
    """What was not searched, from the declared sections that describe a run."""
    if not trials:
        return Markup()
    evaluation = trials[0].job.evaluation
    idle = {"source", "noise"} if evaluation.on == "public" else {"source"}
    idle |= set() if evaluation.metric == "loss" else {"loss_bound"}
    declared = trials[0].job.model_dump(
        mode="json", include={"model", "training", "evaluation"}, exclude={"evaluation": idle}, exclude_none=True
    )
    flat = dict(_flat("", declared))
    same = (f"{name} {words(value)}" for name, value in flat.items() if name not in trials[0].values)
    return tag("p", tag("small", "The same in every trial: ", "; ".join(same), "."))


def _flat(prefix: str, section: Mapping[str, Any]) -> Iterable[tuple[str, object]]:
    for name, value in section.items():
        if isinstance(value, Mapping):
            yield from _flat(f"{prefix}{name}.", value)
        else:
            yield f"{prefix}{name}", value


def _statement(said: Statement | None) -> list[Markup]:
    if said is None:
        return [tag("p", "Nothing was released by this sweep, so there is no statement.")]
    return section(said)


def _heads(before: Sequence[Account], after: Sequence[Account]) -> list[Markup]:
    rows = [
        [new.account, *(tag("code", f"{one.head['seq']}:{one.head['hash']}") for one in (old, new))]
        for old, new in zip(before, after, strict=True)
    ]
    checks = (
        tag("code", f"purser budget verify {shlex.quote(one.account)} --head {one.head['seq']}:{one.head['hash']}")
        for one in after
    )
    kept = "Keep this page apart from the ledger: a head finds any later change of the entries before it."
    return [table(["account", "before", "after"], rows), tag("p", kept), items(checks)]


def _libraries(said: Statement | None) -> Mapping[str, str]:
    if said is not None:
        return said.accounting.libraries
    return {name: importlib.metadata.version(name) for name in LIBRARIES}
