"""How well membership can be told from scores: measures of leakage that refute no ε by themselves.

Canaries and declared-public records only, as in the whole room: a private member's score stays where it was computed.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import special

from cluster.accounting.mechanisms import number, whole
from cluster.errors import PurserError
from training.audit.bounds import BETA_BOUNDS, check_scores, clopper_pearson

TARGETS = (0.001, 0.01)  # false-positive rates


@dataclass(frozen=True)
class Rate:
    """How many members are found while at most `target` of the others are taken for members.

    `false_positives` is how many really were: the most that `target` and ties allow. Among n others the rate comes in
    steps of 1/n, so that below 1/n there is no false positive at all. The interval is of the threshold that was used.
    """

    target: float
    false_positives: int
    tpr: float
    low: float
    high: float


@dataclass(frozen=True)
class Attack:
    """What an attack by threshold comes to, each interval wrong with probability `beta` given at most (the AUC's:
    about). Scores of one run depend on one another; the intervals take them for independent."""

    members: int
    others: int
    auc: float
    auc_low: float
    auc_high: float
    rates: tuple[Rate, ...]

    def as_json(self) -> dict[str, Any]:
        """The form for reports; `resolution` is the least false-positive rate above 0 that there can be."""
        return {**asdict(self), "rates": [asdict(rate) for rate in self.rates], "resolution": 1 / self.others}


def attack(scores: np.ndarray, inside: np.ndarray, beta: float = 0.05) -> Attack:
    """How well `scores` tell members from others. Equal scores count half in the AUC.

    Args:
        scores: [m], higher where more like a member.
        inside: [m], bool.

    Raises:
        PurserError: a score is not finite, or there are no members or no others.
    """
    number("beta", beta, *BETA_BOUNDS)
    check_scores(scores, inside)
    members, others = np.sort(scores[inside]), np.sort(scores[~inside])
    if not len(members) or not len(others):
        raise PurserError("audit: all canaries were in, or none was, so there is nothing to tell apart; add canaries.")
    above, below = _shares(members, others), 1 - _shares(others, members)
    auc = float(above.mean())
    low, high = _auc_interval(auc, above, below, beta)
    rates = tuple(_rate(target, members, others, beta) for target in TARGETS)
    return Attack(len(members), len(others), auc, low, high, rates)


def lira(target: np.ndarray, shadows: np.ndarray, had: np.ndarray, fixed_variance: bool) -> np.ndarray:
    """Scores of the offline likelihood-ratio attack (Carlini et al. 2022, section VI-C): how far a canary's statistic
    lies above those of models that never saw it, in standard deviations. Φ of it is the paper's Λ, in the same order
    but for Φ's ties at 1.

    Args:
        target: [m], of the audited model; higher where it fits the canary better, and about normal over models.
        shadows: [k, m], the same of k shadow models.
        had: [k, m], bool: which models had which canary in their training; those are left out.
        fixed_variance: one variance for all canaries, pooled within them: for few shadow models.

    Raises:
        PurserError: fewer than two models never saw a canary, a number is not finite, or there is no variance.
    """
    if target.ndim != 1 or shadows.shape[1:] != target.shape or had.shape != shadows.shape or had.dtype != np.bool_:
        raise PurserError("audit: each shadow model must have one statistic and one bool for each canary.")
    without = ~had
    models = without.sum(axis=0)
    if not len(models) or models.min() < 2:
        raise PurserError("audit: a canary has fewer than two shadow models that never saw it; train more of them.")
    if not np.isfinite(target).all() or not np.isfinite(shadows[without]).all():
        raise PurserError("audit: a statistic of a canary is not finite, so nothing can be said; check the models.")
    known = np.where(without, shadows, 0.0)
    mean = known.sum(axis=0) / models
    squares = np.where(without, (known - mean) ** 2, 0.0).sum(axis=0)
    variance = squares.sum() / (models - 1).sum() if fixed_variance else squares / (models - 1)
    if not np.all(variance > 0):
        raise PurserError("audit: shadow models agree on a canary to the last digit; are they one model?")
    return (target - mean) / np.sqrt(variance)


def exposure(ranks: np.ndarray, candidates: int) -> np.ndarray:
    """log2 of how far above chance a canary ranks among all that it could have been (Carlini et al. 2019).

    Args:
        ranks: [m], whole numbers; 1 is the candidate that the model finds likeliest.
        candidates: how many there are, the canary among them.
    """
    whole("candidates", candidates, 1, 2**62)
    if ranks.dtype.kind not in "iu" or (len(ranks) and not 1 <= ranks.min() <= ranks.max() <= candidates):
        raise PurserError(f"audit: ranks must be whole numbers from 1 to the number of candidates, {candidates}.")
    return math.log2(candidates) - np.log2(ranks)


def _shares(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """For each of `some`, which share of sorted `others` lies below; ties count half."""
    below, up_to = (np.searchsorted(others, some, side=side) for side in ("left", "right"))
    return (below + up_to) / (2 * len(others))


def _auc_interval(auc: float, above: np.ndarray, below: np.ndarray, beta: float) -> tuple[float, float]:
    """DeLong, DeLong and Clarke-Pearson 1988, on the logit, so that it stays within 0 and 1.

    That has no width where one side lies above the other altogether. As an average over all ways of pairing members and
    others up, the AUC is then 1 (or 0) only if every pair of one such pairing is, and those are independent: Clopper
    and Pearson's interval for as many pairs holds. Where the variance is 0 for another reason (all scores alike, one
    canary on a side), Hoeffding's 1963 for U-statistics holds.
    """
    pairs = min(len(above), len(below))
    if auc in (0.0, 1.0):
        return clopper_pearson(round(auc) * pairs, pairs, beta)
    variance = above.var(ddof=1) / len(above) + below.var(ddof=1) / len(below) if pairs > 1 else 0.0
    if variance == 0:
        half = math.sqrt(math.log(2 / beta) / (2 * pairs))
        return max(0.0, auc - half), min(1.0, auc + half)
    half = -special.ndtri(beta / 2) * math.sqrt(variance) / (auc * (1 - auc))
    return float(special.expit(special.logit(auc) - half)), float(special.expit(special.logit(auc) + half))


def _rate(target: float, members: np.ndarray, others: np.ndarray, beta: float) -> Rate:
    """Both sides are sorted."""
    allowed = math.floor(target * len(others))  # either target is a little more than 1/1000 or 1/100 to a machine
    threshold = others[-1 - allowed]  # whoever lies above is called a member, whoever ties with it is not
    found, false = (int((side > threshold).sum()) for side in (members, others))
    return Rate(target, false, found / len(members), *clopper_pearson(found, len(members), beta))
