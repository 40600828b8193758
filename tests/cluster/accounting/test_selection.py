"""Private selection: the truncated negative binomial distribution is what the theorem says it is, and the price is
never below the theorem's nor below the divergence of the selection itself (P6, P14)."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import exact
import mpmath
import numpy as np
import pytest
from exact import NOISE, allowance, excess, is_too_low
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2, norm

from cluster.accounting import selection
from cluster.accounting.costs import FINE, LARGEST, SELECTION_ORDERS, UNIT, step_cost
from cluster.accounting.mechanisms import (
    GAMMA_BOUNDS,
    LEAST_SHAPE,
    Composition,
    DiscreteGaussian,
    Gaussian,
    Laplace,
    Poisson,
    PoissonSubsampledGaussian,
    RepeatAndSelect,
    TruncatedNegativeBinomial,
)
from cluster.accounting.selection import POISSON, draw, quantile, repetitions_of, tnb_gamma, tnb_mean
from cluster.accounting.selection import masses as all_masses
from cluster.errors import UsageError

SHAPES = [0.0, LEAST_SHAPE, 0.5, 1.0, 3.0]
RUN = Composition(((PoissonSubsampledGaussian(0.25, 8.0), 80),))
OTHER = Composition(((PoissonSubsampledGaussian(0.01, 0.9), 30),))


def masses(gamma, shape, least_left=1e-14):
    """(k, P[K = k]) until the terms no longer matter."""
    for k, mass in enumerate(map(float, all_masses(TruncatedNegativeBinomial(shape, gamma)))):
        yield k, mass
        if k and k * mass < least_left * (1 - gamma) * gamma:
            return


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mean", [1.5, 2, 8, 64])
def test_the_distribution_sums_to_one_and_has_the_asked_mean(mean, shape):
    gamma = tnb_gamma(mean, shape)
    table = list(masses(gamma, shape))
    assert math.fsum(mass for _, mass in table) == pytest.approx(1, abs=1e-12)
    assert math.fsum(k * mass for k, mass in table) == pytest.approx(mean, rel=1e-11)
    assert tnb_mean(gamma, shape) == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize(("shape", "gamma"), [(0.0, 0.2), (0.5, 0.1), (1.0, 0.3), (3.0, 0.5), (LEAST_SHAPE, 0.2)])
def test_the_mean_that_is_charged_for_is_the_sum_over_the_masses(shape, gamma):
    """At 40 digits, by the definition: P[K = k] is proportional to (1−γ)^k Π_{l<k} (l+η)/(l+1)."""
    with mpmath.workdps(40):
        eta, weight, total, weighted = mpmath.mpf(shape), 1 - mpmath.mpf(gamma), mpmath.mpf(0), mpmath.mpf(0)
        for k in itertools.count(1):  # without the factor η of every k, which η = 0 would make 0
            total, weighted = total + weight, weighted + k * weight
            if k * weight < mpmath.mpf(10) ** -38:
                break
            weight *= (1 - mpmath.mpf(gamma)) * (k + eta) / (k + 1)
        assert mpmath.almosteq(weighted / total, exact.tnb_mean(shape, gamma), rel_eps=mpmath.mpf(10) ** -35)
        assert tnb_mean(gamma, shape) == pytest.approx(float(weighted / total), rel=1e-13)
        none, first = itertools.islice(all_masses(TruncatedNegativeBinomial(shape, gamma)), 2)
        assert none == 0
        assert mpmath.almosteq(mpmath.mpf(str(first)), (1 - mpmath.mpf(gamma)) / total, rel_eps=mpmath.mpf(10) ** -35)


def test_the_geometric_distribution_is_among_them():
    assert tnb_gamma(8, 1.0) == pytest.approx(1 / 8, rel=1e-14)
    some = [float(mass) for mass in itertools.islice(all_masses(TruncatedNegativeBinomial(1.0, 0.25)), 4)]
    assert some == pytest.approx([0, 0.25, 0.75 * 0.25, 0.75**2 * 0.25])


@pytest.mark.parametrize(
    ("mean", "shape", "share"), [(64, 0.5, 0.99), (8, 0.5, 0.99), (8, 1.0, 0.5), (8, 0.0, 0.99), (3, 0.5, 0.9)]
)
def test_a_quantile_is_the_first_to_reach_the_share(mean, shape, share):
    first, table = quantile(repetitions_of(mean, shape), share), dict(masses(tnb_gamma(mean, shape), shape))
    assert math.fsum(table[k] for k in range(1, first)) < share
    assert math.fsum(table[k] for k in range(1, first + 1)) >= share


def test_the_quantile_that_plan_shows():
    assert quantile(repetitions_of(64, 0.5), 0.99) == 397


def test_poisson_masses_are_those_of_the_definition():
    some = [float(mass) for mass in itertools.islice(all_masses(Poisson(3.0)), 30)]
    assert some == pytest.approx([math.exp(-3) * 3**k / math.factorial(k) for k in range(30)], rel=1e-14)
    assert math.fsum(float(mass) for mass in itertools.islice(all_masses(Poisson(1e4)), 20_000)) == pytest.approx(1)


DRAWN = [repetitions_of(8, 0.0), repetitions_of(8, 0.5), repetitions_of(3, 1.0), repetitions_of(3, POISSON)]


@pytest.mark.parametrize("repetitions", DRAWN, ids=str)
def test_k_is_the_inverse_of_its_distribution(repetitions, monkeypatch):
    """For whatever bits the operating system gives: K = k exactly where they fall between P[K < k] and P[K ≤ k]."""
    totals = list(itertools.accumulate(map(Fraction, itertools.islice(all_masses(repetitions), 12))))
    for k in range(1, 12):
        for share, drawn in ((totals[k] - Fraction(1, 10**50), k), (totals[k] + Fraction(1, 10**50), k + 1)):
            monkeypatch.setattr(selection.secrets, "randbits", lambda size, at=share: int(at * 2**size))
            assert draw(repetitions) == drawn
    monkeypatch.setattr(selection.secrets, "randbits", lambda size: 0)
    assert draw(repetitions) == (0 if isinstance(repetitions, Poisson) else 1)
    monkeypatch.setattr(selection.secrets, "randbits", lambda size: 2**size - 1)
    assert draw(repetitions) > quantile(repetitions, 0.999), "there is no cap on K"


def chi_square(counts, shares, draws):
    """Of `draws` numbers in classes of those shares."""
    return sum((count - draws * share) ** 2 / (draws * share) for count, share in zip(counts, shares, strict=True))


@pytest.mark.parametrize("repetitions", DRAWN, ids=str)
def test_what_is_drawn_is_distributed_as_charged(repetitions):
    """Chi-square over K = 0 or 1, 2, …, 7 and more: false alarm below 1e-7. A mean of one more is seen."""
    draws, limit = 4000, chi2.isf(1e-7, 6)
    drawn = [max(1, min(7, draw(repetitions))) for _ in range(draws)]
    counts = [drawn.count(k) for k in range(1, 8)]

    def shares(of):
        table = [float(mass) for mass in itertools.islice(all_masses(of), 7)]
        return [table[0] + table[1], *table[2:], 1 - math.fsum(table)]

    assert chi_square(counts, shares(repetitions), draws) < limit
    other = {8: (4.5, 0.0)}.get(round(mean_of(repetitions)), (2, 1.0))
    assert chi_square(counts, shares(repetitions_of(*other)), draws) > limit


def mean_of(repetitions):
    if isinstance(repetitions, Poisson):
        return repetitions.mean
    return tnb_mean(repetitions.gamma, repetitions.shape)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, True, "8", None])
def test_bad_numbers_never_reach_the_distribution(value):
    with pytest.raises(UsageError, match="mean"):
        tnb_gamma(value, 0.5)
    with pytest.raises(UsageError, match="shape"):
        tnb_gamma(8, value)
    with pytest.raises(UsageError, match="share"):
        quantile(repetitions_of(8, 0.5), value)
    with pytest.raises(UsageError, match="share"):
        quantile(repetitions_of(8, 0.5), 1.0)  # no k reaches it


def assert_just_above(mechanism, order):
    """Never below the theorem at 200 digits, and above it by no more than the roundings up of its terms."""
    over = excess(step_cost(mechanism, order), mechanism, order)
    assert -NOISE <= over <= allowance(mechanism)


PLAIN = st.one_of(
    st.builds(Gaussian, st.floats(0.3, 1e4)),
    st.builds(Laplace, st.floats(0.1, 1e4)),
    st.builds(DiscreteGaussian, st.floats(2.0, 1e4), st.integers(1, 4)),
)
CANDIDATES = st.lists(
    st.one_of(PLAIN, st.builds(lambda part, count: Composition(((part, count),)), PLAIN, st.integers(1, 5000))),
    min_size=1,
    max_size=3,
).map(tuple)
REPETITIONS = st.one_of(
    st.builds(
        TruncatedNegativeBinomial,
        st.one_of(st.sampled_from(SHAPES), st.floats(LEAST_SHAPE, 50)),
        st.one_of(st.floats(1e-9, 1 - 1e-9), st.sampled_from(GAMMA_BOUNDS)),
    ),
    st.builds(Poisson, st.floats(1.0, 1e4)),
)


@settings(deadline=None, max_examples=60)
@given(st.builds(RepeatAndSelect, CANDIDATES, REPETITIONS), st.integers(2, 1024))
def test_never_below_the_theorem_and_hardly_above(mechanism, order):
    if exact.rdp(mechanism, order) * UNIT > LARGEST:
        with pytest.raises(UsageError, match="noise"):
            step_cost(mechanism, order)
    else:
        assert_just_above(mechanism, order)


def test_an_order_that_no_ledger_could_book_is_no_obstacle():
    """The base is far beyond 64 bits at the largest of the orders looked at, and well within at the account's."""
    dear = Composition(((Gaussian(0.3), 20_000),))
    with pytest.raises(UsageError, match="noise"):
        step_cost(dear, 1024)
    for repetitions in PRICED:
        assert_just_above(RepeatAndSelect((dear,), repetitions), 2)


