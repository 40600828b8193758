"""Costs: never below the exact Rényi divergence and hardly above it, telescoping over blocks; budgets round down and
ε is what the books charge (P4, P6, P14)."""

from __future__ import annotations

import math
from fractions import Fraction

import mpmath
import pytest
from exact import NOISE, allowance, excess, is_too_low
from exact import rdp as exact_rdp
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.accounting.costs import (
    FINE,
    LARGEST,
    UNIT,
    affordable_steps,
    block_cost,
    budget_cost,
    epsilon_of,
    least_noise_multiplier,
    price,
    step_cost,
)
from cluster.accounting.mechanisms import (
    Charge,
    Composition,
    DiscreteGaussian,
    Gaussian,
    Laplace,
    PoissonSubsampledGaussian,
)
from cluster.errors import UsageError

NOISES = st.floats(-1, 5).map(lambda power: min(max(10.0**power, 0.1), 1e5))
SUBSAMPLED = st.builds(
    PoissonSubsampledGaussian, st.floats(-9, 0).map(lambda power: min(max(10.0**power, 1e-9), 1.0)), NOISES
)
PLAIN = st.one_of(
    st.builds(Gaussian, NOISES),
    st.builds(Laplace, NOISES),
    st.builds(lambda noise, moved: DiscreteGaussian(min(noise * moved, 1e5), moved), NOISES, st.integers(1, 20)),
)
COMPOSED = st.builds(
    lambda parts: Composition(tuple(parts)),
    st.lists(st.tuples(st.one_of(SUBSAMPLED, PLAIN), st.integers(1, 10_000)), min_size=1, max_size=4),
)
STEPS = [
    PoissonSubsampledGaussian(*given)
    for given in [(0.25, 8.0), (0.01, 1.0), (0.004, 0.6), (0.5, 0.5), (1e-5, 8.0), (0.04, 1.5), (0.3, 3.3)]
]


def rdp(mechanism, order):
    return step_cost(mechanism, order) / (UNIT * FINE)


def blocks(steps, block):
    """The blocks of a plan as (start, stop) step numbers; the last may be shorter."""
    return [(start, min(start + block, steps)) for start in range(0, steps, block)]


def assert_just_above(mechanism, order):
    """Never below the truth, and above it by less than one unit of 1e-36 for each execution."""
    over = excess(step_cost(mechanism, order), mechanism, order)
    assert -NOISE <= over < allowance(mechanism) + NOISE


@settings(deadline=None, max_examples=60)
@given(SUBSAMPLED, st.integers(2, 64))
def test_a_subsampled_step_is_never_below_the_exact_divergence_and_hardly_above(mechanism, order):
    assert_just_above(mechanism, order)


@settings(deadline=None, max_examples=150)
@given(PLAIN, st.integers(2, 1024))
def test_plain_noise_is_never_below_the_exact_divergence_and_hardly_above(mechanism, order):
    assert_just_above(mechanism, order)


@settings(deadline=None, max_examples=25)
@given(COMPOSED, st.integers(2, 32))
def test_a_composition_is_never_below_the_exact_divergence_and_hardly_above(mechanism, order):
    if exact_rdp(mechanism, order) * UNIT > LARGEST:
        with pytest.raises(UsageError, match="noise"):
            step_cost(mechanism, order)
    else:
        assert_just_above(mechanism, order)


@pytest.mark.parametrize("order", [128, 1024])
@pytest.mark.parametrize(
    "mechanism",
    [PoissonSubsampledGaussian(*given) for given in [(1e-9, 1e5), (1 - 2**-53, 0.1), (1e-9, 0.1), (0.5, 1e5)]]
    + [Laplace(0.1), Laplace(1e5), Gaussian(0.1), Gaussian(1e5)],
    ids=str,
)
def test_at_the_corners_of_the_bounds(mechanism, order):
    assert_just_above(mechanism, order)


def float_sum(mechanism, order):
    """The divergence of a subsampled step as a float program would compute it."""
    q, sigma = mechanism.sample_rate, mechanism.noise_multiplier
    terms = [
        math.comb(order, k) * (1 - q) ** (order - k) * q**k * math.exp((k * k - k) / (2 * sigma**2))
        for k in range(order + 1)
    ]
    return math.log1p(math.fsum(terms) - 1) / (order - 1)


def float_laplace(mechanism, order):
    b = mechanism.noise_multiplier
    moment = order * math.exp((order - 1) / b) + (order - 1) * math.exp(-order / b)
    return math.log(moment / (2 * order - 1)) / (order - 1)


def slow_growth(mechanism, order):
    """The recursion with r^k where r^2k belongs: half the exponents."""
    slower = PoissonSubsampledGaussian(mechanism.sample_rate, mechanism.noise_multiplier * math.sqrt(2))
    return rdp(slower, order)


