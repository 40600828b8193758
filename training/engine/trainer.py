"""Own the loop: micro-batches without communication, one collective per logical step, exactly the planned steps.

Asks nobody for permission: the caller runs no more steps than were authorised. Knows no files and no Ray.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from cluster.errors import PurserError, UsageError
from training.engine.bookkeeping import BookKeepingHooks
from training.engine.contributions import Contribution, Units
from training.engine.layers import PerRecordHooks
from training.engine.objective import causal, record_losses
from training.engine.optimizer import PrivateOptimizer
from training.engine.run import DPSGDRun
from training.engine.sampling import MicroBatch, PoissonSampler, Shard, micro_batches, rows_of
from training.engine.validation import check_model

# Inputs need no gradients here; Opacus's hooks are right in that case.
warnings.filterwarnings("ignore", message="Full backward hook is firing")


class OptimizerChoice(Protocol):
    """What the job says of the optimizer. Public numbers."""

    @property
    def name(self) -> str:
        """sgd or adam."""

    @property
    def learning_rate(self) -> float:
        """Step size."""

    @property
    def momentum(self) -> float:
        """For sgd."""

    @property
    def weight_decay(self) -> float:
        """L2 (sgd) or decoupled (adam)."""

    @property
    def schedule(self) -> str:
        """constant; linear or cosine down to 0 at the last planned step, so that the last steps' noise counts least."""

    @property
    def warmup(self) -> int:
        """In so many first steps the learning rate rises linearly."""


