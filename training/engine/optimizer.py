"""Clip, sum, noise, reduce, step: Opacus's DPOptimizer with the parts replaced that its hazards call for.

Per-unit gradients of a micro-batch are clipped in fp32 and added to one fp64 buffer: in fp32, one unit more may move a
sum of a million units by 2 % more than C. A logical step ends in one all-reduce of that buffer, to which rank 0 has
added noise. The buffer and everything before the noise are private (P13): nothing here may return, print or store them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from opacus.optimizers import DPOptimizer

from cluster.errors import PurserError
from training.engine.randomness import Keystream
from training.engine.run import DPSGDRun

# The released sum lies on multiples of a public power of two, about σC·2^-18: the low bits of floating-point noise,
# by which sums can be told apart (Mironov 2012), are not released.
GRID_BITS = 18
_EXACT = 4096  # the most contributions that are added in fp32 before they go to the fp64 buffer


class PrivateOptimizer(DPOptimizer):
    """`torch.optim.Optimizer` over finished private gradients.

    Args:
        optimizer: the optimizer that takes the step; its parameters must be hooked by Opacus's GradSampleHooks with
            loss_reduction="sum".
        run: σ, C and B; there is no other place they could be set.

    Guarantees, for one logical step: one unit moves the sum by at most C in L2, whatever its companions (non-finite
    contributions count as zero); the sum over all ranks carries one noise of run.noise_std per coordinate; every rank
    takes the same step; what is divided by is the declared B.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, run: DPSGDRun) -> None:
        self._run = run
        super().__init__(
            optimizer,
            noise_multiplier=run.noise_multiplier,
            max_grad_norm=run.max_grad_norm,
            expected_batch_size=run.expected_batch_size,
            loss_reduction="sum",
        )
        self._size = sum(p.numel() for p in self.params)
        self._sum = torch.zeros(self._size, dtype=torch.float64, device=self.params[0].device)
        self._keys = Keystream()
        self._grid = 2.0 ** (math.floor(math.log2(run.noise_std)) - GRID_BITS)

    @property
    def noise_multiplier(self) -> float:
        """σ, from the run."""
        return self._run.noise_multiplier

    @noise_multiplier.setter
    def noise_multiplier(self, value: float) -> None:
        self._fixed("noise_multiplier", value, self._run.noise_multiplier)

    @property
    def max_grad_norm(self) -> float:
        """C, from the run: a scheduler that changed it here would clip at one norm and add noise for another."""
        return self._run.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float) -> None:
        self._fixed("max_grad_norm", value, self._run.max_grad_norm)

    @staticmethod
    def _fixed(field: str, value: float, planned: float) -> None:
        if value != planned:
            raise PurserError(f"training.{field}: it is {planned} for the whole run and cannot be changed to {value}.")

    def accumulate(self, unit: torch.Tensor, units: int) -> None:
        """Fold the per-record gradients of one backward pass into the sum.

        Args:
            unit: [records], the number of each record's unit within this micro-batch.
            units: how many units there are.
        """
        per_unit = []
        for p in self.params:
            grad_sample = getattr(p, "grad_sample", None)
            if not isinstance(grad_sample, torch.Tensor) or len(grad_sample) != len(unit):
                raise PurserError(
                    "model: a trainable parameter got no per-record gradient; every one must be used once in each "
                    "forward pass, inside a layer that Opacus hooks."
                )
            records = grad_sample.reshape(len(unit), -1).float()
            summed = torch.zeros(units, records.shape[1], device=records.device)
            per_unit.append(summed.index_add_(0, unit.to(records.device), records))
            p.grad_sample = None
            p.grad = None
        gradients = torch.cat(per_unit, dim=1)
        norms = torch.linalg.vector_norm(gradients, dim=1, dtype=torch.float64)
        # An Inf or NaN would poison the sum and single its unit out: the whole contribution counts as zero. So does one
        # so large that its clipping factor would be a subnormal fp32 number, which keeps too few bits for the bound.
        usable = torch.isfinite(norms) & (norms < self._run.max_grad_norm * 2.0**120)
        factors = torch.where(usable, (self._run.max_grad_norm / norms.clamp(min=1e-300)).clamp(max=1.0), 0.0)
        gradients.masked_fill_(~usable[:, None], 0.0)
        for start in range(0, units, _EXACT):
            part = slice(start, start + _EXACT)
            self._sum += (factors[part].float() @ gradients[part]).double()

    def contribution(self) -> torch.Tensor:
        """Hand over and clear the un-noised sum: for the rehearsal on synthetic inputs only. Shape [parameters]."""
        taken, self._sum = self._sum, torch.zeros_like(self._sum)
        return taken

    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Noise, reduce, scale and apply the sum; the same on every rank, whatever it accumulated."""
        distributed = dist.is_available() and dist.is_initialized()
        if not distributed or dist.get_rank() == 0:
            noise = torch.from_numpy(self._keys.normal(self._size) * self._run.noise_std)
            self._sum += noise.to(self._sum.device)
        if distributed:
            dist.all_reduce(self._sum)
        self._sum = (self._sum / self._grid).round_() * self._grid
        start = 0
        for p in self.params:
            part = self._sum[start : start + p.numel()]
            p.grad = (part / self._run.expected_batch_size).view_as(p).to(p.dtype)
            start += p.numel()
        self.original_optimizer.step()
        self.original_optimizer.zero_grad(set_to_none=True)
        self._sum = torch.zeros_like(self._sum)
