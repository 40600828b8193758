"""Records as numbers: one batch of text cells → arrays of the declared shape. Nothing is fitted or counted here (P11).

What a cell becomes depends on the declarations and on itself, and nothing it may be is an error, which would tell of it
(P13): a number is clamped to its range, and what is none is the middle; a category that was not declared is all zeros,
such a label the first; a text is cut to max_length tokens, and a null text is an empty one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.errors import UsageError
from training import tokens
from training.config import Job
from training.data import declared
from training.sections import Data, Feature, Groups


@dataclass(frozen=True)
class Encoding:
    """How the records of one partition, or of a public file, become numbers.

    Attributes:
        data: with every column declared.
        groups: those that each record's group is wanted of; None where nobody asks.
        causal: for a model that learns to say the text.
        tokenizer: of a text; None for tables.
        digest: of the tokenizer, or empty.
    """

    data: Data
    groups: Groups | None = None
    causal: bool = False
    tokenizer: Any = None
    digest: str = ""

    @staticmethod
    def of(job: Job) -> Encoding:
        """Of the records that models of `job` are judged on; without its groups, also of those that they learn from.

        Raises:
            UsageError: what the model needs is not declared, or its tokenizer is not there.
        """
        data, causal = declared(job.data), job.model.kind == "causal-lm"
        if data.label is None and not causal:
            raise UsageError("data.label: it is missing; declare the column to predict and its categories.")
        if data.text is None:
            return Encoding(data, job.evaluation.groups)
        tokenizer = tokens.tokenizer_of(job.model)
        return Encoding(data, job.evaluation.groups, causal, tokenizer, tokens.digest(tokenizer))

    @property
    def schema(self) -> pa.Schema:
        """The columns of an encoded record."""
        text, fields = self.data.text, []
        if text is None:
            fields += [("features", pa.list_(pa.float32(), self.data.width))]
        else:
            fields += [("ids", pa.list_(pa.int32(), text.max_length)), ("length", pa.int32()), ("prompt", pa.int32())]
        if self.data.label is not None:
            fields += [("label", pa.int64())]
        if self.groups is not None:
            fields += [("group", pa.int64())]
        return pa.schema([pa.field(name, kind, nullable=False) for name, kind in fields])

    def arrays(self, batch: pa.RecordBatch) -> dict[str, np.ndarray]:
        """The records of `batch` as numbers.

        Returns:
            `features` float32 [records, width]; or of texts `ids` int32 [records, max_length], `length` int32 [records]
            and `prompt` int32 [records], see `tokens.Tokens`. `label` int64 [records], the place of its category.
            `group` int64 [records], the place of its name.
        """
        data, made = self.data, {}
        if data.text is None:
            features = [_numbers(_cells(batch, name), feature) for name, feature in data.features.items()]
            made["features"] = np.concatenate(features, axis=1)
        else:
            prompts = None if data.text.prompt is None else _cells(batch, data.text.prompt)
            texts = _cells(batch, data.text.column)
            read = tokens.encode(self.tokenizer, data.text, texts, prompts, self.causal)
            made |= {"ids": read.ids, "length": read.length, "prompt": read.prompt}
        if data.label is not None:
            made["label"] = _places(_cells(batch, data.label.column), data.label.categories, 0)
        if self.groups is not None:
            some = self.groups.categories
            made["group"] = _places(_cells(batch, self.groups.column), some, len(some))
        return made

    def encoded(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """`arrays` in the columns of `schema`."""
        made = self.arrays(batch)
        columns = []
        for field in self.schema:
            flat = pa.array(made[field.name].ravel())
            fixed = pa.types.is_fixed_size_list(field.type)
            columns.append(pa.FixedSizeListArray.from_arrays(flat, type=field.type) if fixed else flat)
        return pa.RecordBatch.from_arrays(columns, schema=self.schema)


def _cells(batch: pa.RecordBatch, name: str) -> list[str]:
    return ["" if cell is None else cell for cell in batch.column(name).to_pylist()]


def _places(cells: Sequence[str], categories: Sequence[str], otherwise: int) -> np.ndarray:
    """Of each cell, the place of its category; `otherwise` where it is none of them."""
    place = {category: i for i, category in enumerate(categories)}
    return np.array([place.get(cell.strip(), otherwise) for cell in cells], dtype=np.int64)


def _numbers(cells: Sequence[str], feature: Feature) -> np.ndarray:
    """Of each cell what the model sees. Array: float32 [records, numbers]."""
    if feature.categories is not None:
        found = _places(cells, feature.categories, -1)
        return (found[:, None] == np.arange(len(feature.categories))[None, :]).astype(np.float32)
    assert feature.range is not None
    low, high = feature.range
    values = np.array([_number(cell, (low + high) / 2) for cell in cells], dtype=np.float64)
    # Centred on the declared middle: from [0, 1], much of each clipped gradient would only say what all records share.
    return ((np.clip(values, low, high) - low) / (high - low) - 0.5).astype(np.float32)[:, None]


def _number(cell: str, otherwise: float) -> float:
    """A cell as a number; what is none counts as the middle of the declared range, silently: an error would tell."""
    try:
        value = float(cell)
    except ValueError:
        return otherwise
    return otherwise if math.isnan(value) else value
