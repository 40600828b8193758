"""`purser generate`: texts that a released causal model writes, as free post-processing of what was paid for.

No private record is in this room, and no lease: a release and public prompts come in, texts and a statement go out.
A seed is harmless here, since nothing that it reaches is anybody's secret; the noise of training has none (P10).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import UsageError
from cluster.files import write_whole
from cluster.screen import Screen
from training.prompts import Prompts
from training.released import Released, check_out, in_tenths, leave, load_released, write_parquet
from training.tokens import end_of, prompt_ids

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

ENDINGS = (".jsonl", ".parquet")
MOST = 1_000_000  # samples of a prompt, tokens of a sample
BATCH = 16  # samples that are written side by side


@dataclass(frozen=True)
class Sampling:
    """How texts are drawn: `count` for each prompt, of at most `max_new_tokens` tokens, from the likeliest ones that
    together have probability `top_p`, at `temperature` (0: always the likeliest), each cut before the first `stop`.

    Raises:
        UsageError: a number is out of its bounds.
    """

    count: int = 1
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        for option, given in (("--count", self.count), ("--max-new-tokens", self.max_new_tokens)):
            if not 1 <= given <= MOST:
                raise UsageError(f"{option}: {given} was given; it must be from 1 to {MOST}.")
        if not 0 <= self.temperature <= 100:
            raise UsageError(f"--temperature: {self.temperature:g} was given; it must be from 0 (greedy) to 100.")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p: {self.top_p:g} was given; it must be above 0, and 1 at most.")
        if not all(self.stop):
            raise UsageError("--stop: an empty word was given; every text would end at once, leave it out.")
        if self.temperature == 0 and self.count > 1:
            raise UsageError("--count: at temperature 0 all samples of a prompt are the same; write --count 1.")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise UsageError(f"--seed: {self.seed} was given; it must be from 0 to 2^63 - 1.")


def texts_of(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    how: Sampling,
    told: Callable[[int, int], None] = lambda done, of: None,
) -> Iterator[dict[str, Any]]:
    """What `model` writes after each prompt: rows of prompt, text, and the number of the sample, from 1.

    Args:
        told: hears how many samples are done, of how many.

    Raises:
        UsageError: a prompt leaves no room for the tokens that are asked for.
    """
    import torch

    begins = prompt_ids(tokenizer, prompts)
    room = getattr(model.config, "max_position_embeddings", None)
    if room is not None and (longest := max(map(len, begins))) + how.max_new_tokens > room:
        raise UsageError(
            f"--max-new-tokens: {how.max_new_tokens} was given; the longest prompt has {longest} tokens and the model "
            f"reads {room}, so at most {max(0, room - longest)} are left."
        )
    wanted = [(number, sample) for number in range(len(prompts)) for sample in range(1, how.count + 1)]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.seed() if how.seed is None else torch.manual_seed(how.seed)
        for at in range(0, len(wanted), BATCH):
            batch = wanted[at : at + BATCH]
            told(at, len(wanted))
            texts = _written(model, tokenizer, [begins[number] for number, _ in batch], how, device)
            for (number, sample), text in zip(batch, texts, strict=True):
                yield {"prompt": prompts[number], "text": text, "sample": sample}


def _written(
    model: Any, tokenizer: Any, begins: Sequence[Sequence[int]], how: Sampling, device: torch.device
) -> list[str]:
    """What follows each of `begins`, token ids, padded on the left so that all go on at one place."""
    import torch
    from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

    end, longest = end_of(tokenizer), max(map(len, begins))
    pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(one)) + list(one) for one in begins], device=device)
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in begins], device=device)

    class Stops(StoppingCriteria):
        """Whether a stop word stands in the last tokens; a word has no more tokens than bytes."""

        tail = max((len(word.encode()) for word in how.stop), default=0) + 8

        def __call__(self, input_ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
            last = _decoded(tokenizer, input_ids[:, max(longest, input_ids.shape[1] - self.tail) :])
            return torch.tensor([any(word in text for word in how.stop) for text in last], device=input_ids.device)

    draws: Mapping[str, Any] = {"do_sample": False}
    if how.temperature > 0:
        draws = {"do_sample": True, "temperature": float(how.temperature), "top_p": float(how.top_p), "top_k": 0}
    settings = GenerationConfig(max_new_tokens=how.max_new_tokens, eos_token_id=end, pad_token_id=pad, **draws)
    with torch.no_grad():
        whole = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=settings,
            stopping_criteria=StoppingCriteriaList([Stops()] if how.stop else []),
        )
    return [_cut(text, how.stop) for text in _decoded(tokenizer, whole[:, longest:])]


def _decoded(tokenizer: Any, ids: torch.Tensor) -> list[str]:
    texts: list[str] = tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return texts


def _cut(text: str, stop: Sequence[str]) -> str:
    """`text` up to the first of the stop words."""
    return text[: min((at for at in map(text.find, stop) if at >= 0), default=len(text))]


def generate(
    source: Released, prompts: Prompts, how: Sampling, out: Path, screen: Screen, base: str | None = None
) -> dict[str, Any]:
    """Write texts after each of `prompts` to `out`, and beside it what they are; returns the contract's keys.

    Raises:
        UsageError: the release holds no causal model, or `out` cannot be written.
    """
    beside = check_out(out, ENDINGS)
    model, tokenizer = load_released(source.folder, base or source.model_path)
    rows = list(texts_of(model, tokenizer, prompts.texts, how, in_tenths(screen, "texts")))
    made = {"file": out.name, "texts": len(rows), **asdict(how), "prompts": prompts.said()}
    leave(source, beside, "generated", made)  # first: no text without its statement
    if out.suffix.lower() == ".jsonl":
        write_whole(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    else:
        import pyarrow as pa

        write_parquet(pa.Table.from_pylist(rows), out)
    return {
        "run": source.run,
        "prompts": len(prompts.texts),
        "count": how.count,
        "out": str(out.absolute()),
        "statement": str(beside.absolute()),
    }