RUNS = [Composition(((step, 80),)) for step in STEPS]
LAPLACES = [Laplace(noise) for noise in (0.3, 1.0, 2.5, 8.0, 20.0)]


@pytest.mark.parametrize(
    ("mechanisms", "broken"),
    [
        (STEPS, slow_growth),
        (LAPLACES, lambda m, order: 1 / m.noise_multiplier + math.expm1(-1 / m.noise_multiplier)),  # its limit at 1
        (RUNS, lambda m, order: 79 * rdp(STEPS[RUNS.index(m)], order)),
        (RUNS, lambda m, order: 80 * math.floor(rdp(STEPS[RUNS.index(m)], order) * UNIT) / UNIT),
    ],
    ids=["slow recursion", "Laplace at order 1", "a step short", "steps cut to units"],
)
def test_a_variant_that_is_too_low_is_caught(mechanisms, broken):
    assert all(is_too_low(math.floor(broken(m, 8) * UNIT * FINE), m, 8) for m in mechanisms)


@pytest.mark.parametrize(("mechanisms", "floats"), [(STEPS, float_sum), (LAPLACES, float_laplace)])
def test_floats_are_caught(mechanisms, floats):
    """Their last digit falls on either side of the truth."""
    assert any(is_too_low(math.floor(Fraction(floats(m, 8)) * UNIT * FINE), m, 8) for m in mechanisms)


