"""What an audit will do, fixed before the run begins from public numbers alone: its scores, its guesses, its δ.

No record, score or coin comes here; no Ray, no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from training.audit.claim import tight_epsilon
from training.audit.power import LESS_NOISE, Channel, planned_guesses
from training.config import Job
from training.engine.run import DPSGDRun

SCORES = ("black-box", "white-box", "white-box, changes")  # an audit looks at all of them; see `watch`
# Where the claim is audited. At the account's own δ, of 1e-5 say, the bound's term 2mδ would leave nothing to show. It
# is a fiftieth of the error that an audit allows itself, or less; the claim is the run's own curve there. Below the
# second of these, the curve is lost in what is cut off of its tails.
DELTA, LEAST_DELTA = 1e-9, 1e-11


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

    @property
    def broken(self) -> Channel:
        """The same run with a tenth of its noise, which an audit should find out."""
        return replace(self.channel, noise_multiplier=self.channel.noise_multiplier / LESS_NOISE)


def plan(job: Job, steps: int, guesses: int | None = None) -> Plan:
    """The audit of a run of `job`.

    Args:
        steps: how many it was authorised, those that ran twice included.
        guesses: how many were sealed; before that, None: what the job says, or the number that finds a tenth of the
            noise out most often.
    """
    run = job.run()
    beta = (1 - job.audit.confidence) / len(SCORES)
    delta = max(LEAST_DELTA, min(DELTA, job.privacy.delta, beta / (100 * job.audit.canaries)))
    channel = Channel(run.sample_rate, run.noise_multiplier, steps)
    epsilon = claimed(run, steps, delta)
    guesses = guesses or job.audit.guesses
    if guesses is None:
        guesses = planned_guesses(channel, job.audit.canaries, delta, beta, epsilon)
    return Plan(job.audit.canaries, guesses, delta, beta, channel, epsilon)


def claimed(run: DPSGDRun, steps: int, delta: float) -> float:
    """The ε at `delta` of so many steps of `run`: of this run alone and tight, so that no audit has an easy game."""
    return tight_epsilon(run.sample_rate, run.noise_multiplier, steps, delta)
