"""The picture of a curve: it stays within its lines and columns, and no point is on the wrong side of what is left."""

from __future__ import annotations

import math

import pytest
from rich.console import Console

from tuning.curve import BOTH, FILTER, LEFT, SELECT, Point, drawn, epsilon_for_people, highest, largest, sizes


def lines_of(points, planned, left):
    console = Console(width=80, highlight=False)
    with console.capture() as capture:
        console.print(drawn(points, planned, left, "digits/train"))
    return capture.get().splitlines()


def curve(trials, step=0.3, select=True):
    return [Point(n, step * n, 2 + math.log(n) if select else None) for n in sizes(trials)]


@pytest.mark.parametrize("trials", [1, 2, 3, 8, 10, 64, 100, 10_000])
def test_sizes_reach_four_times_the_trials(trials):
    numbers = sizes(trials)
    assert numbers[0] == 1
    assert trials in numbers
    assert 4 * trials <= numbers[-1] < 8 * trials
    assert numbers == sorted(set(numbers))
    assert all(n == trials or n & (n - 1) == 0 for n in numbers)


@pytest.mark.parametrize("trials", [1, 8, 10, 64, 100, 10_000])
@pytest.mark.parametrize("left", [0.0, 1e-9, 2.9, 1e7])
@pytest.mark.parametrize("select", [True, False])
def test_it_stays_within_twelve_lines_and_eighty_columns(trials, left, select):
    lines = lines_of(curve(trials, 0.5, select), trials, left)
    assert len(lines) <= 12
    assert max(map(len, lines)) <= 80
    assert any(line.split()[0] == f"{trials:,}" for line in lines), "the planned number is never left out"


@pytest.mark.parametrize("left", [0.0, 0.33, 1.5, 2.0001, 2.9, 4.7999999, 50.0])
def test_a_point_is_left_of_the_mark_where_it_fits(left):
    """However near: without the push to its side, the points at 4.8 and 2 would share the mark's column."""
    points = curve(8)
    rows = {int(line.split()[0]): line for line in lines_of(points, 8, left)[2:-1]}
    for point in points:
        row = rows[point.trials][27:]
        for glyph, epsilon in ((FILTER, point.filter_epsilon), (SELECT, point.select_epsilon)):
            at = row.find(glyph) if glyph in row else row.index(BOTH)
            assert (at < row.index(LEFT)) == (epsilon <= left)


def test_without_a_price_there_is_a_dash_and_no_point():
    lines = lines_of(curve(8, select=False), 8, 3.0)
    assert all("–" in line and SELECT not in line and BOTH not in line for line in lines[2:-1])


def test_the_axis_is_true():
    """Each number on the axis stands under the points of that ε."""
    points = [Point(1, 1.0, None), Point(2, 10.0, None), Point(4, 100.0, None)]
    *rows, axis = lines_of(points, 1, 1.0)[3:]
    for row, number in zip(rows, ("10", "100"), strict=True):
        assert abs(row.index(FILTER) - axis.index(f" {number}") - 1 - len(number) // 2) <= 1


def test_a_point_that_is_nothing_can_be_drawn():
    assert lines_of([Point(1, 0.0, 0.0), Point(2, 0.0, 0.0)], 1, 0.0)


def test_the_higher_of_two_curves():
    one, other = [Point(1, 1.0, 5.0), Point(2, 2.0, None)], [Point(1, 3.0, 4.0), Point(2, 1.0, 9.0)]
    assert highest([one, other]) == [Point(1, 3.0, 5.0), Point(2, 2.0, None)]
    assert largest([1.0, None]) is None


@pytest.mark.parametrize(
    ("epsilon", "text"),
    [
        (None, "–"),
        (0.0, "0.000"),
        (2.0001, "2.001"),
        (99.0, "99.000"),
        (123.4, "124"),
        (123456.5, "123,457"),
        (1234567.5, "1.3e+06"),
        (9.91e7, "1.0e+08"),
    ],
)
def test_an_epsilon_is_shown_rounded_up(epsilon, text):
    assert epsilon_for_people(epsilon) == text
