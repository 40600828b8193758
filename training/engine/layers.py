"""Per-record gradients of layers: Opacus's, and those that it lacks or has otherwise than torch.

Nothing is registered with Opacus itself: who uses it in the same process finds it as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from opacus.grad_sample import GradSampleHooks
from opacus.grad_sample.embedding import compute_embedding_grad_sample
from torch import nn

from training.engine.validation import RMS_NORMS, full_name

Sampler = Callable[[Any, Sequence[torch.Tensor], torch.Tensor], dict[torch.Tensor, torch.Tensor]]


class PerRecordHooks(GradSampleHooks):
    """Opacus's hooks, for the layers that validation allows."""

    def __init__(self, model: nn.Module) -> None:
        ours = {type(m): _rms_norm for m in model.modules() if full_name(m) in RMS_NORMS}
        self.GRAD_SAMPLERS: dict[type[nn.Module], Sampler] = {
            **GradSampleHooks.GRAD_SAMPLERS,
            **ours,
            nn.Embedding: _embedding,
        }
        super().__init__(model, loss_reduction="sum", strict=False)

    def forget(self) -> None:
        """Drop what a pass that failed has left: it was computed from records."""
        for module in self._module.modules():
            for left in ("activations", "max_batch_len"):
                vars(module).pop(left, None)
        for p in self._module.parameters():
            if hasattr(p, "_current_grad_sample"):
                del p._current_grad_sample
            if p.requires_grad:
                p.grad_sample, p._forward_counter, p.grad = None, 0, None


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
    x = activations[0].float()
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + layer.variance_epsilon)
    product = normed * backprops.float()
    return {layer.weight: product.reshape(len(product), -1, product.shape[-1]).sum(1)}
