"""The tightest ε that a run of fixed numbers can claim, which is what an audit holds against it.

For reports and audits only, never for admission. The parameters of one run do not depend on what it released, so its
privacy losses compose as distributions (PLD); over runs whose parameters do, that composition is no valid filter, and
the books charge at one Rényi order instead.
"""

from __future__ import annotations

import math

from cluster.accounting.mechanisms import STEPS_BOUNDS, PoissonSubsampledGaussian, number, whole

DELTA_BOUNDS = (1e-30, 1.0)
POINTS = (2_000, 10_000, 50_000)  # of the grid that losses lie on, pass by pass
TAIL = 1e-12  # a grid spans the composed losses but for about this mass
FURTHEST = 10.2  # standard deviations to where dp_accounting cuts a step's noise, e^-50 of its mass


def tight_epsilon(sample_rate: float, noise_multiplier: float, steps: int, delta: float) -> float:
    """An upper bound on ε at `delta` of `steps` Poisson-sampled Gaussian steps, under adding or removing one unit.

    By dp_accounting's PLD, its losses rounded upwards. Infinite where `delta` is less than the mass that is cut off and
    counted as infinite loss, about 1e-15.

    Raises:
        UsageError: a number out of bounds; dp_accounting fails open on NaN.
    """
    step = PoissonSubsampledGaussian(sample_rate, noise_multiplier)
    whole("steps", steps, *STEPS_BOUNDS)
    number("delta", delta, *DELTA_BOUNDS)
    most, least = _most_loss(step), math.inf
    reach = min(most * math.sqrt(steps), _reach(step, steps))
    delta -= 16 * steps * 2.0**-52
    if delta < DELTA_BOUNDS[0]:
        return math.inf
    # Each pass learns from the one before how far the composed losses reach, so that neither a grid too coarse for
    # small losses nor one too fine to be held is laid. On each grid ε is a bound; the least is taken.
    for points in POINTS:
        epsilon, reached = _composed(step, steps, max(most, reach) / points, (delta, TAIL))
        least, reach = min(least, epsilon), min(reach, reached)
    return least


def _reach(step: PoissonSubsampledGaussian, steps: int) -> float:
    """ε at TAIL by Rényi order 2, which overstates it but takes no grid."""
    return steps * math.log1p(step.sample_rate**2 * math.expm1(1 / step.noise_multiplier**2)) - math.log(TAIL)


def _most_loss(step: PoissonSubsampledGaussian) -> float:
    """The largest loss that one step has before its tail is cut."""
    whole_step = FURTHEST / step.noise_multiplier + 1 / (2 * step.noise_multiplier**2)
    return math.log1p(step.sample_rate * math.expm1(whole_step))


def _composed(step: PoissonSubsampledGaussian, steps: int, grid: float, deltas: tuple[float, ...]) -> list[float]:
    """ε at each of `deltas`, of losses on multiples of `grid`."""
    from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=grid)
    accountant.compose(PoissonSampledDpEvent(step.sample_rate, GaussianDpEvent(step.noise_multiplier)), steps)
    return [float(accountant.get_epsilon(delta)) for delta in deltas]
