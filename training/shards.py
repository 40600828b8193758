"""Prepared records as a trainer reads them: memory-mapped files behind what looks like tensors. Inside the boundary.

Opening reads no record. A row is read when it is asked for, from pages that all processes of a node share, so that a
corpus larger than memory trains. Which rows are asked for is private.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from cluster.errors import PurserError, UsageError
from training import sources
from training.config import Job
from training.encoding import Encoding
from training.engine.objective import IGNORED
from training.engine.sampling import Rows, Shard
from training.preparation import INDEX, MANIFEST, ROWS


@dataclass(frozen=True)
class Prepared:
    """A folder that `preparation` has made, whole.

    `manifest`: fingerprint, digest of the preparation, columns, tokenizer, and of each partition its files and counts,
    which are private.
    """

    folder: Path
    manifest: Mapping[str, Any]

    @staticmethod
    def at(folder: Path) -> Prepared | None:
        """What is prepared in `folder`; None where nothing is, or not all of it."""
        try:
            return Prepared(folder, json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None

    def shard(self, partition: str, rank: int, world: int) -> Shard:
        """The units of `partition` that fall to `rank` of `world`.

        Raises:
            UsageError: the folder does not hold what its manifest says.
        """
        order, offsets, shares = (np.load(self.folder / f"{partition}-{name}.npy", mmap_mode="r") for name in INDEX)
        begins = self.folder / f"{partition}-{ROWS}.npy"
        rows = np.load(begins, mmap_mode="r") if begins.exists() else None
        if world > 1:
            chosen, offsets = _parts(offsets, np.flatnonzero(shares % np.uint64(world) == rank))
            if rows is not None:
                chosen, rows = _parts(rows, chosen)
            order = order[chosen]
        columns, offsets = self._columns(partition, order), np.array(offsets, dtype=np.int64)
        if rows is not None:
            return packed_shard(columns, np.array(rows, dtype=np.int64), offsets)
        return shard_of(columns, offsets, self.manifest["causal"])

    def _columns(self, partition: str, order: np.ndarray) -> dict[str, Mapped]:
        facts = self.manifest["partitions"][partition]
        batches = []
        for name, records in facts["files"].items():
            file = pa.ipc.open_file(pa.memory_map(str(self.folder / name)))
            these = [file.get_batch(i) for i in range(file.num_record_batches)]
            if sum(batch.num_rows for batch in these) != records:
                raise UsageError(
                    f"data.source: its prepared form in {self.folder} was changed; delete that folder, it is made anew."
                )
            batches += these
        starts = np.cumsum([0, *(batch.num_rows for batch in batches)])
        return {
            name: Mapped([_values(batch.column(name)) for batch in batches], starts, order, width, np.dtype(kind))
            for name, (kind, width) in facts["columns"].items()
        }


def _parts(offsets: np.ndarray, which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What `which` of the parts between `offsets` hold, by number, and where each of them begins there, int64."""
    first, sizes = offsets[which], offsets[which + 1] - offsets[which]
    begins = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return np.arange(begins[-1]) + np.repeat(first - begins[:-1], sizes), begins


def _values(column: pa.Array) -> np.ndarray:
    """A column where it lies, without a copy: [records], or [records, width]."""
    if pa.types.is_fixed_size_list(column.type):
        width = column.type.list_size
        return column.flatten().to_numpy(zero_copy_only=True).reshape(-1, width)
    return column.to_numpy(zero_copy_only=True)


class Mapped:
    """One column of records that lie in several mapped pieces, in an order of their own; reads what it is asked for.

    Args:
        pieces: each [records] or [records, width].
        starts: the first record's number of each piece, and the number of all.
        order: the number of each record, as it is asked for.
        width: of a record, 0 where it is one number.
    """

    def __init__(
        self, pieces: Sequence[np.ndarray], starts: np.ndarray, order: np.ndarray, width: int, kind: np.dtype
    ) -> None:
        self._pieces, self._starts, self._order, self._kind = pieces, starts, order, kind
        self._shape = (width,) if width else ()

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, which: torch.Tensor | slice) -> torch.Tensor:
        where = self._order[which if isinstance(which, slice) else which.numpy()]
        piece = np.searchsorted(self._starts, where, side="right") - 1
        found = np.empty((len(where), *self._shape), self._kind)
        for i in np.unique(piece):
            here = piece == i
            found[here] = self._pieces[i][where[here] - self._starts[i]]
        return torch.from_numpy(found)


@dataclass(frozen=True)
class Derived:
    """What is made of other columns at each access."""

    of: tuple[Rows, ...]
    make: Callable[..., torch.Tensor]

    def __len__(self) -> int:
        return len(self.of[0])

    def __getitem__(self, which: torch.Tensor | slice) -> torch.Tensor:
        return self.make(*(column[which] for column in self.of))


def shard_of(columns: Mapping[str, Rows], offsets: np.ndarray, causal: bool) -> Shard:
    """A shard of encoded records (`Encoding.arrays`), in the order of their units."""
    groups = columns.get("group")
    if "features" in columns:
        return Shard(columns["features"], columns["label"], offsets, groups=groups)
    ids, length, prompt = columns["ids"], columns["length"], columns["prompt"]
    mask = Derived((length,), functools.partial(_mask, width=ids[:0].shape[1]))
    features = Derived((ids,), torch.Tensor.long)
    labels = Derived((ids, length, prompt), _predicted) if causal else columns["label"]
    return Shard(features, labels, offsets, mask, groups)


