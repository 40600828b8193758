"""How the books look on a terminal: accounts, histories and order tables. Public numbers only; decides nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table

from cluster.accounting.books import Account
from cluster.accounting.costs import epsilon_text
from cluster.accounting.leases import Hold
from cluster.accounting.mechanisms import PoissonSubsampledGaussian
from cluster.accounting.orders import OrderRow, choose
from cluster.accounting.verify import EFFECTS

_BAR = 24  # characters of a bar
_HOLDS = 10  # leases that are listed one by one


def accounts_table(accounts: Sequence[Account]) -> Table:
    """One line per account: its budget and where it stands."""
    table = Table("account", "ε", "δ", "order", "spent", "reserved", "remaining", "indicative ε so far")
    for account in accounts:
        budget = account.budget_cost
        table.add_row(
            account.account,
            f"{account.epsilon:g}",
            f"{account.delta:g}",
            str(account.order),
            f"{account.spent_cost / budget:.1%}",
            f"{account.reserved_cost / budget:.1%}",
            f"{account.remaining_cost / budget:.1%}",
            epsilon_text(account.epsilon_of(account.spent_cost)),
        )
    return table


def account_card(account: Account, last_run: tuple[str, int] | None, holds: Sequence[Hold]) -> Group:
    """One account in full, with what people ask for: who holds what, and how many more runs like the last one fit."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    budget, data = account.budget_cost, account.dataset
    unit = "row" if data.unit == "row" else f"value of {data.unit}"
    table.add_row("account", f"[bold]{account.account}[/]")
    table.add_row(
        "guarantee", f"({account.epsilon:g}, {account.delta:g}) for each {unit}, for ever, at order {account.order}"
    )
    table.add_row("declared", f"{data.units} units, at most {data.max_records_per_unit} record(s) each")
    so_far = epsilon_text(account.epsilon_of(account.spent_cost))
    table.add_row("spent", f"{_share(account.spent_cost, budget)}  (indicative ε so far {so_far})")
    table.add_row("reserved", _share(account.reserved_cost, budget))
    for hold in holds[:_HOLDS]:
        table.add_row("", f"  {hold.reserved_cost / budget:.1%} by {hold.lease}{_of(hold)}")
    if len(holds) > _HOLDS:
        table.add_row("", f"  and {len(holds) - _HOLDS} more")
    table.add_row("remaining", _share(account.remaining_cost, budget))
    if last_run is not None:
        fit = account.remaining_cost // last_run[1]
        table.add_row("fits", f"{fit} more run{'s' * (fit != 1)} like the last one, {last_run[0]}")
    table.add_row("head", f"{account.head['seq']}:{account.head['hash']}")
    return Group(table)


def _share(cost: int, budget: int) -> str:
    filled = math.ceil(_BAR * cost / budget)
    return f"{cost / budget:6.1%}  {'█' * filled}{'░' * (_BAR - filled)}"


def _of(hold: Hold) -> str:
    return "" if hold.by == hold.lease else f" (of {hold.by})"


def history_table(rows: Iterable[Mapping[str, Any]], budget: int) -> Table:
    """A bank statement: what was done, for which run, what it spent or held, and the balance after it."""
    table = Table("seq", "at (UTC)", "what", "run", "spent", "held", "balance")
    for column in table.columns[4:]:
        column.justify = "right"
    for row in rows:
        to_spent, to_reserved = (sign * row["cost"] / budget for sign in EFFECTS.get(row["kind"], (0, 0)))
        table.add_row(
            str(row["seq"]),
            row["at"].removesuffix("+00:00").replace("T", " "),
            _what(row, budget),
            row["lease"] or "",
            f"{to_spent:.2%}" if to_spent else "",
            f"{to_reserved:+.2%}" if to_reserved else "",
            f"{(budget - row['spent_after'] - row['reserved_after']) / budget:.2%}",
        )
    return table


def _what(row: Mapping[str, Any], budget: int) -> str:
    """One entry in words."""
    body = row["body"]
    match row["kind"]:
        case "account":
            return f"account opened with ({body['epsilon']:g}, {body['delta']:g}) at order {body['order']}"
        case "source":
            return "a source was bound to it"
        case "reserve":
            return f"reserved {_work(row)}"
        case "refuse":
            asked, left = row["cost"] / budget, body["remaining"] / budget
            return f"[yellow]refused[/] {_work(row)}: {asked:.1%} asked, {left:.1%} left"
        case "open":
            return f"attempt {row['attempt']} began"
        case "authorise":
            return _work(row)
        case "settle" | "release" | "expire":
            return f"{row['kind']}d: {body['status']}"
        case other:
            return str(other)


def _work(row: Mapping[str, Any]) -> str:
    mechanism, steps = row["mechanism"] or {}, row["steps"]
    if mechanism.get("kind") == PoissonSubsampledGaussian.kind:
        sigma, rate = mechanism["noise_multiplier"], mechanism["sample_rate"]
        return f"{steps} step{'s' * (steps != 1)} of DP-SGD, noise multiplier {sigma:g}, sample rate {rate:.3g}"
    name = str(mechanism.get("kind", "work")).replace("_", " ")
    return name if steps == 1 else f"{steps} × {name}"


def order_table(account: str, rows: Sequence[OrderRow]) -> Table:
    """Which order of Rényi divergence the account will keep for ever, among its neighbours."""
    best = choose(rows)
    at = next(i for i, row in enumerate(rows) if row.order == best)
    table = Table("order", "runs that fit", "select fits", "worst case against best", title=f"{account}: order {best}")
    for row in rows[max(0, at - 3) : at + 4]:
        most, least = row.runs_that_fit
        table.add_row(
            f"[bold]{row.order}[/]" if row.order == best else str(row.order),
            str(most) if most == least else f"{least} to {most}",
            "yes" if row.select_fits else "no",
            f"{row.worst_ratio:.0%}",
        )
    return table
