"""What mechanisms cost: Rényi divergence at one integer order as whole numbers, never too low (P6).

A cost is RDP at the account's order in units of 1e-12. The cost of one step is kept with 24 further digits, computed
in high precision and rounded up, so that many small steps are neither free nor rounded up one by one. Budgets round
down. Converting to ε happens once per account, when it is made; costs are never converted and added.

All divergences are for one unit added or removed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal, localcontext
from fractions import Fraction

from cluster.accounting.mechanisms import (
    NOISE_MULTIPLIER_BOUNDS,
    STEPS_BOUNDS,
    Charge,
    Composition,
    DiscreteGaussian,
    Gaussian,
    Laplace,
    Mechanism,
    Poisson,
    PoissonSubsampledGaussian,
    RepeatAndSelect,
    Repetitions,
    number,
    whole,
)
from cluster.errors import UsageError

UNIT = 10**12  # one unit of cost is RDP 1e-12
FINE = 10**24  # a step's cost is kept in units of 1e-36
LARGEST = 2**62  # costs are 64-bit integers in the ledger
ORDERS = (2, 1024)

# The orders among which the price of a selection takes its minima. Any set of orders gives a valid bound. The minima
# are flat, so that steps of an eighth to a third lose little where orders are many.
SELECTION_ORDERS = (*range(2, 33), 36, 40, 48, 56, 64, 80, 96, 128, 192, 256, 384, 512, 768, 1024)

# 120 digits: a rounding is off by less than 1e-119, relative. Every function below says how often that adds up, and
# none comes near GUARD, which is added before rounding up: the last digits can only make a cost higher.
_HIGH = Context(prec=120, Emax=999_999_999_999_999, Emin=-999_999_999_999_999)
_GUARD = Decimal(10) ** -90


def step_cost(mechanism: Mechanism, order: int) -> int:
    """RDP of one execution of `mechanism` at the integer `order` from 2 to 1,024, in units of 1e-36, rounded up.

    - Gaussian: α/2σ² (Mironov 2017, corollary 3).
    - Laplace: log(α/(2α−1)·e^((α−1)/b) + (α−1)/(2α−1)·e^(−α/b)) / (α−1) (Mironov 2017, proposition 6).
    - Discrete Gaussian: αΔ²/2σ² (Canonne, Kamath and Steinke 2020, proposition 5).
    - Poisson-subsampled Gaussian: log(Σ_k C(α,k)(1−q)^(α−k) q^k exp((k²−k)/2σ²)) / (α−1), exact at integer orders
      for the add direction, which dominates (Mironov, Talwar and Zhang 2019, section 3.3 and theorem 5).
    - Composition: the sum over the parts (Mironov 2017, proposition 1).
    - Repeat and select: Papernot and Steinke 2022, theorems 2 and 6; see `_repeat_and_select`.

    Raises:
        UsageError: not a mechanism, an order out of bounds, or a cost beyond what the ledger can hold.
    """
    return _bounded(_rdp(mechanism, whole("order", order, *ORDERS)))


@functools.lru_cache(maxsize=65536)
def _rdp(mechanism: Mechanism, order: int) -> int:
    """`step_cost` without the ledger's limit: a selection looks at orders at which no cost could be booked."""
    if isinstance(mechanism, PoissonSubsampledGaussian):
        if mechanism.sample_rate == 1.0:
            return _gaussian(order, mechanism.noise_multiplier)
        return _subsampled_gaussian(order, mechanism.sample_rate, mechanism.noise_multiplier)
    if isinstance(mechanism, Gaussian):
        return _gaussian(order, mechanism.noise_multiplier)
    if isinstance(mechanism, DiscreteGaussian):
        return _gaussian(order, mechanism.scale, mechanism.l2_sensitivity)
    if isinstance(mechanism, Laplace):
        return _laplace(order, mechanism.noise_multiplier)
    if isinstance(mechanism, Composition):
        return sum(count * _rdp(part, order) for part, count in mechanism.parts)
    if isinstance(mechanism, RepeatAndSelect):
        return _repeat_and_select(mechanism, order)
    raise UsageError(f"mechanism: {type(mechanism).__name__} has no cost; it cannot be charged.")


def _up(value: Decimal) -> int:
    """`value`, computed in `_HIGH`, in units of 1e-36 and never below what it stands for."""
    return int(((value + _GUARD) * UNIT * FINE).to_integral_value(ROUND_CEILING))


def _gaussian(order: int, deviation: float, sensitivity: int = 1) -> int:
    return math.ceil(Fraction(order * sensitivity**2 * UNIT * FINE) / (2 * Fraction(deviation) ** 2))


def _laplace(order: int, scale: float) -> int:
    # Of one number moved by 1. For a vector moved by t in all, the coordinates' costs add up to no more: each is a
    # convex function of its part of t (a logarithm of a sum of exponentials) that is 0 at 0.
    # Error: exponents are at most 1024 × 10, so the moment is off by 1e-115, relative; its logarithm as much, absolute.
    with localcontext(_HIGH):
        alpha, scale_ = Decimal(order), Decimal(scale)
        moment = (alpha * ((alpha - 1) / scale_).exp() + (alpha - 1) * (-alpha / scale_).exp()) / (2 * alpha - 1)
        return _up(moment.ln() / (alpha - 1))


