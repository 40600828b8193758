"""Descriptions of mechanisms: unknown, NaN, infinite and out-of-bounds values are refused by field name (P4), and what
is written in the ledger reads back as the same mechanism (P12)."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.accounting.mechanisms import (
    GAMMA_BOUNDS,
    LEAST_SHAPE,
    MOST_LEVELS,
    MOST_MECHANISMS,
    NOISE_MULTIPLIER_BOUNDS,
    POISSON_MEAN_BOUNDS,
    SAMPLE_RATE_BOUNDS,
    SHAPE_BOUNDS,
    STEPS_BOUNDS,
    Charge,
    Composition,
    DiscreteGaussian,
    Gaussian,
    Laplace,
    Poisson,
    PoissonSubsampledGaussian,
    RepeatAndSelect,
    TruncatedNegativeBinomial,
    from_json,
    to_json,
)
from cluster.errors import UsageError

STEP = PoissonSubsampledGaussian(sample_rate=0.25, noise_multiplier=8.0)
RUN = Composition(((STEP, 80),))
SELECTION = RepeatAndSelect((RUN, Laplace(3.0)), TruncatedNegativeBinomial(shape=0.5, gamma=0.08))
NOT_NUMBERS = (
    *(math.nan, math.inf, -math.inf, True, False, "8.0", None, [8.0], b"8", 8 + 0j, Decimal(8), Fraction(8)),
    *(10**400, {}, object()),
)


@pytest.mark.parametrize("make", [lambda n: PoissonSubsampledGaussian(0.25, n), Gaussian, Laplace])
@pytest.mark.parametrize("value", [*NOT_NUMBERS, 0, 0.0, -0.0, -8.0, 0.0999, 1.1e5, 5e-324, 1.7e308])
def test_bad_noise_multiplier_is_refused_by_name(make, value):
    with pytest.raises(UsageError, match="noise_multiplier"):
        make(value)


@pytest.mark.parametrize("value", [*NOT_NUMBERS, -0.5, -5e-324, 5e-324, 9.9e-7, 1000.1, 0j, Decimal(0), ""])
def test_bad_shape_is_refused_by_name(value):
    with pytest.raises(UsageError, match="shape"):
        TruncatedNegativeBinomial(value, 0.5)


@pytest.mark.parametrize("value", [*NOT_NUMBERS, 0, 0.0, 1, 1.0, -0.5, 5e-324, math.nextafter(1.0, 0.0)])
def test_bad_gamma_is_refused_by_name(value):
    with pytest.raises(UsageError, match="gamma"):
        TruncatedNegativeBinomial(0.5, value)


@pytest.mark.parametrize("value", [*NOT_NUMBERS, 0, -1.0, 0.999, 1.1e6])
def test_bad_poisson_mean_is_refused_by_name(value):
    """Below 1 the theorem's log E[K] would be negative, and a selection among equals cheaper than nothing."""
    with pytest.raises(UsageError, match="mean"):
        Poisson(value)


NOT_MECHANISMS = (None, math.nan, 8.0, "gaussian", {"kind": "gaussian"}, Gaussian, object(), (Gaussian(1.0), 1))


@pytest.mark.parametrize("value", NOT_MECHANISMS, ids=str)
def test_what_is_no_mechanism_is_refused_by_name(value):
    with pytest.raises(UsageError, match="parts"):
        Composition(((value, 1),))
    with pytest.raises(UsageError, match="candidates"):
        RepeatAndSelect((value,), Poisson(8.0))
    with pytest.raises(UsageError, match="mechanism"):
        Charge("digits/train", value, 80, 20)


@pytest.mark.parametrize("value", [*NOT_NUMBERS, 0, -1, 80.0, STEPS_BOUNDS[1] + 1])
def test_bad_counts_are_refused_by_name(value):
    with pytest.raises(UsageError, match="count"):
        Composition(((STEP, value),))


@pytest.mark.parametrize(
    "value", [None, (), [], [(STEP, 1)], STEP, "ab", {}, {STEP: 1}, (STEP,), ((STEP,),), ((STEP, 1, 1),)]
)
def test_parts_of_another_form_are_refused_by_name(value):
    with pytest.raises(UsageError, match="parts"):
        Composition(value)


@pytest.mark.parametrize("value", [None, (), [], [STEP], STEP, "ab", {STEP: 1}])
def test_candidates_of_another_form_are_refused_by_name(value):
    with pytest.raises(UsageError, match="candidates"):
        RepeatAndSelect(value, Poisson(8.0))


