"""Costs and ε agree with the libraries that others use and with published numbers (P14).

Divergences are compared at every integer order from 2 to 63, within 1e-9 relative and 1e-14 absolute: below that the
libraries' floats are themselves off (`test_costs` compares tiny costs with exact numbers).
"""

from __future__ import annotations

import math

import dp_accounting
import pytest
from dp_accounting.dp_event import RepeatAndSelectDpEvent
from dp_accounting.rdp import rdp_privacy_accountant

from cluster.accounting.costs import (
    FINE,
    SELECTION_ORDERS,
    UNIT,
    block_cost,
    budget_cost,
    epsilon_of,
    price,
    step_cost,
)
from cluster.accounting.mechanisms import (
    Charge,
    Composition,
    DiscreteGaussian,
    Gaussian,
    Laplace,
    Poisson,
    PoissonSubsampledGaussian,
    RepeatAndSelect,
    TruncatedNegativeBinomial,
)
from cluster.accounting.selection import tnb_gamma

ORDERS = range(2, 64)
HISTORIES = [
    (8.0, 0.25, 80),
    (1.0, 0.01, 1000),
    (0.6, 0.004, 500),
    (0.5, 0.5, 3),
    (8.0, 1e-5, 1000),
    (20.0, 1.0, 50),
    (1.5, 0.04, 2250),
    (0.1, 0.9, 1),
]


def ours(mechanism, orders=ORDERS):
    return [step_cost(mechanism, order) / (UNIT * FINE) for order in orders]


def event_of(mechanism):
    """The description of `mechanism` in dp_accounting's terms."""
    match mechanism:
        case PoissonSubsampledGaussian(q, sigma):
            return dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma))
        case Gaussian(sigma):
            return dp_accounting.GaussianDpEvent(sigma)
        case Laplace(scale):
            return dp_accounting.LaplaceDpEvent(scale)
        case DiscreteGaussian(scale, sensitivity):
            return dp_accounting.ZCDpEvent(sensitivity**2 / (2 * scale**2))
        case Composition(parts):
            return dp_accounting.ComposedDpEvent(
                [dp_accounting.SelfComposedDpEvent(event_of(part), count) for part, count in parts]
            )
        case RepeatAndSelect((candidate,), Poisson(mean)):
            return RepeatAndSelectDpEvent(event_of(candidate), mean, math.inf)
    raise TypeError(mechanism)


def theirs(event, orders=ORDERS):
    accountant = rdp_privacy_accountant.RdpAccountant(orders=list(orders))
    accountant.compose(event)
    return [float(value) for value in accountant.rdp]


def close_to(values, rel=1e-9):
    return [pytest.approx(value, rel=rel, abs=1e-14) for value in values]


def or_larger_orders(curve):
    """RDP is non-decreasing in the order, so what bounds a larger order bounds this one."""
    return [min(curve[i:]) for i in range(len(curve))]


def history(sigma, q, steps):
    return Composition(((PoissonSubsampledGaussian(q, sigma), steps),))


@pytest.mark.parametrize(
    "mechanism",
    [
        *(history(*one) for one in HISTORIES),
        *(Gaussian(sigma) for sigma in (0.1, 1.0, 7.7, 1000.0)),
        *(Laplace(scale) for scale in (0.1, 1.0, 7.7, 1000.0)),
        *(DiscreteGaussian(*one) for one in ((0.3, 1), (5.1, 3), (1000.0, 100))),
        Composition(((Laplace(3.0), 2), (history(8.0, 0.25, 80), 3), (DiscreteGaussian(5.0, 1), 1))),
    ],
    ids=str,
)
def test_divergences_agree_with_dp_accounting(mechanism):
    assert ours(mechanism) == close_to(theirs(event_of(mechanism)))


def test_disagreement_is_seen():
    """A millionth more noise than charged for, or one more step in a million, would not pass."""
    run = event_of(history(8.0, 0.25, 80))
    assert ours(history(8.000008, 0.25, 80)) != close_to(theirs(run))
    assert ours(history(8.0, 0.25, 81)) != close_to(theirs(run))


