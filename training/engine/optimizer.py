"""Clip, sum, noise, reduce, step: Opacus's DPOptimizer with the parts replaced that its hazards call for.

Units are clipped and summed in fp32, and every few micro-batches the sum goes to an fp64 one: in fp32, one unit more
may move a sum of a million units by 2 % more than C. A logical step ends in one all-reduce, to which rank 0 has added
noise. The sums and everything before the noise are private (P13): nothing here may return, print or store them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from opacus.optimizers import DPOptimizer

from cluster.errors import PurserError
from training.engine.contributions import Contribution, clip_factors
from training.engine.randomness import Keystream
from training.engine.run import DPSGDRun

# The released sum lies on multiples of a public power of two, about σC·2^-18: the low bits of floating-point noise,
# by which sums can be told apart (Mironov 2012), are not released.
GRID_BITS = 18
# The most that units × additions may become in the fp32 sum before it goes to the fp64 one, with batches of up to 2^14
# units; less for larger ones: a sum that goes over in many parts is rounded anew in each when one unit more is in it.
SPAN, SPANNED = 1024, 2**24
# The collective carries fp32 while expected_batch_size × ranks is at most this, and fp64 above. Taking un-noised sums
# to fp32 and adding W of them up rounds W times, each by at most 2^-24 of a sum of at most n·max_grad_norm. Where n,
# what joined, is up to twice what was expected, that is 2·W·2^-24·2·B ≤ 2^-12 of max_grad_norm for two neighbours.
FP32_SUMS = 1024


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
        self._recent = torch.zeros(self._size, device=self._sum.device)
        self._span = max(1, min(SPAN, SPANNED // run.expected_batch_size))
        self._additions = self._units = 0
        self._whole = True  # whether the last micro-batch was added in all of its parts
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

    def accumulate(self, contributions: Mapping[torch.Tensor, Contribution]) -> None:
        """Clip each unit of one micro-batch as a whole and add it to the sum.

        Args:
            contributions: one for every trainable parameter, over the same units.

        Raises:
            PurserError: torch is set to multiply fp32 matrices in less, or an earlier micro-batch failed half-way.
        """
        self._check_whole()
        if torch.get_float32_matmul_precision() != "highest":
            raise PurserError(
                "torch: float32 matrix products are set to a lower precision, in which a unit's norm could come out "
                "too small; leave torch.set_float32_matmul_precision at highest. training.precision: bf16 is safe."
            )
        parts = [contributions[p] for p in self.params]
        factors = clip_factors(torch.stack([part.squared_norms() for part in parts]).sum(0), self._run.max_grad_norm)
        holes = bool((factors == 0).any())
        self._whole = False
        for first in range(0, len(factors), self._span):
            some = slice(first, min(first + self._span, len(factors)))
            self._make_room(some.stop - some.start)
            start = 0
            for p, part in zip(self.params, parts, strict=True):
                part.add_to(self._recent[start : start + p.numel()], factors, some, holes)
                start += p.numel()
        self._whole = True

    def _make_room(self, units: int) -> None:
        """Before `units` more go to the fp32 sum: empty it into the fp64 one where it would become inexact."""
        self._additions += 1
        self._units += units
        if self._additions * self._units > self._span:
            self._flush()
            self._additions, self._units = 1, units

    def _check_whole(self) -> None:
        if not self._whole:
            raise PurserError(
                "training: a micro-batch was added in part only (out of memory?); start again with a smaller "
                "training.physical_batch_size. What was authorised is spent."
            )

    def _flush(self) -> None:
        self._sum += self._recent
        self._recent.zero_()
        self._additions = self._units = 0

    def contribution(self) -> torch.Tensor:
        """Hand over and clear the un-noised sum: for the rehearsal on synthetic inputs only. Shape [parameters]."""
        self._check_whole()
        self._flush()
        taken, self._sum = self._sum, torch.zeros_like(self._sum)
        return taken

    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Noise, reduce, scale and apply the sum; the same on every rank, whatever it accumulated.

        Raises:
            PurserError: another rank ended or kept silent for longer than the process group's timeout.
        """
        self._check_whole()
        self._flush()
        distributed = dist.is_available() and dist.is_initialized()
        if not distributed or dist.get_rank() == 0:
            noise = torch.from_numpy(self._keys.normal(self._size))
            self._sum.add_(noise.to(self._sum.device), alpha=self._run.noise_std)
        if distributed:
            self._sum = self._reduced()
        self._sum.div_(self._grid).round_().mul_(self._grid / self._run.expected_batch_size)
        start = 0
        for p in self.params:
            p.grad = self._sum[start : start + p.numel()].view_as(p).to(p.dtype)
            start += p.numel()
        self.original_optimizer.step()
        self.original_optimizer.zero_grad(set_to_none=True)
        self._sum.zero_()

    def _reduced(self) -> torch.Tensor:
        """The sum over all ranks, by the step's one collective."""
        exact = self._run.expected_batch_size * dist.get_world_size() > FP32_SUMS
        shared = self._sum if exact else self._sum.float()
        failed = False
        try:
            dist.all_reduce(shared)
        except RuntimeError:
            failed = True
        if failed:  # raised out here: the library's message names hosts and ports
            raise PurserError(
                "training: another worker ended, or was silent for too long, in the middle of a step; what was "
                "authorised is spent. Its own log tells why; purser train --resume goes on from the last block."
            )
        return shared.double()
