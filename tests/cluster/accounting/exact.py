"""The Rényi divergences of `cluster.accounting.costs` in another library's arithmetic: mpmath at 200 digits, straight
from the papers' formulas, every term by itself and no order left out. Shared by the tests of costs."""

from __future__ import annotations

import functools
import math

import mpmath

from cluster.accounting.costs import FINE, SELECTION_ORDERS, UNIT
from cluster.accounting.mechanisms import (
    Composition,
    DiscreteGaussian,
    Gaussian,
    Laplace,
    Mechanism,
    Poisson,
    PoissonSubsampledGaussian,
    RepeatAndSelect,
    Repetitions,
)

DIGITS = 200
NOISE = mpmath.mpf(10) ** -30  # in units of 1e-36: what the two arithmetics may differ by


def exactly(function):
    """Run `function` at 200 digits."""

    @functools.wraps(function)
    def run(*arguments, **named):
        with mpmath.workdps(DIGITS):
            return function(*arguments, **named)

    return run


@functools.cache
@exactly
def rdp(mechanism: Mechanism, order: int) -> mpmath.mpf:
    """The RDP of one execution of `mechanism` at `order`."""
    match mechanism:
        case PoissonSubsampledGaussian(rate, sigma):
            q, two_variance = mpmath.mpf(rate), 2 * mpmath.mpf(sigma) ** 2
            moment = mpmath.fsum(
                math.comb(order, k) * (1 - q) ** (order - k) * q**k * mpmath.exp((k * k - k) / two_variance)
                for k in range(order + 1)
            )
            return mpmath.log(moment) / (order - 1)
        case Gaussian(sigma):
            return order / (2 * mpmath.mpf(sigma) ** 2)
        case DiscreteGaussian(scale, sensitivity):
            return order * mpmath.mpf(sensitivity) ** 2 / (2 * mpmath.mpf(scale) ** 2)
        case Laplace(scale):
            a, b = mpmath.mpf(order), mpmath.mpf(scale)
            moment = a / (2 * a - 1) * mpmath.exp((a - 1) / b) + (a - 1) / (2 * a - 1) * mpmath.exp(-a / b)
            return mpmath.log(moment) / (a - 1)
        case Composition(parts):
            return mpmath.fsum(count * rdp(part, order) for part, count in parts)
        case RepeatAndSelect(candidates, repetitions):
            return selection(lambda at: max(rdp(one, at) for one in candidates), repetitions, order)
    raise TypeError(mechanism)


@exactly
def selection(base, repetitions: Repetitions, order: int, larger: bool = True) -> mpmath.mpf:
    """Papernot and Steinke's theorems for a base with the RDP curve `base`; `larger`: the least over larger orders."""
    outer = [order, *(at for at in SELECTION_ORDERS if larger and at > order)]
    if isinstance(repetitions, Poisson):
        mean = mpmath.mpf(repetitions.mean)
        return min(base(at) + mean * poisson_delta(base, at) + mpmath.log(mean) / (at - 1) for at in outer)
    eta, gamma = mpmath.mpf(repetitions.shape), mpmath.mpf(repetitions.gamma)
    inner = min((1 - mpmath.mpf(1) / at) * base(at) - mpmath.log(gamma) / at for at in SELECTION_ORDERS)
    log_mean = mpmath.log(tnb_mean(repetitions.shape, repetitions.gamma))
    return min(base(at) + log_mean / (at - 1) for at in outer) + (1 + eta) * inner


@exactly
def tnb_mean(shape: float, gamma: float) -> mpmath.mpf:
    """E[K] of the truncated negative binomial distribution."""
    eta, gamma = mpmath.mpf(shape), mpmath.mpf(gamma)
    if eta == 0:
        return (1 / gamma - 1) / mpmath.log(1 / gamma)
    return eta * (1 - gamma) / (gamma * (1 - gamma**eta))


@exactly
def poisson_delta(base, order: int) -> mpmath.mpf:
    """The least δ at ε = log(1 + 1/(λ−1)) that the curve `base` implies, or 1."""
    epsilon = mpmath.log(1 + mpmath.mpf(1) / (order - 1))
    deltas = (
        mpmath.exp((at - 1) * (base(at) - epsilon)) / at * (1 - mpmath.mpf(1) / at) ** (at - 1)
        for at in SELECTION_ORDERS
    )
    return min(1, *deltas)


@exactly
def excess(fine: int, mechanism: Mechanism, order: int) -> mpmath.mpf:
    """By how much `fine`, a cost in units of 1e-36, is above the truth; below 0 it is too low."""
    return mpmath.mpf(int(fine)) - rdp(mechanism, order) * UNIT * FINE


def is_too_low(fine: int, mechanism: Mechanism, order: int) -> bool:
    """Whether a cost in units of 1e-36 is below the truth by more than the two arithmetics' error."""
    return bool(excess(fine, mechanism, order) < -NOISE)


def allowance(mechanism: Mechanism) -> float:
    """By how many units of 1e-36 a cost may lie above the truth: one rounding up for each execution and each term."""
    match mechanism:
        case Composition(parts):
            return sum(count * allowance(part) for part, count in parts)
        case RepeatAndSelect(candidates, Poisson(mean)):
            # δ^ is at most 1 and an exponential of at most 1023 × the base's cost
            return 3 + (1 + 1023 * mean) * max(map(allowance, candidates))
        case RepeatAndSelect(candidates, repetitions):
            return 5 + repetitions.shape + (2 + repetitions.shape) * max(map(allowance, candidates))
    return 1
