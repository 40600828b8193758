"""The model card of a released language model: what it is, how to load it, and what its privacy statement says.

Facts of the statement only; nothing is measured, recomputed or promised here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from training.metrics import in_words
from training.rendering import opening
from training.statement import Statement

CARD = "README.md"
_CLASSES = {"causal-lm": "AutoModelForCausalLM", "sequence-classification": "AutoModelForSequenceClassification"}
_TASKS = {"causal-lm": "text-generation", "sequence-classification": "text-classification"}


def markdown(said: Statement) -> str:
    """The card of the release that the statement `said` is of."""
    model, labels = said.training.model, said.training.labels or ()
    adapter = said.released.target == "adapter"
    made_here = model["path"].startswith("tiny:")
    metrics = said.released.metrics
    what = "A LoRA adapter" if adapter else "The weights of a model"
    if "lora" in model and not adapter:
        what += ", into which its LoRA adapter is merged,"
    of_purser = ", a small model of random weights made by Purser" if made_here else ""
    lines = [
        "---",
        *([f"base_model: {model['path']}"] if _on_a_hub(model["path"]) else []),
        f"library_name: {'peft' if adapter else 'transformers'}",
        f"pipeline_tag: {_TASKS[model['kind']]}",
        "tags:",
        "- differential-privacy",
        *(["- lora"] if adapter else []),
        "---",
        "",
        f"# {said.run}",
        "",
        f"{what} for {_TASKS[model['kind']].replace('-', ' ')} ({model['kind']}), trained by "
        f"{said.training.mechanism} from {model['path']}{of_purser}.",
        "",
        "## How to load it",
        "",
        "```python",
        *_loading(model, labels, adapter, made_here),
        "```",
        "",
        "In the folder of this card. Base and adapter belong together: on another base it is another model."
        if adapter
        else "In the folder of this card.",
        "",
        *([f"Its labels, in order: {', '.join(labels)}.", ""] if labels else []),
        "## Privacy",
        "",
        f"{opening(said)} Neighbouring datasets differ by {said.protected.adjacency}. What that rests on, what it cost "
        "and what is not covered is in `statement.md` and `statement.html`, for machines in `statement.json`.",
        "",
        f"Public data used: {said.public_data}.",
        "",
        "## Figures",
        "",
        f"{in_words(metrics)} ({said.evaluation.figure}; {said.evaluation.error}).".capitalize()
        if metrics
        else "None was released.",
        "",
        "## Intended use and limits",
        "",
        "- For the task that it was trained for, on texts like those of its dataset. Nothing else was tried.",
        "- The guarantee is for the protected units of that dataset. It says nothing of what the base model was "
        "trained on, of facts that many units share, or of texts that are given to the model later.",
        "- Noise costs accuracy, and more of it for groups with few members; single words and rare cases are learnt "
        "least.",
        "- It was not checked for harmful, biased or wrong output.",
    ]
    return "\n".join(lines) + "\n"


def _on_a_hub(path: str) -> bool:
    """Whether others can get it by this name."""
    return path.count("/") == 1


def _loading(model: Mapping[str, Any], labels: Sequence[str], adapter: bool, made_here: bool) -> list[str]:
    kind = _CLASSES[model["kind"]]
    if not adapter:
        return [f"from transformers import AutoTokenizer, {kind}", *_both(f'model = {kind}.from_pretrained(".")')]
    base = '"base"' if made_here else f'"{model["path"]}"'
    if labels and not made_here:  # a head for them is the adapter's; the base's configuration knows none
        base += f", num_labels={len(labels)}"
    return [
        f"from peft import PeftModel; from transformers import AutoTokenizer, {kind}",
        *_both(f'model = PeftModel.from_pretrained({kind}.from_pretrained({base}), ".")'),
        *(["model.config.pad_token_id = tokenizer.pad_token_id"] if labels and not made_here else []),
    ]


def _both(load: str) -> list[str]:
    return [load, 'tokenizer = AutoTokenizer.from_pretrained(".")']
