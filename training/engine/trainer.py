"""Own the loop: micro-batches without communication, one collective per logical step, exactly the planned steps.

Asks nobody for permission: the caller runs no more steps than were authorised. Knows no files and no Ray.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from cluster.errors import PurserError, UsageError
from training.engine.bookkeeping import BookKeepingHooks
from training.engine.contributions import Contribution, Units, clip_factors
from training.engine.layers import PerRecordHooks
from training.engine.objective import in_one_shape, record_losses
from training.engine.optimizer import PrivateOptimizer, is_distributed, ranks
from training.engine.run import DPSGDRun
from training.engine.sampling import MicroBatch, PoissonSampler, Shard, micro_batches, rows_of
from training.engine.stepper import Maker, TorchStepper, check_hand_over, held
from training.engine.validation import check_model, guard_rows

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

    Its ranks are those of the process group in which it is made; all of them must make it alike.

    Args:
        model: on the device where it is to train, trainable parameters in fp32.
        optimizer: what takes the steps.
        run: σ, C, q, T and B.
        clipping: "bookkeeping" (one backward pass, no gradient of a weight) or "hooks" (Opacus's own per-record
            gradients; also for tied weights). Both give the same result.
        precision: "fp32", or "bf16": forward and backward passes under autocast; sums and noise stay as they are.
        activation_checkpointing: recompute activations in the backward pass; for transformers models.
        stepper: makes what takes the steps: torch's optimizer, or `zero.Zero`, with which bf16 weights are bf16.

    Raises:
        UsageError: the model cannot be trained privately in this way, or not all ranks were given the same.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerChoice,
        run: DPSGDRun,
        clipping: str = "bookkeeping",
        precision: str = "fp32",
        activation_checkpointing: bool = False,
        stepper: Maker = TorchStepper,
    ) -> None:
        check_model(model, tied=clipping == "hooks")
        self.model = model
        self.run = run
        self.device = next(p for p in model.parameters() if p.requires_grad).device
        self.precision = precision
        if activation_checkpointing:
            checkpoint_activations(model, clipping)
        self._guards = guard_rows(model)
        hooks = PerRecordHooks if clipping == "hooks" else BookKeepingHooks
        self._hooks = hooks(model, run.max_records_per_unit)
        model.train()
        self.rows = rows_of(run, ranks())
        self._sampler: PoissonSampler | None = None
        self._shard: Shard | None = None
        if is_distributed():
            shapes = [(name, p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()]
            buffers = digests(model.named_buffers())
            how = (clipping, precision, activation_checkpointing, run.physical_batch_size, repr(stepper))
            check_same_on_all_ranks(repr((planned(run, optimizer), how, shapes, buffers)), self.device)
            for parameter in model.parameters():
                dist.broadcast(parameter.data, src=0)
        self._make_stepper = stepper
        self._stepper = stepper(model, make_optimizer(model, optimizer))
        if self._stepper.listens and clipping == "hooks":
            raise UsageError(
                "training.clipping: hooks lets autograd sum gradients on parameters, where training.backend: deepspeed "
                "would take them up before there is noise; write bookkeeping."
            )
        self._planned = planned(run, optimizer) | self._stepper.facts
        self._optimizer = PrivateOptimizer(self._stepper, run)
        self._schedule = LambdaLR(self._stepper.optimizer, lambda step: rate_at(step, run.steps, optimizer))
        self._fixed = fixed_state(model)

    def accumulate(self, batch: MicroBatch) -> None:
        """One forward and one backward pass over whole units, and their clipped contributions into the sum."""
        self._optimizer.accumulate(self._contributions(batch))

    def _contributions(self, batch: MicroBatch) -> Mapping[torch.Tensor, Contribution]:
        whole = self._whole(batch)
        with torch.autocast(self.device.type, enabled=False):  # whatever the caller has on: _loss has its own
            with self._hooks.one_pass(Units(batch.unit, batch.units), len(whole.labels)):
                self._loss(whole).backward()
            return self._hooks.contributions()

    def _whole(self, batch: MicroBatch) -> MicroBatch:
        """`batch` in the one shape that all have, on the device."""
        return in_one_shape(self.model, batch, self.rows).to(self.device)

    def _loss(self, batch: MicroBatch) -> torch.Tensor:
        """Summed over records, so that they never share a normaliser."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            losses = record_losses(self.model, batch)
        return losses.sum()

    def gradients(self, batch: MicroBatch) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, float]]:
        """For the rehearsal on synthetic inputs only: of each trainable parameter its name, the unclipped sum of what
        `batch` contributes, the gradient as autograd has it (shapes [numbers]), and the sum of the units' norms."""
        names = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        ours = self._contributions(batch)
        self._hooks.disable_hooks()
        with torch.autocast(self.device.type, enabled=False):
            theirs = torch.autograd.grad(self._loss(self._whole(batch)), [p for _, p in names], allow_unused=True)
        self._hooks.enable_hooks()
        ones = torch.ones(batch.units, device=self.device)
        for (name, p), true in zip(names, theirs, strict=True):
            total = torch.zeros(p.numel(), dtype=torch.float64, device=self.device)
            ours[p].add_to(total, ones, holes=False)
            sizes = ours[p].squared_norms().sqrt().sum().item()
            yield name, total, torch.zeros_like(total) if true is None else true.flatten(), sizes

    def last_numbers(self, most: int) -> int:
        """How many of the numbers that train, in whole tensors from the last on: as many as `most`, or one tensor."""
        sizes = [p.numel() for p in reversed(self._optimizer.params)]
        return max([total for total in itertools.accumulate(sizes) if total <= most], default=sizes[0])

    def along(self, batch: MicroBatch, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For an audit on canaries, which are nobody's: the length of what each unit of `batch` would contribute to a
        sum, clipped as there, and its direction's inner products with `vectors`.

        Args:
            vectors: fp32 [vectors, numbers], over `last_numbers`.

        Returns:
            Shapes [units] and [units, vectors], fp64, on the CPU. Of a unit that would contribute nothing, zeros.
        """
        parts, last = self._contributions(batch), vectors.shape[1]
        squares = torch.stack([parts[p].squared_norms() for p in self._optimizer.params]).sum(0)
        factors = clip_factors(squares, self.run.max_grad_norm).double()
        found = torch.zeros(batch.units, len(vectors), dtype=torch.float64, device=self.device)
        for p in reversed(self._optimizer.params):
            if last == 0:
                break
            found += parts[p].inner(vectors[:, last - p.numel() : last])
            last -= p.numel()
        sizes = squares.sqrt()
        some = (factors > 0) & (sizes > 0)
        lengths = torch.where(some, factors * sizes, 0.0)
        return lengths.cpu(), torch.where(some[:, None], found / sizes[:, None], 0.0).cpu()

    def steps(self, shard: Shard, count: int, told: Callable[[torch.Tensor], None] | None = None) -> None:
        """Run `count` logical steps on Poisson samples of `shard`, under keys of this trainer's own. A rank whose batch
        is empty takes part in each collective all the same.

        Args:
            told: see `PrivateOptimizer.step`; called in each step.

        Raises:
            PurserError: more steps than are planned; or an earlier step failed half-way, so that this trainer can take
                no other.
        """
        done = self._schedule.last_epoch
        if not 0 <= count <= self.run.steps - done:
            raise PurserError(f"training.steps: {count} more were asked for after {done} of {self.run.steps}.")
        if self._sampler is None or self._shard is not shard:
            self._sampler, self._shard = PoissonSampler(self.run, shard.units), shard
        try:
            for _ in range(count):
                for batch in micro_batches(shard, self._sampler.draw(), self.rows):
                    self.accumulate(batch)
                self._optimizer.step(told=told)
                self._schedule.step()
        except BaseException:
            self._optimizer.spoil()
            raise

    def contribution(self) -> torch.Tensor:
        """The un-noised sum so far, handed over and cleared: for the rehearsal on synthetic inputs only."""
        return self._optimizer.contribution()

    def check_hand_over(self) -> None:
        """See `stepper.check_hand_over`."""
        check_hand_over(self._make_stepper, self.device)

    def rehearse_step(self) -> None:
        """See `PrivateOptimizer.rehearse_step`."""
        self._optimizer.rehearse_step()

    def state_dict(self) -> dict[str, Any]:
        """Parameters that train, and optimizer state, all of it already noised; nothing about keys is in it (P10).

        What is frozen is not in it, but for its digests: of a large base with small adapters it is nearly everything.
        Where the optimizer is sharded, its state is in each rank's `shard_dict`.
        """
        return {
            "model": {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad},
            **({} if self._stepper.sharded else {"optimizer": self._optimizer.state_dict()}),
            "schedule": self._schedule.state_dict(),
            "fixed": self._fixed,
            "planned": self._planned,
        }

    def shard_dict(self) -> dict[str, Any]:
        """Where the optimizer is sharded, this rank's part of its state and of the parameters in fp32; else empty."""
        if not self._stepper.sharded:
            return {}
        parts = [tensor.detach() for tensor in held(self._stepper)]
        return {"optimizer": self._optimizer.state_dict(), "parts": parts}

    def load_state_dict(self, state: dict[str, Any], shard: dict[str, Any] | None = None) -> None:
        """Go on from `state`, under fresh keys.

        Args:
            shard: this rank's `shard_dict`, where the optimizer is sharded.

        Raises:
            UsageError: it is of a run with other numbers, which its optimizer would go on with.
            PurserError: it is of a model with other frozen tensors or buffers, or lacks this rank's shard.
        """
        began = state.get("planned", {})
        for field, value in self._planned.items():
            if began.get(field) != value:
                raise UsageError(
                    f"{field}: {value} was given, the checkpoint is of a run with {began.get(field, 'none')}; a run "
                    "goes on with the numbers that it began with, start a new one for others."
                )
        mine = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if mine.keys() != state["model"].keys() or state["fixed"] != self._fixed:
            raise PurserError(
                "model: its frozen weights, or which of them train, are not those that this run began with; put its "
                "base model back as it was, or start a new run."
            )
        if self._stepper.sharded and not shard:
            raise PurserError("checkpoint: this worker's part of the optimizer is not in it; start a new run.")
        with torch.no_grad():
            for name, p in mine.items():
                p.copy_(state["model"][name])
            for tensor, kept in zip(held(self._stepper), shard["parts"], strict=True) if shard else ():
                tensor.copy_(kept)
        self._optimizer.load_state_dict((shard or state)["optimizer"])
        self._schedule.load_state_dict(state["schedule"])

    def check_fixed(self) -> None:
        """See that buffers and frozen tensors are what they were at the run's start.

        Raises:
            PurserError: one of them is not: it may hold what no noise covers.
        """
        after = fixed_state(self.model)
        changed = sorted(name for name, _ in self._fixed.items() ^ after.items())
        if changed:
            raise PurserError(
                f"model: {changed[0]} is frozen or a buffer, and yet it changed in training; nothing is released."
            )

    def unhook(self) -> nn.Module:
        """Take Opacus's hooks off and return the plain model, for release; see `check_fixed`."""
        self._hooks.remove_hooks()
        self._stepper.end()
        for guard in self._guards:
            guard.remove()
        self.check_fixed()
        return self.model


def fixed_state(model: nn.Module) -> dict[str, str]:
    """SHA-256 of each buffer and frozen parameter, by name: public, and the same at release as at the start."""
    frozen = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
    return digests((*frozen, *model.named_buffers()))


def digests(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
    """SHA-256 of each tensor's content, by name."""
    found = {}
    for name, tensor in tensors:
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        found[name] = hashlib.sha256(content).hexdigest()
    return found


def planned(run: DPSGDRun, choice: OptimizerChoice) -> dict[str, Any]:
    """What a run that goes on from a checkpoint must have in common with the one that wrote it: field → value."""
    numbers = {
        f"training.{name}": value
        for name, value in dataclasses.asdict(run).items()
        if name not in ("physical_batch_size", "block")  # change memory and charging, never the result
    }
    names = ("name", "learning_rate", "momentum", "weight_decay", "schedule", "warmup")
    return numbers | {f"training.optimizer.{name}": getattr(choice, name) for name in names}


def check_same_on_all_ranks(facts: str, device: torch.device) -> None:
    """Compare `facts` with rank 0's; all ranks hear of it if one differs.

    Raises:
        UsageError: they differ: one rank would clip at another norm, or the ranks would train different models.
    """
    mine = torch.tensor(list(hashlib.sha256(facts.encode()).digest()), device=device)
    first = mine.clone()
    dist.broadcast(first, src=0)
    differ = (mine != first).any().to(torch.int64)
    dist.all_reduce(differ)
    if differ.item():
        raise UsageError(
            "training: not all ranks were given the same run, model and settings; start all of them from one job file."
        )


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
