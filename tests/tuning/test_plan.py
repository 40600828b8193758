"""The price before the purchase: the plan's numbers are those that the books will charge (P14), no data is touched for
them (P11, P13), and what a refusal offers instead does fit."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.accounting import mechanisms, orders
from cluster.accounting.answers import Shortage
from cluster.accounting.books import Books
from cluster.accounting.costs import LARGEST, budget_cost, epsilon_of, price
from cluster.accounting.leases import Leases
from cluster.accounting.ledger import Ledger
from cluster.accounting.selection import quantile, repetitions_of
from cluster.errors import UsageError
from training import data, preparation, sources
from training.admission import plans_of, what_would_fit
from training.jobfile import load
from tuning.config import SweepJob
from tuning.display import plan_curve, plan_table, plan_verdict
from tuning.plan import MOST_EPSILON, candidates, make, planned

DIGITS = Path(__file__).parents[2] / "infra" / "jobs" / "digits.yaml"
CONTRACT = {"account", "epsilon", "delta", "order", "mode", "trial_cost", "trials_that_fit"} | {
    "filter_epsilon",
    "select_epsilon",
    "select_trials_p99",
}
MODES = ("filter", "select")
DRAWN = ("tuning.search=random", "tuning.space={training.noise_multiplier: {loguniform: [4, 16]}}")


@pytest.fixture
def books(tmp_path):
    return Books(Ledger(f"sqlite:///{tmp_path}/ledger.db"))


def job_of(*assignments):
    return load(SweepJob, DIGITS, assignments)


def created(books, job):
    """The accounts as `purser budget create` and `purser tune` make them."""
    plans = plans_of([run.charges() for run in (*job.corners(), *candidates(job))])
    return books.create(job.dataset(["ab" * 32]), job.privacy.epsilon, job.privacy.delta, plans, job.tuning.trials)


def run_of(leases, lease, job):
    """Reserve and spend one whole run."""
    assert leases.reserve(lease, lease, job.charges()).fits
    epoch = leases.open(lease, "nonce", 0).epoch
    for charge in job.charges():
        for block in range(1, -(-charge.steps // charge.block) + 1):
            assert leases.authorise(lease, epoch, charge.account, block)
    leases.close(lease, "settle", "completed")


def without_least(plan):
    """A plan but for the least ε: an account that is made keeps its order, one that is not gets the order for its ε."""
    kept = {key: value for key, value in plan.items() if not key.endswith("least_epsilon")}
    return (
        {**kept, "partitions": [without_least(line) for line in plan["partitions"]]} if "partitions" in kept else kept
    )


def spent(books, monkeypatch, **costs):
    """Let so much be spent on the accounts."""
    real = books.show
    monkeypatch.setattr(
        books, "show", lambda name: replace(real(name), spent_cost=costs.get(name.rpartition("/")[2], 0))
    )


def shown(plan, width=80):
    """What a person sees."""
    from rich.console import Console

    console = Console(width=width, highlight=False, soft_wrap=True)
    with console.capture() as capture:
        for part in (plan_table(plan), plan_curve(plan), plan_verdict(plan)):
            console.print(part)
    return capture.get()


def cells(text, label):
    """The row with this label as its columns, once for each section it is in."""
    rows = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    return [row[1:] for row in rows if row[0] == label]


def test_the_plan_of_the_digits_job(books):
    """The job of the documents: order 6, and seven of its eight trials fit."""
    plan = make(books, job_of()).as_json()
    assert set(plan) >= CONTRACT
    assert (plan["account"], plan["epsilon"], plan["delta"], plan["mode"]) == ("digits", 3.0, 1e-4, "filter")
    assert plan["order"] == 6
    assert plan["trials_that_fit"] == 7
    assert plan["filter_epsilon"] > 3.0  # the eighth does not
    assert plan["select_trials_p99"] == quantile(repetitions_of(8, 0.5), 0.99)
    assert json.loads(json.dumps(plan, allow_nan=False)) == plan
    assert isinstance(plan["trial_cost"], int)


def test_prices_are_those_of_the_books(books):
    """Recomputed trial by trial, in the grid's order, at the account's order."""
    job = job_of()
    plan = make(books, job)
    prices = {name: [] for name in job.accounts}
    for run in candidates(job):
        for charge in run.charges():
            prices[charge.account].append(price(charge, plan.lines[0].order))
    for line in plan.lines:
        mine = prices[line.account]
        assert len(mine) == 8
        assert (line.trial_cost_least, line.trial_cost_most) == (min(mine), max(mine))
        assert line.trial_cost == math.ceil(sum(mine) / 8)
        assert line.filter_epsilon == epsilon_of(sum(mine), 1e-4, line.order)
        assert line.remaining_cost == line.budget_cost


def test_as_many_trials_fit_as_the_plan_says(books):
    """Run them all, one after the other, on real books."""
    job = job_of()
    fit = make(books, job).as_json()["trials_that_fit"]
    created(books, job)
    leases = Leases(books)
    granted = 0
    for number, run in enumerate(candidates(job)):
        if leases.fits(run.charges()).fits:
            run_of(leases, f"trial-{number}", run)
            granted += 1
    assert granted == fit == 7


def test_a_plan_goes_by_what_is_left(books):
    job = job_of()
    created(books, job)
    before = make(books, job)
    assert before.exists
    run_of(Leases(books), "one", job.plain)
    after = make(books, job)
    for old, new, charge in zip(before.lines, after.lines, job.plain.charges(), strict=True):
        assert new.remaining_cost == old.remaining_cost - price(charge, old.order)
        assert (new.order, new.budget_cost, new.trial_cost) == (old.order, old.budget_cost, old.trial_cost)
    assert after.as_json()["trials_that_fit"] < before.as_json()["trials_that_fit"]


@pytest.mark.parametrize(("spare", "fit"), [(0, 8), (-1, 7)])
def test_the_last_unit_of_cost_may_be_spent(books, monkeypatch, spare, fit):
    """Where exactly the price of all trials is left they all fit, with one unit less the last does not."""
    job = job_of()
    created(books, job)
    whole = sum(price(run.charges()[0], books.show("digits/train").order) for run in candidates(job))
    real = books.show

    def show(name):
        account = real(name)
        left = whole + spare if name == "digits/train" else account.budget_cost
        return replace(account, spent_cost=account.budget_cost - left)

    monkeypatch.setattr(books, "show", show)
    assert make(books, job).as_json()["trials_that_fit"] == fit


def test_a_plan_before_the_accounts_is_the_plan_after(books):
    job = job_of()
    before = make(books, job)
    created(books, job)
    after = make(books, job)
    assert not before.exists
    assert without_least(before.as_json()) == without_least(after.as_json())


def test_a_plan_shows_the_order_that_the_account_will_get(books):
    """Eight learning rates at σ = 8 come first; the σ = 1 that follows is a corner, but not among the eight trials."""
    rates = ", ".join(map(str, range(1, 9)))
    space = (
        f"{{training.noise_multiplier: {{choice: [8, 1]}}, training.optimizer.learning_rate: {{choice: [{rates}]}}}}"
    )
    job = job_of(f"tuning.space={space}")
    shown = [line.order for line in make(books, job).lines]
    assert shown == [account.order for account in created(books, job)]


@pytest.mark.parametrize("changed", ["privacy.epsilon=30", "privacy.delta=1e-9"])
def test_a_plan_speaks_of_the_budget_that_was_granted(books, changed):
    account = created(books, job_of())[0]
    try:
        plan = make(books, job_of(changed)).as_json()
    except UsageError:
        return  # as good
    assert (plan["epsilon"], plan["delta"]) == (account.epsilon, account.delta)


def test_a_plan_touches_no_data(books, tmp_path, monkeypatch):
    """Its source does not even exist; and who tries to read it is caught. Nothing is written to the ledger either."""

    def caught(*arguments):
        raise AssertionError("data was touched")

    for room, name in ((data, "declared"), (sources, "find"), (sources.Source, "batches"), (preparation, "prepare")):
        monkeypatch.setattr(room, name, caught)
    (tmp_path / "job.yaml").write_text(
        DIGITS.read_text().replace(
            "  source: sklearn:digits",
            "  source: nowhere.csv\n  features: {x: {range: [0, 1]}}\n  label: {column: y, categories: [a, b]}\n#",
        )
    )
    job = load(SweepJob, tmp_path / "job.yaml")
    assert job.data.source == str(tmp_path / "nowhere.csv")
    assert make(books, job).as_json()["trials_that_fit"] == 7
    assert books.names() == []


def test_the_select_price_is_there_in_both_modes(books):
    """Whoever plans one mode sees the other's price. A selection draws from the whole space, not a grid's beginning."""
    for mode in MODES:
        plan = make(books, job_of(f"tuning.mode={mode}"))
        for i, line in enumerate(plan.lines):
            charges = [run.charges()[i] for run in plan.job.corners()]
            cost = orders.select_price(charges, line.order, 8, 0.5)
            assert (line.select_cost, line.select_epsilon) == (cost, epsilon_of(cost, 1e-4, line.order))
            assert line.select_fits == (cost <= line.remaining_cost)
        assert plan.as_json()["select_epsilon"] == max(line.select_epsilon for line in plan.lines)
        assert plan.as_json()["mode"] == mode


def test_a_selection_pays_for_the_dearest_of_the_space(books):
    """The dear candidate is last in the grid, behind the trials that filter mode would run."""
    space = "tuning.space={training.noise_multiplier: {choice: [12, 11, 6]}}"
    few, all_of_it = (make(books, job_of(space, f"tuning.trials={n}")).lines[0] for n in (2, 3))
    dear = job_of("training.noise_multiplier=6", "tuning.space={}", "tuning.trials=2")
    assert few.order == all_of_it.order
    assert few.trial_cost_most < all_of_it.trial_cost_most
    assert few.select_cost == orders.select_price([dear.charges()[0]], few.order, 2)


def test_many_selected_trials_are_cheaper_than_all_of_them(books):
    plan = make(books, job_of("tuning.trials=64", "tuning.search=random", "tuning.space={}")).as_json()
    assert plan["select_epsilon"] < plan["filter_epsilon"] / 3
    assert plan["select_trials_p99"] == 397


def test_a_random_search_is_planned_from_its_corners(books):
    """What is not known before is priced at the dearest: all trials cost no more than the plan says."""
    space = "{training.noise_multiplier: {loguniform: [4, 16]}, training.max_grad_norm: {uniform: [0.1, 2]}}"
    job = job_of("tuning.search=random", f"tuning.space={space}")
    line = make(books, job).lines[0]
    ends = [price(job.candidate({"training.noise_multiplier": s}).charges()[0], line.order) for s in (4.0, 16.0)]
    assert (line.trial_cost_most, line.trial_cost_least) == tuple(ends)
    assert line.trial_cost_least < line.trial_cost < line.trial_cost_most
    assert line.trials_that_fit == line.remaining_cost // line.trial_cost
    assert line.trials_that_fit_least == line.remaining_cost // line.trial_cost_most < line.trials_that_fit
    assert line.filter_cost == 8 * line.trial_cost_most > 8 * line.trial_cost
    assert not line.filter_exact


def test_a_grid_that_ends_before_the_trials(books):
    """Twelve combinations are twelve trials, however many are asked for; a selection may draw one of them twice."""
    plan = make(books, job_of("tuning.trials=64"))
    prices = [price(run.charges()[0], plan.lines[0].order) for run in candidates(plan.job)]
    assert plan.filter_trials == len(prices) == 12
    assert plan.lines[0].filter_cost == sum(prices)
    assert plan.as_json()["select_trials_p99"] == 397
    assert "12 trials (the whole grid) cost" in shown(plan)


# What is left, and what would be enough.


@pytest.mark.parametrize("train", [0, 200_000_000_000, 10**15])
def test_what_is_left_afterwards_is_never_negative(books, monkeypatch, train):
    job = job_of()
    created(books, job)
    spent(books, monkeypatch, train=train)
    plan = make(books, job)
    for line in plan.lines:
        for cost, left, fits in (
            (line.filter_cost, line.filter_left, line.filter_fits),
            (line.select_cost, line.select_left, line.select_fits),
        ):
            assert fits == (cost <= line.remaining_cost)
            assert left == ((line.remaining_cost - cost) / line.budget_cost if fits else None)
    assert (plan.as_json()["filter_left"] is None) == (not all(line.filter_fits for line in plan.lines))
    if not plan.lines[0].select_fits:
        assert plan.as_json()["select_left"] is None
        assert [row[0] for row in cells(shown(plan), "left afterwards")] == ["does not fit", "does not fit"]
    assert "-" not in re.sub(r"[a-z]-[a-z]", "", shown(plan)), "no number is negative"


@pytest.mark.parametrize("train", [0, 200_000_000_000])
def test_the_least_epsilon_of_an_account_counts_what_is_spent(books, monkeypatch, train):
    """At its order: a budget of that ε holds what is spent and the job, a budget of a thousandth less does not."""
    job = job_of()
    created(books, job)
    fresh = make(books, job).lines[0]
    spent(books, monkeypatch, train=train)
    line = make(books, job).lines[0]
    for cost, least in ((line.filter_cost, line.filter_least_epsilon), (line.select_cost, line.select_least_epsilon)):
        assert budget_cost(least, 1e-4, line.order) >= train + cost
        assert budget_cost(round(least - 0.001, 3), 1e-4, line.order) < train + cost
    assert bool(cells(shown(make(books, job)), "least ε, with what is spent")) == bool(train)
    if train:  # whoever forgets it promises too much
        assert budget_cost(fresh.filter_least_epsilon, 1e-4, line.order) < train + line.filter_cost


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("tuning.trials=64",),
        DRAWN,
        (*DRAWN, "tuning.trials=64", "privacy.delta=1e-6"),
        ("tuning.space={training.noise_multiplier: {choice: [1, 8, 30]}}",),
        ("evaluation.noise=1",),
    ],
)
def test_the_least_epsilon_of_a_new_account_is_enough(books, mode, changes):
    """Granted that ε, the same plan says that it fits both accounts; granted a thousandth less, that it does not."""
    least = make(books, job_of(*changes)).as_json()[f"{mode}_least_epsilon"]
    for epsilon, enough in ((least, True), (round(least - 0.001, 3), False)):
        plan = make(books, job_of(*changes, f"privacy.epsilon={epsilon}"))
        assert all(getattr(line, f"{mode}_fits") for line in plan.lines) == enough


def test_the_least_epsilon_goes_by_the_order_that_is_chosen(books):
    """At the order that were best for this selection alone a smaller ε would do, but no account is made with it."""
    job = job_of()
    line = make(books, job).lines[0]
    charges = [run.charges()[0] for run in job.corners()]
    alone = min(epsilon_of(orders.select_price(charges, order, 8), 1e-4, order) for order in orders.CANDIDATES)
    assert alone < line.select_least_epsilon - 0.001
    granted = make(books, job_of(f"privacy.epsilon={math.ceil(alone * 1000) / 1000}"))
    assert not granted.lines[0].select_fits


def test_select_mode_has_the_order_at_which_its_selection_is_cheapest(books):
    job = job_of("tuning.mode=select")
    plan = make(books, job)
    for i, line in enumerate(plan.lines):
        charges = [run.charges()[i] for run in job.corners()]
        shares = {
            order: orders.select_price(charges, order, 8) / budget_cost(3.0, 1e-4, order)
            for order in orders.CANDIDATES
            if budget_cost(3.0, 1e-4, order) > 0
        }
        assert shares[line.order] == pytest.approx(min(shares.values()), rel=1e-9)
        assert line.select_cost == price(job.selection()[i], line.order)
    assert plan.lines[0].order != make(books, job_of()).lines[0].order


@pytest.mark.parametrize(
    ("repeats", "shape"), [("{eta: 0}", 0.0), ("{eta: 1}", 1.0), ("{distribution: poisson}", math.inf)]
)
def test_the_price_is_that_of_the_distribution_that_was_asked_for(books, repeats, shape):
    plan = make(books, job_of("tuning.mode=select", f"tuning.repeats={repeats}"))
    for i, line in enumerate(plan.lines):
        charges = [run.charges()[i] for run in plan.job.corners()]
        assert line.select_cost == orders.select_price(charges, line.order, 8, shape)
    assert plan.select_trials_p99 == quantile(repetitions_of(8, shape), 0.99)
    assert SweepJob.model_validate(plan.job.model_dump(mode="json")) == plan.job, "as workers and a resume read it"


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ("tuning.repeats={eta: 2}", r"tuning.repeats.eta: 2 was given"),
        ("tuning.repeats={distribution: poisson, eta: 1}", "leave it out for poisson"),
        ("tuning.trials=1", "tuning.trials: 1 was given"),
        ("tuning.space={training.noise_multiplier: {uniform: [1, .inf]}}", "uniform"),
        ("tuning.space={model.path: {choice: ['tiny:bert', other]}}", "model.path cannot be searched in select mode"),
    ],
)
def test_what_no_selection_can_be_made_of_is_refused_by_name(wrong, word):
    with pytest.raises(UsageError, match=word):
        job_of("tuning.mode=select", wrong)


def test_no_epsilon_that_may_be_granted_is_enough(books):
    plan = make(books, job_of("tuning.search=random", "tuning.space={}", "tuning.trials=10000"))
    assert plan.as_json()["filter_least_epsilon"] is None
    assert cells(shown(plan), "least ε that is enough")[0][0] == f"above {MOST_EPSILON:g}"
    with pytest.raises(UsageError):
        job_of(f"privacy.epsilon={MOST_EPSILON + 1}")


@pytest.mark.parametrize("changes", [(), ("tuning.trials=64",), ("evaluation.noise=1",), ("evaluation.noise=0.3",)])
def test_the_largest_mean_that_fits(books, changes):
    """One more in the mean does not fit."""
    for i, line in enumerate(make(books, job_of(*changes)).lines):
        charges = [run.charges()[i] for run in job_of(*changes).corners()]
        fit = line.select_trials_that_fit
        assert fit == 0 or orders.select_price(charges, line.order, fit) <= line.remaining_cost
        assert fit == 10_000 or orders.select_price(charges, line.order, fit + 1) > line.remaining_cost
        assert line.select_fits == (fit >= line_trials(changes))


def line_trials(changes):
    return 64 if "tuning.trials=64" in changes else 8


# A selection without a price.


def unpriced(plan, word):
    said = json.loads(json.dumps(plan.as_json(), allow_nan=False))
    for part in (said, said["partitions"][0]):
        for key in ("select_cost", "select_epsilon", "select_left", "select_least_epsilon", "select_trials_that_fit"):
            assert part[key] is None, key
        assert all(point["select_epsilon"] is None for point in part["curve"] if point["trials"] > 1)
    assert said["filter_epsilon"] > 0
    assert said["partitions"][0]["select_unpriced"] == word
    assert said["partitions"][1]["select_unpriced"] is None
    assert word in shown(plan)
    assert max(map(len, shown(plan).splitlines()[:-1])) <= 80


def test_too_many_candidates_have_no_price(books, monkeypatch):
    job = job_of()
    created(books, job)
    monkeypatch.setattr(mechanisms, "MOST_MECHANISMS", 2)  # the space has three
    unpriced(make(books, job), "too many different candidates")


def test_a_selection_beyond_the_ledger_has_no_price(books):
    """One run may still be booked, a selection among many of them not."""
    noise = ("training.noise_multiplier=0.1", "training.expected_batch_size=1437", "tuning.space={}")
    at = make(books, job_of(*noise, "training.steps=1")).lines[0]
    steps = LARGEST * 9 // 10 // at.trial_cost
    unpriced(make(books, job_of(*noise, f"training.steps={steps}")), "more than the ledger holds")


# What a person sees.


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("changes", [(), DRAWN, (*DRAWN, "tuning.trials=1000"), ("tuning.trials=1", "tuning.space={}")])
def test_eighty_columns_show_all_of_it(books, mode, changes):
    if mode == "select" and "tuning.trials=1" in changes:
        pytest.skip("refused: K would always be 1")
    plan = make(books, job_of(f"tuning.mode={mode}", *changes))
    text = shown(plan)
    table = text[: text.index("ε of so many")]
    assert max(map(len, text.splitlines()[:-1])) <= 80  # the last is a sentence
    assert "…" not in text
    for label in ("order", "trials that fit", "largest mean of K that fits"):
        assert len(cells(table, label)[0]) == 2
    assert f"at most {plan.select_trials_p99:,}" in table


@pytest.mark.parametrize("changes", [(), DRAWN, ("tuning.trials=64",), ("evaluation.noise=1",)])
def test_no_epsilon_is_shown_below_what_is_charged(books, changes):
    """And none a hundredth above it. To the nearest hundredth, as it was once shown, some of them would be too low."""
    plan = make(books, job_of(*changes))
    words = zip(*cells(shown(plan), "total ε"), strict=True)
    for line, (in_filter, in_select) in zip(plan.lines, words, strict=True):
        assert in_filter.startswith("at most ") != line.filter_exact
        for word, epsilon in ((in_filter, line.filter_epsilon), (in_select, line.select_epsilon)):
            said = float(word.removeprefix("at most ").replace(",", ""))
            assert 0 <= said - epsilon < (0.01 if epsilon < 100 else 1)


def test_costs_are_shown_rounded_up_and_what_is_left_rounded_down(books):
    plan = make(books, job_of("evaluation.noise=7"))
    for i, line in enumerate(plan.lines):
        for row, cost in (
            (f"{plan.filter_trials} trials cost", line.filter_cost),
            ("all, whatever K, cost", line.select_cost),
        ):
            said = float(cells(shown(plan), row)[0][i].rstrip("%")) / 100
            assert 0 <= said - cost / line.budget_cost < 0.001 + 1e-12
    left = cells(shown(plan), "left afterwards")[1][1]
    assert 0 <= plan.lines[1].select_left - float(left.rstrip("%")) / 100 < 0.001 + 1e-12


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("changes", [(), ("tuning.trials=64",), DRAWN, ("evaluation.noise=1",)])
def test_what_the_verdict_offers_does_fit(books, mode, changes):
    plan = make(books, job_of(f"tuning.mode={mode}", *changes))
    verdict = plan_verdict(plan)
    assert ("It fits" in verdict) == all(getattr(line, f"{mode}_fits") for line in plan.lines)
    offers = re.findall(r"((?:tuning|privacy)\.\w+=[\w.]+\w)", verdict)
    assert offers or "It fits" in verdict
    for offer in offers:
        changed = make(books, job_of(f"tuning.mode={mode}", *changes, offer))
        assert "It fits" in plan_verdict(changed), offer


def test_the_next_command_is_for_the_job_that_was_planned(tmp_path, monkeypatch):
    """With its overrides, as a shell wants them: without them another job would be tuned."""
    from typer.testing import CliRunner

    from purser import app

    monkeypatch.setenv("PURSER_HOME", str(tmp_path))
    monkeypatch.delenv("PURSER_LEDGER", raising=False)
    ended = CliRunner().invoke(
        app, ["plan", str(DIGITS), "tuning.trials=2", "tuning.space={training.steps: {choice: [7]}}"]
    )
    assert ended.exit_code == 0
    assert (
        ended.stdout.splitlines()[-1]
        == f"Next: purser tune {DIGITS} tuning.trials=2 'tuning.space={{training.steps: {{choice: [7]}}}}'"
    )


# The curve.


@pytest.mark.parametrize("changes", [(), ("tuning.trials=5",), DRAWN])
def test_the_curve_is_of_the_books_prices(books, changes):
    """Recomputed point by point, for both accounts; the job's own curve is the higher of both."""
    job = job_of(*changes)
    plan = make(books, job)
    whole = plan.as_json()
    for i, line in enumerate(plan.lines):
        prices = [price(run.charges()[i], line.order) for run in candidates(job)]
        pool = [run.charges()[i] for run in job.corners()]
        for point in line.curve:
            n = point.trials
            cost = sum(prices[k % len(prices)] for k in range(n)) if line.filter_exact else n * max(prices)
            assert point.filter_epsilon == epsilon_of(cost, 1e-4, line.order)
            assert point.select_epsilon == epsilon_of(orders.select_price(pool, line.order, n), 1e-4, line.order)
    assert [point["trials"] for point in whole["curve"]][-1] >= 4 * job.tuning.trials
    at = next(point for point in whole["curve"] if point["trials"] == job.tuning.trials)
    assert at == {"trials": job.tuning.trials} | {k: whole[k] for k in ("filter_epsilon", "select_epsilon")}
    for mode in MODES:
        heights = [point[f"{mode}_epsilon"] for point in whole["curve"]]
        assert heights == sorted(heights)


