"""Canaries: made-up records of which each is in the train partition by a fair coin; drawn once, before anything is
charged, and sealed in the run's folder.

They are nobody's: what is asked of the models that may have learnt from them is no private record's answer. No real
record is read here, and neither coins nor content follow from any (P11); coins are the operating system's (P10).
"""

from __future__ import annotations

import io
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.errors import UsageError
from cluster.files import sha256, write_whole
from training.config import Job
from training.data import declared

if TYPE_CHECKING:
    from training.engine.sampling import Shard

SEALED = "canaries.npz"  # in a run's folder; owner-only
LENGTH = 16  # tokens of a canary that is text, at most


@dataclass(frozen=True)
class Canaries:
    """What was drawn.

    Attributes:
        arrays: as `Encoding.arrays` has records. [canaries, ...]
        inside: bool [canaries], whose coin said that it is in the train partition.
        candidates: int64, the tokens of which a rare-token canary's last one is drawn; empty for other kinds.
        facts: what may be said of them: kind, how many, how many of them differ, guesses, confidence.
    """

    arrays: Mapping[str, np.ndarray]
    inside: np.ndarray
    candidates: np.ndarray
    facts: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.inside)

    def part(self, rank: int, world: int) -> np.ndarray:
        """The numbers of the canaries that fall to `rank` of `world`. Array: int64."""
        return np.arange(rank, len(self), world)

    def shard(self, job: Job, which: np.ndarray) -> Shard:
        """The canaries with these numbers, each a unit of its own."""
        from training.shards import shard_in_memory

        packed = job.data.text is not None and job.data.text.packing == "unit"
        arrays = {name: array[which] for name, array in self.arrays.items()}
        return shard_in_memory(arrays, job.model.kind == "causal-lm", packed)

    def seal(self, folder: Path) -> str:
        """Write them to the run's `folder`, whole or not at all; returns the SHA-256 of the file."""
        records = {f"record_{name}": array for name, array in self.arrays.items()}
        facts = np.array(json.dumps(dict(self.facts)))
        write_arrays(folder / SEALED, {"inside": self.inside, "candidates": self.candidates, "facts": facts, **records})
        return digest(folder)

    @staticmethod
    def unsealed(folder: Path, expected: str | None = None) -> Canaries:
        """Those that were sealed in `folder`.

        Raises:
            UsageError: they are not there, or are not those with the SHA-256 `expected`.
        """
        found = digest(folder)
        if not found or expected not in (None, found):
            raise UsageError(
                f"audit.canaries: those that the run was begun with are not in {folder / SEALED}; put the file back, "
                "or start a new run. Nothing is drawn twice for one run."
            )
        with np.load(folder / SEALED, allow_pickle=False) as file:
            arrays = {name.removeprefix("record_"): file[name] for name in file.files if name.startswith("record_")}
            return Canaries(arrays, file["inside"], file["candidates"], json.loads(str(file["facts"])))


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write arrays by their names, whole or not at all, for their owner alone."""
    file = io.BytesIO()
    np.savez(file, **arrays)
    write_whole(path, file.getvalue()).chmod(0o600)


def digest(folder: Path) -> str:
    """SHA-256 of what is sealed in the run's `folder`; empty where nothing is."""
    try:
        return sha256(folder / SEALED)
    except FileNotFoundError:
        return ""


def draw(job: Job, guesses: int) -> Canaries:
    """As many canaries as `job` says.

    Args:
        guesses: how many guesses the audit will make; sealed with them.

    Raises:
        UsageError: its public source has too few records, or cannot be read.
    """
    count, kind = job.audit.canaries, job.canary_kind
    rng = np.random.Generator(np.random.PCG64(secrets.randbits(128)))  # of content, which is no secret
    inside = np.unpackbits(np.frombuffer(secrets.token_bytes(-(-count // 8)), np.uint8))[:count].astype(bool)
    candidates = np.zeros(0, np.int64)
    if job.audit.source is not None:
        arrays = _of_file(job, count, rng)
    elif job.model.reads_text:
        arrays, candidates = _of_tokens(job, count, kind, rng)
    else:
        arrays = _of_cells(job, count, kind, rng)
    if (label := declared(job.data).label) is not None and job.model.kind != "causal-lm":
        classes = len(label.categories)
        drawn = rng.integers(0, classes, count)
        if job.audit.source is None:
            arrays["label"] = drawn
        elif kind == "mislabelled":
            arrays["label"] = (arrays["label"] + 1 + drawn % (classes - 1)) % classes
    facts = {
        "kind": kind,
        "canaries": count,
        "distinct": _distinct(arrays, count),
        "guesses": guesses,
        "confidence": job.audit.confidence,
    }
    return Canaries(arrays, inside, candidates, facts)


def _of_file(job: Job, count: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    from training.shards import public_arrays

    found = public_arrays(job, "audit")
    records = len(next(iter(found.values())))
    if records < count:
        raise UsageError(
            f"audit.canaries: {count} was given, and {Path(str(job.audit.source)).name} has {records} records; choose "
            "fewer, or name a larger file."
        )
    chosen = rng.choice(records, count, replace=False)
    return {name: array[chosen] for name, array in found.items()}


def _of_cells(job: Job, count: int, kind: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Features as those of a record come out: of a number one end of its range or the other, of a category any; of a
    blank canary an empty cell in every column but one."""
    import pyarrow as pa

    from training.encoding import Encoding

    encoding = replace(Encoding.of(job), groups=None)  # what a model learns from is in none
    data = encoding.data.model_copy(update={"label": None})  # drawn by itself
    which = rng.integers(0, len(data.features), count)
    cells = {}
    for i, (name, feature) in enumerate(data.features.items()):
        drawn = rng.choice([str(value) for value in feature.categories or feature.range or ()], count)
        cells[name] = pa.array(np.where(which == i, drawn, "") if kind == "blank" else drawn, pa.string())
    return replace(encoding, data=data).arrays(pa.RecordBatch.from_pydict(cells))


def _of_tokens(job: Job, count: int, kind: str, rng: np.random.Generator) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Random tokens between those that every text has; of a rare-token canary the last is what is to be said, and what
    stands before it is its prompt. And the tokens that this last one was drawn from."""
    from training import tokens

    assert job.data.text is not None
    most, tokenizer = job.data.text.max_length, tokens.tokenizer_of(job.model)
    special = set(tokenizer.all_special_ids)
    words = np.array(sorted(set(tokenizer.get_vocab().values()) - special), np.int64)
    causal = kind == "rare-token"
    begin, end = tokens.around(tokenizer, causal)
    room = max(2 if causal and not begin else 1, min(LENGTH, most) - len(begin) - len(end))  # nothing says the first
    body = rng.choice(words, (count, 1 if kind == "blank" else room))
    fixed = [np.tile(np.array(some, np.int64).reshape(1, -1), (count, 1)) for some in (begin, end)]
    rows = np.concatenate([fixed[0], body, fixed[1]], axis=1)[:, :most]
    ids = np.full((count, most), tokens.padding_of(tokenizer), np.int32)
    ids[:, : rows.shape[1]] = rows
    length = np.full(count, rows.shape[1], np.int32)
    arrays = {"ids": ids, "length": length, "prompt": length - 1 if causal else length * 0}
    return arrays, words if causal else words[:0]


def _distinct(arrays: Mapping[str, np.ndarray], count: int) -> int:
    rows = np.concatenate([array.reshape(count, -1).astype(np.float64) for array in arrays.values()], axis=1)
    return len(np.unique(rows, axis=0))
