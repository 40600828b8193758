"""A field that is auto: solved at the account's order so that each candidate costs what the job as it stands does,
never more; priced as it is solved (P14); refused where nothing can be solved, by its field."""

from __future__ import annotations

from dataclasses import replace

import pytest
from product import DIGITS

from cluster.accounting.books import Books
from cluster.accounting.costs import price
from cluster.accounting.ledger import Ledger
from cluster.errors import UsageError
from training.jobfile import load, parse
from tuning.config import SweepJob
from tuning.plan import candidates, make, planned
from tuning.search import proposals

BATCHES = "training.expected_batch_size: {choice: [128, 256, 360, 512]}"
NOISE, STEPS = "training.noise_multiplier", "training.steps"


def job_of(space, *assignments, search="random", mode="filter", trials=8):
    tuning = f"tuning={{mode: {mode}, search: {search}, trials: {trials}, space: {{{space}}}}}"
    return load(SweepJob, DIGITS, [tuning, *assignments])


def cost(run, order):
    return price(run.charges()[0], order)


@pytest.mark.parametrize("order", [2, 6, 32])
@pytest.mark.parametrize("field", [NOISE, STEPS])
def test_every_candidate_costs_what_the_job_as_it_stands_does_and_never_more(field, order):
    job = job_of(f"{field}: auto, {BATCHES}", search="grid")
    allowed = cost(job.plain, order)
    for values in proposals(job, order):
        run = job.candidate(values)
        assert cost(run, order) <= allowed
        charge = run.charges()[0]
        if field == STEPS:
            dearer = replace(charge, steps=charge.steps + 1)
        else:
            less = round(charge.mechanism.noise_multiplier - 0.001, 3)
            dearer = replace(charge, mechanism=replace(charge.mechanism, noise_multiplier=less))
        assert price(dearer, order) > allowed, "the next step of the field would be too much"


@pytest.mark.parametrize("field", [NOISE, STEPS])
def test_the_job_s_own_batch_gets_its_own_value(field):
    job = job_of(f"{field}: auto, training.expected_batch_size: {{choice: [360]}}", search="grid")
    (values,) = proposals(job, 6)
    assert values[field] == {NOISE: 8.0, STEPS: 80}[field]


def test_one_solved_at_another_order_would_be_seen():
    job = job_of(f"{NOISE}: auto, {BATCHES}", search="grid")
    assert any(cost(job.candidate(values), 32) > cost(job.plain, 32) for values in proposals(job, 2))


def test_random_candidates_are_solved_and_concrete():
    job = job_of(f"{NOISE}: auto, training.expected_batch_size: {{int: [100, 600]}}", trials=20)
    drawn = list(proposals(job, 6))
    assert len({values[NOISE] for values in drawn}) > 10
    assert all(list(values) == ["training.expected_batch_size", NOISE] for values in drawn)
    assert parse(SweepJob, job.model_dump(mode="json")) == job, "what a resumed sweep reads"


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ("training.max_grad_norm: auto", "tuning.space: training.max_grad_norm cannot be auto"),
        (f"{NOISE}: auto, {STEPS}: auto", "tuning.space: training.noise_multiplier and training.steps are both auto"),
        (f"{NOISE}: automatic", "tuning.space.training.noise_multiplier: 'automatic' was given; write auto, or one of"),
    ],
)
def test_auto_for_anything_else_is_refused(space, said):
    with pytest.raises(UsageError) as raised:
        job_of(space)
    assert str(raised.value).startswith(said)


def test_a_selection_needs_choices_beside_it():
    for name, ends in (("training.expected_batch_size", "int: [100, 200]"), (STEPS, "int: [10, 20]")):
        with pytest.raises(UsageError, match=rf"^tuning\.space: {name} needs choice"):
            job_of(f"{NOISE}: auto, {name}: {{{ends}}}", mode="select")
    assert job_of(f"{NOISE}: auto, {BATCHES}, training.max_grad_norm: {{uniform: [1, 2]}}", mode="select")


@pytest.mark.parametrize(
    ("space", "assignments", "said"),
    [
        (f"{STEPS}: auto, {NOISE}: {{choice: [0.5, 8]}}", ("training.steps=1", "training.block=1"), "one step"),
        (f"{NOISE}: auto, {STEPS}: {{choice: [1, 9000000]}}", ("training.noise_multiplier=90000",), "noise_multiplier"),
    ],
)
def test_where_nothing_can_be_solved_the_field_and_the_values_are_named(space, assignments, said):
    job = job_of(space, *assignments)
    with pytest.raises(UsageError, match=rf"^tuning\.space: .* is auto, but for training.*{said}.* costs more"):
        job.corners(6)


def test_a_plan_prices_what_is_solved(tmp_path):
    job = job_of(f"{NOISE}: auto, {BATCHES}", search="grid", trials=4)
    books = Books(Ledger(f"sqlite:///{tmp_path}/ledger.db"))
    before = make(books, job)
    line = before.lines[0]
    prices = [cost(run, line.order) for run in candidates(job, line.order)]
    assert line.filter_cost == sum(prices)
    assert max(prices) <= cost(job.plain, line.order) <= min(prices) * 1.01
    books.create(job.dataset(["ab" * 32]), job.privacy.epsilon, job.privacy.delta, planned(job), 4)
    after = make(books, job).lines[0]
    assert (after.order, after.filter_cost) == (line.order, line.filter_cost)
    unsolved = [cost(run, line.order) for run in candidates(job)]
    assert max(unsolved) > 1.5 * max(prices), "broken on purpose: priced with the value that the job has"