def test_the_curve_is_drawn_for_the_account_that_ends_first(books):
    assert "trials on digits/train" in shown(make(books, job_of()))
    assert "trials on digits/validation" in shown(make(books, job_of("evaluation.noise=0.5")))


# What a refusal offers instead.


def offers(sentence):
    """The field=value offers in a sentence, as values for a job."""
    found = re.findall(r"((?:training|evaluation)\.\w+)=([\d.]+(?:e[+-]?\d+)?)", sentence)
    return [{field: int(value) if field.endswith("steps") else float(value)} for field, value in found]


def accounts_with(books, job, **remaining):
    """The job's accounts with no more than so much left on each."""
    left = dict.fromkeys(("train", "validation"), None) | remaining
    return [
        account if cost is None else replace(account, spent_cost=account.budget_cost - cost)
        for account, cost in zip(created(books, job), left.values(), strict=True)
    ]


def shortages_of(run, accounts):
    """What the books would answer to a reservation."""
    asked = [(account, account.price(charge)) for account, charge in zip(accounts, run.charges(), strict=True)]
    return [Shortage(a.account, cost, a.remaining_cost, 0) for a, cost in asked if cost > a.remaining_cost]


def offered(run, accounts):
    """The sentence, and the values that it offers."""
    short = shortages_of(run, accounts)
    assert short
    sentence = what_would_fit(run, accounts, short)
    return sentence, offers(sentence)