def packed_shard(columns: Mapping[str, Rows], rows: np.ndarray, offsets: np.ndarray) -> Shard:
    """A shard whose rows hold several encoded records each, of one unit, one after the other.

    Args:
        rows: where each row begins among the records, and where the last ends. [rows + 1]
        offsets: where each unit begins among the rows, and where the last ends. [units + 1]
    """
    one, length = shard_of(columns, rows, causal=True), columns["length"]
    assert one.mask is not None
    places = Derived((length,), functools.partial(_places, width=one.features[:0].shape[1]))
    return Shard(
        Joined(one.features, length, rows, 0),
        Joined(one.labels, length, rows, IGNORED),
        offsets,
        Joined(one.mask, length, rows, 0),
        positions=Joined(places, length, rows, 0),
    )


@dataclass(frozen=True)
class Joined:
    """Rows of what `of` has for each token of several records [records, width], one record after the other, and then
    `empty`. Row i has the records rows[i] to rows[i+1], of so many tokens as `length` says."""

    of: Rows
    length: Rows
    rows: np.ndarray
    empty: int

    def __len__(self) -> int:
        return len(self.rows) - 1

    def __getitem__(self, which: torch.Tensor | slice) -> torch.Tensor:
        chosen = np.arange(len(self))[which if isinstance(which, slice) else which.numpy()]
        index, begins = _parts(self.rows, chosen)
        records = torch.from_numpy(index)
        values, length = self.of[records], self.length[records].long()
        there = _mask(length, values.shape[1]).bool()
        tokens = torch.cat([torch.zeros(1, dtype=torch.long), length.cumsum(0)])[torch.from_numpy(begins)].diff()
        made = values.new_full((len(chosen), values.shape[1]), self.empty)
        made[_mask(tokens, values.shape[1]).bool()] = values[there]  # row by row, token by token, in the same order
        return made


def _places(length: torch.Tensor, width: int) -> torch.Tensor:
    return torch.arange(width).expand(len(length), -1)


def _mask(length: torch.Tensor, width: int) -> torch.Tensor:
    return (torch.arange(width) < length[:, None]).long()


def _predicted(ids: torch.Tensor, length: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """Every token but those of the prompt and the padding."""
    place = torch.arange(ids.shape[1])
    wanted = (place < length[:, None]) & (place >= prompt[:, None])
    return ids.long().masked_fill(~wanted, IGNORED)


def public_arrays(job: Job, section: str = "evaluation") -> dict[str, np.ndarray]:
    """Every record of the file that the job declares public in `section`, as `Encoding.arrays` has them.

    Raises:
        UsageError: it cannot be read, or holds no record.
    """
    source, encoding = sources.public(job, section), Encoding.of(job)
    if section == "audit":  # what a model learns from is in no group
        encoding = replace(encoding, groups=None)
    made = [
        encoding.arrays(batch) for number in range(len(source.files)) for batch in source.batches(number) if len(batch)
    ]
    source.check_records(len(made))
    return {name: np.concatenate([arrays[name] for arrays in made]) for name in made[0]}


def public_shard(job: Job) -> Shard:
    """The records on which the job is judged where it says that they are public, each a unit of its own."""
    return shard_in_memory(public_arrays(job), job.model.kind == "causal-lm")


def shard_in_memory(arrays: Mapping[str, np.ndarray], causal: bool, packed: bool = False) -> Shard:
    """Encoded records, each a unit of its own, and where the others of its job are packed, alone in its row."""
    columns = {name: torch.from_numpy(array) for name, array in arrays.items()}
    each = np.arange(len(next(iter(columns.values()))) + 1)
    return packed_shard(columns, each, each) if packed else shard_of(columns, each, causal)


@dataclass(frozen=True)
class Beside:
    """The rows of `first`, and after them those of `second`."""

    first: Rows
    second: Rows

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def __getitem__(self, which: torch.Tensor | slice) -> torch.Tensor:
        chosen = torch.arange(len(self))[which] if isinstance(which, slice) else which
        later = chosen >= len(self.first)
        one, other = self.first[chosen[~later]], self.second[chosen[later] - len(self.first)]
        found = one.new_empty(len(chosen), *one.shape[1:])
        found[~later], found[later] = one, other
        return found


def beside(first: Shard, second: Shard) -> Shard:
    """The units of both."""

    def both(name: str) -> Rows | None:
        one, other = getattr(first, name), getattr(second, name)
        if (one is None) != (other is None):
            raise PurserError(f"data: of two kinds of records one has {name}; nothing was charged.")
        return None if one is None else Beside(one, other)

    features, labels = Beside(first.features, second.features), Beside(first.labels, second.labels)
    offsets = np.concatenate([first.offsets, first.offsets[-1] + second.offsets[1:]])
    return Shard(features, labels, offsets, both("mask"), both("groups"), both("positions"))
