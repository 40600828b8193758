"""What an audit would see if all went well for it: the ideal channel, the power against a claim, the number of guesses.

Everything here is computed from public numbers, before training. Its generators have a constant seed: this is public
randomness, which reaches neither training nor any canary, so that a plan is the same wherever it is made (P10).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from cluster.accounting.mechanisms import NOISE_MULTIPLIER_BOUNDS, SAMPLE_RATE_BOUNDS, STEPS_BOUNDS, number, whole
from training.audit.bounds import MOST_CANARIES, ceiling, guessed, needed

REPLICAS = 200
FRACTIONS = (0.2, 0.5, 1.0)  # of the canaries, that may be guessed
LESS_NOISE = 10  # a run that adds its noise a tenth too strong is what an audit must find
_SEED = 20230515


@dataclass(frozen=True)
class Channel:
    """A run as an ideal auditor sees it: each canary has a direction of its own in the sum of gradients, is clipped to
    the whole norm, and disturbs no other. Real canaries show less."""

    sample_rate: float
    noise_multiplier: float  # from 0 on, unlike a run's own: broken runs are channels, too
    steps: int

    def __post_init__(self) -> None:
        number("sample_rate", self.sample_rate, *SAMPLE_RATE_BOUNDS)
        number("noise_multiplier", self.noise_multiplier, 0.0, NOISE_MULTIPLIER_BOUNDS[1])
        whole("steps", self.steps, *STEPS_BOUNDS)

    @property
    def broken(self) -> Channel:
        """The same run with a tenth of its noise, which an audit should find out."""
        return replace(self, noise_multiplier=self.noise_multiplier / LESS_NOISE)

    def scores(self, inside: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """What the steps' sums came to in each canary's direction, in units of the clip norm.

        Args:
            inside: bool, of any shape, which the scores get.
        """
        joined = rng.binomial(self.steps, self.sample_rate, inside.shape) * inside
        return joined + rng.normal(0.0, math.sqrt(self.steps) * self.noise_multiplier, inside.shape)


def power(
    channel: Channel, canaries: int, guesses: int, delta: float, beta: float, epsilon: float, replicas: int = REPLICAS
) -> float:
    """The probability that the audit of such a run contradicts the claim `epsilon`, as seen over `replicas` runs of the
    channel. Its standard error is 0.036 at most, and next to nothing where it is near 0 or 1."""
    fewest = needed(canaries, guesses, delta, beta, epsilon)
    if fewest is None:
        whole("replicas", replicas, 1, 1_000_000)
        return 0.0
    return found_out(channel, canaries, lambda scores, inside: guessed(scores, inside, guesses) >= fewest, replicas)


def found_out(
    channel: Channel, canaries: int, finds: Callable[[np.ndarray, np.ndarray], bool], replicas: int = REPLICAS
) -> float:
    """How often `finds`, of scores and of who was in, is true over `replicas` runs of the channel."""
    whole("replicas", replicas, 1, 1_000_000)
    rng, found = np.random.default_rng(_SEED), 0
    for _ in range(replicas):
        inside = rng.random(canaries) < 0.5
        found += finds(channel.scores(inside, rng), inside)
    return found / replicas


def planned_guesses(channel: Channel, canaries: int, delta: float, beta: float, epsilon: float) -> int:
    """How many canaries to guess, from public numbers alone and so before training: that of a few even numbers which
    most often contradicts the claim of a run that has a tenth of its noise. Of equal ones it is the smallest that can
    exceed the claim at all, or else the largest."""
    whole("audit.canaries", canaries, 2, MOST_CANARIES)
    grid = sorted({min(max(2, 2 * round(canaries * part / 2)), canaries // 2 * 2) for part in FRACTIONS})
    powers = {guesses: power(channel.broken, canaries, guesses, delta, beta, epsilon) for guesses in grid}
    best = [guesses for guesses in grid if powers[guesses] == max(powers.values())]
    able = [guesses for guesses in best if ceiling(canaries, guesses, delta, beta) > epsilon]
    return able[0] if able else best[-1]
