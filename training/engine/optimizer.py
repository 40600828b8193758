"""Clip, sum, noise, reduce, step: Opacus's DPOptimizer with the parts replaced that its hazards call for.

Units are clipped in fp32 and summed in fp64: in fp32, one unit more may move a sum of a million units by 2 % more than
C. A logical step ends in one all-reduce, to which rank 0 has added noise. The sums and everything before the noise are
private (P13): nothing here may return, print or store them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from opacus.optimizers import DPOptimizer
from torch import nn

from cluster.errors import PurserError
from training.engine.contributions import Contribution, clip_factors
from training.engine.randomness import Keystream
from training.engine.run import DPSGDRun
from training.engine.stepper import Stepper, held

# The released sum lies on multiples of a public power of two, about σC·2^-18: the low bits of floating-point noise,
# by which sums can be told apart (Mironov 2012), are not released.
GRID_BITS = 18
NOISE_AT_ONCE = 1 << 24  # numbers, 128 MiB: all at once they would take the memory of the sum again


def is_distributed() -> bool:
    """Whether torch.distributed is initialised."""
    return dist.is_available() and dist.is_initialized()


def process_group() -> object:
    """The default process group, by identity; None where there is none."""
    return dist.group.WORLD if is_distributed() else None


def ranks() -> int:
    """How many ranks take part."""
    return dist.get_world_size() if is_distributed() else 1


def most_units(run: DPSGDRun) -> float:
    """As many as will ever join a batch: more do with a probability below e^-80 (Chernoff)."""
    return run.expected_batch_size + 12 * math.sqrt(run.expected_batch_size) + 60


def carrier_of(run: DPSGDRun, ranks: int, size: int) -> torch.dtype:
    """In which precision the sums of `ranks` ranks, each of `size` numbers, are added up: fp32 where that keeps one
    unit's part within 2^-12 + 2^-13 of C, else fp64.

    W roundings of un-noised sums, of at most n·C for n units, lose at most 2^-24 of them each, and between two
    neighbours twice that. And what is added to rank 0's sum afterwards can show in units of the noise's last place
    only: 2^-23·σC·√size in length, W − 1 times.
    """
    sums = 2 * ranks * 2.0**-24 * most_units(run)
    noise = (ranks - 1) * 2.0**-23 * run.noise_multiplier * math.sqrt(size)
    return torch.float32 if sums <= 2.0**-12 and noise <= 2.0**-13 else torch.float64


def grid_of(run: DPSGDRun, rounded: bool) -> float:
    """The public power of two on whose multiples the released sum lies.

    Args:
        rounded: whether the ranks' sums were rounded to fp32 before they were added up. A large one then lies on a
            lattice coarser than σC·2^-18, and what another rank adds would show through it: the grid is as coarse as
            the largest sum's, for as many units as will ever join and noise of up to 9σC.
    """
    exponent = math.floor(math.log2(run.noise_std)) - GRID_BITS
    if rounded:
        largest = most_units(run) * run.max_grad_norm + 9 * run.noise_std
        exponent = max(exponent, math.floor(math.log2(largest)) - 23)
    return float(2.0**exponent)


def check_products() -> None:
    """See that matrix products of fp32 numbers are fp32 numbers.

    Raises:
        PurserError: torch, or the driver, was told to take them in less.
    """
    try:
        whole = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set by torch.backends.*.fp32_precision, of which it will not speak
        whole = False
    if not whole or os.environ.get("NVIDIA_TF32_OVERRIDE", "0") != "0":
        raise PurserError(
            "torch: float32 matrix products are set to a lower precision, in which a unit's norm could come out too "
            "small; leave torch.set_float32_matmul_precision at highest, and torch.backends.*.fp32_precision and "
            "NVIDIA_TF32_OVERRIDE alone. training.precision: bf16 is safe."
        )


class PrivateOptimizer(DPOptimizer):
    """`torch.optim.Optimizer` over finished private gradients.

    Args:
        stepper: what takes the step; its parameters must be hooked by Opacus's GradSampleHooks with
            loss_reduction="sum".
        run: σ, C and B; there is no other place they could be set.

    Guarantees, for one logical step: one unit moves the sum by at most C in L2, whatever its companions (non-finite
    contributions count as zero); the sum over all ranks carries one noise of run.noise_std per coordinate; every rank
    takes the same step; what is divided by is the declared B.
    """

    def __init__(self, stepper: Stepper, run: DPSGDRun) -> None:
        self._run = run
        self._stepper = stepper
        super().__init__(
            stepper.optimizer,
            noise_multiplier=run.noise_multiplier,
            max_grad_norm=run.max_grad_norm,
            expected_batch_size=run.expected_batch_size,
            loss_reduction="sum",
        )
        self._size = sum(p.numel() for p in self.params)
        self._sum = torch.zeros(self._size, dtype=torch.float64, device=self.params[0].device)
        self._whole = True  # whether all that was begun was also finished
        self._keys = Keystream()
        self._group = process_group()
        self._carrier = carrier_of(run, ranks(), self._size)
        self._grid = grid_of(run, ranks() > 1 and self._carrier == torch.float32)

    @property
    def params(self) -> list[nn.Parameter]:
        """Those of the model that train; what the stepper's own optimizer holds may be a part of a copy of them."""
        return self._stepper.parameters

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
            PurserError: torch is set to multiply fp32 matrices in less, or something failed half-way before.
        """
        self._check_whole()
        check_products()
        with torch.autocast(self._sum.device.type, enabled=False):  # whatever the caller has on: norms are fp32
            parts = [contributions[p] for p in self.params]
            squared_norms = torch.stack([part.squared_norms() for part in parts]).sum(0)
            factors = clip_factors(squared_norms, self._run.max_grad_norm)
            if len(factors) > self._run.physical_batch_size:
                raise PurserError(
                    "training.physical_batch_size: a micro-batch has more units than may go through at once."
                )
            holes = bool((factors == 0).any())
            self._whole = False
            spread, start = self._run.expected_batch_size * math.sqrt(self._run.physical_batch_size), 0
            for p, part in zip(self.params, parts, strict=True):
                part.add_to(self._sum[start : start + p.numel()], factors, holes, spread)
                start += p.numel()
            self._whole = True

    def spoil(self) -> None:
        """A logical step failed half-way: units may be in the sum already, and must not be added again."""
        self._whole = False

    def _check_whole(self) -> None:
        if not self._whole:
            raise PurserError(
                "training: a step was made in part only (out of memory?); start again, with a smaller "
                "training.physical_batch_size if memory is short. What was authorised is spent."
            )

    def contribution(self) -> torch.Tensor:
        """Hand over and clear the un-noised sum: for the rehearsal on synthetic inputs only. Shape [parameters]."""
        self._check_whole()
        taken, self._sum = self._sum, torch.zeros_like(self._sum)
        return taken

    def step(
        self, closure: Callable[[], float] | None = None, told: Callable[[torch.Tensor], None] | None = None
    ) -> None:
        """Noise, reduce, scale and apply the sum; the same on every rank, whatever it accumulated.

        Args:
            told: is shown what is applied, fp64 [parameters], for as long as it is called: it is noised, and released.

        Raises:
            PurserError: another rank ended or kept silent for longer than the process group's timeout, the process
                group is not the one that the optimizer was made in, or a parameter holds a gradient already, which no
                noise covers.
        """
        self._check_whole()
        self._whole = False
        if process_group() is not self._group:
            raise PurserError(
                "training: the process group changed after the trainer was made, so that the ranks would no longer add "
                "up to one step; make the trainer after init_process_group, and end it before the group."
            )
        if any(p.grad is not None for p in self.params):
            raise PurserError(
                "training: a parameter holds a gradient that no noise covers, and it would be applied; call no "
                "backward pass but the trainer's. What was authorised is spent."
            )
        distributed = is_distributed()
        if not distributed or dist.get_rank() == 0:
            for some in self._sum.split(NOISE_AT_ONCE):
                noise = torch.from_numpy(self._keys.normal(len(some)))
                some.add_(noise.to(some.device), alpha=self._run.noise_std)
        if distributed:
            self._reduce()
        self._sum.div_(self._grid).round_().mul_(self._grid / self._run.expected_batch_size)
        if told is not None:
            told(self._sum)
        parts = self._sum.split([p.numel() for p in self.params])
        self._stepper.step([part.view_as(p).to(p.dtype) for part, p in zip(parts, self.params, strict=True)])
        self._sum.zero_()
        self._whole = True

    def rehearse_step(self) -> None:
        """Take a step of whatever was accumulated, and undo it: there was memory for noise, collective and optimizer.
        For the rehearsal on synthetic inputs only.

        Raises:
            PurserError: steps were taken before, whose momentum it would forget.
        """
        if self.original_optimizer.state:
            raise PurserError("rehearsal: it comes before the first step, and before a checkpoint is loaded.")
        written = {id(tensor): tensor for tensor in (*self.params, *held(self._stepper))}.values()
        before = [tensor.detach().clone() for tensor in written]
        self.step()
        with torch.no_grad():
            for tensor, old in zip(written, before, strict=True):
                tensor.copy_(old)
        self.original_optimizer.state.clear()

    def _reduce(self) -> None:
        """Make the sum that over all ranks, by the step's one collective."""
        shared = self._sum.to(self._carrier)
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
        self._sum.copy_(shared)
