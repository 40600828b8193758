"""Which models may be trained: layers allowed by name, before anything is charged (P8).

A layer is allowed when its output for one record depends on that record alone and Opacus has an exact per-record
gradient for it. Everything else is refused with the fix; there is no switch to let an unknown layer through.
"""

from __future__ import annotations

import torch
from torch import nn

from cluster.errors import UsageError

HOOKED = (nn.Linear, nn.Conv2d, nn.Embedding, nn.LayerNorm, nn.GroupNorm)
STATELESS = (
    nn.Sequential,
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.ReLU,
    nn.GELU,
    nn.Tanh,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
)
CROSS_UNIT = {
    nn.modules.batchnorm._BatchNorm: "it mixes the records of a batch; use GroupNorm or LayerNorm",
    nn.modules.instancenorm._InstanceNorm: "it keeps running statistics of records; use GroupNorm",
    nn.modules.rnn.RNNBase: "its per-record gradients are not supported here; use a feed-forward model",
}


def check_model(model: nn.Module) -> None:
    """Refuse a model whose per-record gradients could be wrong or whose records could touch each other.

    Raises:
        UsageError: names the layer or parameter and says what to do instead.
    """
    for name, module in model.named_modules():
        at = f"model: the layer {name or 'at the top'} ({type(module).__name__})"
        for kind, why in CROSS_UNIT.items():
            if isinstance(module, kind):
                raise UsageError(f"{at} cannot be trained privately: {why}.")
        if type(module) not in HOOKED + STATELESS:
            allowed = ", ".join(kind.__name__ for kind in HOOKED + STATELESS)
            raise UsageError(f"{at} is not on the list of layers whose privacy was checked; allowed are {allowed}.")
        if isinstance(module, nn.Embedding) and (
            module.max_norm is not None or module.scale_grad_by_freq or module.sparse
        ):
            raise UsageError(
                f"{at} uses max_norm, scale_grad_by_freq or sparse, which touch other records; turn it off."
            )
        if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
            raise UsageError(f"{at} pads with {module.padding_mode}, for which Opacus has no gradient; use zeros.")
        if type(module) in STATELESS and next(module.parameters(recurse=False), None) is not None:
            raise UsageError(f"{at} holds a parameter of its own, which no hook would see; move it into a layer.")
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{parameter_name}"
            if owners.setdefault(id(parameter), full) != full:
                raise UsageError(f"model: {full} and {owners[id(parameter)]} are one tied weight; untie them.")
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise UsageError("model: it has no trainable parameter; unfreeze at least one.")
    if len({p.device for p in trainable}) > 1:
        raise UsageError("model: its parameters lie on different devices; put them on one.")
    if any(p.dtype != torch.float32 for p in trainable):
        raise UsageError("model: a trainable parameter is not float32; sums and noise need float32 parameters.")