PRICED = [
    TruncatedNegativeBinomial(0.5, tnb_gamma(8, 0.5)),
    TruncatedNegativeBinomial(0.0, tnb_gamma(64, 0.0)),
    TruncatedNegativeBinomial(1.0, tnb_gamma(8, 1.0)),
    Poisson(8.0),
    Poisson(1.0),
]


@pytest.mark.parametrize("repetitions", PRICED, ids=str)
@pytest.mark.parametrize("order", [2, 6, 33, 128])
def test_never_below_the_theorem_for_training_runs(repetitions, order):
    assert_just_above(RepeatAndSelect((RUN, OTHER), repetitions), order)


def equal_at(order, sampled, steps, run):
    """A run of subsampled steps that costs the same as `run` at `order`."""
    low, high = 0.3, 50.0
    for _ in range(50):
        middle = math.sqrt(low * high)
        cost = step_cost(PoissonSubsampledGaussian(sampled, middle), order) * steps
        low, high = (low, middle) if cost < step_cost(run, order) else (middle, high)
    return Composition(((PoissonSubsampledGaussian(sampled, high), steps),))


def test_equal_cost_at_one_order_is_not_equal_cost():
    """Two runs that the filter at α* = 8 cannot tell apart: a selection priced by the curve of one is too cheap."""
    flat = RUN
    steep = equal_at(8, 0.001, 10, flat)
    assert step_cost(steep, 8) == pytest.approx(step_cost(flat, 8), rel=1e-9)
    assert step_cost(steep, 16) > 10 * step_cost(flat, 16)
    assert step_cost(steep, 4) < step_cost(flat, 4) / 10
    for repetitions in PRICED:
        both = RepeatAndSelect((flat, steep), repetitions)
        for one in (flat, steep):
            alone = RepeatAndSelect((one,), repetitions)
            caught = [is_too_low(step_cost(alone, order), both, order) for order in (2, 4, 8, 16)]
            assert any(caught)
        cheapest = exact.selection(lambda at: min(exact.rdp(one, at) for one in (flat, steep)), repetitions, 8)
        assert is_too_low(math.ceil(cheapest * UNIT * FINE), both, 8)


