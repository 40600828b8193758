"""What the books answer to a request, and how a refusal is said to people: plain facts, nothing is decided here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.accounting.books import Account


@dataclass(frozen=True)
class Shortage:
    """What one account lacks for a request, in units of cost."""

    account: str
    asked: int
    remaining: int
    reserved: int


@dataclass(frozen=True)
class Answer:
    """Whether a request fits. `may_fit_later`: others' reservations, if released, could still make room."""

    fits: bool
    shortages: tuple[Shortage, ...] = ()

    @property
    def may_fit_later(self) -> bool:
        """Whether releasing every reservation would be enough."""
        return all(s.asked <= s.remaining + s.reserved for s in self.shortages)


def explain(shortages: Sequence[Shortage], accounts: Sequence[Account]) -> str:
    """Say what was asked for, what remains, and what others hold, in ε-free units and shares of the budget."""
    said = []
    for shortage in shortages:
        budget = next(a.budget_cost for a in accounts if a.account == shortage.account)
        share = f"{shortage.asked / budget:.1%} of the budget was asked, {shortage.remaining / budget:.1%} remains"
        others = f" ({shortage.reserved / budget:.1%} is reserved by others)" if shortage.reserved else ""
        said.append(f"{shortage.account}: {share}{others}")
    return "; ".join(said)
