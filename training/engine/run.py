"""The one object that holds σ, C, q and T of a run (P12). It holds public, declared numbers only.

Sampler, optimizer, noise and the charge against the budget are all made from it, so they cannot disagree.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.accounting.mechanisms import Charge, PoissonSubsampledGaussian, number, whole
from cluster.errors import UsageError

# The noise that is added is this much larger than what is charged for: it covers that norms, clipping factors and
# sums are fp32 numbers, so that one unit's contribution may exceed max_grad_norm in the last digits (P8).
SIGMA_MARGIN = 1 + 2.0**-10


@dataclass(frozen=True)
class DPSGDRun:
    """A DP-SGD run as planned.

    Attributes:
        noise_multiplier: σ, the noise's standard deviation over max_grad_norm.
        max_grad_norm: C, the L2 bound on one unit's whole contribution to a step.
        sample_rate: q, the probability with which each unit joins a step, independently.
        expected_batch_size: B, the declared normaliser of the noised sum; never the number of units that joined.
        steps: T, exactly as many on every rank, empty batches included.
        block: how many steps are authorised at once.
        physical_batch_size: the most records in one micro-batch; changes memory, never the result.
        max_records_per_unit: the most records of one unit that are used.
    """

    noise_multiplier: float
    max_grad_norm: float
    sample_rate: float
    expected_batch_size: int
    steps: int
    block: int
    physical_batch_size: int
    max_records_per_unit: int = 1

    def __post_init__(self) -> None:
        PoissonSubsampledGaussian(self.sample_rate, self.noise_multiplier)
        number("training.max_grad_norm", self.max_grad_norm, 1e-6, 1e6)
        for field in ("expected_batch_size", "steps", "block", "physical_batch_size", "max_records_per_unit"):
            whole(f"training.{field}", getattr(self, field), 1, 10_000_000)
        if self.max_records_per_unit > self.physical_batch_size:
            raise UsageError(
                f"training.physical_batch_size: {self.physical_batch_size} was given; a unit stays whole in one "
                f"micro-batch, so it must be at least privacy.max_records_per_unit = {self.max_records_per_unit}."
            )

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on each coordinate of the summed gradient: σ·C·(1 + 2^-10)."""
        return self.noise_multiplier * self.max_grad_norm * SIGMA_MARGIN

    def charge(self, account: str) -> Charge:
        """What this run asks of the budget of `account`."""
        mechanism = PoissonSubsampledGaussian(self.sample_rate, self.noise_multiplier)
        return Charge(account, mechanism, self.steps, self.block)
