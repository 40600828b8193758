"""Per-record gradients of layers: Opacus's, and those that it lacks or has otherwise than torch.

Nothing is registered with Opacus itself: who uses it in the same process finds it as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from opacus.grad_sample import GradSampleHooks
from opacus.grad_sample.embedding import compute_embedding_grad_sample
from torch import nn

from cluster.errors import PurserError
from training.engine.contributions import Contribution, PerUnit, Units
from training.engine.validation import RMS_NORMS, full_name

Sampler = Callable[[Any, Sequence[torch.Tensor], torch.Tensor], dict[torch.Tensor, torch.Tensor]]


class PerRecordHooks(GradSampleHooks):
    """Opacus's hooks, for the layers that validation allows.

    Args:
        most: how many records one unit may have.
    """

    def __init__(self, model: nn.Module, most: int = 1) -> None:
        self._most = most
        ours = {type(m): _rms_norm for m in model.modules() if full_name(m) in RMS_NORMS}
        self.GRAD_SAMPLERS: dict[type[nn.Module], Sampler] = {
            **GradSampleHooks.GRAD_SAMPLERS,
            **ours,
            nn.Embedding: _embedding,
        }
        self._trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._layers = [m for m in model.modules() if any(p.requires_grad for p in m.parameters(recurse=False))]
        super().__init__(model, loss_reduction="sum", strict=False)

    @contextmanager
    def one_pass(self, units: Units, rows: int) -> Iterator[None]:
        """One forward and backward pass over `rows` rows, the first of which are the records of `units`; where it
        fails, nothing of it is left."""
        self.forget()
        self._units, self._rows = units, rows
        try:
            yield
        except BaseException:
            self.forget()
            raise

    def contributions(self) -> dict[torch.Tensor, Contribution]:
        """What each unit contributed in the last pass to each trainable parameter; handed over.

        Raises:
            PurserError: a parameter took no part.
        """
        found = self._collected()
        self.forget()
        for name, p in self._trainable.items():
            if p not in found:
                raise PurserError(
                    f"model: {name} got no per-record gradient; every parameter that trains must be used in each "
                    "forward pass, inside a layer that Opacus hooks. Freeze it otherwise."
                )
        return found

    def _collected(self) -> dict[torch.Tensor, Contribution]:
        found: dict[torch.Tensor, Contribution] = {}
        records = len(self._units.of_record)
        for p in self._trainable.values():
            sample = p.grad_sample  # type: ignore[attr-defined]
            if isinstance(sample, torch.Tensor) and len(sample) >= records:
                found[p] = PerUnit(self._units.sums(sample[:records]))
        return found

    def forget(self) -> None:
        """Drop what a pass has left: it was computed from records."""
        self._units, self._rows = Units(torch.zeros(0, dtype=torch.long), 0), 0
        for layer in self._layers:
            for left in ("activations", "max_batch_len"):
                vars(layer).pop(left, None)
        for p in self._trainable.values():
            vars(p).pop("_current_grad_sample", None)
            p.grad_sample, p._forward_counter, p.grad = None, 0, None  # type: ignore[attr-defined]


def without_padding(layer: nn.Embedding, entries: torch.Tensor, backprops: torch.Tensor) -> torch.Tensor:
    """`backprops` [..., width] with zeros where `entries` [...] is padding, whose row torch leaves as it is."""
    if layer.padding_idx is None:
        return backprops
    return backprops.masked_fill((entries == layer.padding_idx)[..., None], 0.0)


def _embedding(
    layer: nn.Embedding, activations: Sequence[torch.Tensor], backprops: torch.Tensor
) -> dict[torch.Tensor, torch.Tensor]:
    found: dict[torch.Tensor, torch.Tensor] = compute_embedding_grad_sample(
        layer, activations, without_padding(layer, activations[0], backprops)
    )
    return found


def _rms_norm(
    layer: Any, activations: Sequence[torch.Tensor], backprops: torch.Tensor
) -> dict[torch.Tensor, torch.Tensor]:
    """Per-record gradients of y = weight · x/√(mean x² + ε): Σ_t backprops_t · x_t/√(mean x_t² + ε)."""
    x, width = activations[0].float(), layer.weight.numel()
    scale = torch.rsqrt(torch.linalg.vector_norm(x, dim=-1).square() / width + layer.variance_epsilon)
    product = (x * backprops.float()).reshape(len(x), -1, width)
    return {layer.weight: torch.bmm(scale.reshape(len(x), 1, -1), product)[:, 0]}
