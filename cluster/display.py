"""How the books look on a terminal: accounts, histories and order tables. Public numbers only; decides nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table

from cluster.accounting.books import Account
from cluster.accounting.costs import epsilon_text
from cluster.accounting.orders import OrderRow, choose


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


def account_card(account: Account, last_run_cost: int | None) -> Group:
    """One account in full, with what people ask for: how many more runs like the last one fit."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    budget, data = account.budget_cost, account.dataset
    unit = "row" if data.unit == "row" else f"value of {data.unit}"
    table.add_row("account", account.account)
    table.add_row(
        "guarantee", f"({account.epsilon:g}, {account.delta:g}) for each {unit}, for ever, at order {account.order}"
    )
    table.add_row("declared", f"{data.units} units, at most {data.max_records_per_unit} record(s) each")
    table.add_row("spent", f"{account.spent_cost / budget:.1%} of the budget")
    table.add_row("reserved", f"{account.reserved_cost / budget:.1%}")
    table.add_row("remaining", f"{account.remaining_cost / budget:.1%}")
    if last_run_cost:
        table.add_row("fits", f"{account.remaining_cost // last_run_cost} more runs like the last one")
    table.add_row("head", f"{account.head['seq']}:{account.head['hash']}")
    return Group(table)


def history_table(rows: Iterable[Mapping[str, Any]], budget: int) -> Table:
    """A bank statement: what was done, by whom, what it cost, what was spent in all."""
    table = Table("seq", "at", "what", "by", "steps", "cost", "spent", "reserved")
    for row in rows:
        table.add_row(
            str(row["seq"]),
            row["at"],
            row["kind"],
            row["lease"] or row["by"] or "",
            "" if row["steps"] is None else str(row["steps"]),
            f"{row['cost'] / budget:.2%}",
            f"{row['spent_after'] / budget:.1%}",
            f"{row['reserved_after'] / budget:.1%}",
        )
    return table


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