def from_smaller_orders(mechanism, order):
    """The least bound over all orders, though a divergence at a smaller order bounds nothing at this one."""
    return exact.rdp(mechanism, 2)


def without_the_mean(mechanism, order):
    return exact.rdp(mechanism, order) - mpmath.log(8) / (order - 1)


def as_one_run(mechanism, order):
    return exact.rdp(mechanism.candidates[0], order)


@pytest.mark.parametrize("repetitions", [one for one in PRICED if one != Poisson(1.0)], ids=str)
@pytest.mark.parametrize("broken", [from_smaller_orders, without_the_mean, as_one_run])
def test_a_variant_that_is_too_low_is_caught(broken, repetitions):
    mechanism = RepeatAndSelect((RUN,), repetitions)
    assert is_too_low(math.ceil(broken(mechanism, 64) * UNIT * FINE), mechanism, 64)


def float_price(mechanism, order):
    """Theorem 2 as a float program computes it, from the same costs of the base."""

    def curve(at):
        return step_cost(mechanism.candidates[0], at) / (UNIT * FINE)

    shape, gamma = mechanism.repetitions.shape, mechanism.repetitions.gamma
    least = min((1 - 1 / at) * curve(at) + math.log(1 / gamma) / at for at in SELECTION_ORDERS)
    log_mean = math.log(tnb_mean(gamma, shape))
    outer = min(curve(at) + log_mean / (at - 1) for at in [order, *(o for o in SELECTION_ORDERS if o > order)])
    return outer + (1 + shape) * least


