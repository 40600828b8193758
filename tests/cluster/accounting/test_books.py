"""Datasets and accounts: made once and whole, bound to their data and declared facts for ever (P4), with keys that
appear nowhere outside (P13)."""

from __future__ import annotations

import json
import math

import pytest
from bookkeeping import (
    DELTA,
    EPSILON,
    HISTOGRAM,
    STEP,
    TRAIN,
    VALIDATION,
    digits,
    evaluation,
    plans,
    run_attempt,
    training,
)

from cluster.accounting.costs import budget_cost, price
from cluster.errors import PurserError, UsageError


@pytest.fixture
def new(places):
    """A ledger without accounts."""
    return places.empty().desk()


def create(desk, dataset, epsilon=EPSILON, delta=DELTA):
    return desk.books.create(dataset, epsilon, delta, plans(dataset), 8)


def test_both_partitions_get_the_whole_budget(new):
    train, validation = create(new, digits())
    assert (train.account, validation.account) == (TRAIN, VALIDATION)
    for account in (train, validation):
        assert (account.epsilon, account.delta, account.dataset) == (EPSILON, DELTA, digits())
        assert account.budget_cost == budget_cost(EPSILON, DELTA, account.order) == account.remaining_cost
        assert (account.spent_cost, account.reserved_cost) == (0, 0)
    assert train.order == 6
    assert train.price(training()) == price(training(), 6)
    assert train.epsilon_of(train.budget_cost) == pytest.approx(EPSILON)


def test_what_was_made_reads_back_from_another_process_s_view(place, desk):
    again = place.desk()
    assert [again.account(name) for name in (TRAIN, VALIDATION)] == [desk.account(n) for n in (TRAIN, VALIDATION)]
    assert again.books.names() == [TRAIN, VALIDATION]
    assert again.books.exists("digits")
    assert not again.books.exists("letters")
    assert again.books.check(digits(), EPSILON, DELTA)[0] == again.account(TRAIN)


def test_create_is_all_or_none(desk):
    """The second source of the same content fails after both accounts were written: they must be gone."""
    twice = digits("letters", sources=("new", "new"))
    with pytest.raises(PurserError):
        create(desk, twice)
    assert desk.books.names() == [TRAIN, VALIDATION]
    with desk.ledger.reading() as view:
        assert view.by_key("source:new") is None
    with pytest.raises(UsageError):
        desk.books.partition_key("letters")
    assert create(desk, digits("letters", sources=("new",)))  # and nothing is in the way of a good one


def test_a_source_belongs_to_one_dataset(desk):
    before = desk.totals()
    with pytest.raises(UsageError, match=r"data\.source") as raised:
        create(desk, digits("copy", sources=("fresh", *digits().sources)))
    assert "account: digits" in str(raised.value)
    assert desk.books.names() == [TRAIN, VALIDATION]
    assert desk.totals() == before
    assert create(desk, digits("copy", sources=("fresh",)))


@pytest.mark.parametrize("changes", [{}, {"sources": ("other",)}, {"units": 5000}])
def test_a_second_create_is_refused(desk, changes):
    before = desk.totals()
    with pytest.raises(UsageError, match="exists already"):
        create(desk, digits(**changes), epsilon=8.0)
    assert desk.totals() == before
    assert desk.account().epsilon == EPSILON
    with desk.ledger.reading() as view:
        assert view.by_key("source:other") is None


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("privacy.epsilon", {"epsilon": 8.0}),
        ("privacy.epsilon", {"epsilon": math.nan}),
        ("privacy.delta", {"delta": 1e-5}),
        ("privacy.unit", {"unit": "device"}),
        ("privacy.units", {"units": 1798}),
        ("privacy.max_records_per_unit", {"max_records_per_unit": 2}),
        ("data.validation_fraction", {"validation_fraction": 0.25}),
        ("data.source", {"sources": ("other",)}),
        ("data.source", {"sources": ()}),
        ("data.source", {"sources": (*digits().sources, "more")}),
    ],
)
def test_check_names_each_field_that_differs(desk, field, changes):
    before = desk.totals()
    said = {"epsilon": EPSILON, "delta": DELTA, **changes}
    epsilon, delta = said.pop("epsilon"), said.pop("delta")
    with pytest.raises(UsageError, match=rf"^{field}: ") as raised:
        desk.books.check(digits(**said), epsilon, delta)
    value = next(iter(changes.values()))
    if field != "data.source":
        assert str(value) in str(raised.value), "the message says what the job says"
        made = {"epsilon": EPSILON, "delta": DELTA, **vars(digits())}[next(iter(changes))]
        assert f"write {made} in the job" in str(raised.value)
    assert desk.totals() == before


def test_check_of_an_unknown_dataset_says_how_to_make_it(desk):
    with pytest.raises(UsageError, match="budget create"):
        desk.books.check(digits("letters"), EPSILON, DELTA)


@pytest.mark.parametrize("delta", [1 / 1797, 1e-3, 0.5, 1.0])
def test_delta_must_be_below_one_in_the_number_of_units(new, delta):
    with pytest.raises(UsageError, match=r"privacy\.delta"):
        create(new, digits(), delta=delta)
    assert new.books.names() == []
    assert create(new, digits(), delta=1 / 1798)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0, 0.0, -3.0, 1e-4, 101.0, True, "3", None])
def test_bad_epsilon_is_refused_by_name(new, value):
    with pytest.raises(UsageError, match=r"privacy\.epsilon"):
        create(new, digits(), epsilon=value)
    assert new.books.names() == []