@pytest.mark.parametrize("value", [None, 8, 8.0, math.nan, "poisson", {"kind": "poisson"}, Poisson, STEP])
def test_repetitions_of_another_form_are_refused_by_name(value):
    with pytest.raises(UsageError, match="repetitions"):
        RepeatAndSelect((STEP,), value)


def test_a_selection_may_follow_others_but_not_run_within_one():
    assert Composition(((SELECTION, 1), (STEP, 80))).parts[0][0] is SELECTION
    for nested in (SELECTION, Composition(((STEP, 1), (SELECTION, 1)))):
        with pytest.raises(UsageError, match="candidates"):
            RepeatAndSelect((STEP, nested), Poisson(8.0))
        form = to_json(RepeatAndSelect((STEP,), Poisson(8.0)))
        form["candidates"].append(to_json(nested))
        with pytest.raises(UsageError, match="candidates"):
            from_json(form)


def nested(levels):
    """A mechanism within `levels` compositions."""
    mechanism = STEP
    for _ in range(levels):
        mechanism = Composition(((mechanism, 1),))
    return mechanism


def test_depth_is_bounded():
    deepest = nested(MOST_LEVELS)
    assert from_json(to_json(deepest)) == deepest
    with pytest.raises(UsageError, match="parts.*deep"):
        Composition(((deepest, 1),))
    with pytest.raises(UsageError, match="candidates.*deep"):
        RepeatAndSelect((deepest,), Poisson(8.0))


def test_a_hostile_form_is_refused_before_it_is_walked():
    form = to_json(STEP)
    for _ in range(100_000):  # deeper than Python can recurse
        form = {"kind": "composition", "version": 1, "parts": [{"mechanism": form, "count": 1}]}
    with pytest.raises(UsageError, match="deep"):
        from_json(form)
    while "parts" in form:  # taken apart from outside: its own end would recurse as deep
        form = form["parts"].pop()["mechanism"]


@pytest.mark.parametrize(
    "wrap", [lambda step: {"mechanism": step, "count": 1}, lambda step: step], ids=["parts", "candidates"]
)
def test_huge_lists_are_refused_by_name(wrap):
    field = "parts" if "count" in wrap({}) else "candidates"
    form = {"kind": "composition", "version": 1} if field == "parts" else to_json(SELECTION)
    assert from_json({**form, field: [wrap(to_json(STEP))] * MOST_MECHANISMS})
    for many in (MOST_MECHANISMS + 1, 10_000_000):
        with pytest.raises(UsageError, match=field):
            from_json({**form, field: [wrap(to_json(STEP))] * many})


def test_mechanisms_are_counted_in_all():
    half = Composition(((STEP, 1),) * (MOST_MECHANISMS // 2))
    assert Composition(((half, 1), (half, 1)))
    with pytest.raises(UsageError, match="parts"):
        Composition(((half, 1), (half, 1), (STEP, 1)))
    with pytest.raises(UsageError, match="candidates"):
        RepeatAndSelect((half, half, STEP), Poisson(8.0))


@pytest.mark.parametrize("value", [*NOT_NUMBERS, 0, -0.1, 9.9e-10, math.nextafter(1.0, 2.0), 2, 5e-324])
def test_bad_sample_rate_is_refused_by_name(value):
    with pytest.raises(UsageError, match="sample_rate"):
        PoissonSubsampledGaussian(sample_rate=value, noise_multiplier=8.0)


@pytest.mark.parametrize("value", [*NOT_NUMBERS, 0, -5.0, 0.0999, 1.1e5])
def test_bad_scale_is_refused_by_name(value):
    with pytest.raises(UsageError, match="scale"):
        DiscreteGaussian(scale=value, l2_sensitivity=1)


@pytest.mark.parametrize("value", [*NOT_NUMBERS, 0, -1, 1.0, 1_000_001])
def test_bad_sensitivity_is_refused_by_name(value):
    with pytest.raises(UsageError, match="l2_sensitivity"):
        DiscreteGaussian(scale=5.0, l2_sensitivity=value)


def test_scale_is_bounded_relative_to_the_sensitivity():
    """A scale that is fine alone is next to no noise where one unit moves the counts by a lot."""
    with pytest.raises(UsageError, match="scale / l2_sensitivity"):
        DiscreteGaussian(scale=5.0, l2_sensitivity=51)


@pytest.mark.parametrize("field", ["steps", "block"])
@pytest.mark.parametrize("value", [*NOT_NUMBERS, 0, -1, 80.0, STEPS_BOUNDS[1] + 1])
def test_bad_steps_and_blocks_are_refused_by_name(field, value):
    with pytest.raises(UsageError, match=field):
        Charge("digits/train", STEP, **{"steps": 80, "block": 20, field: value})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"kind": "exponential"}, "mechanism.kind"),
        ({"kind": "poisson"}, "mechanism.kind"),
        ({"kind": "laplace"}, "sample_rate"),
        ({"kind": None}, "mechanism.kind"),
        ({"kind": "PoissonSubsampledGaussian"}, "mechanism.kind"),
        ({"kind": ["poisson_subsampled_gaussian"]}, "mechanism.kind"),
        ({"version": 2}, "mechanism.version"),
        ({"version": None}, "mechanism.version"),
        ({"version": "1"}, "mechanism.version"),
        ({"version": True}, "mechanism.version"),
        ({"version": 1.0}, "mechanism.version"),
        ({"seed": 1}, "seed"),
        ({1: 2}, "sample_rate"),
        ({"noise_multiplier": math.nan}, "noise_multiplier"),
        ({"noise_multiplier": "8.0"}, "noise_multiplier"),
        ({"sample_rate": True}, "sample_rate"),
    ],
)
def test_unknown_or_altered_json_is_refused_by_name(change, named):
    with pytest.raises(UsageError, match=named):
        from_json({**to_json(STEP), **change})


