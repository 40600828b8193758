"""How often a private selection repeats: the distributions of K, for whoever plans with them and for whoever draws.

What a selection costs is computed from a distribution's parameters in `costs`; nothing is priced here. K is drawn from
the operating system's entropy, and nowhere else (P10).

References: Papernot and Steinke 2022, definition 1 and section 3.1 (shape η = 0 is the logarithmic, 1 the geometric
distribution; a smaller shape costs less privacy and has a heavier tail).
"""

from __future__ import annotations

import itertools
import math
import secrets
from collections.abc import Iterator
from decimal import Context, Decimal

from cluster.accounting.mechanisms import (
    GAMMA_BOUNDS,
    SHAPE_BOUNDS,
    Poisson,
    Repetitions,
    TruncatedNegativeBinomial,
    number,
)

MEAN_BOUNDS = (1.0, 1e6)
POISSON = math.inf  # the shape that stands for the Poisson distribution, the negative binomial's limit

_BITS = 192  # of the uniform number that K is drawn by
_DIGITS = Context(prec=60, Emin=-999_999_999, Emax=999_999_999)  # 192 bits are 58 of them


def tnb_mean(gamma: float, eta: float) -> float:
    """E[K] of shape `eta` ≥ 0 and `gamma` in (0, 1): η(1−γ)/(γ(1−γ^η)), and (1/γ − 1)/log(1/γ) where η = 0."""
    log = math.log(gamma)
    return (1 / gamma - 1) * (eta / -math.expm1(eta * log) if eta > 0 else -1 / log)


def tnb_gamma(mean: float, eta: float) -> float:
    """γ of the truncated negative binomial with shape `eta` ≥ 0 whose mean is `mean` or, in its last digit, more.

    By bisection: E[K] falls from infinity to 1 as γ rises from 0 to 1. 64 halvings of log γ pass its last digit.
    """
    mean, eta = number("mean", mean, *MEAN_BOUNDS), number("shape", eta, *SHAPE_BOUNDS)
    low, high = GAMMA_BOUNDS
    for _ in range(64):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if tnb_mean(middle, eta) > mean else (low, middle)
    return low


def repetitions_of(mean: float, shape: float) -> Repetitions:
    """The distribution of that `mean`: Poisson where `shape` is POISSON, else truncated negative binomial."""
    if shape == POISSON:
        return Poisson(float(mean))
    return TruncatedNegativeBinomial(shape, tnb_gamma(mean, shape))


def masses(repetitions: Repetitions) -> Iterator[Decimal]:
    """P[K = 0], P[K = 1], … without end, each to almost 60 digits.

    Truncated negative binomial: 0 for K = 0, then (1−γ)^k / (γ^−η − 1) · Π_{l<k} (l+η)/(l+1), and
    (1−γ)^k / (k log(1/γ)) where η = 0. Poisson: e^−μ μ^k / k!.
    """
    at = _DIGITS
    if isinstance(repetitions, Poisson):
        mean = Decimal(repetitions.mean)
        mass = at.exp(at.minus(mean))
        for k in itertools.count(1):
            yield mass
            mass = at.divide(at.multiply(mass, mean), k)
        return
    gamma, eta = Decimal(repetitions.gamma), Decimal(repetitions.shape)
    rest, log = at.subtract(1, gamma), at.ln(gamma)
    # 1 − γ ≥ 1e-12 and η ≥ 1e-6: γ^−η − 1 loses at most 18 digits.
    scale = at.divide(eta, at.subtract(at.exp(at.minus(at.multiply(eta, log))), 1)) if eta else at.divide(-1, log)
    yield Decimal(0)
    mass = at.multiply(rest, scale)
    for k in itertools.count(1):
        yield mass
        mass = at.divide(at.multiply(mass, at.multiply(rest, at.add(k, eta))), k + 1)


def quantile(repetitions: Repetitions, share: float) -> int:
    """The smallest k with P[K ≤ k] ≥ `share`."""
    return _first(repetitions, Decimal(number("share", share, 0.0, 1 - 1e-6)))


def draw(repetitions: Repetitions) -> int:
    """One K, from the operating system's entropy; there is no bound on it.

    By inversion of 192 random bits: no k's probability is off by more than 2^−192 and the rounding of the masses, some
    1e-40 at worst.
    """
    point = _DIGITS.divide(Decimal(secrets.randbits(_BITS)), Decimal(2**_BITS))
    return _first(repetitions, point, above=True)


def _first(repetitions: Repetitions, share: Decimal, above: bool = False) -> int:
    """The smallest k at which the masses up to it come to `share`, or `above` it."""
    total = Decimal(0)
    for k, mass in enumerate(masses(repetitions)):
        total = _DIGITS.add(total, mass)
        if total > share or (total == share and not above):
            return k
    raise AssertionError("unreachable")
