"""Descriptions of mechanisms: unknown, NaN, infinite and out-of-bounds values are refused by field name (P4), and what
is written in the ledger reads back as the same mechanism (P12)."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.accounting.mechanisms import (
    NOISE_MULTIPLIER_BOUNDS,
    SAMPLE_RATE_BOUNDS,
    STEPS_BOUNDS,
    Charge,
    DiscreteGaussian,
    PoissonSubsampledGaussian,
    from_json,
    to_json,
)
from cluster.errors import UsageError

STEP = PoissonSubsampledGaussian(sample_rate=0.25, noise_multiplier=8.0)
NOT_NUMBERS = (math.nan, math.inf, -math.inf, True, False, "8.0", None, [8.0], b"8", 8 + 0j)


@pytest.mark.parametrize("value", [*NOT_NUMBERS, 0, 0.0, -0.0, -8.0, 0.0999, 1.1e5, 5e-324, 1.7e308])
def test_bad_noise_multiplier_is_refused_by_name(value):
    with pytest.raises(UsageError, match="noise_multiplier"):
        PoissonSubsampledGaussian(sample_rate=0.25, noise_multiplier=value)


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
        ({"kind": "laplace"}, "mechanism.kind"),
        ({"kind": None}, "mechanism.kind"),
        ({"kind": "PoissonSubsampledGaussian"}, "mechanism.kind"),
        ({"kind": ["poisson_subsampled_gaussian"]}, "mechanism.kind"),
        ({"version": 2}, "mechanism.version"),
        ({"version": None}, "mechanism.version"),
        ({"version": "1"}, "mechanism.version"),
        ({"seed": 1}, "seed"),
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


MECHANISMS = st.one_of(
    st.builds(PoissonSubsampledGaussian, st.floats(*SAMPLE_RATE_BOUNDS), st.floats(*NOISE_MULTIPLIER_BOUNDS)),
    st.builds(DiscreteGaussian, st.floats(10.0, NOISE_MULTIPLIER_BOUNDS[1]), st.integers(1, 100)),
)


@settings(deadline=None, max_examples=100)
@given(MECHANISMS, st.integers(*STEPS_BOUNDS), st.integers(*STEPS_BOUNDS))
def test_json_round_trip_is_exact(mechanism, steps, block):
    charge = Charge("digits/train", mechanism, steps, block)
    assert Charge.from_json(json.loads(json.dumps(charge.to_json()))) == charge


@pytest.mark.parametrize("bounds", [SAMPLE_RATE_BOUNDS, NOISE_MULTIPLIER_BOUNDS])
def test_bounds_themselves_are_allowed(bounds):
    """Otherwise a test of refusals would also pass where everything is refused."""
    field = "sample_rate" if bounds is SAMPLE_RATE_BOUNDS else "noise_multiplier"
    for value in bounds:
        PoissonSubsampledGaussian(**{"sample_rate": 0.5, "noise_multiplier": 1.0, field: value})


def test_a_whole_number_beyond_every_float_is_refused_by_name():
    with pytest.raises(UsageError, match="noise_multiplier"):
        PoissonSubsampledGaussian(sample_rate=0.25, noise_multiplier=10**400)


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
