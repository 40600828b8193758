"""How the ε of a job grows with the number of its trials, in both modes: the points, and their picture on a terminal.

Prices come from the plan; nothing is priced here. Trials run downwards and ε to the right, so that each point stands
beside its exact numbers and eighty columns are enough.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Group
from rich.text import Text

from cluster.accounting.costs import epsilon_text

FILTER, SELECT, BOTH, LEFT = "●", "○", "◉", "┊"
WIDTH = 50  # characters from the least ε to the largest
_MOST_ROWS = 9
_LEAST = 1e-3  # ε below this are drawn as this


@dataclass(frozen=True)
class Point:
    """The ε that the books charge for `trials` trials, and for one selection among `trials` in the mean; None where
    that selection has no price."""

    trials: int
    filter_epsilon: float
    select_epsilon: float | None


def sizes(trials: int) -> list[int]:
    """1, 2, 4, … up to the first that is four times `trials` or more, and `trials` itself; ascending."""
    powers = [2**i for i in range((4 * trials - 1).bit_length() + 1)]
    return sorted({*powers, trials})


def highest(curves: Sequence[Sequence[Point]]) -> list[Point]:
    """The larger ε of several curves over the same numbers of trials, one by one."""
    return [
        Point(points[0].trials, max(p.filter_epsilon for p in points), largest([p.select_epsilon for p in points]))
        for points in zip(*curves, strict=True)
    ]


def largest(values: Sequence[float | None]) -> float | None:
    """The largest of `values`; None, which is no number at all, is larger than any."""
    known = [value for value in values if value is not None]
    return max(known) if len(known) == len(values) else None


def epsilon_for_people(epsilon: float | None) -> str:
    """An ε that is never below what is charged: three decimals, a whole number from 100 on, two digits from a million
    on; a dash for none."""
    if epsilon is None:
        return "–"
    if epsilon < 100:
        return epsilon_text(epsilon)
    number = math.ceil(epsilon)
    if number < 1_000_000:
        return f"{number:,}"
    last = 10 ** (len(str(number)) - 2)
    return f"{-(-number // last) * last:.1e}"


def drawn(points: Sequence[Point], planned: int, left: float, name: str) -> Group:
    """The curve as at most twelve lines.

    Args:
        points: ascending in their trials; of many, every other one is left out until they fit.
        planned: the number of trials whose line stands out.
        left: the ε that what is left of the account comes to. Whatever is drawn to its right does not fit.
        name: the account, for the headline.
    """
    shown = _thinned(points, planned)
    scale = _Scale([e for p in shown for e in (p.filter_epsilon, p.select_epsilon) if e is not None] + [left])
    head = Text(f"ε of so many trials on {name}: ")
    head.append(f"{FILTER} filter  {SELECT} select  {LEFT} what is left")
    return Group(
        head,
        Text(f"{'trials':>7} {'filter':>8} {'select':>8}", style="bold"),
        *(_row(point, scale, left, point.trials == planned) for point in shown),
        Text(" " * 27 + scale.axis()),
    )


def _thinned(points: Sequence[Point], planned: int) -> list[Point]:
    shown = list(points)
    while len(shown) > _MOST_ROWS:
        powers = [point for point in shown if point.trials != planned]
        kept = powers[::-2]
        shown = sorted([*kept, *(p for p in shown if p.trials == planned)], key=lambda point: point.trials)
    return shown


class _Scale:
    """Columns for ε, by its logarithm."""

    def __init__(self, values: Sequence[float]) -> None:
        self.low = max(_LEAST, min((value for value in values if value > 0), default=_LEAST))
        self.high = max(self.low * 1.01, *values)

    def column(self, epsilon: float) -> int:
        share = math.log(max(epsilon, self.low) / self.low) / math.log(self.high / self.low)
        return round(share * (WIDTH - 1))

    def axis(self) -> str:
        """The numbers 1, 2, 5, 10, … under their columns, as far as there is room for them."""
        line = ""
        for value in _round_numbers(self.low, self.high):
            label, at = f"{value:g}", self.column(value)
            at -= len(label) // 2
            if at >= len(line) + bool(line):
                line = f"{line:<{at}}{label}"
        return line


def _round_numbers(low: float, high: float) -> Iterator[float]:
    for exponent in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        for digit in (1, 2, 5):
            value = float(f"{digit}e{exponent}")
            if low <= value <= high:
                yield value


def _row(point: Point, scale: _Scale, left: float, planned: bool) -> Text:
    row = Text(style="bold" if planned else "")
    row.append(f"{point.trials:>7,} {epsilon_for_people(point.filter_epsilon):>8} ")
    row.append(f"{epsilon_for_people(point.select_epsilon):>8}  ")
    mark = min(scale.column(left), WIDTH - 1)
    cells = {mark: (LEFT, "dim")}
    for epsilon, glyph in ((point.filter_epsilon, FILTER), (point.select_epsilon, SELECT)):
        if epsilon is None:
            continue
        fits = epsilon <= left
        # Which side of the mark a point is on is the answer to a question; rounding to a column may not change it.
        at = min(scale.column(epsilon), mark - 1) if fits else max(scale.column(epsilon), mark + 1)
        at = max(0, at)
        glyph = BOTH if cells.get(at, ("",))[0] == FILTER else glyph
        cells[at] = (glyph, "green" if fits else "red")
    for at in range(max(cells) + 1):
        row.append(*cells.get(at, (" ", "")))
    return row
