"""What a run can claim is an upper bound on its ε, near the truth where the truth is known, and never from NaN (P4)."""

from __future__ import annotations

import math

import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from cluster.accounting.costs import FINE, epsilon_of, step_cost
from cluster.accounting.mechanisms import PoissonSubsampledGaussian
from cluster.errors import UsageError
from training.audit.claim import tight_epsilon

DIGITS = {"sample_rate": 0.25, "noise_multiplier": 8.0, "steps": 80}


def gaussian_epsilon(mu, delta):
    """ε of a Gaussian mechanism (Balle and Wang 2018)."""

    def excess(epsilon):
        lost = norm.logcdf(-epsilon / mu - mu / 2) + epsilon
        return norm.cdf(mu / 2 - epsilon / mu) - math.exp(lost) - delta

    return brentq(excess, 0.0, 700.0, xtol=1e-12)


def one_step_epsilon(q, sigma, delta):
    """ε of a single step: the worse of removing and adding a unit, from normal tails on either side of where the ratio
    of densities, 1 − q + q·e^((2x − 1)/2σ²), is e^ε or e^−ε."""

    def crossing(ratio):
        return sigma**2 * math.log((ratio - 1 + q) / q) + 0.5

    def removing(epsilon):
        x = crossing(math.exp(epsilon))
        mixed = (1 - q) * norm.sf(x / sigma) + q * norm.sf((x - 1) / sigma)
        return mixed - math.exp(epsilon) * norm.sf(x / sigma)

    def adding(epsilon):
        if math.exp(-epsilon) <= 1 - q:
            return 0.0
        x = crossing(math.exp(-epsilon))
        mixed = (1 - q) * norm.cdf(x / sigma) + q * norm.cdf((x - 1) / sigma)
        return norm.cdf(x / sigma) - math.exp(epsilon) * mixed

    return brentq(lambda epsilon: max(removing(epsilon), adding(epsilon)) - delta, 0.0, 30.0, xtol=1e-12)


@pytest.mark.parametrize("delta", [1e-5, 1e-9])
@pytest.mark.parametrize(("noise", "steps"), [(8.0, 80), (1.0, 1), (100.0, 20_000), (3.0, 20)])
def test_without_sampling_it_is_a_gaussian_mechanism(noise, steps, delta):
    exact, least = (gaussian_epsilon(math.sqrt(steps) / noise, one) for one in (delta, delta - lost(steps)))
    assert exact - 1e-9 <= tight_epsilon(1.0, noise, steps, delta) <= least * 1.0001


def lost(steps):
    """Of δ, in composing by FFT."""
    return 16 * steps * 2.0**-52


@pytest.mark.parametrize("delta", [1e-9, 1e-10, 1e-11])
@pytest.mark.parametrize("steps", [1000, 30_000, 300_000])
@pytest.mark.parametrize("mu", [0.3, 1.0])
def test_it_is_a_bound_far_out_and_after_many_steps_too(mu, steps, delta):
    """Where rounding would take more than there is of δ, nothing is claimed."""
    exact = gaussian_epsilon(mu, delta)
    found = tight_epsilon(1.0, math.sqrt(steps) / mu, steps, delta)
    assert found >= exact
    assert (found == math.inf) == (lost(steps) >= delta)


@pytest.mark.parametrize("delta", [1e-5, 1e-9])
@pytest.mark.parametrize(("rate", "noise"), [(0.25, 8.0), (0.01, 1.0), (0.5, 0.5), (0.9, 2.0), (0.001, 0.6)])
def test_one_step_is_as_integrals_say(rate, noise, delta):
    exact = one_step_epsilon(rate, noise, delta)
    assert exact - 1e-9 <= tight_epsilon(rate, noise, 1, delta) <= exact * 1.0001


