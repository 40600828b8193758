"""The search space and the polite gate: candidates come in a known order from declared ranges only (P11), nothing is
handed out that the gate did not let go, and the corners that are priced beforehand hold the cheapest and dearest."""

from __future__ import annotations

import itertools
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.tune.search import Searcher
from scipy import stats

from cluster.accounting.costs import price
from cluster.errors import UsageError
from training.jobfile import load
from tuning.config import MOST_CORNERS, Dimension, SweepJob
from tuning.search import END, GO, REFUSE, WAIT, BudgetedSearch, Listed, proposals

DIGITS = Path(__file__).parents[2] / "infra" / "jobs" / "digits.yaml"
RARE = 2e-9  # the false-alarm rate of each statistical check below

SHARES = st.floats(0, 1, exclude_max=True)


def job_of(space=None, *assignments, search="random", trials=8):
    space = "{}" if space is None else space
    return load(SweepJob, DIGITS, [f"tuning={{search: {search}, trials: {trials}, space: {space}}}", *assignments])


def refused(*arguments, **options):
    with pytest.raises(UsageError) as raised:
        job_of(*arguments, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_grid_goes_through_its_combinations_with_the_last_dimension_fastest():
    space = (
        "{training.steps: {choice: [20, 10]}, model.kind: {choice: [mlp, linear]}, training.block: {choice: [3, 1, 2]}}"
    )
    job = job_of(space, search="grid", trials=8)
    got = [tuple(values.values()) for values in proposals(job)]
    assert got == list(itertools.product([20, 10], ["mlp", "linear"], [3, 1, 2]))[:8]
    assert list(next(proposals(job))) == ["training.steps", "model.kind", "training.block"]
    assert [tuple(values.values()) for values in proposals(job)] == got  # the same again: nothing is drawn


def test_a_grid_ends_with_its_last_combination():
    job = job_of("{training.steps: {choice: [10, 20]}}", search="grid", trials=8)
    assert list(proposals(job)) == [{"training.steps": 10}, {"training.steps": 20}]


def test_without_a_space_every_trial_is_the_job_as_it_stands():
    for search in ("grid", "random"):
        assert list(proposals(job_of(search=search, trials=3))) == [{}, {}, {}]


SPACE = """{
  training.noise_multiplier: {loguniform: [4, 16]},
  training.max_grad_norm: {uniform: [0.1, 2]},
  training.optimizer.name: {choice: [sgd, adam]},
}"""


def test_random_draws_stay_in_their_ranges_and_are_valid_runs():
    job = job_of(SPACE, trials=200)
    drawn = list(proposals(job))
    assert len(drawn) == 200
    for values in drawn:
        assert 4 <= values["training.noise_multiplier"] <= 16
        assert 0.1 <= values["training.max_grad_norm"] <= 2
        assert values["training.optimizer.name"] in ("sgd", "adam")
    for values in drawn[:20]:
        run = job.candidate(values)
        assert run.training.noise_multiplier == values["training.noise_multiplier"]
    assert len({values["training.noise_multiplier"] for values in drawn}) == 200


def test_random_draws_are_uniform_and_loguniform():
    drawn = list(proposals(job_of(SPACE, trials=5000)))
    sigma = np.log([values["training.noise_multiplier"] for values in drawn]) / np.log(2)
    clip = np.array([values["training.max_grad_norm"] for values in drawn])
    assert stats.kstest(sigma, "uniform", (2, 2)).pvalue > RARE
    assert stats.kstest(clip, "uniform", (0.1, 1.9)).pvalue > RARE
    assert stats.binomtest(sum(v["training.optimizer.name"] == "sgd" for v in drawn), 5000, 0.5).pvalue > RARE


def test_no_seed_repeats_a_sweep():
    drawn = []
    for _ in range(2):
        random.seed(1)
        np.random.seed(1)
        drawn.append(list(proposals(job_of(SPACE, trials=3))))
    assert drawn[0] != drawn[1]


@settings(deadline=None)
@given(share=SHARES, count=st.integers(1, 50))
def test_every_choice_is_within_reach(share, count):
    dimension = Dimension(choice=tuple(range(count)))
    assert dimension.at(share) in dimension.extremes()
    assert dimension.at(0.0) == 0
    assert dimension.at(1 - 2.0**-53) == count - 1


@settings(deadline=None)
@given(share=SHARES, ends=st.tuples(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6)).filter(lambda e: e[0] < e[1]))
def test_draws_of_a_range_lie_between_its_ends(share, ends):
    """To the last digit but three: where a bound of the field is an end of the range, rounding could leave it."""
    for kind in ("uniform", "loguniform"):
        value = Dimension(**{kind: ends}).at(share)
        assert ends[0] * (1 - 1e-15) <= value <= ends[1] * (1 + 1e-15)
        assert Dimension(**{kind: ends}).at(0.0) == ends[0]