@pytest.fixture(scope="module")
def opacus():
    from opacus import accountants
    from opacus.accountants.analysis import rdp

    return accountants, rdp


@pytest.mark.parametrize(("sigma", "q"), [one[:2] for one in HISTORIES])
def test_divergences_agree_with_opacus(opacus, sigma, q):
    # one step: at q = 1e-5 Opacus is up to 6e-5 off relative, 1e-16 absolute, and would multiply that by the steps
    values = opacus[1].compute_rdp(q=q, noise_multiplier=sigma, steps=1, orders=list(ORDERS))
    assert ours(PoissonSubsampledGaussian(q, sigma)) == close_to(values)


@pytest.mark.filterwarnings("ignore:Optimal order")
@pytest.mark.parametrize(("sigma", "q", "steps"), [(8.0, 0.25, 80), (1.5, 0.04, 2250), (1.0, 0.01, 1000)])
@pytest.mark.parametrize("order", [4, 11, 32])
def test_epsilon_agrees_with_the_accountant_of_opacus(opacus, sigma, q, steps, order):
    accountant = opacus[0].RDPAccountant()
    accountant.history = [(sigma, q, steps)]
    cost = price(Charge("a/train", PoissonSubsampledGaussian(q, sigma), steps, steps), order)
    assert epsilon_of(cost, 1e-5, order) == pytest.approx(accountant.get_epsilon(1e-5, alphas=[order]), rel=1e-9)


@pytest.mark.parametrize("delta", [1e-4, 1e-5, 1e-10, 0.01])
@pytest.mark.parametrize("order", [2, 6, 17, 128, 1024])
def test_epsilon_agrees_with_dp_accounting(delta, order):
    cost = 5 * UNIT
    epsilon, _ = rdp_privacy_accountant.compute_epsilon([order], [cost / UNIT], delta)
    assert epsilon_of(cost, delta, order) == pytest.approx(epsilon, rel=1e-12)
    assert budget_cost(float(epsilon), delta, order) == pytest.approx(cost, rel=1e-12)


def test_a_published_epsilon_by_todays_conversion():
    """Opacus's test of its accountant asserts 7.32911117143, at the best of fractional orders; ours are whole."""
    run = Charge("a/train", PoissonSubsampledGaussian(0.04, 1.5), 2250, 2250)
    least = min(epsilon_of(price(run, order), 1e-5, order) for order in ORDERS)
    assert 7.32911117143 < least < 7.32911117143 * 1.005


def test_a_published_epsilon_by_the_first_conversion():
    """TensorFlow Privacy's tutorial prints for 60 epochs of MNIST: "14063 steps ... eps = 3.01 ... optimal RDP order is
    9.0", by ε = rdp + log(1/δ)/(α−1) (Mironov 2017, proposition 3)."""
    step = PoissonSubsampledGaussian(256 / 60000, 1.1)
    by_order = {order: 14063 * rdp + math.log(1e5) / (order - 1) for order, rdp in zip(ORDERS, ours(step), strict=True)}
    assert min(by_order, key=by_order.get) == 9
    assert f"{by_order[9]:.2f}" == "3.01"


# Repeat and select. dp_accounting takes its inner minimum over the orders of the accountant.

BASES = [history(8.0, 0.25, 80), history(1.5132, 0.01, 1000), Gaussian(2.0), Laplace(3.0), DiscreteGaussian(5.0, 1)]


