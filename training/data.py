"""What a job declares of its records: columns, ranges, shapes. Nothing is read here, and nothing learnt (P11).

From the files to a model's batches: sources → preparation (by encoding) → shards.
"""

from __future__ import annotations

import math

from cluster.errors import UsageError
from training.config import Job
from training.sections import Data, Feature, Label, Model

DIGITS = "sklearn:digits"
PIXELS = {f"pixel_{i}": Feature(range=(0.0, 16.0)) for i in range(64)}
DIGIT = Label(column="digit", categories=tuple("0123456789"))


def declared(data: Data) -> Data:
    """`data` with the columns that a bundled source brings along.

    Raises:
        UsageError: a table without declared features or label.
    """
    if data.source == DIGITS:
        return data.model_copy(update={"features": data.features or PIXELS, "label": data.label or DIGIT})
    if data.text is not None:
        return data
    if not data.features:
        raise UsageError(
            "data.features: it is missing; declare a range or the categories of each column to learn from."
        )
    if data.label is None:
        raise UsageError("data.label: it is missing; declare the column to predict and its categories.")
    return data


def image_of(model: Model, data: Data) -> tuple[int, int, int] | None:
    """The (channels, height, width) that a cnn sees its features as; None for other models.

    Raises:
        UsageError: a cnn without an image shape that matches the features.
    """
    if model.kind != "cnn":
        return None
    shape = model.image or ((1, 8, 8) if data.source == DIGITS else None)
    if shape is None or math.prod(shape) != data.width or min(shape[1:]) < 4:
        raise UsageError(
            f"model.image: {list(shape) if shape else None} was given; a cnn needs [channels, height, width], at least "
            f"4 by 4, whose product is the {data.width} features of a record."
        )
    return shape


def columns_read(job: Job) -> dict[str, str]:
    """Field of the job → the column of a record that it names; what a unit or a group is called is not among them."""
    data = declared(job.data)
    columns = {f"data.features.{column}": column for column in data.features}
    if data.text is not None:
        columns["data.text.column"] = data.text.column
        if data.text.prompt is not None:
            columns["data.text.prompt"] = data.text.prompt
    if data.label is not None:
        columns["data.label.column"] = data.label.column
    return columns
