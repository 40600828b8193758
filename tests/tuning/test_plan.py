"""The price before the purchase: the plan's numbers are those that the books will charge (P14), no data is touched for
them (P11, P13), and what a refusal offers instead does fit."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.accounting import orders
from cluster.accounting.books import Books
from cluster.accounting.costs import epsilon_of, price
from cluster.accounting.leases import Leases, Shortage
from cluster.accounting.ledger import Ledger
from cluster.accounting.selection import tnb_quantile
from cluster.errors import UsageError
from training import data
from training.admission import plans_of, what_would_fit
from training.config import load
from tuning.config import SweepJob
from tuning.display import plan_table
from tuning.plan import candidates, make

DIGITS = Path(__file__).parents[2] / "infra" / "jobs" / "digits.yaml"
CONTRACT = {"account", "epsilon", "delta", "order", "mode", "trial_cost", "trials_that_fit"} | {
    "filter_epsilon",
    "select_epsilon",
    "select_trials_p99",
}


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


def test_the_plan_of_the_digits_job(books):
    """The job of the documents: order 6, and seven of its eight trials fit."""
    plan = make(books, job_of()).as_json()
    assert set(plan) >= CONTRACT
    assert (plan["account"], plan["epsilon"], plan["delta"], plan["mode"]) == ("digits", 3.0, 1e-4, "filter")
    assert plan["order"] == 6
    assert plan["trials_that_fit"] == 7
    assert plan["filter_epsilon"] > 3.0  # the eighth does not
    assert plan["select_trials_p99"] == tnb_quantile(8, 0.5, 0.99)
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
    assert before.as_json() == after.as_json()


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

    for name in ("read", "load", "declared", "fingerprint", "_read_text"):
        monkeypatch.setattr(data, name, caught)
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
    """Whoever plans one mode sees the other's price."""
    for mode in ("filter", "select"):
        plan = make(books, job_of(f"tuning.mode={mode}"))
        for line in plan.lines:
            charges = [run.charges()[plan.lines.index(line)] for run in candidates(plan.job)]
            cost = orders.select_price(charges, line.order, 8, 0.5)
            assert line.select_epsilon == epsilon_of(cost, 1e-4, line.order)
            assert line.select_fits == (cost <= line.remaining_cost)
        assert plan.as_json()["select_epsilon"] == max(line.select_epsilon for line in plan.lines)
        assert plan.as_json()["mode"] == mode


def test_many_selected_trials_are_cheaper_than_all_of_them(books):
    plan = make(books, job_of("tuning.trials=64", "tuning.search=random", "tuning.space={}")).as_json()
    assert plan["select_epsilon"] < plan["filter_epsilon"] / 3
    assert plan["select_trials_p99"] == 397


def test_a_random_search_is_planned_from_its_corners(books):
    space = "{training.noise_multiplier: {loguniform: [4, 16]}, training.max_grad_norm: {uniform: [0.1, 2]}}"
    job = job_of("tuning.search=random", f"tuning.space={space}")
    line = make(books, job).lines[0]
    ends = [price(job.candidate({"training.noise_multiplier": s}).charges()[0], line.order) for s in (4.0, 16.0)]
    assert (line.trial_cost_most, line.trial_cost_least) == tuple(ends)
    assert line.trial_cost_least < line.trial_cost < line.trial_cost_most
    assert line.trials_that_fit == line.remaining_cost // line.trial_cost


def test_the_table_shows_what_the_plan_says(books):
    from rich.console import Console

    plan = make(books, job_of())
    console = Console(width=160)
    with console.capture() as capture:
        console.print(plan_table(plan))
    shown = capture.get()
    for line in plan.lines:
        row = next(text for text in shown.splitlines() if line.account in text)
        for word in (
            str(line.order),
            str(line.trials_that_fit),
            f"{line.filter_epsilon:.2f}",
            f"{line.select_epsilon:.2f}",
        ):
            assert word in row


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