def test_whole_numbers_are_drawn_from_both_ends():
    dimension = job_of("{training.steps: {int: [10, 12]}}").tuning.space["training.steps"]
    assert [dimension.at(share) for share in (0.0, 0.34, 0.67, 1 - 2.0**-53)] == [10, 11, 12, 12]
    assert dimension.extremes() == (10, 12)


@pytest.mark.parametrize(
    ("space", "field", "word"),
    [
        ("{privacy.epsilon: {choice: [1, 30]}}", "tuning.space: privacy.epsilon", "cannot be searched"),
        ("{evaluation.noise: {choice: [1, 30]}}", "tuning.space: evaluation.noise", "cannot be searched"),
        ("{training.steps: {}}", "tuning.space.training.steps", "exactly one of"),
        ("{training.steps: {choice: []}}", "tuning.space.training.steps.choice", "at least 1"),
        (
            "{training.max_grad_norm: {choice: [1], uniform: [1, 2]}}",
            "tuning.space.training.max_grad_norm",
            "exactly one",
        ),
        ("{training.max_grad_norm: {uniform: [2, 1]}}", "tuning.space.training.max_grad_norm.uniform", "below"),
        ("{training.max_grad_norm: {uniform: [1, 1]}}", "tuning.space.training.max_grad_norm.uniform", "below"),
        ("{training.max_grad_norm: {uniform: [1, .inf]}}", "tuning.space.training.max_grad_norm.uniform.1", "finite"),
        ("{training.max_grad_norm: {loguniform: [0, 1]}}", "tuning.space.training.max_grad_norm.loguniform", "above 0"),
        ("{training.max_grad_norm: {normal: [0, 1]}}", "tuning.space.training.max_grad_norm.normal", "unknown"),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused_by_its_field(space, field, word):
    said = refused(space)
    assert said.startswith(field)
    assert word in said


def test_a_grid_needs_choices():
    said = refused("{training.max_grad_norm: {uniform: [1, 2]}}", search="grid")
    assert said.startswith("tuning.space: training.max_grad_norm needs choice")


@pytest.mark.parametrize(
    ("space", "field"),
    [
        ("{training.noise_multiplier: {uniform: [0.01, 1]}}", "training.noise_multiplier"),
        ("{training.noise_multiplier: {choice: [8, .nan]}}", "training.noise_multiplier"),
        ("{training.expected_batch_size: {choice: [100, 5000]}}", "training.expected_batch_size"),
        ("{training.nothing: {choice: [1]}}", "training.nothing"),
        ("{model.kind: {choice: [linear, giant]}}", "model.kind"),
        ("{training.steps: {uniform: [10, 20]}}", "training.steps"),
    ],
)
def test_a_space_with_a_run_that_is_none_is_refused_before_the_first(space, field):
    """At its corners and within: a sweep must not stop half-way over a value that could have been seen."""
    with pytest.raises(UsageError, match=rf"^{field.replace('.', '[.]')}: "):
        job_of(space).corners()


def test_a_space_with_too_many_corners_is_refused():
    rates = ", ".join(map(str, range(1, MOST_CORNERS + 2)))
    with pytest.raises(UsageError, match=rf"^tuning\.space: it has {MOST_CORNERS + 1} corners"):
        job_of(f"{{training.optimizer.learning_rate: {{choice: [{rates}]}}}}").corners()


def test_the_corners_hold_the_cheapest_and_the_dearest():
    """At any order, no random draw costs less or more than some corner: so what is planned bounds what is run."""
    space = """{
      training.noise_multiplier: {loguniform: [4, 16]},
      training.expected_batch_size: {choice: [100, 300, 200]},
      training.steps: {choice: [40, 20, 80]},
      training.optimizer.learning_rate: {uniform: [1, 8]},
    }"""
    job = job_of(space, trials=50)
    drawn = [job.candidate(values) for values in proposals(job)]
    for order in (2, 6, 32):
        corners = [price(run.charges()[0], order) for run in job.corners()]
        assert min(corners) < max(corners)
        for run in drawn:
            assert min(corners) <= price(run.charges()[0], order) <= max(corners)
    cheapest = job.candidate(
        {"training.noise_multiplier": 16.0, "training.expected_batch_size": 100, "training.steps": 20}
    )
    assert price(cheapest.charges()[0], 6) == min(price(run.charges()[0], 6) for run in job.corners())


def test_a_candidate_is_the_job_with_its_values_and_nothing_else():
    job = load(SweepJob, DIGITS)
    run = job.candidate({"training.max_grad_norm": 0.75, "training.optimizer.learning_rate": 3.0})
    assert not hasattr(run, "tuning")
    assert (run.training.max_grad_norm, run.training.optimizer.learning_rate) == (0.75, 3.0)
    was = {
        "training.max_grad_norm": job.training.max_grad_norm,
        "training.optimizer.learning_rate": job.training.optimizer.learning_rate,
    }
    assert run.with_values(was) == job.plain == job.candidate({})


class Gate:
    """Answers as it was told to, and remembers what it was asked."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = []

    def __call__(self, number, values):
        self.asked.append((number, values["training.steps"]))
        return self.answers.pop(0)


STEPS = "{training.steps: {choice: [10, 20, 30, 40]}}"


def search_of(gate):
    return BudgetedSearch(Listed(enumerate(proposals(job_of(STEPS, search="grid", trials=4)), start=1)), gate)


def suggested(search, times):
    return [search.suggest(f"trial-{i}") for i in range(times)]


def handed(number):
    return {"number": number, "values": {"training.steps": 10 * number}}


def test_candidates_that_may_go_are_handed_out_in_order_and_once():
    gate = Gate(GO, GO, GO, GO)
    assert suggested(search_of(gate), 6) == [handed(1), handed(2), handed(3), handed(4), *[Searcher.FINISHED] * 2]
    assert gate.asked == [(1, 10), (2, 20), (3, 30), (4, 40)]  # after the last, nobody is asked any more


def test_a_candidate_that_waits_is_asked_about_again_and_none_overtakes_it():
    gate = Gate(WAIT, WAIT, GO, WAIT, REFUSE, GO)
    search = search_of(gate)
    assert suggested(search, 5) == [None, None, handed(1), None, handed(3)]
    assert gate.asked == [(1, 10), (1, 10), (1, 10), (2, 20), (2, 20), (3, 30)]


def test_refused_candidates_are_passed_over():
    gate = Gate(REFUSE, GO, REFUSE, REFUSE)
    assert suggested(search_of(gate), 2) == [handed(2), Searcher.FINISHED]
    assert [number for number, _ in gate.asked] == [1, 2, 3, 4]


def test_a_sweep_of_which_nothing_fits_ends_at_once():
    gate = Gate(*[REFUSE] * 4)
    assert suggested(search_of(gate), 1) == [Searcher.FINISHED]
    assert len(gate.asked) == 4


def test_no_answer_but_go_lets_a_candidate_through():
    """Even one that the gate should never give."""
    gate = Gate(None, "GO", "", True)
    assert suggested(search_of(gate), 1) == [Searcher.FINISHED]


def test_a_gate_that_fails_hands_out_nothing():
    """An accountant that cannot be reached is no permission (P4)."""

    def broken(number, values):
        raise ConnectionError

    search = search_of(broken)
    for _ in range(2):
        with pytest.raises(ConnectionError):
            search.suggest("trial")


def test_what_tune_saves_holds_no_gate():
    """The gate holds the accountant's handle, which must not be written anywhere."""
    search = search_of(lambda number, values: GO)  # a lambda cannot be pickled
    copy = pickle.loads(pickle.dumps(search))
    assert "_ask" not in vars(copy)
    search.on_trial_complete("trial", {"accuracy": 0.9})
    assert search.suggest("trial") == handed(1)  # results change nothing


def test_where_nothing_can_be_paid_any_more_nobody_is_asked_again():
    gate = Gate(GO, REFUSE, END)
    assert suggested(search_of(gate), 4) == [handed(1), *[Searcher.FINISHED] * 3]
    assert [number for number, _ in gate.asked] == [1, 2, 3]