@pytest.mark.parametrize("base", BASES, ids=str)
@pytest.mark.parametrize("shape", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("mean", [2, 8, 64])
def test_selection_agrees_with_dp_accounting(base, shape, mean):
    mechanism = RepeatAndSelect((base,), TruncatedNegativeBinomial(shape, tnb_gamma(mean, shape)))
    event = RepeatAndSelectDpEvent(event_of(base), mean, shape)
    assert ours(mechanism, SELECTION_ORDERS) == close_to(theirs(event, SELECTION_ORDERS))


@pytest.mark.parametrize("base", BASES, ids=str)
@pytest.mark.parametrize("mean", [1.0, 2.5, 8, 64])
def test_poisson_selection_agrees_with_dp_accounting(base, mean):
    """dp_accounting takes no minimum over larger orders here, so that is done to its curve."""
    mechanism = RepeatAndSelect((base,), Poisson(mean))
    curve = or_larger_orders(theirs(event_of(mechanism), SELECTION_ORDERS))
    assert ours(mechanism, SELECTION_ORDERS) == close_to(curve)


@pytest.mark.parametrize("base", BASES, ids=str)
@pytest.mark.parametrize("shape", [0.0, 0.5, 1.0, math.inf])
def test_selection_is_never_below_what_a_finer_grid_proves(base, shape):
    """Every integer order up to 128 besides ours: at most 1 % less than our price, and never more."""
    fine, mean = sorted({*range(2, 129), *SELECTION_ORDERS}), 8
    repetitions = Poisson(mean) if shape == math.inf else TruncatedNegativeBinomial(shape, tnb_gamma(mean, shape))
    event = RepeatAndSelectDpEvent(event_of(base), mean, shape)
    proved = or_larger_orders(theirs(event, fine))
    for cost, least in zip(ours(RepeatAndSelect((base,), repetitions), ORDERS), proved, strict=False):
        assert least * (1 - 1e-9) <= cost < least * 1.01


@pytest.mark.parametrize("shape", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize(("gamma", "inner"), [(0.01, 8), (0.1, 12), (0.5, 3)])
def test_selection_from_a_gaussian_is_the_papers_closed_form(shape, gamma, inner):
    """Papernot and Steinke 2022, corollary 4, with the noise at which the best inner order is one of ours."""
    rho = -math.log(gamma) / inner**2
    mechanism = RepeatAndSelect((Gaussian(math.sqrt(0.5 / rho)),), TruncatedNegativeBinomial(shape, gamma))
    mean = rdp_privacy_accountant._truncated_negative_binomial_mean(gamma, shape)
    rest = 2 * (1 + shape) * math.sqrt(-rho * math.log(gamma)) - shape * rho
    turn = 1 + math.sqrt(math.log(mean) / rho)
    assert turn < 32  # up to there every integer is among our orders
    for order in ORDERS:
        if order >= turn:
            expected = rho * (order - 1) + math.log(mean) / (order - 1) + rest
            assert ours(mechanism, [order])[0] == pytest.approx(expected, rel=1e-9)
        else:
            expected = 2 * math.sqrt(rho * math.log(mean)) + rest
            assert expected * (1 - 1e-9) <= ours(mechanism, [order])[0] < expected * 1.02


# ε at δ = 1e-5 of the best of K runs of ε = 1 (q = .01, T = 1000) by dp_accounting's default orders: mean of K → shape.
TABLE = {
    8: {math.inf: 2.02, 1.0: 2.04, 0.5: 1.89, 0.0: 1.72},
    16: {math.inf: 2.93, 1.0: 2.24, 0.5: 2.05, 0.0: 1.84},
    32: {math.inf: 4.49, 1.0: 2.42, 0.5: 2.19, 0.0: 1.95},
    64: {math.inf: 6.54, 1.0: 2.58, 0.5: 2.32, 0.0: 2.05},
}


@pytest.mark.parametrize(("mean", "shape"), [(mean, shape) for mean in TABLE for shape in TABLE[mean]])
def test_the_price_of_private_selection(mean, shape):
    run = history(1.5132, 0.01, 1000)
    assert min(epsilon_of(block_cost(run, o, 0, 1), 1e-5, o) for o in ORDERS) == pytest.approx(1, abs=1e-4)
    repetitions = Poisson(mean) if shape == math.inf else TruncatedNegativeBinomial(shape, tnb_gamma(mean, shape))
    mechanism = RepeatAndSelect((run,), repetitions)
    epsilon = min(epsilon_of(block_cost(mechanism, order, 0, 1), 1e-5, order) for order in ORDERS)
    if shape == math.inf:  # its best orders are fractions, and ours are whole
        assert TABLE[mean][shape] - 0.005 <= epsilon < TABLE[mean][shape] * 1.006
    else:
        assert round(epsilon, 2) == TABLE[mean][shape]
