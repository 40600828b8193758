"""`purser embed`: what a released causal model makes of public texts, as vectors; free post-processing, like its texts.

No private record is in this room: a vector is of a text that its owner declared public.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.errors import UsageError
from cluster.screen import Screen
from training.prompts import Prompts
from training.released import Released, check_out, in_tenths, leave, load_released, write_parquet
from training.tokens import end_of, prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ENDINGS = (".parquet",)
BATCH = 16


def vectors_of(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    max_length: int,
    told: Callable[[int, int], None] = lambda done, of: None,
) -> np.ndarray:
    """The last hidden state of each text, in the mean over its first `max_length` tokens: float32 [texts, width].

    Raises:
        UsageError: that is none, or more than the model reads.
    """
    import torch

    room = getattr(model.config, "max_position_embeddings", None) or 1_000_000
    if not 1 <= max_length <= room:
        raise UsageError(f"--max-length: {max_length} was given; it must be from 1 to {room} tokens.")
    begins = [ids[:max_length] for ids in prompt_ids(tokenizer, texts)]
    pad = end_of(tokenizer)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    found = []
    for at in range(0, len(begins), BATCH):
        told(at, len(begins))
        batch = begins[at : at + BATCH]
        longest = max(map(len, batch))
        ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids in batch], device=device)
        mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in batch], device=device)
        with torch.no_grad():
            last = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1].float()
        found.append(((last * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)).cpu().numpy())
    return np.concatenate(found)


def embed(
    source: Released, texts: Prompts, max_length: int, out: Path, screen: Screen, base: str | None = None
) -> dict[str, Any]:
    """Write a vector for each of `texts` to `out`, and beside it what they are; returns the contract's keys.

    Raises:
        UsageError: the release holds no causal model, or `out` cannot be written.
    """
    import pyarrow as pa

    beside = check_out(out, ENDINGS)
    model, tokenizer = load_released(source.folder, base or source.model_path)
    vectors = vectors_of(model, tokenizer, texts.texts, max_length, in_tenths(screen, "texts"))
    width = vectors.shape[1]
    how = {"pooling": "mean of the last hidden state over the tokens", "max_length": max_length, "width": width}
    leave(source, beside, "embedded", {"file": out.name, **how, "texts": texts.said()})
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), width)
    write_parquet(pa.table({"text": list(texts.texts), "embedding": column}), out)
    return {
        "run": source.run,
        "texts": len(texts.texts),
        "width": width,
        "out": str(out.absolute()),
        "statement": str(beside.absolute()),
    }
