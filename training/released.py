"""A release in use: found by its run or its path, its causal model loaded, its statement passed on to what it made.

Nothing here is private, and nothing is charged: a release left when it was paid for. No code that comes with it is run.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import environment
from cluster.errors import UsageError, without_content
from cluster.files import write_whole
from cluster.screen import Screen
from training.folder import JOB
from training.release import STATEMENT

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import nn
    from transformers import PreTrainedTokenizerFast

ADAPTER = "adapter_config.json"
COST = "post-processing of what was released: costs nothing, and the guarantee above holds for it"


@dataclass(frozen=True)
class Released:
    """A release, by the run or sweep that it came from."""

    run: str
    folder: Path

    def _job(self) -> dict[str, Any]:
        """The job of the run, where the release still lies in the run's folder."""
        job = self.folder.parent / JOB
        return json.loads(job.read_text(encoding="utf-8")) if job.is_file() else {}

    @property
    def private_source(self) -> Path | None:
        """The file or folder that the run was trained on; None where that is not known here."""
        source = self._job().get("data", {}).get("source", ":")
        return None if ":" in source else Path(source)

    @property
    def model_path(self) -> str | None:
        """Where the model lay that training began with; None where that is not known here."""
        path: str | None = self._job().get("model", {}).get("path")
        return path

    def statement(self) -> dict[str, Any]:
        """What the run says of its privacy.

        Raises:
            UsageError: it is no statement.
        """
        said = None
        with contextlib.suppress(OSError, ValueError):
            said = json.loads((self.folder / STATEMENT).read_text(encoding="utf-8"))
        if not isinstance(said, dict) or "guarantee" not in said:
            raise UsageError(f"RUN: {self.folder / STATEMENT} is no privacy statement; name a release that has one.")
        return said


def released(run: str) -> Released:
    """The release of a run or sweep, by its name, or in the folder that is named.

    Raises:
        UsageError: there is none.
    """
    path = Path(run).expanduser()
    if (path / STATEMENT).is_file():
        folder = path.resolve()
        said = Released(folder.name, folder).statement().get("run")
        return Released(said if isinstance(said, str) else folder.name, folder)
    if "/" in run:
        raise UsageError(f"RUN: {run} holds no {STATEMENT}; name a release folder, or a run by its name.")
    folder = environment.run_folder(run) / "release"
    if not (folder / STATEMENT).is_file():
        raise UsageError(f"RUN: {run} released nothing; name a run or sweep that did.")
    return Released(run, folder)


def load_released(folder: Path, base: str | None = None) -> tuple[nn.Module, PreTrainedTokenizerFast]:
    """The causal model of a release, whole or an adapter on its base, and its tokenizer; no code of theirs is run.

    Args:
        base: a model's folder or hub id, for an adapter whose own base is not in its release.

    Raises:
        UsageError: the release holds none, or another kind of model.
    """
    import torch
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoTokenizer,
        GenerationConfig,
        PreTrainedTokenizerFast,
    )

    from training.language import quiet

    quiet()
    whole, adapted = str(folder), (folder / ADAPTER).is_file()
    if adapted:
        whole = _base(folder, base)
    elif not (folder / "config.json").is_file():
        raise UsageError(f"RUN: {folder} holds no language model; texts are written by what a causal-lm job released.")
    failure = None
    try:
        config = AutoConfig.from_pretrained(whole, trust_remote_code=False)
        if not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in config.architectures or ()):
            raise UsageError(
                f"RUN: {folder} holds no causal model, and another writes no texts; release a causal-lm job."
            )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise UsageError(f"RUN: the tokenizer in {folder} is no fast one; save it with tokenizer.json.")
        model: Any = AutoModelForCausalLM.from_pretrained(
            whole,
            dtype=torch.float32,  # as it was trained, whatever the base's file has
            use_safetensors=True,  # a pickle is code
            trust_remote_code=False,
        )
        model.generation_config = GenerationConfig()  # its own would fill in whatever a caller leaves out
        if adapted:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(folder))
        return model.eval(), tokenizer
    except UsageError:
        raise
    except Exception as error:  # noqa: BLE001 (a dozen libraries read such folders)
        failure = without_content(error)
    raise UsageError(
        f"RUN: the model in {folder} cannot be loaded ({failure}); check that the release is whole"
        f"{', or say by --base where the model is that it adapts' if adapted else ''}."
    )


def _base(folder: Path, otherwise: str | None) -> str:
    """The model that the adapter in `folder` belongs to: one in the release, or `otherwise`, or the hub's id it names.

    Of a model that lay in a folder a release tells the folder's name alone.
    """
    said: Any = None
    with contextlib.suppress(OSError, ValueError):
        said = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
    if not isinstance(said, dict) or not isinstance(said.get("base_model_name_or_path"), str):
        raise UsageError(f"RUN: {folder / ADAPTER} names no base model; check that the release is whole.")
    if said.get("task_type") != "CAUSAL_LM":
        raise UsageError(f"RUN: {folder} holds no causal model, and another writes no texts; release a causal-lm job.")
    base = str(said["base_model_name_or_path"])
    return str(folder / base) if (folder / base).is_dir() else otherwise or base


def check_out(out: Path, endings: Sequence[str]) -> Path:
    """See that `out` can be written, with one of `endings`; returns where its statement goes.

    Raises:
        UsageError: it is there already, or its name ends otherwise.
    """
    if out.suffix.lower() not in endings:
        raise UsageError(f"--out: {out.name} was given; its name must end in {' or '.join(endings)}.")
    said = out.with_name(f"{out.name}.statement.json")
    for path in (out, said):
        if path.exists():
            raise UsageError(f"--out: {path} is there already, and nothing is overwritten; name another file.")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"--out: the folder of {out} is not there; make it, or name another.")
    return said


def leave(source: Released, beside: Path, section: str, made: dict[str, Any]) -> None:
    """Write the statement of what was made with a release: that of its run, and a section of its own."""
    said = {**source.statement(), section: {"run": source.run, **made, "cost": COST}}
    write_whole(beside, json.dumps(said, indent=2, allow_nan=False) + "\n")


def write_parquet(table: pa.Table, out: Path) -> None:
    """Write a table, whole or not at all."""
    import pyarrow.parquet as pq

    draft = out.with_name(f".{out.name}")
    pq.write_table(table, draft)
    os.replace(draft, out)


def in_tenths(screen: Screen, what: str) -> Callable[[int, int], None]:
    """Tells how much of long work is done, each time that it is a tenth more."""
    tenth = -1

    def told(done: int, of: int) -> None:
        nonlocal tenth
        if (now := 10 * done // of) > tenth:
            tenth = now
            screen.say(f"  {done} of {of} {what}")

    return told
