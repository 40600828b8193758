"""One-backward book-keeping: activations and output gradients are kept, weight gradients skipped (Bu et al. 2023).

Extends Opacus's hooks: same layers, same per-record gradients, but taken in one backward pass that computes
no gradient of a weight, and written out only where that is less work than their norms. A weight that is also used
outside its module gets no gradient from there: what is added is what was normed, never more.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from cluster.errors import PurserError
from training.engine.contributions import Contribution, Lookups, PerUnit, Products, Units
from training.engine.layers import PerRecordHooks, without_padding


class _Record(torch.autograd.Function):
    """The identity; on its way back it hands a module's input and output gradient over.

    The input is saved for the backward pass as autograd's own are: activation checkpointing drops and recomputes it.
    """

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, keep: Any, _tape: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.keep = keep
        ctx.save_for_backward(*inputs)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *backprops: torch.Tensor) -> Any:
        (backprop,) = backprops
        saved = ctx.saved_tensors  # once: a checkpoint recomputes them each time they are asked for
        ctx.keep(saved, backprop)
        return (backprop, None, None, *(None for _ in saved))


class BookKeepingHooks(PerRecordHooks):
    """Hooks that collect what `contributions` needs, for every module with trainable parameters."""

    def add_hooks(self, **_options: Any) -> None:
        """See Opacus's `GradSampleHooks.add_hooks`; forward hooks only."""
        if hasattr(self._module, "autograd_grad_sample_hooks"):
            raise ValueError("Trying to add hooks twice to the same model")
        self._names = {module: name for name, module in self._module.named_modules()}
        # Something must ask for gradients while no parameter does.
        device = next(iter(self._trainable.values())).device
        self._tape = torch.zeros((), device=device, requires_grad=True)
        self.forget()
        self._module.autograd_grad_sample_hooks = []
        self.autograd_grad_sample_hooks = self._module.autograd_grad_sample_hooks
        modules = list(self.iterate_submodules(self._module))
        linear = [m for m in modules if type(m) is nn.Linear]
        self._weights = {m for m in linear if m.weight.requires_grad}
        self._turned = {m.weight: (m.in_features, m.out_features) for m in linear if m.in_features < m.out_features}
        self._biases = {m for m in linear if m.bias is not None and m.bias.requires_grad}
        for module in modules:
            self.autograd_grad_sample_hooks.append(module.register_forward_hook(self._tap))
        self.enable_hooks()

    def _tap(self, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
        if not (self.hooks_enabled and module.training and torch.is_grad_enabled()):
            return None
        kept: torch.Tensor = _Record.apply(output, functools.partial(self._keep, module), self._tape, inputs[0])
        return kept

    def _keep(self, module: nn.Module, saved: tuple[torch.Tensor, ...], g: torch.Tensor) -> None:
        """During the backward pass: write per-unit gradients out at once where they are small, else keep both."""
        a = saved[0]
        if len(a) != self._rows or len(g) != self._rows:
            raise PurserError(
                f"model: the input of {self._names[module]} has not one row per record, so that there is no per-record "
                "gradient; freeze this layer."
            )
        records = len(self._units.of_record)
        if records != self._rows:
            a, g = a[:records], g[:records]  # rows after the records are padding, whose gradients are zero
        if a.dtype != g.dtype and a.is_floating_point():
            a = a.to(g.dtype)  # autocast takes a layer's input in the dtype of its output
        if module in self._weights and not self._keeps_factors(module, a):
            a, g = _timed(a), _timed(g)
            narrow, wide = (a, g) if module.weight in self._turned else (g, a)
            self._add(module.weight, self._units.sums(torch.bmm(narrow.mT, wide)))
            self._add_bias(module, g)
            self._kept.setdefault(module, [])
        else:
            a = self._inputs.setdefault((a.data_ptr(), a.dtype, a.shape, a.stride()), a.detach())
            self._kept.setdefault(module, []).append((a, g))

    def _keeps_factors(self, module: nn.Linear, a: torch.Tensor) -> bool:
        """Whether norms by times are less work than gradients written out; the same for every call of a pass.

        Only public numbers decide: were it the units at hand, one more of them could change which rounding all go by.
        """
        if module in self._kept:
            return bool(self._kept[module])
        times = a.numel() // (max(1, len(a)) * module.in_features) * self._most
        return times * (module.in_features + module.out_features) < module.in_features * module.out_features

    def _add(self, parameter: torch.Tensor, per_unit: torch.Tensor) -> None:
        self._summed[parameter] = self._summed[parameter] + per_unit if parameter in self._summed else per_unit

    def _add_bias(self, module: nn.Linear, g: torch.Tensor) -> None:
        if module in self._biases:
            self._add(module.bias, self._units.sums(g.sum(1)))

    @contextmanager
    def one_pass(self, units: Units, rows: int) -> Iterator[None]:
        """See `PerRecordHooks.one_pass`; no gradient of a parameter is computed meanwhile."""
        for parameter in self._trainable.values():
            parameter.requires_grad_(False)
        try:
            with super().one_pass(units, rows):
                yield
        finally:
            for parameter in self._trainable.values():
                parameter.requires_grad_(True)

    def _collected(self) -> dict[torch.Tensor, Contribution]:
        found: dict[torch.Tensor, Contribution] = {}
        for module, kept in self._kept.items():
            if not kept:
                continue  # written out already
            if type(module) is nn.Linear:
                a, g = (_joined([pair[i] for pair in kept]) for i in (0, 1))
                if module in self._weights:
                    found[module.weight] = Products(a, g, self._units)
                self._add_bias(module, g)
            elif type(module) is nn.Embedding:
                entries = _joined([a[..., None] for a, _ in kept])[..., 0]
                g = without_padding(module, entries, _joined([g for _, g in kept]))
                found[module.weight] = Lookups(entries, g, self._units, module.weight.shape)
            else:
                for a, g in kept:
                    for parameter, sample in self.GRAD_SAMPLERS[type(module)](module, [a], g).items():
                        self._add(parameter, self._units.sums(sample))
        return found | {p: PerUnit(gradients, self._turned.get(p)) for p, gradients in self._summed.items()}

    def forget(self) -> None:
        """See `PerRecordHooks.forget`."""
        super().forget()
        # What each layer was given and gave back, gradients written out, and one object for what several layers share.
        self._kept: dict[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._summed: dict[torch.Tensor, torch.Tensor] = {}
        self._inputs: dict[tuple[Any, ...], torch.Tensor] = {}


def _timed(values: torch.Tensor) -> torch.Tensor:
    """[records, ..., width] → [records, times, width], fp32."""
    if values.dim() != 3:
        values = values.reshape(len(values), -1, values.shape[-1])
    return values.float() if values.is_floating_point() else values


def _joined(calls: list[torch.Tensor]) -> torch.Tensor:
    """What several calls of a layer kept, one after another in time."""
    return _timed(calls[0]) if len(calls) == 1 else torch.cat([_timed(call) for call in calls], 1)
