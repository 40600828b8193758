"""What mechanisms cost: Rényi divergence at one integer order as whole numbers, never too low (P6).

A cost is RDP at the account's order in units of 1e-12. The cost of one step is kept with 24 further digits, computed
in high precision and rounded up, so that many small steps are neither free nor rounded up one by one. Budgets round
down. Converting to ε happens once per account, when it is made; costs are never converted and added.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal, localcontext
from fractions import Fraction

from cluster.accounting.mechanisms import (
    NOISE_MULTIPLIER_BOUNDS,
    Charge,
    DiscreteGaussian,
    Mechanism,
    PoissonSubsampledGaussian,
    number,
    whole,
)
from cluster.errors import UsageError

UNIT = 10**12  # one unit of cost is RDP 1e-12
FINE = 10**24  # a step's cost is kept in units of 1e-36
LARGEST = 2**62  # costs are 64-bit integers in the ledger
ORDERS = (2, 1024)

# 120 digits: sums of up to 1,025 terms and the logarithm of a number as near to 1 as 1e-30 keep far more than the 36
# digits that are used; GUARD is added before rounding so that the last digits' rounding can only make a cost higher.
_HIGH = Context(prec=120, Emax=999_999_999_999_999, Emin=-999_999_999_999_999)
_GUARD = Decimal(10) ** -90


@functools.lru_cache(maxsize=65536)
def step_cost(mechanism: Mechanism, order: int) -> int:
    """RDP of one execution at `order`, in units of 1e-36, rounded up.

    Poisson-subsampled Gaussian: log(Σ_k C(α,k)(1−q)^(α−k) q^k exp((k²−k)/2σ²)) / (α−1), exact at integer orders for
    the add direction, which dominates (Mironov, Talwar and Zhang 2019, section 3.3 and theorem 5). Discrete
    Gaussian: αΔ²/2σ² (Canonne, Kamath and Steinke 2020, proposition 5).
    """
    if isinstance(mechanism, DiscreteGaussian):
        rho = Fraction(order * mechanism.l2_sensitivity**2) / (2 * Fraction(mechanism.scale) ** 2)
        return _bounded(math.ceil(rho * UNIT * FINE))
    if isinstance(mechanism, PoissonSubsampledGaussian):
        if mechanism.sample_rate == 1.0:
            return _bounded(math.ceil(Fraction(order) / (2 * Fraction(mechanism.noise_multiplier) ** 2) * UNIT * FINE))
        with localcontext(_HIGH):
            rdp = _log_moment(mechanism.sample_rate, mechanism.noise_multiplier, order) / (order - 1)
            return _bounded(int(((rdp + _GUARD) * UNIT * FINE).to_integral_value(ROUND_CEILING)))
    raise UsageError(f"mechanism: {type(mechanism).__name__} has no cost; it cannot be charged.")


def _log_moment(sample_rate: float, noise_multiplier: float, order: int) -> Decimal:
    q, two_variance = Decimal(sample_rate), 2 * Decimal(noise_multiplier) ** 2
    weight = (1 - q) ** order  # C(α,k)(1−q)^(α−k) q^k for k = 0, then by recursion
    odds = q / (1 - q)
    moment = Decimal(0)
    for k in range(order + 1):
        moment += weight * (Decimal(k * k - k) / two_variance).exp()
        weight *= odds * (order - k) / (k + 1)
    return moment.ln()


def _bounded(fine: int) -> int:
    if fine <= 0 or fine > LARGEST * FINE:
        raise UsageError(
            "noise_multiplier: the cost of one step is beyond what the ledger can hold; choose more noise."
        )
    return fine


def block_cost(mechanism: Mechanism, order: int, start: int, stop: int) -> int:
    """Cost of steps `start` to `stop` (counted from 0 within one attempt): ⌈c·stop⌉ − ⌈c·start⌉, never 0.

    Telescoping: the blocks of an attempt add up to at least c × the steps it was authorised.
    """
    fine = step_cost(mechanism, order)
    cost = max(1, _ceil(fine * stop) - _ceil(fine * start))
    if cost > LARGEST:
        raise UsageError("steps: the cost is beyond what the ledger can hold; choose more noise or fewer steps.")
    return cost


def _ceil(fine: int) -> int:
    return -(-fine // FINE)


def price(charge: Charge, order: int, steps: int | None = None) -> int:
    """What authorising every block of `charge` (or only its first `steps` steps) will cost.

    The sum of `block_cost` over the blocks, in closed form: full blocks telescope where a block costs a unit or more,
    and cost exactly one unit each where it costs less.
    """
    planned = charge.steps if steps is None else steps
    full, rest = divmod(planned, charge.block)
    fine = step_cost(charge.mechanism, order)
    cost = _ceil(fine * full * charge.block) if fine * charge.block >= FINE else full
    if rest:
        cost += block_cost(charge.mechanism, order, planned - rest, planned)
    if cost > LARGEST:
        raise UsageError("steps: the cost is beyond what the ledger can hold; choose more noise or fewer steps.")
    return cost


def budget_cost(epsilon: float, delta: float, order: int) -> int:
    """The RDP at `order` that still implies (`epsilon`, `delta`), rounded down; 0 or less means the order is of no use.

    ε = rdp + log(1−1/α) − (log δ + log α)/(α−1) (Canonne, Kamath and Steinke 2020, proposition 12). `epsilon` and
    `delta` are the decimal numbers that were written, not their binary neighbours.
    """
    epsilon = number("epsilon", epsilon, 0.0, 1e6)
    with localcontext(_HIGH):
        budget = Decimal(repr(epsilon)) - _conversion(delta, order) - _GUARD
        return int((budget * UNIT).to_integral_value(ROUND_FLOOR))


def epsilon_of(cost: int, delta: float, order: int) -> float:
    """The ε at `delta` that the books charge for `cost` at `order`; rounded up, 0 for nothing spent."""
    if cost <= 0:
        return 0.0
    with localcontext(_HIGH):
        epsilon = Decimal(cost) / UNIT + _conversion(delta, order)
        return max(0.0, math.nextafter(float(epsilon), math.inf))


def epsilon_text(epsilon: float) -> str:
    """An ε for people: three decimals, never below what is charged (P14)."""
    return f"{math.ceil(epsilon * 1000) / 1000:.3f}"


def _conversion(delta: float, order: int) -> Decimal:
    delta = number("delta", delta, 5e-324, 1.0)
    whole("order", order, *ORDERS)
    alpha = Decimal(order)
    return (1 - 1 / alpha).ln() - (Decimal(repr(delta)).ln() + alpha.ln()) / (alpha - 1)


def affordable_steps(charge: Charge, order: int, available: int, at_most: int | None = None) -> int:
    """The most steps of `charge`, up to `at_most` or its own plan, whose price is within `available`."""
    low, high = 0, charge.steps if at_most is None else at_most
    while low < high:
        middle = (low + high + 1) // 2
        if price(charge, order, middle) <= available:
            low = middle
        else:
            high = middle - 1
    return low


def least_noise_multiplier(charge: Charge, order: int, available: int) -> float | None:
    """The least noise_multiplier, to three digits and rounded up, at which all of `charge` fits in `available`."""
    if not isinstance(charge.mechanism, PoissonSubsampledGaussian) or available <= 0:
        return None
    low, high = charge.mechanism.noise_multiplier, NOISE_MULTIPLIER_BOUNDS[1]
    if price(replace(charge, mechanism=replace(charge.mechanism, noise_multiplier=high)), order) > available:
        return None
    while high / low > 1.0005:
        middle = math.sqrt(low * high)
        changed = replace(charge, mechanism=replace(charge.mechanism, noise_multiplier=middle))
        low, high = (low, middle) if price(changed, order) <= available else (middle, high)
    digits = 2 - math.floor(math.log10(high))
    return math.ceil(high * 10**digits) / 10**digits
