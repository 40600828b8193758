"""Own the loop: micro-batches without communication, one collective per logical step, exactly the planned steps.

Asks nobody for permission: the caller runs no more steps than were authorised. Knows no files and no Ray.
"""

from __future__ import annotations

import warnings
from typing import Any, Protocol

import torch
import torch.distributed as dist
from opacus.grad_sample import GradSampleHooks
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from training.engine.optimizer import PrivateOptimizer
from training.engine.run import DPSGDRun
from training.engine.sampling import MicroBatch, PoissonSampler, Shard, micro_batches
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
        """constant, or linear: down to 0 at the last planned step, so that the last steps' noise counts least."""


def make_optimizer(model: nn.Module, choice: OptimizerChoice) -> torch.optim.Optimizer:
    """The torch optimizer over the trainable parameters of `model`."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if choice.name == "adam":
        return torch.optim.AdamW(parameters, lr=choice.learning_rate, weight_decay=choice.weight_decay)
    return torch.optim.SGD(
        parameters, lr=choice.learning_rate, momentum=choice.momentum, weight_decay=choice.weight_decay
    )


class PrivateTrainer:
    """DP-SGD of one model on one rank's shard, joined with the other ranks by torch.distributed if it is initialised.

    The model is checked and hooked on construction, and every rank starts from rank 0's parameters.
    """

    def __init__(self, model: nn.Module, optimizer: OptimizerChoice, run: DPSGDRun) -> None:
        check_model(model)
        self.model = model
        self.run = run
        self._hooks = GradSampleHooks(model, loss_reduction="sum")
        inner = make_optimizer(model, optimizer)
        self._optimizer = PrivateOptimizer(inner, run)
        falls = optimizer.schedule == "linear"
        self._schedule = LambdaLR(inner, lambda step: 1 - step / run.steps if falls else 1.0)
        model.train()
        if dist.is_available() and dist.is_initialized():
            for parameter in model.parameters():
                dist.broadcast(parameter.data, src=0)

    def accumulate(self, batch: MicroBatch) -> None:
        """One backward pass: per-record cross-entropy, summed, so that records never share a normaliser."""
        loss = nn.functional.cross_entropy(self.model(batch.features), batch.labels, reduction="sum")
        loss.backward()
        self._optimizer.accumulate(batch.unit, batch.units)

    def steps(self, shard: Shard, sampler: PoissonSampler, count: int) -> None:
        """Run `count` logical steps. A rank whose batch is empty takes part in each collective all the same."""
        for _ in range(count):
            for batch in micro_batches(shard, sampler.draw(), self.run.physical_batch_size):
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
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`, under fresh keys."""
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])

    def unhook(self) -> nn.Module:
        """Take Opacus's hooks off and return the plain model."""
        self._hooks.remove_hooks()
        return self.model
