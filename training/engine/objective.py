"""The loss of each record, by itself (P8): no batch statistic, no normaliser that records share."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from training.engine.sampling import MicroBatch

IGNORED = -100  # a label that is not to be predicted
CAUSAL = ("llama", "gpt2")  # config.model_type


def record_losses(model: nn.Module, batch: MicroBatch) -> torch.Tensor:
    """Cross-entropy of every record of `batch`, without its padding. Shape [records], fp32.

    Labels [rows] are classes. Labels [rows, length] are tokens: each is predicted from those before it, and a record's
    loss is the mean over its own predicted tokens. Where records share rows, a row's loss is the sum of theirs.
    """
    records = len(batch.unit)
    logits = logits_of(model, batch)[:records].float()
    labels = batch.labels[:records]
    if labels.dim() == 1:
        return F.cross_entropy(logits, labels, reduction="none")
    wanted = labels[:, 1:]
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), wanted, ignore_index=IGNORED, reduction="none")
    if batch.positions is None:
        return losses.sum(1) / (wanted != IGNORED).sum(1).clamp(min=1)
    begins = batch.positions[:records] == 0
    record = begins.cumsum(1)[:, 1:]  # of the row, from 1
    predicted = (wanted != IGNORED) & ~begins[:, 1:]  # a first token follows nothing of its own record
    counts = batch.positions.new_zeros(records, losses.shape[1] + 2)
    counts.scatter_add_(1, record, predicted.long())
    return (losses * predicted / counts.gather(1, record).clamp(min=1)).sum(1)


def in_one_shape(model: nn.Module, batch: MicroBatch, rows: int) -> MicroBatch:
    """`batch`, of at most `rows` records, in the shape that all have. Where the model is given a mask, or makes one of
    positions, there is a row of padding in any case: transformers may take another kernel where no mask has a 0, and
    makes none where no positions begin anew."""
    return batch.padded(rows + (batch.positions is not None or (batch.mask is not None and not causal(model))))


def logits_of(model: nn.Module, batch: MicroBatch) -> torch.Tensor:
    """What the model says of every row: a plain module's output, or a transformers model's logits."""
    if batch.mask is None:
        return model(batch.features)
    if causal(model) and batch.positions is not None:  # with a cache, transformers looks at no positions: one record
        return model(input_ids=batch.features, position_ids=batch.positions, use_cache=False).logits
    if causal(model):
        return model(input_ids=batch.features).logits
    return model(input_ids=batch.features, attention_mask=batch.mask).logits


def causal(model: nn.Module) -> bool:
    """Whether a token sees only those before it, so that padding after a record needs no mask.

    A mask is not given then: transformers takes another kernel where all of a batch's mask is 1, so that one padded
    record would change what its companions come out as.
    """
    return getattr(getattr(model, "config", None), "model_type", None) in CAUSAL
