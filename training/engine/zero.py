"""DeepSpeed's engine as a stepper: the optimizer's states, and in stage 2 the finished gradient, sharded over ranks.

The gradient goes in by DeepSpeed's own `coalesce_grad_reduction` and no method of it is replaced: a patch that fits no
longer would train without noise, and say nothing. Every rank hands over the same finished gradient, whose mean is
itself. DeepSpeed's hooks fire where autograd puts a gradient on a parameter, so none may ever be there: un-noised, it
would be reduced as well.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from cluster.errors import PurserError
from training.engine.optimizer import is_distributed, ranks

_KERNEL = "deepspeed_shm_comm"


@dataclass(frozen=True)
class Zero:
    """Makes steppers with one configuration, see `zero_config.configuration`."""

    config: Mapping[str, Any]

    def __call__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> ZeroStepper:
        """See `ZeroStepper`."""
        return ZeroStepper(model, optimizer, self.config)


class ZeroStepper:
    """See `stepper.Stepper`.

    Args:
        model: on its device. With bf16 its floating-point parameters are bf16 from here on, frozen ones as well.
        optimizer: torch's, over those of its parameters that train; becomes this rank's part.

    Raises:
        PurserError: no process group, another accelerator than the model's, or DeepSpeed made something else of the
            configuration.
    """

    sharded = listens = True

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, config: Mapping[str, Any]) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = optimizer
        stage, bf16 = config["zero_optimization"]["stage"], config["bf16"]["enabled"]
        self.facts: dict[str, Any] = {
            "training.backend": "deepspeed",
            "training.zero_stage": stage,
            "training.precision": "bf16" if bf16 else "fp32",
            "training.workers": ranks(),
        }
        self._engine = _engine(model, optimizer, config)
        check_engine(self._engine, config)
        self._stage = stage
        self._as_before_any_step()

    def _as_before_any_step(self) -> None:
        """In bf16 without shards DeepSpeed takes a first step by zeros: Adam's count is one ahead, decay has begun."""
        self.optimizer.state.clear()
        if self._stage == 0:
            with torch.no_grad():
                for copy, p in zip(self.optimizer.param_groups[0]["params"], self.parameters, strict=True):
                    if copy is not p:
                        copy.copy_(p)

    def step(self, gradients: Sequence[torch.Tensor]) -> None:
        """See `Stepper.step`.

        Raises:
            PurserError: DeepSpeed says that it took none.
        """
        with self._engine.coalesce_grad_reduction() if self._stage else contextlib.nullcontext():
            for p, gradient in zip(self.parameters, gradients, strict=True):
                p.grad = gradient
        self._engine.step()
        if not self._engine.was_step_applied():
            raise PurserError("training: DeepSpeed skipped a step that was charged; what was authorised is spent.")

    def end(self) -> None:
        """See `Stepper.end`."""
        for handle in (self._engine.module_forward_pre_hook, self._engine.module_forward_post_hook):
            handle.remove()
        self._engine.destroy()


def check_engine(engine: Any, config: Mapping[str, Any]) -> None:
    """See that the engine does what the configuration says, by what it says of itself.

    Raises:
        PurserError: something else; or it has no word for it.
    """
    bf16, stage = config["bf16"]["enabled"], config["zero_optimization"]["stage"]
    wrapper = {True: "DeepSpeedZeroOptimizer", False: "FP16_UnfusedOptimizer" if bf16 else None}[stage > 0]
    expected = {
        "zero_optimization_stage": stage,
        "gradient_clipping": 0.0,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": True,
        "fp16_enabled": False,
        "bfloat16_enabled": bf16,
        "postscale_gradients": True,
        "gradient_predivide_factor": 1.0,
        "gradient_average": True,
        "communication_data_type": torch.float32,
        "has_moe_layers": False,
        "pipeline_parallelism": False,
        "zero_overlap_comm": False,
        "world_size": ranks(),
        "dp_world_size": ranks(),
    }
    for name, value in expected.items():
        said = getattr(engine, name, None)
        said = said() if callable(said) else said
        if said != value:
            raise PurserError(
                f"training.deepspeed: DeepSpeed says that {name} is {said}, and it must be {value}; install the "
                "version of constraints.txt, or write training.backend: torch. Nothing was charged."
            )
    made = type(engine.optimizer).__name__
    if (wrapper or type(engine.basic_optimizer).__name__) != made:
        raise PurserError(
            f"training.deepspeed: steps would be taken by {made}, which was not checked; install the version of "
            "constraints.txt, or write training.backend: torch. Nothing was charged."
        )


def _engine(model: nn.Module, optimizer: torch.optim.Optimizer, config: Mapping[str, Any]) -> Any:
    if not is_distributed():
        raise PurserError("training.backend: deepspeed needs torch.distributed; initialise it first.")
    device = next(p for p in model.parameters() if p.requires_grad).device
    # Else a machine that has a GPU would train there, whatever the job says.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it writes to stdout, which is the result's
    with contextlib.redirect_stdout(None):
        import deepspeed
        from deepspeed.ops import __compatible_ops__ as kernels

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if (said := deepspeed.get_accelerator().device_name()) != device.type:
        raise PurserError(f"training.device: DeepSpeed is on {said} in this process, and the model on {device.type}.")
    # A kernel for reductions in inference, which each new machine with CPUs would compile first: a minute.
    kernels[_KERNEL] = False
    with _local_rank(device), contextlib.redirect_stdout(None):
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=dict(config))
    return engine


@contextlib.contextmanager
def _local_rank(device: torch.device) -> Iterator[None]:
    """DeepSpeed takes the GPU of this number, and Ray Train counts another way where workers see one GPU each."""
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    try:
        yield
    finally:
        if before is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = before


@contextlib.contextmanager
def group_of_one(device: torch.device) -> Iterator[None]:
    """A process group of this process alone, for a rehearsal without workers."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
