"""Text to tokens: by the model's own tokenizer, made before it saw any of this data (P11), in rows of one length.

Row by row: what a text becomes depends on nothing else. No text may appear in an error (P13).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.errors import UsageError, without_content
from training.sections import Model, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TINY = ("tiny:bert", "tiny:llama")  # models that are made on the spot, of random weights, with a tokenizer of bytes
PAD, BEGIN, END = "[PAD]", "[CLS]", "[SEP]"


@dataclass(frozen=True)
class Tokens:
    """Texts as rows of one length. Arrays: int32 [rows, max_length], padded on the right; int32 [rows], how many of
    them are tokens, at least 1; int32 [rows], how many at the start are a prompt, which is not to be predicted."""

    ids: np.ndarray
    length: np.ndarray
    prompt: np.ndarray


def tokenizer_of(model: Model) -> PreTrainedTokenizerFast:
    """The tokenizer that belongs to the model.

    Raises:
        UsageError: there is none at `model.path`, or it is no fast one, whose content can be named by a digest.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if model.path in TINY:
        return _of_bytes()
    failure = None
    try:
        found: Any = AutoTokenizer.from_pretrained(model.path)
    except Exception as error:  # noqa: BLE001 (a dozen libraries read such folders)
        failure = without_content(error)
    if failure is not None:
        raise UsageError(
            f"model.path: {model.path!r} was given, and no tokenizer can be loaded from it ({failure}); name a folder "
            "that holds a model and its tokenizer, or a hub's id that this machine can reach."
        )
    if not isinstance(found, PreTrainedTokenizerFast):
        raise UsageError(f"model.path: the tokenizer of {model.path!r} is no fast one; save it with tokenizer.json.")
    return found


def digest(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of all that decides what a text becomes. Hexadecimal."""
    special = sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
    return hashlib.sha256(f"{special}\0{tokenizer.backend_tokenizer.to_str()}".encode()).hexdigest()


def encode(
    tokenizer: PreTrainedTokenizerFast, text: Text, rows: Sequence[str], prompts: Sequence[str] | None, causal: bool
) -> Tokens:
    """Texts as a model reads them.

    Args:
        prompts: what stands before each, or None.
        causal: end each text with the token that ends texts, for a model that is to learn where to stop. It is cut like
            all that is beyond `text.max_length`.
    """
    most, end = text.max_length, end_of(tokenizer)
    if not causal:
        cut, begins = _ids(tokenizer, rows, most), [0] * len(rows)
    else:
        # Cut here: a tokenizer that is told to cut would keep the special token at its end.
        before = _before(tokenizer, prompts if prompts is not None else [""] * len(rows))
        after = _ids(tokenizer, rows, special=False)
        cut = [[*first, *then, end][:most] for first, then in zip(before, after, strict=True)]
        begins = [min(len(first), most) if prompts is not None else 0 for first in before]
    ids = np.full((len(rows), most), padding_of(tokenizer), np.int32)
    for row, some in zip(ids, cut, strict=True):
        row[: max(1, len(some))] = some or [end]
    length = np.array([max(1, len(some)) for some in cut], np.int32)
    return Tokens(ids, length, np.array(begins, np.int32))


def prompt_ids(tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]) -> list[list[int]]:
    """Prompts as a causal model was trained to read them, for it to go on from; each at least one token."""
    return [ids or [end_of(tokenizer)] for ids in _before(tokenizer, prompts)]


def _before(tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]) -> list[list[int]]:
    """With what begins a text, and without what ends it."""
    end = end_of(tokenizer)
    return [ids[:-1] if ids[-1:] == [end] else ids for ids in _ids(tokenizer, prompts)]


def around(tokenizer: PreTrainedTokenizerFast, causal: bool) -> tuple[list[int], list[int]]:
    """The tokens that stand before and after those of a text; after one that a causal model learns to go on from, none
    do."""
    if causal:
        return _before(tokenizer, [""])[0], []
    (both,) = _ids(tokenizer, [""])
    return (both[:-1], both[-1:]) if both[-1:] == [end_of(tokenizer)] else (both, [])


def padding_of(tokenizer: PreTrainedTokenizerFast) -> int:
    """The token that stands after a row's last."""
    return end_of(tokenizer) if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)


def end_of(tokenizer: PreTrainedTokenizerFast) -> int:
    """The token that ends a text.

    Raises:
        UsageError: the tokenizer has none.
    """
    for token in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        if token is not None:
            return int(token)
    raise UsageError("model.path: its tokenizer has no eos_token or sep_token to end a text with; give it one.")


def _ids(tokenizer: Any, rows: Sequence[str], most: int | None = None, special: bool = True) -> list[list[int]]:
    """By the library below transformers, which would log how long a record is that is longer than it likes."""
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    if most is None:
        backend.no_truncation()
    else:
        backend.enable_truncation(most, direction="right")
    return [encoding.ids for encoding in backend.encode_batch_fast(list(rows), add_special_tokens=special)]


def _of_bytes() -> PreTrainedTokenizerFast:
    """Every byte of UTF-8 is a token: nothing was learnt from any text."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    words = [PAD, BEGIN, END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}", special_tokens=[(BEGIN, 1), (END, 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token=PAD,
        bos_token=BEGIN,
        cls_token=BEGIN,
        eos_token=END,
        sep_token=END,
        model_max_length=65_536,
    )
