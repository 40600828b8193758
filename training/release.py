"""What leaves: weights as safetensors and a privacy statement, in JSON for machines, Markdown and HTML for lawyers; of
a language model a folder that transformers and PEFT load, with a model card. Nothing else leaves.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.files import put_whole, sha256, write_whole
from training import card
from training.config import Job
from training.rendering import markdown, page
from training.statement import WEIGHTS, Statement

if TYPE_CHECKING:
    from torch import nn

STATEMENT, PAGE = "statement.json", "statement.html"
MODEL = "model"  # in a run's folder, in place of WEIGHTS: what a language model leaves
# Of such a folder these leave, and no other: libraries write what they like.
LEAVING = (
    *("adapter_model.safetensors", "adapter_config.json", "model.safetensors", "config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
    *("base/model.safetensors", "base/config.json", "base/generation_config.json"),
)
METRICS = "metrics.json"  # of a rung


def write_model(model: nn.Module, folder: Path, job: Job) -> None:
    """Write what may leave of the noised `model` of `job`, whole or not at all."""
    with _apart(model):
        if not job.model.reads_text:
            write_weights(model, folder)
            return
        from training import language

        draft = folder / f".{MODEL}"
        shutil.rmtree(draft, ignore_errors=True)
        language.save(model, job, draft)
    put_whole(draft, folder / MODEL)


@contextmanager
def _apart(model: nn.Module) -> Iterator[None]:
    """DeepSpeed makes parameters views of one tensor, which libraries take for tied weights: not so in the block."""
    views = [(p, p.data) for p in model.parameters() if p.untyped_storage().nbytes() > p.numel() * p.element_size()]
    for p, view in views:
        p.data = view.clone()
    try:
        yield
    finally:
        for p, view in views:
            p.data = view


def write_weights(model: nn.Module, folder: Path) -> None:
    """Write the noised parameters of `model`, whole or not at all; of tied ones the file holds one, and says so."""
    from safetensors.torch import save_model

    save_model(model, str(folder / f".{WEIGHTS}"))
    put_whole(folder / f".{WEIGHTS}", folder / WEIGHTS)


def left(folder: Path) -> Path:
    """Where the run in `folder` left its model: a file, or a folder of a language model's; it need not be there."""
    return folder / MODEL if (folder / MODEL).is_dir() else folder / WEIGHTS


def rung_folder(folder: Path, steps: int) -> Path:
    """Where a run keeps what it was at the rung after `steps` steps."""
    return folder / f"rung-{steps}"


def keep_rung(model: nn.Module, folder: Path, job: Job, steps: int, metrics: Mapping[str, Any]) -> None:
    """Keep the noised parameters of the `model` of `job` after `steps` steps of the run in `folder`, and the noised
    metrics that it was judged to have."""
    rung = rung_folder(folder, steps)
    rung.mkdir(exist_ok=True)
    write_model(model, rung, job)
    write_whole(rung / METRICS, json.dumps({"steps": steps, **metrics}))


def kept_rungs(folder: Path) -> list[dict[str, Any]]:
    """The noised metrics of the run in `folder` at its rungs, each with its `steps`, in order."""
    kept = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob(f"rung-*/{METRICS}")]
    return sorted(kept, key=lambda one: int(one["steps"]))


def write_release(folder: Path, model: Path, said: Statement) -> Path:
    """Make `folder`/release of what a run left (see `left`) and a statement, whole or not at all; returns its path."""
    draft = folder / ".release"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    files = {name: model / name for name in LEAVING} if model.is_dir() else {WEIGHTS: model}
    digests = {}
    for name, path in files.items():
        if path.is_file():
            (draft / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, draft / name)
            digests[name] = sha256(draft / name)
    said = said.model_copy(update={"released": said.released.model_copy(update={"sha256": digests})})
    if model.is_dir():
        (draft / card.CARD).write_text(card.markdown(said), encoding="utf-8")
    write_statement(draft, said)
    return put_whole(draft, folder / "release")


def write_statement(release: Path, said: Statement) -> None:
    """Write `said` into the folder `release`, in every form that it has."""
    write_whole(release / STATEMENT, json.dumps(said.as_json(), indent=2, allow_nan=False) + "\n")
    write_whole(release / "statement.md", markdown(said))
    write_whole(release / PAGE, page(said))