@pytest.mark.parametrize("missing", ["kind", "version", "sample_rate", "noise_multiplier"])
def test_json_that_lacks_a_field_is_refused_by_name(missing):
    form = {key: value for key, value in to_json(STEP).items() if key != missing}
    with pytest.raises(UsageError, match=missing):
        from_json(form)


def test_a_charge_checks_the_mechanism_again_when_it_is_read():
    form = Charge("digits/train", STEP, 80, 20).to_json()
    form["mechanism"]["noise_multiplier"] = -8.0
    with pytest.raises(UsageError, match="noise_multiplier"):
        Charge.from_json(form)


BAD_SELECTIONS = [
    ({"candidates": []}, "candidates"),
    ({"candidates": None}, "candidates"),
    ({"candidates": to_json(STEP)}, "candidates"),
    ({"candidates": [None]}, "mechanism"),
    ({"candidates": [{**to_json(STEP), "noise_multiplier": math.nan}]}, "noise_multiplier"),
    ({"candidates": [{"kind": "composition", "version": 1, "parts": [{"mechanism": to_json(STEP)}]}]}, "parts"),
    ({"candidates": [{"kind": "composition", "version": 1, "parts": [[to_json(STEP), 80]]}]}, "parts"),
    ({"candidates": [{"kind": "composition", "version": 1, "parts": "ab"}]}, "parts"),
    ({"candidates": [{"kind": "composition", "version": 1}]}, "parts"),
    ({"repetitions": None}, "repetitions"),
    ({"repetitions": 8.0}, "repetitions"),
    ({"repetitions": {"kind": "poisson", "version": 1}}, "mean"),
    ({"repetitions": {"kind": "poisson", "version": 1, "mean": math.nan}}, "mean"),
    ({"repetitions": {"kind": "poisson", "version": 2, "mean": 8.0}}, "repetitions.version"),
    ({"repetitions": {"kind": "poisson", "version": True, "mean": 8.0}}, "repetitions.version"),
    ({"repetitions": {"kind": "gaussian", "version": 1, "noise_multiplier": 8.0}}, "repetitions.kind"),
    ({"repetitions": {"kind": "poisson", "version": 1, "mean": 8.0, "gamma": 0.5}}, "gamma"),
    ({"repetitions": {"kind": "truncated_negative_binomial", "version": 1, "shape": 0.5}}, "gamma"),
    ({"repetitions": {"kind": "truncated_negative_binomial", "version": 1, "shape": -0.5, "gamma": 0.5}}, "shape"),
    ({"repetitions": {"kind": "truncated_negative_binomial", "version": 1, "shape": 0.5, "gamma": 1}}, "gamma"),
]


@pytest.mark.parametrize(("change", "named"), BAD_SELECTIONS, ids=str)
def test_an_altered_selection_is_refused_by_name(change, named):
    with pytest.raises(UsageError, match=named):
        from_json({**to_json(SELECTION), **change})


@pytest.mark.parametrize("form", [None, [], "gaussian", 8, [to_json(STEP)]])
def test_what_is_no_object_is_refused(form):
    with pytest.raises(UsageError, match="mechanism"):
        from_json(form)