def _subsampled_gaussian(order: int, sample_rate: float, noise_multiplier: float) -> int:
    # The terms of the sum by multiplications alone: from k to k + 1 the weight C(α,k)(1−q)^(α−k) q^k grows by
    # q/(1−q)·(α−k)/(k+1) and exp((k²−k)/2σ²) by r^2k, r² = exp(1/σ²).
    # Error: 1/σ² ≤ 100, so r² is off by 1e-117, relative, its power k by k times that and the product of the powers
    # before k, which is in term k, by k²/2 times: below 1e-111 with the rounding of the other factors (some 10 for each
    # k) for k ≤ 1024. All terms are positive: nothing cancels, and the sum is as good as its worst term. That error of
    # its logarithm is absolute; the logarithm's own is relative to a value of at most α²/2σ² < 1e8.
    with localcontext(_HIGH):
        q = Decimal(sample_rate)
        ratio, growth = _growth(noise_multiplier), q / (1 - q)
        term = moment = (1 - q) ** order
        for k in range(order):
            term = term * growth * (order - k) / (k + 1)
            moment += term
            growth *= ratio
        return _up(moment.ln() / (order - 1))


@functools.lru_cache(maxsize=1024)
def _growth(noise_multiplier: float) -> Decimal:
    """exp(1/σ²), the same for every order."""
    with localcontext(_HIGH):
        return (1 / Decimal(noise_multiplier) ** 2).exp()