@pytest.mark.parametrize(
    ("rate", "noise", "steps", "delta"),
    [(0.25, 8.0, 80, 1e-5), (0.25, 8.0, 80, 1e-9), (0.01, 1.0, 1000, 1e-5)],
)
@pytest.mark.filterwarnings("ignore:Optimal order")
def test_opacus_agrees_within_its_error(rate, noise, steps, delta):
    """Opacus's PRV adds its error bound, here 0.001 in ε, to its estimate."""
    from opacus.accountants import PRVAccountant

    theirs = PRVAccountant()
    theirs.history = [(noise, rate, steps)]
    assert tight_epsilon(rate, noise, steps, delta) == pytest.approx(
        theirs.get_epsilon(delta, eps_error=0.001), abs=0.002
    )


def test_a_limit_law_is_no_bound():
    """The central limit's μ is near where many steps differ little, and below the truth elsewhere."""

    def limit(rate, noise, steps, delta):
        return gaussian_epsilon(rate * math.sqrt(steps * math.expm1(1 / noise**2)), delta)

    assert limit(*DIGITS.values(), 1e-5) == pytest.approx(tight_epsilon(**DIGITS, delta=1e-5), rel=0.02)
    assert limit(0.001, 0.6, 1000, 1e-9) < 0.5 * tight_epsilon(0.001, 0.6, 1000, 1e-9)


def test_it_is_below_what_one_renyi_order_says():
    """The books' ε holds for adaptive parameters, too, and so is larger: at the best order by 3 to 30 % here."""
    step = PoissonSubsampledGaussian(0.25, 8.0)
    books = min(epsilon_of(math.ceil(80 * step_cost(step, order) / FINE), 1e-5, order) for order in range(2, 64))
    assert 1.03 < books / tight_epsilon(**DIGITS, delta=1e-5) < 1.3


def test_more_steps_less_noise_and_a_smaller_delta_cost_more():
    base = tight_epsilon(**DIGITS, delta=1e-5)
    for changed in ({"steps": 81}, {"noise_multiplier": 7.9}, {"sample_rate": 0.26}):
        assert tight_epsilon(**DIGITS | changed, delta=1e-5) > base
    assert tight_epsilon(**DIGITS, delta=1e-6) > base


@pytest.mark.parametrize(("rate", "noise", "steps"), [(1.0, 0.1, 20_000), (1e-9, 0.1, 20_000), (1e-3, 1e4, 20_000)])
def test_odd_runs_have_a_bound_too(rate, noise, steps):
    """A million, about 67, and next to nothing: on grids that neither exhaust memory nor round it all up."""
    epsilon = tight_epsilon(rate, noise, steps, 1e-9)
    assert 0 < epsilon < steps * math.log1p(rate**2 * math.expm1(1 / noise**2)) + math.log(1e9)
    if rate == 1:  # beyond what e^ε can be computed of: the mean loss and six deviations, within 1 %
        assert epsilon == pytest.approx(steps / (2 * noise**2) + 6 * math.sqrt(steps) / noise, rel=0.01)
    if noise == 1e4:
        assert epsilon < 1e-4


def test_a_delta_below_what_is_cut_off_is_answered_by_infinity():
    assert tight_epsilon(**DIGITS, delta=1e-20) == math.inf
    assert tight_epsilon(**DIGITS, delta=1.0) == 0


@pytest.mark.parametrize(("changed", "field"), [
    ({"sample_rate": math.nan}, "sample_rate"),
    ({"sample_rate": 1.1}, "sample_rate"),
    ({"noise_multiplier": math.nan}, "noise_multiplier"),
    ({"noise_multiplier": 0.0}, "noise_multiplier"),
    ({"noise_multiplier": -8.0}, "noise_multiplier"),
    ({"steps": 0}, "steps"),
    ({"steps": 80.0}, "steps"),
    ({"delta": math.nan}, "delta"),
    ({"delta": 0.0}, "delta"),
])  # fmt: skip
def test_what_is_no_run_is_refused(changed, field):
    with pytest.raises(UsageError, match=f"^{field}: .* was given; it must be"):
        tight_epsilon(**{**DIGITS, "delta": 1e-5, **changed})


def test_the_library_alone_would_let_nan_pass():
    """A claim of NaN is exceeded by no bound."""
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    assert math.isnan(from_gaussian_mechanism(8.0, sampling_prob=0.25).get_epsilon_for_delta(math.nan))
