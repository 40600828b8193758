"""The sweep's page: it says what the books say (P14) and what was noised (P13), no text in it becomes markup, nothing
in it reaches out, and its chart is to scale. Beside each check stands a page that is broken on purpose and seen."""

from __future__ import annotations

import math
import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from decimal import Decimal
from html.parser import HTMLParser

import pytest

from cluster.accounting.books import Account, Dataset
from cluster.accounting.costs import budget_cost, epsilon_of
from cluster.errors import PurserError
from training import page as markup
from training.claims import EXCLUDED
from training.config import Job
from training.driver import Charged, Outcome
from training.jobfile import parse
from training.sections import Evaluation
from training.statement import statement
from tuning import report
from tuning.report import sweep_report, write_report
from tuning.trials import Trial

NAME = "people-20260101-000000-abcd"
ORDER, DELTA = 6, 1e-4
BUDGET = budget_cost(3.0, DELTA, ORDER)
SECRET = "Zyxomma"
JOB = parse(
    Job,
    {
        "account": "people",
        "privacy": {"epsilon": 3.0, "delta": DELTA, "unit": "person", "units": 2000, "max_records_per_unit": 2},
        "data": {
            "source": f"/data/{SECRET}.csv",
            "features": {"age": {"range": [0, 120]}, "town": {"categories": [SECRET, "b"]}},
            "label": {"column": "label", "categories": [SECRET, "yes"]},
        },
        "model": {"kind": "linear"},
        "training": {"steps": 50, "block": 25, "expected_batch_size": 200, "noise_multiplier": 6.0},
    },
)
NOISE, RATE = "training.noise_multiplier", "training.optimizer.learning_rate"
EDGES = 0.9, 0.7, 0.8


def accounts(train=0, validation=0, seq=1, epsilon=3.0, reserved=0, name="people", unit="person"):
    """Both accounts with so much spent."""
    data = Dataset(name, unit, 2000, 2, 0.2, (f"{SECRET}-hmac",))
    budget = budget_cost(epsilon, DELTA, ORDER)
    return [
        Account(
            account=account,
            epsilon=epsilon,
            delta=DELTA,
            order=ORDER,
            budget_cost=budget,
            spent_cost=spent,
            reserved_cost=reserved,
            dataset=data,
            head={"seq": seq, "hash": f"{seq:02x}" * 32},
        )
        for account, spent in zip(data.accounts(), (train, validation), strict=True)
    ]


