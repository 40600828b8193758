"""The models a job may name, from public shapes only, and their trainers, rehearsed; those that read text are made in
`training.language`.

Layers are those that the engine allows by name (`training.engine.validation`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from cluster.errors import UsageError
from training.config import Job
from training.data import declared, image_of
from training.engine.rehearsal import Inputs, Rehearsal, rehearse
from training.engine.stepper import Maker, TorchStepper
from training.engine.trainer import PrivateTrainer
from training.sections import Model


def rehearsed(job: Job) -> tuple[PrivateTrainer, Rehearsal]:
    """The trainer of `job` in this process, tried on synthetic inputs; no record is read.

    Raises:
        PurserError: what was tried does not hold, or the model may not be trained; nothing was charged.
    """
    how = job.training
    device = device_of(job)
    model, inputs = _of_text(job) if job.model.reads_text else _of_table(job)
    model.to(device)
    trainer = PrivateTrainer(
        model,
        how.optimizer,
        job.run(),
        how.clipping,
        how.precision,
        how.activation_checkpointing == "full",
        TorchStepper if how.zero is None else _zero(how.zero),
    )
    return trainer, rehearse(trainer, inputs)


def _zero(config: Mapping[str, Any]) -> Maker:
    from training.engine.zero import Zero

    return Zero(config)


def device_of(job: Job) -> torch.device:
    """Where this process trains: on a GPU, that which is the current one.

    Raises:
        UsageError: the job wants a GPU, and this process sees none.
    """
    if job.training.device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError(
            "training.device: gpu was given, and torch sees none here; write cpu, or run where there is one (on a "
            "cluster: purser submit). Nothing was charged."
        )
    return torch.device("cuda", torch.cuda.current_device())


def _of_text(job: Job) -> tuple[nn.Module, Inputs]:
    from training import language

    assert job.data.text is not None
    model = language.build(job)
    classes = len(job.data.label.categories) if job.data.label is not None else 0
    words = model.get_input_embeddings().num_embeddings
    return model, Inputs((job.data.text.max_length,), classes, words, job.data.text.packing == "unit")


def _of_table(job: Job) -> tuple[nn.Module, Inputs]:
    table = declared(job.data)
    assert table.label is not None
    classes = len(table.label.categories)
    return build(job.model, table.width, classes, image_of(job.model, table)), Inputs((table.width,), classes)


def build(model: Model, width: int, classes: int, image: tuple[int, int, int] | None = None) -> nn.Module:
    """A model from features [records, width] to logits [records, classes].

    Args:
        image: (channels, height, width) of the features, for a cnn (`training.data.image_of`).
    """
    if model.kind == "linear":
        linear = nn.Linear(width, classes)
        nn.init.zeros_(linear.weight)  # convex: random weights would only be noise that nobody asked for
        nn.init.zeros_(linear.bias)
        return nn.Sequential(linear)
    if model.kind == "mlp":
        return nn.Sequential(nn.Linear(width, model.hidden), nn.ReLU(), nn.Linear(model.hidden, classes))
    assert image is not None
    channels, height, breadth = image
    hidden = model.channels
    return nn.Sequential(
        nn.Unflatten(1, (channels, height, breadth)),
        nn.Conv2d(channels, hidden, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(hidden, 2 * hidden, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * hidden * (height // 4) * (breadth // 4), classes),
    )