@pytest.mark.parametrize("mechanism", [*STEPS, Laplace(1.5), Composition(((STEPS[0], 80),))], ids=str)
def test_rounding_the_last_digit_down_is_caught(mechanism):
    """The checks above see a single unit of 1e-36."""
    assert not is_too_low(step_cost(mechanism, 8), mechanism, 8)
    assert is_too_low(step_cost(mechanism, 8) - math.ceil(allowance(mechanism)), mechanism, 8)
    assert is_too_low(step_cost(mechanism, 8) // FINE * FINE, mechanism, 8)


@pytest.mark.parametrize("bound", [Gaussian(0.7), Gaussian(3.0), DiscreteGaussian(5.1, 3), DiscreteGaussian(0.3, 1)])
def test_gaussian_costs_are_fractions_rounded_up(bound):
    scale, moved = (
        (bound.scale, bound.l2_sensitivity) if isinstance(bound, DiscreteGaussian) else (bound.noise_multiplier, 1)
    )
    for order in (2, 6, 64):
        assert step_cost(bound, order) == math.ceil(
            Fraction(order * moved**2) / (2 * Fraction(scale) ** 2) * UNIT * FINE
        )


def test_a_step_of_everyone_is_the_gaussian_mechanism():
    assert step_cost(PoissonSubsampledGaussian(1.0, 8.0), 6) == step_cost(Gaussian(8.0), 6)
    almost = step_cost(PoissonSubsampledGaussian(1 - 2**-53, 8.0), 6)
    assert step_cost(Gaussian(8.0), 6) * (1 - 1e-15) < almost < step_cost(Gaussian(8.0), 6)


def test_a_composition_costs_its_parts():
    parts = [(STEPS[0], 80), (DiscreteGaussian(5.0, 1), 2), (Composition(((Laplace(2.0), 3),)), 4)]
    for order in (2, 6, 64):
        assert step_cost(Composition(tuple(parts)), order) == sum(n * step_cost(part, order) for part, n in parts)
    charge = Charge("a/train", STEPS[0], 80, 80)
    assert block_cost(Composition(((STEPS[0], 80),)), 6, 0, 1) == price(charge, 6)


def quadrature(p, r, order, ends):
    """The Rényi divergence of density p from density r, from its definition."""
    return mpmath.log(mpmath.quad(lambda x: p(x) ** order * r(x) ** (1 - order), ends)) / (order - 1)


@pytest.mark.parametrize(("scale", "order"), [(0.5, 2), (1.0, 6), (3.0, 17), (20.0, 3)])
def test_laplace_covers_its_own_density(scale, order):
    """Straight from the definition; and moving two coordinates by halves costs less than moving one by the whole."""
    with mpmath.workdps(30):
        ends = [-mpmath.mpf(80) * scale, 0, mpmath.mpf(1) / 2, 1, 1 + mpmath.mpf(80) * scale]

        def density(centre):
            return lambda x: mpmath.exp(-abs(x - centre) / scale) / (2 * mpmath.mpf(scale))

        whole, half = (quadrature(density(moved), density(0), order, ends) for moved in (1, mpmath.mpf(1) / 2))
        assert rdp(Laplace(scale), order) == pytest.approx(float(whole), rel=1e-12)
        assert 2 * half < whole


@pytest.mark.parametrize(("q", "sigma", "order"), [(0.25, 1.0, 4), (0.25, 8.0, 6), (0.9, 2.0, 3), (0.01, 0.7, 2)])
def test_covers_adding_and_removing_a_unit(q, sigma, order):
    """Straight from the definition, by numerical integration, with no formula of any paper in between."""
    with mpmath.workdps(30):
        cost = mpmath.mpf(step_cost(PoissonSubsampledGaussian(q, sigma), order)) / (UNIT * FINE)

        def without(x):
            return mpmath.npdf(x, 0, sigma)

        def joined(x):
            return (1 - mpmath.mpf(q)) * without(x) + mpmath.mpf(q) * mpmath.npdf(x, 1, sigma)

        ends = mpmath.linspace(-15 * sigma, order + 15 * sigma, 12)
        add, remove = quadrature(joined, without, order, ends), quadrature(without, joined, order, ends)
        assert remove <= add
        assert cost == pytest.approx(add, rel=1e-12)


def test_tiny_steps_are_neither_free_nor_rounded_up_one_by_one():
    mechanism = PoissonSubsampledGaussian(1e-5, 8.0)
    assert rdp(mechanism, 8) == pytest.approx(6.299e-12, rel=1e-3)
    one_by_one = 1000 * block_cost(mechanism, 8, 0, 1)
    assert one_by_one == 7000
    assert block_cost(mechanism, 8, 0, 1000) == math.ceil(exact_rdp(mechanism, 8) * UNIT * 1000) == 6300


def test_a_single_step_costs_at_least_one_unit():
    mechanism = PoissonSubsampledGaussian(1e-9, 1e5)
    assert 0 < step_cost(mechanism, 2) < FINE
    assert [block_cost(mechanism, 2, start, start + 1) for start in range(5)] == [1] * 5


@settings(deadline=None, max_examples=150)
@given(SUBSAMPLED, st.integers(2, 32), st.integers(1, 400), st.integers(1, 60))
def test_blocks_telescope(mechanism, order, steps, block):
    """However an attempt is cut into blocks, and wherever it stops, it has paid for the steps it ran, and at most one
    unit per block more."""
    exact = Fraction(step_cost(mechanism, order), FINE)
    paid = 0
    for number, (start, stop) in enumerate(blocks(steps, block), start=1):
        cost = block_cost(mechanism, order, start, stop)
        assert cost >= 1
        paid += cost
        assert exact * stop <= paid < exact * stop + number
        assert price(Charge("a/train", mechanism, steps, block), order, stop) == paid
    assert price(Charge("a/train", mechanism, steps, block), order) == paid


def test_a_variant_that_rounds_each_block_to_the_nearest_unit_is_caught():
    exact = Fraction(step_cost(PoissonSubsampledGaussian(1e-5, 8.0), 8), FINE)
    assert sum(round(exact * (stop - start)) for start, stop in blocks(1000, 1)) < exact * 1000


@pytest.mark.parametrize(("scale", "sensitivity", "order"), [(5.0, 1, 6), (2.0, 3, 4), (0.5, 1, 8)])
def test_discrete_gaussian_covers_its_own_mass_function(scale, sensitivity, order):
    """The divergence between the noise and the shifted noise, summed over the integers."""
    with mpmath.workdps(40):
        reach = int(30 * scale + order * sensitivity + 10)
        mass = {
            x: mpmath.exp(-(mpmath.mpf(x) ** 2) / (2 * mpmath.mpf(scale) ** 2)) for x in range(-2 * reach, 2 * reach)
        }
        total = mpmath.fsum(mass.values())
        moment = mpmath.fsum(
            (mass[x - sensitivity] / total) ** order * (mass[x] / total) ** (1 - order) for x in range(-reach, reach)
        )
        exact = mpmath.log(moment) / (order - 1)
        cost = mpmath.mpf(step_cost(DiscreteGaussian(scale, sensitivity), order)) / (UNIT * FINE)
        # at an integer shift the two agree to the last digit, so the comparison allows the 40 digits' own rounding
        assert exact - mpmath.mpf(10) ** -30 <= cost <= exact * (1 + mpmath.mpf(10) ** -6)


@settings(deadline=None, max_examples=150)
@given(st.floats(0.5, 100), st.sampled_from([1e-3, 1e-4, 1e-5, 1e-9, 0.3]), st.sampled_from([2, 6, 12, 32, 128, 1024]))
def test_budgets_round_down_and_invert(epsilon, delta, order):
    budget = budget_cost(epsilon, delta, order)
    with mpmath.workdps(60):
        # mpmath reads the digits that were written, as the owner did; the binary neighbour may lie above
        alpha, granted, chance = mpmath.mpf(order), mpmath.mpf(repr(epsilon)), mpmath.mpf(repr(delta))
        exact = (granted - mpmath.log(1 - 1 / alpha) + mpmath.log(chance * alpha) / (alpha - 1)) * UNIT
        assert budget <= exact < budget + 1 + mpmath.mpf(10) ** -30
    if budget > 0:
        assert epsilon_of(budget, delta, order) == pytest.approx(epsilon, abs=1e-11)
        assert epsilon_of(budget + 2, delta, order) > epsilon
        assert epsilon_of(budget // 2, delta, order) < epsilon


def test_budgets_are_of_the_digits_that_were_written():
    """The float nearest to 64.918 lies above it; taken for what the owner granted, it is here one unit too much."""
    epsilon, delta = "64.918", "9.18e-05"

    def exact(epsilon, delta):
        return int(mpmath.floor((epsilon - mpmath.log(mpmath.mpf(5) / 6) + mpmath.log(delta * 6) / 5) * UNIT))

    with mpmath.workdps(60):
        written = exact(mpmath.mpf(epsilon), mpmath.mpf(delta))
        assert exact(mpmath.mpf(float(epsilon)), mpmath.mpf(float(delta))) == written + 1
        assert budget_cost(float(epsilon), float(delta), 6) == written


def test_epsilon_of_rises_with_the_cost_and_nothing_is_nothing():
    assert epsilon_of(0, 1e-4, 6) == 0.0
    said = [epsilon_of(cost, 1e-4, 6) for cost in (UNIT, UNIT + 10_000, 2 * UNIT)]
    assert said == sorted(set(said))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1e-4, 0.0, True, "1e-4", None])