def trial(
    number, share=None, accuracy=None, error=0.03, status="completed", why="", values=None, seq=10, name="people"
):
    """A trial that was charged `share` of the train account in two blocks, or nothing."""
    values = {NOISE: 6.0 + number, RATE: 1 / 3} if values is None else values
    metrics = {} if accuracy is None else {"correct": 310, "wrong": 95, "accuracy": accuracy, "accuracy_error": error}
    made = Trial(number, f"{NAME}-{number:02d}", values, JOB.with_values({NOISE: 6.0 + number, RATE: 1 / 3}))
    made.outcome = Outcome(status, metrics, why)
    if share is not None:
        cost = round(share * BUDGET)
        costs = {f"{name}/train": (cost - cost // 2, cost // 2), f"{name}/validation": (BUDGET // 100,)}
        entries = {
            account: [
                {
                    "seq": seq + i,
                    "kind": "authorise",
                    "steps": 25 if account.endswith("train") else 1,
                    "mechanism": {"kind": "gaussian"},
                    "cost": one,
                    "hash": f"{number:x}{seq + i:x}".rjust(64, "a"),
                    "body": {"nonce": f"{SECRET}-nonce"},
                    "key": f"{SECRET}-key",
                }
                for i, one in enumerate(parts)
            ]
            for account, parts in costs.items()
        }
        made.charges = Charged(accounts(name=name), entries)
    return made


def spent_by(trials, account="people/train"):
    return sum(e["cost"] for t in trials if t.charges for e in t.charges.entries[account])


def page_of(trials, best=None, before=None, name="people", said=None, **options):
    """The page of a sweep that is alone on its accounts, unless `before` says what others spent."""
    before = before or accounts(name=name)
    after = [replace(a, spent_cost=a.spent_cost + spent_by(trials, a.account)) for a in before]
    after = [replace(a, head={"seq": 99, "hash": "ef" * 32}) for a in after]
    if best is not None and said is None:
        said = statement(best.job, best.lease, after, best.charges.entries, best.outcome.metrics, "trial of a sweep.")
    return sweep_report(NAME, before, after, trials, best, said, **options)


def sweep():
    """Five trials that ended in every way there is; the first is the best."""
    return [
        trial(1, 0.30, EDGES[0]),
        trial(2, 0.20, EDGES[1], error=0.05, seq=20),
        trial(3, 0.10, EDGES[2], status="stopped", why="the budget could not pay for all of its steps", seq=30),
        trial(4, status="refused", why="people/train: 31.0% of the budget was asked, 12.5% remains"),
        trial(5, 0.05, status="failed", why="its process died; what was authorised is spent", seq=40),
    ]


class Node:
    def __init__(self, tag, attributes):
        self.tag, self.at, self.inside = tag, dict(attributes), []

    @property
    def text(self):
        return "".join(part if isinstance(part, str) else part.text for part in self.inside)

    def all(self, tag=None, kind=None):
        """Every element below of this name and class."""
        for part in self.inside:
            if isinstance(part, Node):
                if tag in (None, part.tag) and (kind is None or kind in part.at.get("class", "").split()):
                    yield part
                yield from part.all(tag, kind)


class Tree(HTMLParser):
    """A page as a tree; a tag that is not closed in its order is an error."""

    def __init__(self, page):
        super().__init__()
        self.open = [Node("", ())]
        self.feed(page)
        self.close()
        assert len(self.open) == 1, f"{self.open[-1].tag} is not closed"
        self.root = self.open[0]

    def handle_starttag(self, tag, attrs):
        node = Node(tag, attrs)
        assert len(node.at) == len(attrs), f"{tag} has an attribute twice"
        self.open[-1].inside.append(node)
        if tag != "meta":
            self.open.append(node)

    def handle_endtag(self, tag):
        assert self.open[-1].tag == tag, f"{tag} closes {self.open[-1].tag}"
        self.open.pop()

    def handle_data(self, data):
        self.open[-1].inside.append(data)


def tree(page):
    return Tree(page).root


def rows(page, head, nth=0):
    """The rows of the nth table whose first head is `head`, each head → text."""
    body = [next(t.all("tbody")) for t in tree(page).all("table") if next(t.all("th")).text == head][nth]
    return [{cell.at["data-label"]: cell.text for cell in row.all("td")} for row in body.all("tr")]


def reaches_out(page):
    """What in a page would make a browser run or fetch something."""
    nodes = list(tree(page).all())
    wrong = [n.tag for n in nodes if n.tag in ("script", "link", "img", "iframe", "object", "base", "form", "a", "use")]
    wrong += [a for n in nodes for a in n.at if a in ("src", "href", "style", "srcset", "xlink:href") or a[:2] == "on"]
    return wrong + re.findall(r"(?i)https?://|<script|url\(|@import|javascript:|expression\(", page)


def test_a_page_is_whole_and_reaches_out_for_nothing():
    trials = sweep()
    page = page_of(trials, trials[0])
    assert reaches_out(page) == []
    root = tree(page)
    metas = [node.at for node in root.all("meta")]
    assert any(at.get("content", "").startswith("default-src 'none'") for at in metas)
    assert any(at.get("name") == "viewport" for at in metas)
    style = next(root.all("style")).text
    for asked in ("prefers-color-scheme:dark", "@media print", "max-width:40rem"):
        assert asked in style


@pytest.mark.parametrize("part", ["<p>", "</p>", "<p><b></p></b>", "<svg><rect></svg>"])
def test_a_page_that_is_not_whole_is_seen(part):
    page = page_of(sweep())
    with pytest.raises(AssertionError):
        tree(page.replace("</main>", f"{part}</main>"))


@pytest.mark.parametrize(
    "part",
    [
        "<script></script>",
        '<p onclick="x()"></p>',
        '<p style="color:red"></p>',
        "http://purser",
        '<svg href="x"></svg>',
    ],
)
def test_a_page_that_reaches_out_is_seen(part):
    assert reaches_out(page_of(sweep()).replace("</main>", f"{part}</main>"))


def test_every_trial_is_there_with_all_that_is_known_of_it():
    trials = sweep()
    page = page_of(trials, trials[0], why="1 trial could not be paid for.")
    got = rows(page, "trial")
    assert [row["trial"] for row in got] == ["1 ★ best", "2", "3", "4", "5"]
    for row, one in zip(got, trials, strict=True):
        assert row["noise multiplier"] == f"{6 + one.number}"
        assert row["learning rate"] == "0.333333"
        assert row["status"] == one.outcome.status + one.outcome.why
        assert row["steps charged"] == f"{50 if one.charges else 0} of 50"
        assert row["cost, validation"] == ("1.0%" if one.charges else "0.0%")
    assert [row["cost, train"] for row in got] == ["30.0%", "20.0%", "10.0%", "0.0%", "5.0%"]
    assert [row["accuracy"] for row in got] == ["0.900 ± 0.030", "0.700 ± 0.050", "0.800 ± 0.030", "–", "–"]
    assert f'title="{1 / 3}"' in page  # rounded, but the whole of it is at hand
    text = tree(page).text
    for said in (
        "5 trials on dataset people: 2 completed, 1 stopped, 1 refused, 1 failed.",
        "This sweep spent 65.0% of the budget of people/train",
        "Best: trial 1, accuracy 0.900 ± 0.030 (95 % of the noise)",
        "1 trial could not be paid for.",
        "training.expected_batch_size 200",
    ):
        assert said in text
    shared = next(node.text for node in tree(page).all("small") if node.text.startswith("The same"))
    assert "noise_multiplier" not in shared
    assert "learning_rate" not in shared


def test_fields_of_one_last_name_are_told_apart():
    values = {"training.optimizer.name": "adam", "model.name": "a", "model.kind": "linear"}
    row = rows(page_of([trial(1, values=values), trial(2, values={"model.kind": "mlp"})]), "trial")[0]
    assert (row["training.optimizer.name"], row["model.name"], row["kind"]) == ("adam", "a", "linear")


def bars(page):
    """Per account, class → share of its bar."""
    found = []
    for svg in tree(page).all("svg", "bar"):
        at = 0.0
        for rect in svg.all("rect"):
            assert float(rect.at["x"]) == pytest.approx(at, abs=0.002)  # side by side, without gap or overlap
            at += float(rect.at["width"])
        assert at == pytest.approx(1000, abs=0.01)
        found.append({rect.at["class"]: float(rect.at["width"]) / 1000 for rect in svg.all("rect")})
    return found


def test_a_bar_shows_what_was_spent_before_by_the_sweep_and_is_left():
    trials = [trial(1, 0.30, 0.9), trial(2, 0.20, 0.8, seq=20)]
    train, validation = bars(page_of(trials, before=accounts(train=BUDGET // 10)))
    assert train == pytest.approx({"before": 0.1, "mine": 0.5, "left": 0.4}, abs=1e-5)
    assert validation == pytest.approx({"mine": 0.02, "left": 0.98}, abs=1e-5)


def test_what_others_spent_and_hold_is_not_the_sweeps():
    trials = [trial(1, 0.30, 0.9)]
    before = accounts(train=BUDGET // 10, seq=5)
    after = accounts(
        train=BUDGET // 10 + spent_by(trials) + BUDGET // 5, validation=BUDGET // 100, reserved=BUDGET // 4
    )
    train, _ = bars(sweep_report(NAME, before, after, trials, None))
    assert train == pytest.approx({"before": 0.1, "mine": 0.3, "others": 0.2, "held": 0.25, "left": 0.15}, abs=1e-5)


def test_a_resumed_sweep_owns_what_it_spent_before():
    """Entries up to the head at which the command began were spent by then, and are the sweep's all the same."""
    trials = [trial(1, 0.30, 0.9, seq=3), trial(2, 0.20, 0.8, seq=20)]
    before = accounts(train=BUDGET // 10 + spent_by(trials[:1]), validation=BUDGET // 100, seq=12)
    after = accounts(train=BUDGET // 10 + spent_by(trials), validation=2 * (BUDGET // 100), seq=30)
    page = sweep_report(NAME, before, after, trials, None)
    assert bars(page)[0] == pytest.approx({"before": 0.1, "mine": 0.5, "left": 0.4}, abs=1e-5)
    assert "The sweep was resumed; 30.0% of the budget it had spent before that." in tree(page).text
    assert "resumed" not in page_of(trials)


def test_books_and_charges_that_contradict_each_other_make_no_page():
    trials = [trial(1, 0.30, 0.9)]
    short = accounts(train=spent_by(trials) - 1, validation=BUDGET // 100, seq=30)
    with pytest.raises(PurserError, match="contradict"):
        sweep_report(NAME, accounts(), short, trials, None)
    with pytest.raises(PurserError, match="contradict"):
        sweep_report(NAME, accounts(), accounts(train=BUDGET + 1), [], None)
    with pytest.raises(PurserError, match="contradict"):
        sweep_report(NAME, accounts(name="other"), accounts(), [], None)


# No text becomes markup.

HOSTILE = '"></td></table><script>alert("x")</script><img src=x onerror=y>&amp;<!--'


HARMLESS = "x" * len(HOSTILE)


def hostile_page(text):
    """A page with `text` wherever a text comes from elsewhere."""
    values = {f"model.{text}": text, NOISE: 7.5}
    trials = [
        trial(1, 0.3, 0.9, values=values, status=text, why=text, name=text),
        trial(2, status="refused", why=text, values=values),
    ]
    before = accounts(name=text, unit=text)
    after = [replace(a, spent_cost=spent_by(trials[:1], a.account), head={"seq": 99, "hash": text}) for a in before]
    said = statement(trials[0].job, NAME, after, trials[0].charges.entries, trials[0].outcome.metrics, text)

    def changed(part, **fields):
        return part.model_copy(update=fields)

    said = changed(
        said,
        run=text,
        excluded=(text,),
        audits=({text: [text]},),
        protected=changed(said.protected, dataset=text, unit=text, adjacency=text),
        accounting=changed(said.accounting, method=text, libraries={text: text}),
        released=changed(said.released, target=text, file=text),
        training=changed(said.training, optimizer={text: text}, model={text: text}),
        partitions=tuple(
            changed(one, charges=tuple(changed(charge, hash=text) for charge in one.charges)) for one in said.partitions
        ),
    )
    return sweep_report(text, before, after, trials, trials[0], said, text)


def shape(page):
    """Every element and its attributes' names, in order."""
    return [(node.tag, sorted(node.at)) for node in tree(page).all()]


def test_hostile_texts_stay_texts():
    page = hostile_page(HOSTILE)
    assert shape(page) == shape(hostile_page(HARMLESS))
    assert tree(page).text.count(HOSTILE) == tree(hostile_page(HARMLESS)).text.count(HARMLESS) > 30
    assert "<script" not in page
    assert "<img" not in page


def test_a_text_that_becomes_markup_is_seen(monkeypatch):
    monkeypatch.setattr(markup, "_escaped", str)
    with pytest.raises(AssertionError):
        test_hostile_texts_stay_texts()


def test_invisible_characters_are_shown():
    """A text that runs backwards or holds a line's end could make a page say what it does not."""
    page = hostile_page("a\u202eb\x00c\nd\ud800")
    assert not set("\u202e\x00\ud800") & set(page)
    assert "a\\u202eb\\u0000c\\u000ad\\ud800" in tree(page).text
    page.encode()


# The chart is to scale.


def axis(svg, kind):
    """From a place on an axis to its value, by the ticks that are drawn; they must lie on one line."""
    found = []
    for group in svg.all("g", kind):
        line, label = next(group.all("line")), next(group.all("text")).text
        value = float(label.removesuffix("%")) / (100 if label.endswith("%") else 1)
        found.append((float(line.at["x1" if kind == "x" else "y1"]), value))
    assert len(found) >= 3
    (a, first), (b, last) = found[0], found[-1]
    assert first < last

    def value(place):
        return first + (place - a) * (last - first) / (b - a)

    for place, said in found:
        assert value(place) == pytest.approx(said, abs=1e-3 * (last - first))
    return value


def drawn(page):
    """trial → (share, accuracy, low end, high end, caps) as a reader takes them from the chart."""
    svg = next(tree(page).all("svg", "chart"))
    share, accuracy = axis(svg, "x"), axis(svg, "y")
    width, height = map(float, svg.at["viewbox"].split()[2:])
    found = {}
    for group in svg.all("g", "point"):
        circle, bar = next(group.all("circle")), next(group.all("line", "error"))
        assert bar.at["x1"] == bar.at["x2"] == circle.at["cx"]
        for mark in (*group.all("text"), *group.all("line")):
            for key, most in (
                ("x", width),
                ("x1", width),
                ("x2", width),
                ("y", height),
                ("y1", height),
                ("y2", height),
            ):
                assert 0 <= float(mark.at.get(key, 0)) <= most
        ends = sorted((float(bar.at["y1"]), float(bar.at["y2"])), reverse=True)
        caps = sorted((float(cap.at["y1"]) for cap in group.all("line", "cap")), reverse=True)
        assert set(caps) <= set(ends)
        where = (share(float(circle.at["cx"])), *(accuracy(y) for y in (float(circle.at["cy"]), *ends)), len(caps))
        found[int(group.at["data-trial"])] = where
    return found


def is_to_scale(page, trials, wide=1e-3):
    """Each point and bar is at its numbers. `wide`: by how much a point may be aside to make room for others."""
    found = drawn(page)
    expected = [one for one in trials if one.outcome.metrics]
    assert set(found) == {one.number for one in expected}
    for one in expected:
        share, middle, low, high, _ = found[one.number]
        accuracy, error = one.outcome.metrics["accuracy"], one.outcome.metrics["accuracy_error"]
        assert share == pytest.approx(one.charges.cost / BUDGET, rel=wide)
        assert middle == pytest.approx(accuracy, abs=1e-3)
        assert low == pytest.approx(max(0.0, accuracy - error), abs=1e-3)
        assert high == pytest.approx(min(1.0, accuracy + error), abs=1e-3)
    return found


def test_points_and_error_bars_lie_where_they_should():
    trials = sweep()
    page = page_of(trials, trials[0])
    is_to_scale(page, trials)
    best = list(tree(page).all("g", "best"))
    assert [group.at["data-trial"] for group in best] == ["1"]
    assert "1 ★" in best[0].text
    assert "Not drawn, as no metric was released: 2 trials." in tree(page).text
    assert "cost, as a share of the budget of people/train" in tree(page).text
    assert "noised accuracy" in tree(page).text


@pytest.mark.parametrize("changed", ["accuracy", "accuracy_error"])
def test_a_chart_that_is_not_to_scale_is_seen(changed):
    trials = sweep()
    page = page_of(trials)
    trials[1].outcome.metrics[changed] += 0.004
    with pytest.raises(AssertionError):
        is_to_scale(page, trials)


@pytest.mark.parametrize("seed", range(20))
def test_any_sweep_is_drawn_to_scale(seed):
    draw = random.Random(seed)
    scale, count = 10.0 ** -draw.randint(2, 6), draw.randint(1, 60)
    trials = [
        trial(number, scale * (1 + draw.random()), draw.random(), error=draw.random() ** 4, seq=10 * number)
        for number in range(1, count + 1)
    ]
    is_to_scale(page_of(trials, trials[-1]), trials)


def test_a_bar_ends_at_0_and_1_without_a_cap():
    trials = [trial(1, 0.1, 0.98, error=0.05), trial(2, 0.2, 0.3, error=1.0, seq=20)]
    found = is_to_scale(page_of(trials), trials)
    assert [found[number][4] for number in (1, 2)] == [1, 0]


def test_trials_of_equal_cost_stand_side_by_side():
    trials = [trial(number, 0.1, 0.8 + number / 100, seq=10 * number) for number in range(1, 9)]
    page = page_of(trials)
    places = [float(node.at["cx"]) for node in tree(page).all("circle")]
    assert len(set(places)) == 8
    assert all(b - a >= 12 for a, b in zip(places, places[1:], strict=False))
    share = axis(next(tree(page).all("svg", "chart")), "x")
    assert share(sum(places) / 8) == pytest.approx(0.1, abs=1e-4)
    assert 64 < min(places) < max(places) < 620


def test_one_trial():
    trials = [trial(1, 0.2, 0.8)]
    page = page_of(trials, trials[0])
    is_to_scale(page, trials)
    assert "1 trial on dataset people: 1 completed." in tree(page).text


@pytest.mark.parametrize("accuracy", [0.0, 0.5, 0.123456, 1.0])
@pytest.mark.parametrize("error", [0.0, 0.01, 1.0])
def test_equal_accuracies(accuracy, error):
    trials = [trial(number, number / 10, accuracy, error=error, seq=10 * number) for number in (1, 2, 3)]
    is_to_scale(page_of(trials, trials[0]), trials)


def test_many_trials_are_drawn_without_numbers_but_for_the_best():
    trials = [trial(number, 0.001, 0.8, seq=10 * number) for number in range(1, 60)]
    page = page_of(trials, trials[6])
    labels = [text.text for group in tree(page).all("g", "point") for text in group.all("text")]
    assert labels == ["7 ★"]


def test_nothing_ran():
    trials = [trial(number, status="refused", why="people/train: no room") for number in (1, 2)]
    text = tree(page_of(trials, why="2 trials could not be paid for.")).text
    assert "2 trials on dataset people: 2 refused." in text
    assert "This sweep spent 0.0% of the budget" in text
    assert text.count("people/train: no room") == 2
    assert "there is nothing to draw" in text
    assert "Nothing was released by this sweep, so there is no statement." in text
    for line in EXCLUDED:
        assert line in text
    assert "opacus" in text
    assert "0 trials on dataset people: none." in tree(page_of([])).text


@pytest.mark.parametrize(
    "metrics",
    [
        {},
        {"accuracy": 0.9},
        {"accuracy": math.nan, "accuracy_error": 0.1},
        {"accuracy": 0.9, "accuracy_error": math.inf},
    ]
    + [{"accuracy": f"{SECRET}", "accuracy_error": 0.1}, {"accuracy": None, "accuracy_error": None}],
)
def test_a_metric_that_is_missing_is_no_number(metrics):
    trials = [trial(1, 0.2), trial(2, 0.2, 0.7, seq=20)]
    trials[0].outcome = Outcome("completed", metrics)
    page = page_of(trials, trials[0])
    assert [row["accuracy"] for row in rows(page, "trial")] == ["–", "0.700 ± 0.030"]
    assert list(drawn(page)) == [2]
    assert "Best: trial 1, –" in tree(page).text
    assert not re.search(r"\b(nan|inf|None)\b", tree(page).text)


# What is said of ε is what the books charge.


def epsilons(page):
    """Every ε of a cost that the page names: so far before and after, of the sweep alone, of the released run."""
    so_far = [row for table in tree(page).all("table") for row in table.all("tr") if "indicative" in row.text]
    found = [cell.text for row in so_far for cell in list(row.all("td"))[1:]]
    found += re.findall(r"indicative ε of it alone (\d+\.\d+)", tree(page).text)
    return [Decimal(text) for text in (*found, *(row["ε of this run"] for row in rows(page, "account")))]


def costs_of(trials, before, best):
    """The costs that `epsilons` are said of, in its order."""
    mine = {a.account: spent_by(trials, a.account) for a in before}
    costs = [cost for a in before for cost in (a.spent_cost, a.spent_cost + mine[a.account])] + list(mine.values())
    return costs + [sum(e["cost"] for e in best.charges.entries[a.account]) for a in before]


def never_below(seed):
    draw = random.Random(seed)
    trials = [trial(1, draw.random() / 3, 0.9), trial(2, draw.random() / 3, 0.8, seq=20)]
    before = accounts(train=int(draw.random() / 3 * BUDGET), validation=int(draw.random() / 3 * BUDGET))
    said = epsilons(page_of(trials, trials[0], before=before))
    costs = costs_of(trials, before, trials[0])
    assert len(said) == len(costs) == 8
    for epsilon, cost in zip(said, costs, strict=True):
        assert 0 <= epsilon - Decimal(epsilon_of(cost, DELTA, ORDER)) < Decimal("0.001")


@pytest.mark.parametrize("seed", range(10))
def test_no_epsilon_is_below_what_the_books_charge(seed):
    never_below(seed)


def test_an_epsilon_that_is_rounded_down_is_seen(monkeypatch):
    monkeypatch.setattr(report, "epsilon_text", lambda epsilon: f"{math.floor(epsilon * 1000) / 1000:.3f}")
    with pytest.raises(AssertionError):
        never_below(0)


def test_a_granted_budget_is_shown_to_its_last_digit():
    """To six digits, as %g has it, this one would be understated."""
    granted = 2.3456784
    before = accounts(epsilon=granted)
    text = tree(sweep_report(NAME, before, before, [], None)).text
    assert f"({granted}, 0.0001)-differentially private for each person" in text
    assert f"Budget: ε = {granted}, δ = 0.0001" in text
    (factor,) = re.findall(r"at most ([\d.]+) \(e\^ε\)", text)
    assert math.exp(granted) < float(factor) < math.exp(granted) + 0.011


def test_the_statement_of_the_release_is_in_the_page():
    trials = sweep()
    page = page_of(trials, trials[0])
    text = tree(page).text
    for said in (
        "Each person of the dataset people is protected by (3, 0.0001)-differential privacy for everything ever",
        f"{NAME}-01",
        "differ by one unit with all of its records added or removed",
        "Rényi filter at one fixed integer order",
        "the weights in weights.safetensors",
        "trial of a sweep.",
        "may not be added to that of others",
        *EXCLUDED,
    ):
        assert said in text
    charges = rows(page, "account", 1)
    entries = [(name, e) for name, mine in trials[0].charges.entries.items() for e in mine]
    assert len(charges) == len(entries) == 3
    for row, (name, entry) in zip(charges, entries, strict=True):
        assert (row["account"], row["entry"], row["steps"]) == (name, str(entry["seq"]), str(entry["steps"]))
        assert row["cost (1e-12 RDP)"] == f"{entry['cost']:,}"
        assert row["hash"] == entry["hash"][:16] + "…"


def test_the_audits_of_a_release_are_in_the_page():
    trials = sweep()
    said = statement(JOB, NAME, accounts(), trials[0].charges.entries, trials[0].outcome.metrics, "none.")
    page = page_of(trials, trials[0], said=said.model_copy(update={"audits": ({"kind": "other", "seen": 3},)}))
    assert "kind other, seen 3" in tree(page).text
    assert "No audit was made of this release." in tree(page_of(trials, trials[0], said=said)).text


def test_heads_are_there_whole():
    page = page_of(sweep())
    text = tree(page).text
    assert f"1:{'01' * 32}" in text
    assert f"purser budget verify people/train --head 99:{'ef' * 32}" in text
    assert "purser budget verify 'two words/train' --head" in tree(page_of([], name="two words")).text


# Nothing hidden.


def test_only_what_is_public_is_shown():
    """Planted: the source and its HMACs, declared categories, nonces and keys of entries, metrics that nobody noised"""
    trials = sweep()
    for one in trials[:3]:
        one.outcome.metrics.update({"loss": 0.98765, "grad_norm": 0.98765, "batch": 98765, SECRET: SECRET})
    page = page_of(trials, trials[0])
    facts = repr((trials, accounts()))
    for planted in (SECRET, "98765"):
        assert planted in facts
        assert planted not in page
    assert not re.search(r"\b(loss|grad_norm)\b", tree(page).text)


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = write_report(tmp_path, "first ε")
    assert path == tmp_path / "report.html"
    assert path.read_text(encoding="utf-8") == "first ε"
    assert list(tmp_path.iterdir()) == [path]

    def dies(*arguments):
        raise OSError("disk")

    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(OSError, match="disk"):
        write_report(tmp_path, "second")
    assert path.read_text(encoding="utf-8") == "first ε"


def test_the_room_imports_nothing_heavy():
    code = "import sys, tuning.report; print(*[name for name in ('ray', 'torch', 'numpy') if name in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == []


def test_a_sweep_that_was_judged_by_losses_on_public_records_says_so():
    trials = [trial(1, 0.2, 0.5), trial(2, 0.2, 0.5, seq=20)]
    evaluation = {"on": "public", "source": "/home/somebody/public.csv", "metric": "loss", "loss_bound": 4.0}
    for one, loss in zip(trials, (2.5, 3.9), strict=True):
        one.job = one.job.model_copy(update={"evaluation": Evaluation(**evaluation)})
        one.outcome = Outcome("completed", {"clipped_loss": loss, "clipped_loss_error": 0.2})
    page = page_of(trials, trials[0])
    text = tree(page).text
    assert "Best: trial 1, clipped loss 2.500 ± 0.200 (95 % of the chance of which public records were judged)." in text
    assert [row["loss"] for row in rows(page, "trial")] == ["2.500 ± 0.200", "3.900 ± 0.200"]
    assert [next(tree(page).all("svg", "chart")).at["aria-label"].partition(",")[0]] == [
        "clipped loss on public records"
    ]
    assert sorted(drawn(page)) == [1, 2]
    assert "somebody" not in page
    assert "evaluation.noise" not in text
    assert "evaluation.loss_bound 4" in text
