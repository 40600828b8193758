"""How often a private selection repeats: facts about the truncated negative binomial distribution, for planning.

These are floats for people and planners. What a selection costs is computed from its shape and γ in `costs`.

References: Papernot and Steinke 2022, definition 1 and section 3.1 (shape η = 0 is the logarithmic, 1 the geometric
distribution; a smaller shape costs less privacy and has a heavier tail).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from cluster.accounting.mechanisms import GAMMA_BOUNDS, SHAPE_BOUNDS, number

MEAN_BOUNDS = (1.0, 1e6)


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


def tnb_masses(gamma: float, eta: float) -> Iterator[float]:
    """P[K = 1], P[K = 2], … without end: (1−γ)^k / (γ^−η − 1) · Π_{l<k} (l+η)/(l+1), and (1−γ)^k / (k log(1/γ))
    where η = 0."""
    log = math.log(gamma)
    mass = (1 - gamma) * (eta / math.expm1(-eta * log) if eta > 0 else -1 / log)
    k = 1
    while True:
        yield mass
        mass *= (1 - gamma) * (k + eta) / (k + 1)
        k += 1


def tnb_quantile(mean: float, eta: float, share: float) -> int:
    """The smallest k with P[K ≤ k] ≥ `share` for the truncated negative binomial of that `mean` and shape `eta`."""
    share = number("share", share, 0.0, 1 - 1e-6)  # nearer to 1, the masses' rounding would count
    if mean <= 1:
        return 1
    totals = itertools.accumulate(tnb_masses(tnb_gamma(mean, eta), eta))
    return next(k for k, total in enumerate(totals, start=1) if total >= share)