def fits(run, accounts, **values):
    changed = run.with_values({name.replace("__", "."): value for name, value in values.items()})
    return not shortages_of(changed, accounts)


@pytest.mark.parametrize("remaining", [200_000_000_000, 100_000_000_000, 20_000_000_000, 5_000_000_000])
def test_what_would_fit_does_fit(books, remaining):
    """Both offers, anything beyond them in the direction that is said, and hardly anything short of them."""
    job = job_of()
    accounts, run = accounts_with(books, job, train=remaining), job.plain
    _, (more, fewer) = offered(run, accounts)
    sigma, steps = more["training.noise_multiplier"], fewer["training.steps"]
    assert fits(run, accounts, training__noise_multiplier=sigma)
    assert fits(run, accounts, training__noise_multiplier=sigma * 1.5)
    assert not fits(run, accounts, training__noise_multiplier=sigma * 0.98)
    assert fits(run, accounts, training__steps=steps)
    assert steps == 1 or fits(run, accounts, training__steps=steps - 1)
    assert not fits(run, accounts, training__steps=steps + 1)


@pytest.mark.parametrize("remaining", [100_000_000_000, 3_000_000_000, 1_000_000])
def test_an_evaluation_that_would_fit_does_fit(books, remaining):
    job = job_of()
    accounts, run = accounts_with(books, job, validation=remaining), job.plain
    _, (offer,) = offered(run, accounts)
    noise = offer["evaluation.noise"]
    assert fits(run, accounts, evaluation__noise=noise)
    assert not fits(run, accounts, evaluation__noise=noise - 0.2)


