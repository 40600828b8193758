"""What leaves: weights as safetensors and a privacy statement, in JSON for machines and Markdown for lawyers; of a
language model a folder that transformers and PEFT load, with a model card. Nothing else leaves.

Every number of a statement comes from the ledger or from declared facts; nothing is recomputed from data.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.accounting.books import Account
from cluster.accounting.costs import epsilon_text
from cluster.files import put_whole, write_whole
from training import card
from training.config import Job
from training.metrics import by_group, in_words

if TYPE_CHECKING:
    from torch import nn

WEIGHTS = "weights.safetensors"
MODEL = "model"  # in a run's folder, in place of WEIGHTS: what a language model leaves
# Of such a folder these leave, and no other: libraries write what they like.
LEAVING = (
    *("adapter_model.safetensors", "adapter_config.json", "model.safetensors", "config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
    *("base/model.safetensors", "base/config.json", "base/generation_config.json"),
)
METRICS = "metrics.json"  # of a rung
LIBRARIES = ("purser", "torch", "opacus", "opendp", "ray")  # and transformers, peft and deepspeed, where they were used
EXCLUDED = (
    "timing, memory use, crashes and out-of-memory stops are side channels outside the guarantee",
    "the guarantee is for idealised real arithmetic with computationally secure randomness; floating-point effects are "
    "mitigated (53-bit noise, a public rounding grid, a margin in the noise) but not proven harmless",
    "the data's owner, this machine and the cluster's operators are trusted; whoever sees only what leaves is not",
    "the books bound what this ledger saw: the same people in another file or another ledger are charged there",
)


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


def file_of(job: Job) -> str:
    """The file in a release of `job` that holds what was trained."""
    if not job.model.reads_text:
        return WEIGHTS
    return "adapter_model.safetensors" if job.target == "adapter" else "model.safetensors"


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


def statement(
    job: Job,
    run: str,
    accounts: Sequence[Account],
    charges: Mapping[str, Sequence[Mapping[str, Any]]],
    metrics: Mapping[str, Any],
    tuning: str,
) -> dict[str, Any]:
    """The privacy statement of one run.

    Args:
        accounts: both accounts as they stand now.
        charges: account → its `authorise` entries of this run.
        tuning: in words, whether the run was chosen among others, and where those were charged.
    """
    plan = job.run()
    partitions = []
    for account in accounts:
        mine = charges[account.account]
        cost = sum(entry["cost"] for entry in mine)
        partitions.append(
            {
                "account": account.account,
                "epsilon": account.epsilon,
                "delta": account.delta,
                "order": account.order,
                "budget_cost": account.budget_cost,
                "spent_cost": account.spent_cost,
                "head": account.head,
                "cost_of_run": cost,
                "epsilon_of_run": account.epsilon_of(cost),
                "charges": [
                    {key: entry[key] for key in ("seq", "kind", "mechanism", "steps", "cost", "hash")} for entry in mine
                ],
            }
        )
    first = accounts[0]
    return {
        "schema": "purser.privacy-statement/1",
        "run": run,
        "made_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "protected": {
            "dataset": job.account,
            "unit": first.dataset.unit,
            "adjacency": "one unit with all of its records added or removed",
            "max_records_per_unit": first.dataset.max_records_per_unit,
            "declared_units": first.dataset.units,
        },
        "guarantee": {
            "epsilon": first.epsilon,
            "delta": first.delta,
            "scope": "everything ever released from this dataset through this ledger, tuning and evaluation included",
        },
        "released": {"target": job.target, "file": file_of(job), "metrics": dict(metrics)},
        "accounting": {
            "method": "Rényi filter at one fixed integer order per account (Feldman and Zrnic 2021); conversion of "
            "Canonne, Kamath and Steinke 2020; costs are integers of 1e-12 RDP, rounded up",
            "sampling": "Poisson over units at sample_rate, as accounted, by a ChaCha20 keystream from OS entropy",
            "libraries": {name: importlib.metadata.version(name) for name in _libraries(job)},
        },
        "training": {
            "mechanism": "DP-SGD",
            "noise_multiplier": plan.noise_multiplier,
            "max_grad_norm": plan.max_grad_norm,
            "sample_rate": plan.sample_rate,
            "expected_batch_size": plan.expected_batch_size,
            "planned_steps": plan.steps,
            "model": job.model.public().model_dump(mode="json", exclude_none=True),
            **({"labels": list(label.categories)} if job.model.reads_text and (label := job.data.label) else {}),
            "optimizer": job.training.optimizer.model_dump(mode="json"),
            "precision": job.training.precision,
            "backend": job.training.backend,
            **({} if job.training.zero is None else {"zero_stage": job.training.zero_stage}),
        },
        "tuning": tuning,
        "partitions": partitions,
        "evaluation": {"figure": job.evaluation.measured, "error": job.evaluation.error},
        "public_data": _public_data(job),
        "audits": "none",
        "excluded": list(EXCLUDED),
    }


def write_release(folder: Path, model: Path, said: Mapping[str, Any]) -> Path:
    """Make `folder`/release of what a run left (see `left`) and a statement, whole or not at all; returns its path."""
    draft = folder / ".release"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    if model.is_dir():
        for name in LEAVING:
            if (model / name).is_file():
                (draft / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(model / name, draft / name)
        (draft / card.CARD).write_text(card.markdown(said), encoding="utf-8")
    else:
        shutil.copyfile(model, draft / WEIGHTS)
    (draft / "statement.json").write_text(json.dumps(said, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    (draft / "statement.md").write_text(markdown(said), encoding="utf-8")
    return put_whole(draft, folder / "release")


def _libraries(job: Job) -> tuple[str, ...]:
    text = ("transformers", *(("peft",) if job.model.lora else ())) if job.model.reads_text else ()
    return (*LIBRARIES, *text, *(("deepspeed",) if job.training.zero is not None else ()))


def _public_data(job: Job) -> str:
    """What was taken to be public: weights that training began with, and the file on which the model was judged."""
    public = []
    path = job.model.path
    if path is not None and not job.model.made_here:
        files = sorted(Path(path).glob("*.safetensors")) if Path(path).is_absolute() else []
        content = "".join(f", {file.name} SHA-256 {_sha256(file)}" for file in files)
        public.append(f"the pretrained model {job.model.public().path}{content}, whose weights training began with")
    if (source := job.evaluation.source) is not None:
        # What has gone since has no content to name, and the model may leave all the same.
        content = f" (SHA-256 {_sha256(Path(source))})" if Path(source).is_file() else ""
        public.append(f"{Path(source).name}{content}, declared public by the job, on which the model was judged")
    return "; ".join(public) or "none"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def markdown(said: Mapping[str, Any]) -> str:
    """The statement for people."""
    protected, guarantee, training = said["protected"], said["guarantee"], said["training"]
    unit = "record (row)" if protected["unit"] == "row" else protected["unit"]
    lines = [
        f"# Privacy statement of {said['run']}",
        "",
        f"Each {unit} of the dataset **{protected['dataset']}** is protected by "
        f"({guarantee['epsilon']:g}, {guarantee['delta']:g})-differential privacy for {guarantee['scope']}.",
        "",
        f"- Neighbouring datasets differ by {protected['adjacency']}; at most {protected['max_records_per_unit']} "
        f"record(s) of a unit are used; {protected['declared_units']} units were declared.",
        f"- Released: the {said['released']['target']} in `{said['released']['file']}`"
        + (", and the metrics below." if said["released"]["metrics"] else "."),
        f"- Mechanism: {training['mechanism']}, noise_multiplier {training['noise_multiplier']:g}, max_grad_norm "
        f"{training['max_grad_norm']:g}, sample_rate {training['sample_rate']:.6g}, {training['planned_steps']} steps "
        f"planned. Sampling: {said['accounting']['sampling']}.",
        f"- Tuning: {said['tuning']}",
        f"- Accounting: {said['accounting']['method']}.",
        f"- Public data used: {said['public_data']}. Audits: {said['audits']}.",
        "",
        "| account | budget ε | δ | order | ε of this run | spent of the budget | ledger head |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for part in said["partitions"]:
        lines.append(
            f"| {part['account']} | {part['epsilon']:g} | {part['delta']:g} | {part['order']} "
            f"| {epsilon_text(part['epsilon_of_run'])} | {part['spent_cost'] / part['budget_cost']:.1%} "
            f"| {part['head']['seq']}:{part['head']['hash']} |"
        )
    lines += [
        "",
        "A unit is in one partition only, so the guarantee of the two accounts together is that of one. The ε of this "
        "run alone may not be added to that of others: the budget is what bounds them all.",
        "",
        "## Charges of this run",
        "",
        "| account | entry | steps | cost (1e-12 RDP) | hash |",
        "| --- | --- | --- | --- | --- |",
    ]
    for part in said["partitions"]:
        for charge in part["charges"]:
            lines.append(
                f"| {part['account']} | {charge['seq']} | {charge['steps']} | {charge['cost']:,} "
                f"| {charge['hash'][:16]}… |"
            )
    metrics = said["released"]["metrics"]
    if metrics:
        judged = said["evaluation"]
        lines += ["", f"## Metrics: {judged['figure']}", "", f"{in_words(metrics)} ({judged['error']}).".capitalize()]
        lines += ["", *(f"- {line}" for line in by_group(metrics))]
    lines += ["", "## Not covered", "", *(f"- {line}." for line in said["excluded"]), ""]
    lines.append("Libraries: " + ", ".join(f"{k} {v}" for k, v in said["accounting"]["libraries"].items()) + ".")
    return "\n".join(lines) + "\n"