def _repeat_and_select(mechanism: RepeatAndSelect, order: int) -> int:
    """RDP of releasing only the best of K candidates.

    One candidate, drawn and run, is the base; with which of them was drawn as part of what it releases, its RDP at
    every order is at most ε(α), the largest of the candidates' at that order. For every α' ≥ α, at which RDP is no
    less, the selection's is at most

        ε(α') + log E[K]/(α'−1) + (1+η) · min over α^ of ((1−1/α^)·ε(α^) + log(1/γ)/α^)    (theorem 2)
        ε(α') + log E[K]/(α'−1) + E[K]·δ^,  where the base is (log(1 + 1/(α'−1)), δ^)-DP     (theorem 6)

    for the truncated negative binomial and the Poisson distribution (Papernot and Steinke 2022); the least of these
    bounds over α and the larger SELECTION_ORDERS is taken (van Erven and Harremoës 2014, theorem 3: a divergence is
    non-decreasing in its order).

    Each term is a whole number of 1e-36, rounded up on its own.
    """
    # Theorem 6 with K = 0, of chance e^(−μ) whatever the data: write a and a' for the densities of the best,
    # q and q' for the base's, F and F' for their distribution functions, T = (λ−1)(1−F') − λ(1−F), so that
    # a^λ a'^(1−λ) = μ·e^(μT)·q^λ q'^(1−λ). As ∫ μ·e^(μT) (λq − (λ−1)q') = 1 − e^(−μ), the selection's moment is
    # 1 + ∫ μ·e^(μT) (q^λ q'^(1−λ) − λq + (λ−1)q'), whose bracket is never negative and whose T ≤ (λ−1)δ^:
    # at most 1 + μ·e^((λ−1)μδ^) (M − 1) for the base's moment M, and that is the theorem's μ·e^((λ−1)μδ^) M or less
    # where μ ≥ 1. Below 1 the theorem's log μ would be negative; hence the bound on means.
    base, log_mean, least = _base(mechanism.candidates), _log_mean(mechanism.repetitions), None
    for at in (order, *(larger for larger in SELECTION_ORDERS if larger > order)):
        epsilon = base(at)
        if least is not None and epsilon >= least:
            break  # RDP only rises with the order
        bound = epsilon - (-log_mean // (at - 1))
        if isinstance(mechanism.repetitions, Poisson):
            bound += _poisson_overhead(mechanism, at)
        least = bound if least is None else min(least, bound)
    assert least is not None
    return least if isinstance(mechanism.repetitions, Poisson) else least + _binomial_overhead(mechanism)


@functools.lru_cache(maxsize=256)
def _base(candidates: tuple[Mechanism, ...]) -> Callable[[int], int]:
    """order → the largest of the candidates' RDP there. Kept as one object: hashing a thousand candidates for each
    order would cost more than the rest."""
    return functools.lru_cache(maxsize=None)(lambda order: max(_rdp(one, order) for one in candidates))


def covers(selection: RepeatAndSelect, run: Mechanism) -> bool:
    """Whether `run` may be a candidate of `selection`: at every order that a price looks at, it costs no more than the
    dearest of those that are listed."""
    base = _base(selection.candidates)
    return all(_rdp(run, order) <= base(order) for order in SELECTION_ORDERS)


@functools.lru_cache(maxsize=1024)
def _log_mean(repetitions: Repetitions) -> int:
    """log E[K] in units of 1e-36, rounded up; never below 0.

    Truncated negative binomial: E[K] = η(1−γ)/(γ(1−γ^η)), and (1/γ − 1)/log(1/γ) for η = 0 (Papernot and Steinke
    2022, definition 1).
    """
    # Error: 1 − γ ≥ 1e-12 and η log(1/γ) ≥ 1e-18, so cancellation leaves more than 100 digits.
    with localcontext(_HIGH):
        if isinstance(repetitions, Poisson):
            return _up(Decimal(repetitions.mean).ln())
        shape, gamma = Decimal(repetitions.shape), Decimal(repetitions.gamma)
        odds = 1 / gamma - 1
        mean = odds / -gamma.ln() if shape == 0 else shape * odds / (1 - (shape * gamma.ln()).exp())
        return _up(max(mean, Decimal(1)).ln())


@functools.lru_cache(maxsize=256)
def _binomial_overhead(mechanism: RepeatAndSelect) -> int:
    """What theorem 2 adds whatever the order: (1+η) · min over α^ of ((1−1/α^)·ε(α^) + log(1/γ)/α^)."""
    assert not isinstance(mechanism.repetitions, Poisson)
    base, least = _base(mechanism.candidates), None
    with localcontext(_HIGH):
        log_inverse = _up(-Decimal(mechanism.repetitions.gamma).ln())
    for at in SELECTION_ORDERS:
        weighted = (at - 1) * base(at)
        if least is not None and weighted >= least * at:
            break  # (1−1/α^)·ε(α^) only rises with the order
        bound = -(-(weighted + log_inverse) // at)
        least = bound if least is None else min(least, bound)
    assert least is not None
    return math.ceil((1 + Fraction(mechanism.repetitions.shape)) * least)


@functools.lru_cache(maxsize=4096)
def _poisson_overhead(mechanism: RepeatAndSelect, order: int) -> int:
    """What theorem 6 adds at `order` λ: E[K]·δ^, where the base is (log(λ/(λ−1)), δ^)-DP.

    δ^ = exp((α^−1)(ε(α^) − log(λ/(λ−1)) + log(1−1/α^)) − log α^) at its least over α^, or 1 (Canonne, Kamath and
    Steinke 2020, proposition 12).
    """
    # Error: exponents that matter lie between −720 and 0, so that δ^ is off by less than 1e-115.
    assert isinstance(mechanism.repetitions, Poisson)
    base = _base(mechanism.candidates)
    with localcontext(_HIGH):
        gap, log_delta = -_logs(order)[0], Decimal(0)
        for at in SELECTION_ORDERS:
            excess = (at - 1) * (Decimal(base(at)) / (UNIT * FINE) - gap)
            if excess > 8:
                break  # it only rises, and what follows takes off at most 1 + log 1024 < 8
            log_one_less, log_order = _logs(at)
            log_delta = min(log_delta, excess + (at - 1) * log_one_less - log_order)
        return _up(Decimal(mechanism.repetitions.mean) * log_delta.exp())


@functools.lru_cache(maxsize=1024)
def _logs(order: int) -> tuple[Decimal, Decimal]:
    """log(1−1/α) and log α."""
    with localcontext(_HIGH):
        alpha = Decimal(order)
        return (1 - 1 / alpha).ln(), alpha.ln()


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


def bound_text(epsilon: float, decimals: int = 3) -> str:
    """A lower bound on ε for people: never above what was shown."""
    scale = 10**decimals
    return f"{math.floor(epsilon * scale) / scale:.{decimals}f}"


def epsilon_text(epsilon: float) -> str:
    """An ε for people: three decimals, never below what is charged (P14)."""
    return f"{math.ceil(epsilon * 1000) / 1000:.3f}"


def _conversion(delta: float, order: int) -> Decimal:
    delta = number("delta", delta, 5e-324, 1.0)
    whole("order", order, *ORDERS)
    log_one_less, log_order = _logs(order)
    return log_one_less - (Decimal(repr(delta)).ln() + log_order) / (order - 1)


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


def most_steps(charge: Charge, order: int, available: int) -> int:
    """The most steps of `charge` whose price is within `available`; unlike `affordable_steps` beyond its plan."""
    bound = available * FINE // step_cost(charge.mechanism, order) + 1  # beyond it no rounding helps
    return affordable_steps(charge, order, available, min(bound, STEPS_BOUNDS[1]))


def least_noise(charge: Charge, order: int, available: int) -> float | None:
    """The least noise_multiplier, in thousandths, at which all of `charge` fits in `available`; None if there is none.
    Unlike `least_noise_multiplier` it may be below the charge's own."""
    assert isinstance(charge.mechanism, PoissonSubsampledGaussian)
    low, high = (round(1000 * bound) for bound in NOISE_MULTIPLIER_BOUNDS)
    if not _fits_with(charge, high, order, available):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _fits_with(charge, middle, order, available) else (middle + 1, high)
    return high / 1000


def _fits_with(charge: Charge, thousandths: int, order: int, available: int) -> bool:
    assert isinstance(charge.mechanism, PoissonSubsampledGaussian)
    changed = replace(charge, mechanism=replace(charge.mechanism, noise_multiplier=thousandths / 1000))
    try:
        return price(changed, order) <= available
    except UsageError:  # so little noise that no ledger could hold the cost
        return False