def test_an_impossible_delta_fails_closed(value):
    """max(0.0, nan) is 0.0: a NaN that got through would read as nothing spent."""
    with pytest.raises(UsageError, match="delta"):
        budget_cost(3.0, value, 6)
    with pytest.raises(UsageError, match="delta"):
        epsilon_of(UNIT, value, 6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, True, "3", None])
def test_an_impossible_epsilon_fails_closed(value):
    with pytest.raises(UsageError, match="epsilon"):
        budget_cost(value, 1e-4, 6)


@pytest.mark.parametrize("value", [0, 1, 1025, 6.0, True, math.nan])
def test_an_order_out_of_bounds_fails_closed(value):
    with pytest.raises(UsageError, match="order"):
        budget_cost(3.0, 1e-4, value)


@pytest.mark.parametrize("field", ["sample_rate", "noise_multiplier"])
def test_nan_never_reaches_a_cost(field):
    """Libraries fail open on it: dp_accounting turns a spent ε of 96 into 0."""
    with pytest.raises(UsageError, match=field):
        step_cost(PoissonSubsampledGaussian(**{"sample_rate": 0.1, "noise_multiplier": 1.0, field: math.nan}), 8)
    with pytest.raises(UsageError, match="scale"):
        step_cost(DiscreteGaussian(math.nan, 1), 8)


def test_what_has_no_cost_cannot_be_charged():
    with pytest.raises(UsageError, match="mechanism"):
        step_cost(object(), 8)


def test_a_block_beyond_64_bits_is_refused():
    mechanism = PoissonSubsampledGaussian(1.0, 0.1)
    steps = LARGEST * FINE // step_cost(mechanism, 6)
    assert block_cost(mechanism, 6, 0, steps) <= LARGEST
    with pytest.raises(UsageError, match="steps"):
        block_cost(mechanism, 6, 0, steps + 1)


def test_a_price_beyond_64_bits_is_refused_though_each_block_is_not():
    charge = Charge("a/train", PoissonSubsampledGaussian(1.0, 0.1), 10_000_000, 1000)
    assert block_cost(charge.mechanism, 6, 0, 1000) <= LARGEST
    with pytest.raises(UsageError, match="steps"):
        price(charge, 6)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 60), st.integers(1, 25), st.integers(0, 4 * 10**11))
def test_affordable_steps_is_the_most_that_fits(steps, block, available):
    charge = Charge("a/train", PoissonSubsampledGaussian(0.25, 8.0), steps, block)
    fits = [n for n in range(steps + 1) if price(charge, 6, n) <= available]
    assert affordable_steps(charge, 6, available) == max(fits)
    assert affordable_steps(charge, 6, available, steps // 2) == min(max(fits), steps // 2)


def test_least_noise_multiplier_fits_and_hardly_less_does():
    charge = Charge("a/train", PoissonSubsampledGaussian(0.25, 1.0), 80, 20)
    available = budget_cost(3.0, 1e-4, 6)
    least = least_noise_multiplier(charge, 6, available)
    for noise, fits in ((least, True), (least * 0.98, False)):
        changed = Charge("a/train", PoissonSubsampledGaussian(0.25, noise), 80, 20)
        assert (price(changed, 6) <= available) is fits
    assert least == float(f"{least:.3g}")
    assert least_noise_multiplier(charge, 6, 0) is None
    assert least_noise_multiplier(charge, 6, 1) is None
