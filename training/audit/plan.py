"""What an audit will do, fixed before the run begins from public numbers alone: its scores, its guesses, its δ.

No record, score or coin comes here; no Ray, no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.accounting.mechanisms import PoissonSubsampledGaussian, from_json
from cluster.errors import PurserError
from training.audit import bounds
from training.audit.claim import tight_epsilon
from training.audit.power import Channel, planned_guesses, power
from training.config import Job

SCORES = ("black-box", "white-box", "white-box, changes")  # an audit looks at all of them; see `watch`
# Where the claim is audited. At the account's own δ, of 1e-5 say, the bound's term 2mδ would leave nothing to show. The
# claim is the run's own curve at this one; further out the curve is lost in what is cut off of its tails.
DELTA = 1e-9


@dataclass(frozen=True)
class Plan:
    """An audit's numbers, all public.

    Attributes:
        canaries, guesses: as sealed.
        delta: at which the claim is audited.
        beta: the chance that one score's bound is wrong; all scores together have 1 − confidence (Bonferroni).
        channel: the run, as an ideal attack would see it.
        epsilon: what is claimed of the run at `delta`.
    """

    canaries: int
    guesses: int
    delta: float
    beta: float
    channel: Channel
    epsilon: float

    def as_json(self) -> dict[str, Any]:
        """What it can show, as `purser plan` and `purser audit` print it. `ceiling`: the bound if all guesses are
        right; `needed`: the fewest right ones that contradict the claim, or None; `power`: how often a run with a tenth
        of the noise would be found out; a claim without bound is None."""
        numbers = self.canaries, self.guesses, self.delta, self.beta
        return {
            "canaries": self.canaries,
            "guesses": self.guesses,
            "delta": self.delta,
            "epsilon_claimed": self.epsilon if math.isfinite(self.epsilon) else None,
            "ceiling": bounds.ceiling(*numbers),
            "needed": bounds.needed(*numbers, self.epsilon),
            "power": power(self.channel.broken, *numbers, self.epsilon),
        }


def plan(job: Job) -> Plan:
    """The audit of a run of `job` that goes as planned, with as many guesses as the job says, or as find a tenth of the
    noise out most often."""
    run, audit = job.run(), job.audit
    channel = Channel(run.sample_rate, run.noise_multiplier, run.steps)
    beta, epsilon = _beta(audit.confidence), claimed(channel)
    guesses = audit.guesses or planned_guesses(channel, audit.canaries, DELTA, beta, epsilon)
    return Plan(audit.canaries, guesses, DELTA, beta, channel, epsilon)


def charged_plan(canaries: int, guesses: int, confidence: float, charges: Sequence[Mapping[str, Any]]) -> Plan:
    """The audit of a run as it was charged, steps that ran twice included: what is claimed follows from the ledger.

    Args:
        canaries, guesses, confidence: as sealed.
        charges: the run's `authorise` entries on its train account.

    Raises:
        PurserError: they are none of DP-SGD, or not of one.
    """
    steps = [from_json(entry["mechanism"]) for entry in charges]
    mechanism = steps[0] if steps else None
    if not isinstance(mechanism, PoissonSubsampledGaussian) or any(step != mechanism for step in steps):
        raise PurserError("audit: the ledger has no charges of one DP-SGD run under this name; name a trained run.")
    channel = Channel(mechanism.sample_rate, mechanism.noise_multiplier, sum(entry["steps"] for entry in charges))
    return Plan(canaries, guesses, DELTA, _beta(confidence), channel, claimed(channel))


def claimed(channel: Channel) -> float:
    """The ε of a run at DELTA: of this run alone and tight, so that no audit has an easy game."""
    return tight_epsilon(channel.sample_rate, channel.noise_multiplier, channel.steps, DELTA)


def _beta(confidence: float) -> float:
    return (1 - confidence) / len(SCORES)