def test_floats_are_caught():
    """Their last digit falls on either side of the truth."""
    mechanisms = [RepeatAndSelect((RUN,), repetitions) for repetitions in PRICED[:3]]
    costs = [(m, order, Fraction(float_price(m, order)) * UNIT * FINE) for m in mechanisms for order in (6, 16, 40)]
    assert any(is_too_low(math.floor(cost), m, order) for m, order, cost in costs)


# From the definition, with no theorem in between: two candidates, of Gaussian noise, release which of them it was and
# its score; the best score wins. The unit's presence moves the scores by 1.


def slope(repetitions, share):
    """The derivative at `share` of K's probability generating function, from the definitions."""
    if isinstance(repetitions, Poisson):
        return repetitions.mean * np.exp(repetitions.mean * (share - 1))
    eta, gamma = repetitions.shape, repetitions.gamma
    rest = 1 - (1 - gamma) * share
    if eta == 0:
        return (1 - gamma) / (rest * -math.log(gamma))
    return eta * (1 - gamma) * rest ** (-eta - 1) / (gamma**-eta - 1)


def divergence_of_the_best(deviations, repetitions, order, toward):
    """RDP of the selection between scores around `toward` and around 1 − `toward`; x: [40001] scores."""
    x = np.linspace(-15 * max(deviations) - order, 15 * max(deviations) + order + 1, 40_001)

    def best(centre):
        """[candidate, x]: the logarithm of the density of each candidate winning with score x."""
        chosen = np.array([norm.logpdf(x, centre, deviation) for deviation in deviations]) - math.log(len(deviations))
        share = sum(norm.cdf(x, centre, deviation) for deviation in deviations) / len(deviations)
        return chosen + np.log(slope(repetitions, share))

    p, r = best(toward), best(1 - toward)
    nothing = math.exp(-repetitions.mean) if isinstance(repetitions, Poisson) else 0
    assert np.trapezoid(np.exp(p).sum(0), x) + nothing == pytest.approx(1, abs=1e-9)
    return math.log(nothing + np.trapezoid(np.exp(order * p + (1 - order) * r).sum(0), x)) / (order - 1)


@pytest.mark.parametrize("repetitions", [*PRICED, Poisson(3.0)], ids=str)
@pytest.mark.parametrize("order", [2, 5, 8])
@pytest.mark.parametrize("deviations", [(2.0,), (2.0, 4.0), (0.7, 0.8, 3.0)])
def test_the_price_covers_the_divergence_of_the_selection_itself(repetitions, order, deviations):
    mechanism = RepeatAndSelect(tuple(map(Gaussian, deviations)), repetitions)
    true = max(divergence_of_the_best(deviations, repetitions, order, toward) for toward in (0, 1))
    assert true <= step_cost(mechanism, order) / (UNIT * FINE)
    if len(deviations) == 1 and repetitions != Poisson(1.0):
        assert true > step_cost(Gaussian(2.0), order) / (UNIT * FINE)  # the price of one run is too low