@pytest.mark.parametrize("account", ["train", "validation"])
def test_an_empty_account_offers_nothing(books, account):
    job = job_of()
    sentence, given = offered(job.plain, accounts_with(books, job, **{account: 0}))
    assert sentence == "Nothing fits any more; the account is at its end."
    assert given == []


def test_an_account_without_room_for_one_step_offers_more_noise(books):
    """Where not even one step fits at this noise, fewer steps are not offered."""
    job = job_of()
    accounts, run = accounts_with(books, job, train=1_000_000_000), job.plain
    _, given = offered(run, accounts)
    assert [list(offer) for offer in given] == [["training.noise_multiplier"]]
    assert fits(run, accounts, training__noise_multiplier=given[0]["training.noise_multiplier"])


def test_what_would_fit_fits_both_accounts(books):
    job = job_of()
    accounts, run = accounts_with(books, job, train=20_000_000_000, validation=110_000_000_000), job.plain
    _, given = offered(run, accounts)
    together = {field: value for offer in given for field, value in offer.items()}
    assert any(not shortages_of(run.with_values(values), accounts) for values in (*given, together))


def test_an_offered_evaluation_noise_is_allowed(books):
    job = job_of()
    _, given = offered(job.plain, accounts_with(books, job, validation=10))
    for offer in given:
        job.with_values(offer)


@pytest.mark.parametrize("mode", MODES)
def test_what_is_judged_on_public_records_is_planned_on_train_alone(books, mode, tmp_path):
    """Both accounts are made, but only one is asked."""
    public = (f"evaluation.source={tmp_path / 'public.csv'}", "evaluation.on=public", f"tuning.mode={mode}")
    job, private = job_of(*public), job_of(f"tuning.mode={mode}")
    plan = make(books, job)
    assert [line.account for line in plan.lines] == ["digits/train"]
    assert plan.lines[0] == make(books, private).lines[0]
    assert "validation" not in shown(plan).replace("public", "")
    assert "judged on public records" in shown(plan)
    accounts = books.create(job.dataset(["ab" * 32]), 3.0, 1e-4, planned(job), 8)
    assert [account.account for account in accounts] == ["digits/train", "digits/validation"]
    assert set(make(books, job).as_json()) == set(make(books, private).as_json())