def make_optimizer(model: nn.Module, choice: OptimizerChoice) -> torch.optim.Optimizer:
    """The torch optimizer over the trainable parameters of `model`."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if choice.name == "adam":
        return torch.optim.AdamW(parameters, lr=choice.learning_rate, weight_decay=choice.weight_decay)
    return torch.optim.SGD(
        parameters, lr=choice.learning_rate, momentum=choice.momentum, weight_decay=choice.weight_decay
    )


def rate_at(step: int, steps: int, choice: OptimizerChoice) -> float:
    """The learning rate at `step` (from 0) of `steps`, over choice.learning_rate."""
    if step < choice.warmup:
        return (step + 1) / (choice.warmup + 1)
    done = (step - choice.warmup) / max(1, steps - choice.warmup)
    if choice.schedule == "linear":
        return 1 - done
    return 0.5 * (1 + math.cos(math.pi * done)) if choice.schedule == "cosine" else 1.0


class PrivateTrainer:
    """DP-SGD of one model on one rank's shard, joined with the other ranks by torch.distributed if it is initialised.

    The model is checked and hooked on construction, and every rank starts from rank 0's parameters.

    Args:
        model: on the device where it is to train, trainable parameters in fp32.
        optimizer: what takes the steps.
        run: σ, C, q, T and B.
        clipping: "bookkeeping" (one backward pass, no gradient of a weight) or "hooks" (Opacus's own per-record
            gradients; also for tied weights). Both give the same result.
        precision: "fp32", or "bf16": forward and backward passes under autocast; sums and noise stay as they are.
        activation_checkpointing: recompute activations in the backward pass; for transformers models.

    Raises:
        UsageError: the model cannot be trained privately in this way.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerChoice,
        run: DPSGDRun,
        clipping: str = "bookkeeping",
        precision: str = "fp32",
        activation_checkpointing: bool = False,
    ) -> None:
        check_model(model, tied=clipping == "hooks")
        self.model = model
        self.run = run
        self.device = next(p for p in model.parameters() if p.requires_grad).device
        self.precision = precision
        if activation_checkpointing:
            checkpoint_activations(model, clipping)
        self._hooks = PerRecordHooks(model) if clipping == "hooks" else BookKeepingHooks(model)
        inner = make_optimizer(model, optimizer)
        self._optimizer = PrivateOptimizer(inner, run)
        self._schedule = LambdaLR(inner, lambda step: rate_at(step, run.steps, optimizer))
        model.train()
        self.rows = rows_of(run, 1)
        if dist.is_available() and dist.is_initialized():
            self.rows = rows_of(run, dist.get_world_size())
            for parameter in model.parameters():
                dist.broadcast(parameter.data, src=0)
        self._fixed = fixed_state(model)

    def accumulate(self, batch: MicroBatch) -> None:
        """One forward and one backward pass over whole units, and their clipped contributions into the sum."""
        self._optimizer.accumulate(self._contributions(batch))

    def _contributions(self, batch: MicroBatch) -> Mapping[torch.Tensor, Contribution]:
        whole = self._whole(batch)
        with self._hooks.one_pass(Units(batch.unit, batch.units), len(whole.labels)):
            self._loss(whole).backward()
        return self._hooks.contributions()

    def _whole(self, batch: MicroBatch) -> MicroBatch:
        """`batch` in the one shape that all have, on the device. With a mask there is a row of padding in any case."""
        return batch.padded(self.rows + (batch.mask is not None and not causal(self.model))).to(self.device)

    def _loss(self, batch: MicroBatch) -> torch.Tensor:
        """Summed over records, so that they never share a normaliser."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            losses = record_losses(self.model, batch)
        return losses.sum()

    def gradients(self, batch: MicroBatch) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """For the rehearsal on synthetic inputs only: of each trainable parameter its name, the unclipped sum of what
        `batch` contributes, and the gradient as autograd has it. Shapes [numbers]."""
        names = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        ours = self._contributions(batch)
        self._hooks.disable_hooks()
        theirs = torch.autograd.grad(self._loss(self._whole(batch)), [p for _, p in names], allow_unused=True)
        self._hooks.enable_hooks()
        ones = torch.ones(batch.units, device=self.device)
        for (name, p), true in zip(names, theirs, strict=True):
            total = torch.zeros(p.numel(), device=self.device)
            ours[p].add_to(total, ones, slice(0, batch.units), holes=False)
            yield name, total, torch.zeros_like(total) if true is None else true.flatten()

    def steps(self, shard: Shard, sampler: PoissonSampler, count: int) -> None:
        """Run `count` logical steps. A rank whose batch is empty takes part in each collective all the same."""
        for _ in range(count):
            for batch in micro_batches(shard, sampler.draw(), self.rows):
                self.accumulate(batch)
            self._optimizer.step()
            self._schedule.step()

    def contribution(self) -> torch.Tensor:
        """The un-noised sum so far, handed over and cleared: for the rehearsal on synthetic inputs only."""
        return self._optimizer.contribution()

    def state_dict(self) -> dict[str, Any]:
        """Parameters and optimizer state, all of it already noised; nothing about keys is in it (P10)."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "fixed": self._fixed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`, under fresh keys."""
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self._fixed = state["fixed"]
        self.check_fixed()

    def check_fixed(self) -> None:
        """See that buffers and frozen tensors are what they were at the run's start.

        Raises:
            PurserError: one of them is not: it may hold what no noise covers.
        """
        after = fixed_state(self.model)
        for name, digest in self._fixed.items():
            if after[name] != digest:
                raise PurserError(f"model: {name} is frozen, and yet it changed in training; nothing is released.")

    def unhook(self) -> nn.Module:
        """Take Opacus's hooks off and return the plain model, for release; see `check_fixed`."""
        self._hooks.remove_hooks()
        self.check_fixed()
        return self.model


def fixed_state(model: nn.Module) -> dict[str, str]:
    """SHA-256 of each buffer and frozen parameter, by name: public, and the same at release as at the start."""
    fixed = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
    digests = {}
    for name, tensor in (*fixed, *model.named_buffers()):
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        digests[name] = hashlib.sha256(content).hexdigest()
    return digests


def checkpoint_activations(model: nn.Module, clipping: str) -> None:
    """Turn on what transformers models bring.

    Raises:
        UsageError: another model, or hooks, which would count every record twice.
    """
    if clipping == "hooks":
        raise UsageError(
            "training.activation_checkpointing: it was asked for with training.clipping: hooks, which would see every "
            "layer twice; use bookkeeping."
        )
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise UsageError(
            f"training.activation_checkpointing: {type(model).__name__} brings none; leave it off, or use a "
            "transformers model."
        )
    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