@pytest.mark.parametrize("value", [math.nan, math.inf, 0, 0.0, -1e-5, 1e-31, 2.0, True, "1e-5", None])
def test_bad_delta_is_refused_by_name(new, value):
    with pytest.raises(UsageError, match=r"privacy\.delta"):
        create(new, digits(), delta=value)
    assert new.books.names() == []


@pytest.mark.parametrize("value", [math.nan, math.inf, 0, 1, -5, 1797.0, 10**13, True, "1797", None])
def test_bad_units_are_refused_by_name(new, value):
    with pytest.raises(UsageError, match=r"privacy\.units"):
        create(new, digits(units=value))
    assert new.books.names() == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_records_per_unit", 0),
        ("max_records_per_unit", -3),
        ("max_records_per_unit", 1.5),
        ("validation_fraction", -0.5),
        ("validation_fraction", 1.5),
        ("validation_fraction", math.nan),  # this one fails with json's ValueError: refused, but by no field's name
    ],
)
def test_other_bad_facts_are_refused_by_name(new, field, value):
    with pytest.raises(UsageError, match=field):
        create(new, digits(**{field: value}))


def test_an_impossible_budget_is_refused(new):
    with pytest.raises(UsageError, match=r"privacy\.epsilon"):
        create(new, digits(), epsilon=0.001, delta=1e-30)
    assert new.books.names() == []


def test_keys_appear_nowhere_outside(place, desk):
    """Whoever holds the HMAC key can test guesses of records against fingerprints; the partition key tells who was
    trained on. Neither may be in what is printed, hashed or entered."""
    desk.leases.reserve("lease", "by", [training(), evaluation()])
    run_attempt(desk, "lease", "nonce", 2)
    desk.leases.close("lease", "settle", "completed")
    desk.leases.reserve("greedy", "by", [training(8000)])
    keys = (desk.books.source_key(), desk.books.partition_key("digits"))
    assert len(set(keys)) == 2
    outside = json.dumps([list(desk.books.history(a)) for a in desk.books.names()]) + repr(desk.account())
    outside += desk.ledger.identity + repr(desk.verdict()) + repr(desk.leases.fits([training(8000)]))
    outside += repr(place.contents()[0])
    assert "authorise" in outside
    for key in keys:
        assert len(key) == 64
        assert key not in outside
        assert key[:12] not in outside


def test_partition_keys_differ_and_stay(desk):
    create(desk, digits("letters"))
    first, second = desk.books.partition_key("digits"), desk.books.partition_key("letters")
    assert first != second
    assert desk.books.partition_key("digits") == first
    with pytest.raises(UsageError) as raised:
        desk.books.partition_key("nobody")
    assert first not in str(raised.value)


def test_names_resolve(desk):
    assert desk.books.resolve("digits") == TRAIN
    assert desk.books.resolve(VALIDATION) == VALIDATION
    with pytest.raises(UsageError, match=r"nobody.*digits/train"):
        desk.books.resolve("nobody")
    with pytest.raises(UsageError, match="nobody"):
        desk.books.show("nobody")


def test_an_empty_ledger_says_how_to_begin(new):
    with pytest.raises(UsageError, match="budget create"):
        new.books.resolve("digits")


def test_history_tells_mechanism_steps_and_author(desk):
    desk.leases.reserve("lease", "run-1", [training(), evaluation()])
    run_attempt(desk, "lease", "nonce", 1)
    history = list(desk.books.history(TRAIN))
    assert [row["kind"] for row in history] == ["account", "source", "reserve", "open", "authorise"]
    assert [row["by"] for row in history] == ["owner", "owner", "run-1", "run-1", "run-1"]
    assert history[-1]["mechanism"] == {
        "kind": "poisson_subsampled_gaussian",
        "version": 1,
        "sample_rate": STEP.sample_rate,
        "noise_multiplier": STEP.noise_multiplier,
    }
    assert (history[-1]["steps"], history[2]["steps"]) == (20, 80)
    assert list(desk.books.history(VALIDATION))[1]["mechanism"]["scale"] == HISTOGRAM.scale


def test_authorised_steps_and_the_last_run_are_read_from_the_ledger(desk):
    assert desk.books.last_run(TRAIN) is None
    for lease, steps in (("first", 80), ("second", 60)):
        desk.leases.reserve(lease, lease, [training(steps), evaluation()])
    run_attempt(desk, "second", "nonce", 1)
    run_attempt(desk, "first", "nonce", 2)
    run_attempt(desk, "second", "again", 3)
    assert not desk.leases.reserve("greedy", "greedy", [training(8000)]).fits
    assert desk.books.last_run(TRAIN) == ("second", price(training(60), 6)), "what was refused is no run"
    assert [sum(e["steps"] for e in desk.books.charged(lease, TRAIN)) for lease in ("first", "second", "none")] == [
        40,
        80,
        0,
    ]
    assert desk.books.charged("second", VALIDATION) == []


def test_an_account_prints_the_keys_of_the_contract(desk):
    desk.leases.reserve("lease", "run", [training()])
    printed = json.loads(json.dumps(desk.account().as_json()))
    keys = "account epsilon delta order budget_cost spent_cost reserved_cost remaining_cost head"
    assert set(printed) >= set(keys.split())
    assert printed["remaining_cost"] == printed["budget_cost"] - printed["spent_cost"] - printed["reserved_cost"]
    assert set(printed["head"]) == {"seq", "hash"}
