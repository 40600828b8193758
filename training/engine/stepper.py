"""Who takes the step: torch's optimizer here, DeepSpeed's engine in `zero`. One interface, so that there is one place
where gradients are clipped, summed and noised, whoever applies them.

What comes here is finished: noised, reduced, scaled, the same on every rank. Nothing here sees records, sums or keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from cluster.errors import PurserError, without_content


class Stepper(Protocol):
    """Applies finished private gradients to `parameters`.

    Attributes:
        parameters: those of the model that train, in order.
        optimizer: holds the learning rate and the state, over `parameters`, or over this rank's part of them.
        sharded: whether each rank has a part of its own of what `optimizer` holds.
        listens: whether it acts on what autograd puts on a parameter, so that nothing may ever be put there.
        facts: what a run that goes on must have in common with the one that wrote its checkpoint; field → value.
    """

    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    sharded: bool
    listens: bool
    facts: dict[str, Any]

    def step(self, gradients: Sequence[torch.Tensor]) -> None:
        """Take one step by `gradients`, of each parameter its own, in its shape and dtype; they may be written over."""

    def end(self) -> None:
        """Take off whatever was put on the model, without which the model may never be freed."""


Maker = Callable[[nn.Module, torch.optim.Optimizer], Stepper]


class TorchStepper:
    """torch's optimizer, on every rank the same."""

    sharded = listens = False

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = optimizer
        self.facts: dict[str, Any] = {"training.backend": "torch"}

    def step(self, gradients: Sequence[torch.Tensor]) -> None:
        """See `Stepper.step`."""
        for p, gradient in zip(self.parameters, gradients, strict=True):
            p.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def end(self) -> None:
        """See `Stepper.end`."""


def held(stepper: Stepper) -> list[torch.Tensor]:
    """What the optimizer writes to: the parameters themselves, or this rank's part of a copy of them in fp32."""
    return [tensor for group in stepper.optimizer.param_groups for tensor in group["params"]]


def check_hand_over(make: Maker, device: torch.device) -> None:
    """See on a throw-away model that what is handed over is what is applied: all of it, once, and nothing else.

    Two steps of plain SGD at a learning rate of 1 must subtract the two gradients, on every rank. All numbers are
    quarters, which bf16 and sums over ranks hold exactly, but for divisions by the number of ranks.

    Raises:
        PurserError: it is not; a library has changed, and training could be without noise.
    """
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).to(device)
    expected = [_quarters(p, 31, 0) for p in model.parameters()]
    with torch.no_grad():
        for p, value in zip(model.parameters(), expected, strict=True):
            p.copy_(value)
    why, stepper = "", None
    try:
        stepper = make(model, torch.optim.SGD(model.parameters(), lr=1.0))
        for turn in (1, 2):
            gradients = [_quarters(p, 13, turn) for p in stepper.parameters]
            expected = [value - gradient for value, gradient in zip(expected, gradients, strict=True)]
            stepper.step([g.to(p.dtype) for g, p in zip(gradients, stepper.parameters, strict=True)])
            for p, value in zip(stepper.parameters, expected, strict=True):
                if p.grad is not None or not torch.allclose(p.detach().float(), value, rtol=0, atol=1e-5):
                    why = f"not what was handed over was applied, in step {turn}"
    except PurserError:
        raise
    except Exception as error:  # noqa: BLE001 (whatever a library that has changed says)
        why = f"it failed with {without_content(error)}"
    finally:
        if stepper is not None:
            stepper.end()
    if why:
        raise PurserError(
            f"rehearsal: a gradient was handed over on a throw-away model, and {why}; install the versions of "
            "constraints.txt, or write training.backend: torch. Nothing was charged."
        )


def _quarters(like: torch.Tensor, modulus: int, turn: int) -> torch.Tensor:
    """Quarters from -modulus/8 to modulus/8 that differ from place to place, in the shape of `like`; fp32."""
    numbers = (7 * torch.arange(like.numel()) + 5 * turn) % modulus - modulus // 2
    return (numbers.float() / 4).view(like.shape).to(like.device)
