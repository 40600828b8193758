"""From right guesses to a lower bound on ε: what a claimed (ε, δ) can be refuted by.

An audit that refutes nothing shows nothing: its bound lies far below the true ε even where all goes well. So a bound is
told beside its ceiling. The number of guesses is fixed before the scores are seen; whoever tries several and keeps the
best bound has no confidence left.
"""

from __future__ import annotations

import bisect
import functools
import math

import numpy as np
from scipy import special

from cluster.accounting.mechanisms import number, whole
from cluster.errors import PurserError, UsageError

MOST_CANARIES = 100_000
DELTA_BOUNDS = (0.0, 1.0)
BETA_BOUNDS = (1e-12, 0.5)
ROUNDING = 1e-8  # relative, of a p-value: above what its sums lose in double precision at MOST_CANARIES
RESOLUTION = 1e6  # bounds are whole multiples of one by this


def one_run(canaries: int, guesses: int, correct: int, delta: float, beta: float) -> float:
    """The lower bound on ε, at confidence 1 − `beta`, from one run (Steinke, Nasr and Jagielski 2023, arXiv 2305.08846,
    appendix D). It needs no assumption on the training, the canaries or the scores.

    Args:
        canaries: how many there were, each in the training data with probability 1/2, independently of all else.
        guesses: how many of them were guessed in or out; the number was fixed before the scores were seen.
        correct: how many of the guesses are right.
        delta: the δ at which ε is bounded.

    Returns:
        The ε up to which all are refuted, rounded down to 1e-6; 0 where not even 0 is.
    """
    check(canaries, guesses, delta, beta)
    whole("correct", correct, 0, guesses)

    def refuted(epsilon: float) -> bool:
        return _p_value(canaries, guesses, correct, delta, epsilon) * (1 + ROUNDING) <= beta

    if not refuted(0.0):
        return 0.0
    # From below, as the reference goes: should the p-value fall anywhere, all below the bound is refuted nevertheless.
    low = 0.0
    while refuted(low + 1):
        low += 1
    high = low + 1
    while high - low > 1 / RESOLUTION:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return math.floor(low * RESOLUTION) / RESOLUTION


def ceiling(canaries: int, guesses: int, delta: float, beta: float) -> float:
    """The most that `one_run` can show: its bound where every guess is right."""
    return one_run(canaries, guesses, guesses, delta, beta)


def needed(canaries: int, guesses: int, delta: float, beta: float, epsilon: float) -> int | None:
    """The fewest right guesses whose bound exceeds `epsilon`, which may be infinite; None where no number's does."""
    check(canaries, guesses, delta, beta)
    number("epsilon", epsilon, 0.0, math.inf)
    fewest = bisect.bisect_right(
        range(guesses + 1), epsilon, key=lambda correct: one_run(canaries, guesses, correct, delta, beta)
    )
    return fewest if fewest <= guesses else None


def guessed(scores: np.ndarray, inside: np.ndarray, guesses: int) -> int:
    """How many of `guesses` guesses are right: the guesses // 2 highest scores are guessed in, as many of the lowest as
    are left are guessed out, and of the others nothing is said.

    Of equal scores the earlier index counts as the lower, whatever `inside` says; so the order of canaries must not
    depend on which of them are in.

    Args:
        scores: [m], higher where a canary looks more like having been in.
        inside: [m], bool.
    """
    check_scores(scores, inside)
    check_guesses(len(scores), guesses)
    order = np.argsort(scores, kind="stable")
    called_in, called_out = order[len(order) - guesses // 2 :], order[: guesses - guesses // 2]
    return int(inside[called_in].sum() + (~inside[called_out]).sum())


def clopper_pearson(correct: int, of: int, beta: float) -> tuple[float, float]:
    """The exact interval of a proportion, each end wrong with probability at most `beta` / 2 (Clopper, Pearson 1934).

    Args:
        correct: successes among `of` independent trials.
    """
    number("beta", beta, *BETA_BOUNDS)
    whole("of", of, 1, 2**53)
    whole("correct", correct, 0, of)
    low = special.betaincinv(correct, of - correct + 1, beta / 2) if correct else 0.0
    high = special.betainccinv(correct + 1, of - correct, beta / 2) if correct < of else 1.0
    return float(low), float(high)


def heuristic(true_positives: int, members: int, false_positives: int, others: int, delta: float, beta: float) -> float:
    """ε ≥ log((TPR − δ) / FPR), and the same of true and false negatives, at the worse ends of their intervals.

    A bound at confidence 1 − `beta` if every guess comes of a run of its own, and the threshold was fixed before. A
    heuristic within one run: its canaries share one model and its noise, and are no independent trials.
    """
    number("delta", delta, *DELTA_BOUNDS)
    tpr_low, _ = clopper_pearson(true_positives, members, beta)
    _, fpr_high = clopper_pearson(false_positives, others, beta)
    ratios = ((tpr_low - delta) / fpr_high, (1 - fpr_high - delta) / (1 - tpr_low))
    return max(0.0, *(math.log(ratio) for ratio in ratios if ratio > 0))


def check(canaries: int, guesses: int, delta: float, beta: float) -> None:
    """Refuse what is no audit.

    Raises:
        UsageError: a number out of bounds.
    """
    whole("audit.canaries", canaries, 1, MOST_CANARIES)
    check_guesses(canaries, guesses)
    number("delta", delta, *DELTA_BOUNDS)
    number("beta", beta, *BETA_BOUNDS)


def check_guesses(canaries: int, guesses: int) -> None:
    """Refuse more guesses than canaries, or none."""
    if isinstance(guesses, bool) or not isinstance(guesses, int) or not 1 <= guesses <= canaries:
        raise UsageError(
            f"audit.guesses: {guesses!r} was given; it must be a whole number from 1 to audit.canaries, {canaries}."
        )


def check_scores(scores: np.ndarray, inside: np.ndarray) -> None:
    """Refuse scores that have no order, and a membership that is not theirs.

    Raises:
        PurserError: a score is not finite, or there is not one bool for each.
    """
    if scores.ndim != 1 or inside.shape != scores.shape or inside.dtype != np.bool_:
        raise PurserError("audit: each canary must have one score, and one bool that says whether it was in.")
    if not np.isfinite(scores).all():
        raise PurserError("audit: the score of a canary is not finite, so nothing can be said; check the model.")


@functools.lru_cache(maxsize=4)
def _log_binomials(guesses: int) -> np.ndarray:
    """log C(guesses, k) for each k from 0."""
    k = np.arange(guesses + 1)
    return special.gammaln(guesses + 1) - special.gammaln(k + 1) - special.gammaln(guesses - k + 1)


def _p_value(canaries: int, guesses: int, correct: int, delta: float, epsilon: float) -> float:
    """The probability of `correct` right guesses or more, at most, under (`epsilon`, `delta`)-DP:

    P[B ≥ v] + 2·m·δ · max over 1 ≤ i ≤ v of P[v > B ≥ v − i] / i, for B = Bin(r, e^ε / (1 + e^ε)).
    """
    if correct == 0:
        return 1.0
    log_right = -math.log1p(math.exp(-epsilon))
    k = np.arange(correct - 1, -1, -1)
    logs = _log_binomials(guesses)[k] + k * log_right + (guesses - k) * (log_right - epsilon)
    means = np.cumsum(np.exp(logs)) / np.arange(1, correct + 1)
    tail = special.betainc(correct, guesses - correct + 1, math.exp(log_right))
    return float(tail + 2 * canaries * delta * means.max())