NOISES = st.floats(*NOISE_MULTIPLIER_BOUNDS)
LEAVES = st.one_of(
    st.builds(Gaussian, NOISES),
    st.builds(Laplace, NOISES),
    st.builds(PoissonSubsampledGaussian, st.floats(*SAMPLE_RATE_BOUNDS), NOISES),
    st.builds(DiscreteGaussian, st.floats(10.0, NOISE_MULTIPLIER_BOUNDS[1]), st.integers(1, 100)),
)


def composed(mechanisms):
    parts = st.lists(st.tuples(mechanisms, st.integers(*STEPS_BOUNDS)), min_size=1, max_size=3)
    return st.builds(Composition, parts.map(tuple))


def selected(mechanisms):
    shapes = st.one_of(st.just(0.0), st.floats(LEAST_SHAPE, SHAPE_BOUNDS[1]))
    repetitions = st.one_of(
        st.builds(Poisson, st.floats(*POISSON_MEAN_BOUNDS)),
        st.builds(TruncatedNegativeBinomial, shapes, st.floats(*GAMMA_BOUNDS)),
    )
    return st.builds(RepeatAndSelect, st.lists(mechanisms, min_size=1, max_size=3).map(tuple), repetitions)


RUNS = st.one_of(LEAVES, composed(LEAVES), composed(composed(LEAVES)))
MECHANISMS = st.one_of(LEAVES, RUNS, selected(RUNS), composed(st.one_of(RUNS, selected(LEAVES))))


@settings(deadline=None, max_examples=150)
@given(MECHANISMS, st.integers(*STEPS_BOUNDS), st.integers(*STEPS_BOUNDS))
def test_json_round_trip_is_exact(mechanism, steps, block):
    charge = Charge("digits/train", mechanism, steps, block)
    read = Charge.from_json(json.loads(json.dumps(charge.to_json())))
    assert read == charge
    assert hash(read) == hash(charge)
    assert type(read.mechanism) is type(mechanism)


def test_the_forms_in_the_ledger():
    """Ledgers hold them for good: what is written today must read tomorrow."""
    assert to_json(SELECTION) == {
        "kind": "repeat_and_select",
        "version": 1,
        "candidates": [
            {
                "kind": "composition",
                "version": 1,
                "parts": [
                    {
                        "mechanism": {
                            "kind": "poisson_subsampled_gaussian",
                            "version": 1,
                            "sample_rate": 0.25,
                            "noise_multiplier": 8.0,
                        },
                        "count": 80,
                    }
                ],
            },
            {"kind": "laplace", "version": 1, "noise_multiplier": 3.0},
        ],
        "repetitions": {"kind": "truncated_negative_binomial", "version": 1, "shape": 0.5, "gamma": 0.08},
    }
    assert to_json(Gaussian(2.0)) == {"kind": "gaussian", "version": 1, "noise_multiplier": 2.0}


@pytest.mark.parametrize("bounds", [SAMPLE_RATE_BOUNDS, NOISE_MULTIPLIER_BOUNDS])
def test_bounds_themselves_are_allowed(bounds):
    """Otherwise a test of refusals would also pass where everything is refused."""
    field = "sample_rate" if bounds is SAMPLE_RATE_BOUNDS else "noise_multiplier"
    for value in bounds:
        PoissonSubsampledGaussian(**{"sample_rate": 0.5, "noise_multiplier": 1.0, field: value})


def test_the_other_bounds_are_allowed():
    for shape in (*SHAPE_BOUNDS, 0, LEAST_SHAPE):
        for gamma in GAMMA_BOUNDS:
            assert TruncatedNegativeBinomial(shape, gamma)
    for mean in POISSON_MEAN_BOUNDS:
        assert Poisson(mean)
    for noise in NOISE_MULTIPLIER_BOUNDS:
        assert Gaussian(noise).noise_multiplier == Laplace(noise).noise_multiplier
    assert Composition(((STEP, STEPS_BOUNDS[1]),))


@pytest.mark.parametrize("make", [lambda: "x" * 1_000_000, lambda: 10**5000, lambda: [[0] * 1000]])
def test_messages_stay_short(make):
    """A number of 5,000 digits is one that Python will not even print."""
    with pytest.raises(UsageError, match="noise_multiplier") as caught:
        Gaussian(make())
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "form",
    [
        {"mechanism": None},
        {"surprise": 1},
        {"account": None},
    ],
    ids=["no mechanism", "extra field", "no account"],
)
def test_a_malformed_charge_is_a_usage_error(form):
    with pytest.raises(UsageError):
        Charge.from_json({**Charge("digits/train", STEP, 80, 20).to_json(), **form})
