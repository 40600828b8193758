"""The privacy statement of a release, as one schema: what is promised to whom, what it rests on and cost, what is not
covered. `rendering` shows it, `proof` compares it with the ledger, whoever has the JSON Schema checks its shape.

Every number comes from the ledger or from declared facts; nothing is recomputed from data. Its fixed sentences are in
`claims`.
"""

from __future__ import annotations

import datetime
import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.accounting.books import Account
from cluster.accounting.mechanisms import Charge, to_json
from cluster.environment import code_hash
from cluster.errors import UsageError
from cluster.files import sha256
from training import claims
from training.config import Job

SCHEMA: Literal["purser.privacy-statement/2"] = "purser.privacy-statement/2"
WEIGHTS = "weights.safetensors"
LIBRARIES = ("purser", "torch", "opacus", "opendp", "ray")  # and transformers, peft and deepspeed, where they were used


class Part(BaseModel):
    """A section of the statement: frozen, no unknown keys, no NaN, nothing converted on the way."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        ser_json_inf_nan="constants",  # a NaN in a metric is met by whoever writes it, and not turned into null
        serialize_by_alias=True,
        populate_by_name=True,
    )


class Setting(Part):
    """Who adds the noise, who is trusted with the records, and who sees what leaves."""

    model: str
    trusted: str
    sees: str


class Protected(Part):
    """Whom the guarantee is for, as the owner declared it when the accounts were made."""

    dataset: str
    unit: str
    adjacency: str
    max_records_per_unit: int
    declared_units: int
    delta_below_one_over_units: bool


class Guarantee(Part):
    """The (ε, δ) of each unit, and what it covers."""

    epsilon: float
    delta: float
    scope: str


class Leaves(Part):
    """What is released, and the figures that are released with it. `sha256`: of each file of the model, by its name."""

    target: str
    file: str
    metrics: dict[str, Any]
    sha256: dict[str, str] = {}


class Accounting(Part):
    """How costs are counted, and how noise and samples were drawn. `code_hash`: SHA-256 over Purser's own files."""

    method: str
    conversion: str
    sampling: str
    noise: str
    libraries: dict[str, str]
    code_hash: str


class Trained(Part):
    """How it was trained: σ, C, q, B and T as planned, the model, the optimizer, and canaries, half of them expected
    among those that it learnt from."""

    mechanism: str
    noise_multiplier: float
    max_grad_norm: float
    sample_rate: float
    expected_batch_size: int
    planned_steps: int
    canaries: Annotated[int, Field(ge=1)] | None = None
    model: dict[str, Any]
    labels: tuple[str, ...] | None = None
    optimizer: dict[str, Any]
    precision: str
    backend: str
    zero_stage: int | None = None


class Head(Part):
    """The ledger's newest entry of an account when the statement was made."""

    seq: int
    hash: str


class Planned(Part):
    """What was reserved for the run on an account: a mechanism, so many times, in blocks."""

    mechanism: dict[str, Any]
    steps: int
    block: int


class Entry(Part):
    """One charge of the run, as the ledger has it; `cost` in 1e-12 RDP at the account's order."""

    seq: int
    kind: str
    mechanism: dict[str, Any]
    steps: int
    cost: int
    hash: str


class Partition(Part):
    """One account: its budget, what is spent of it, and what this run was charged."""

    account: str
    epsilon: float
    delta: float
    order: int
    budget_cost: int
    spent_cost: int
    head: Head
    planned: Planned | None = None
    authorised_steps: int
    cost_of_run: int
    epsilon_of_run: float
    charges: tuple[Entry, ...]


class Judged(Part):
    """What the released figure is, and what its error bar means."""

    figure: str
    error: str


class Check(Part):
    """A line of NIST SP 800-226's pyramid: passed before anything left, not checked by anybody here, or excluded."""

    layer: claims.Layer
    check: str
    result: claims.Result
    how: str


class Statement(Part):
    """What a release says of its privacy. `audits`: an object for each audit that was made of it."""

    schema_: Annotated[Literal["purser.privacy-statement/2"], Field(alias="schema")]
    run: str
    made_at: str
    setting: Setting
    protected: Protected
    guarantee: Guarantee
    released: Leaves
    withheld: tuple[str, ...]
    accounting: Accounting
    training: Trained
    mode: claims.Mode
    tuning: str
    partitions: tuple[Partition, ...]
    evaluation: Judged
    public_data: str
    audits: tuple[dict[str, Any], ...] = ()
    checks: tuple[Check, ...]
    excluded: tuple[str, ...]
    generated: dict[str, Any] | None = None
    embedded: dict[str, Any] | None = None

    def as_json(self) -> dict[str, Any]:
        """The object that is written: what does not apply is not in it."""
        return self.model_dump(mode="json", exclude_none=True)


def read(path: Path, field: str) -> Statement:
    """The statement in the file at `path`.

    Args:
        field: what named it on the command line, for errors.

    Raises:
        UsageError: it is not there, no statement, or one of another schema.
    """
    try:
        text = path.read_text(encoding="utf-8")
        said = _Schema.model_validate_json(text).schema_
        if said == SCHEMA:
            return Statement.model_validate_json(text)
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no text"
        raise UsageError(f"{field}: {path} cannot be read ({why}); name a release's statement.json.") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        why = f"{where}: {first['msg'].splitlines()[0].lower()}" if first["type"] != "json_invalid" else "it is no JSON"
        raise UsageError(f"{field}: {path} is no privacy statement ({why}); name a release's statement.json.") from None
    raise UsageError(
        f"{field}: {path} is of schema {said[:60]!r}, and this Purser reads {SCHEMA}; use the Purser that wrote it, or "
        "release anew."
    )


class _Schema(BaseModel):
    """As much of a file as says what the rest of it is."""

    schema_: Annotated[str, Field(alias="schema")]


def statement(
    job: Job,
    run: str,
    accounts: Sequence[Account],
    charges: Mapping[str, Sequence[Mapping[str, Any]]],
    metrics: Mapping[str, Any],
    tuning: str,
    mode: claims.Mode = "none",
    planned: Sequence[Charge] | None = None,
) -> Statement:
    """The privacy statement of one run.

    Args:
        run: its lease.
        accounts: both accounts as they stand now.
        charges: account → its `authorise` entries of this run.
        tuning: in words, whether the run was chosen among others, and where those were charged.
        planned: what was reserved for it, where that is not what a run of `job` asks for.
    """
    first = accounts[0]
    reserved = {charge.account: charge for charge in (job.charges() if planned is None else planned)}
    return Statement(
        schema_=SCHEMA,
        run=run,
        made_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        setting=Setting(**claims.SETTING),
        protected=Protected(
            dataset=job.account,
            unit=first.dataset.unit,
            adjacency=claims.ADJACENCY,
            max_records_per_unit=first.dataset.max_records_per_unit,
            declared_units=first.dataset.units,
            delta_below_one_over_units=first.delta * first.dataset.units < 1,
        ),
        guarantee=Guarantee(
            epsilon=first.epsilon,
            delta=first.delta,
            scope=claims.SCOPE,
        ),
        released=Leaves(target=job.target, file=file_of(job), metrics=dict(metrics)),
        withheld=claims.withheld(mode),
        accounting=Accounting(
            method=claims.METHOD,
            conversion=claims.CONVERSION,
            sampling=claims.sampling(job.training.workers),
            noise=claims.NOISE,
            libraries={name: importlib.metadata.version(name) for name in _libraries(job)},
            code_hash=code_hash(),
        ),
        training=_trained(job),
        mode=mode,
        tuning=tuning,
        partitions=tuple(_partition(one, charges[one.account], reserved.get(one.account)) for one in accounts),
        evaluation=Judged(figure=job.evaluation.measured, error=job.evaluation.error),
        public_data=_public_data(job),
        checks=tuple(
            Check(layer=layer, check=check, result=result, how=how)
            for layer, check, result, how in claims.checks(job, mode)
        ),
        excluded=claims.EXCLUDED,
    )


def file_of(job: Job) -> str:
    """The file in a release of `job` that holds what was trained."""
    if not job.model.reads_text:
        return WEIGHTS
    return "adapter_model.safetensors" if job.target == "adapter" else "model.safetensors"


def _partition(account: Account, entries: Sequence[Mapping[str, Any]], planned: Charge | None) -> Partition:
    cost = sum(entry["cost"] for entry in entries)
    names = Entry.model_fields
    return Partition(
        account=account.account,
        epsilon=account.epsilon,
        delta=account.delta,
        order=account.order,
        budget_cost=account.budget_cost,
        spent_cost=account.spent_cost,
        head=Head(**account.head),
        planned=None
        if planned is None
        else Planned(mechanism=to_json(planned.mechanism), steps=planned.steps, block=planned.block),
        authorised_steps=sum(entry["steps"] for entry in entries),
        cost_of_run=cost,
        epsilon_of_run=account.epsilon_of(cost),
        charges=tuple(Entry(**{name: entry[name] for name in names}) for entry in entries),
    )


def _trained(job: Job) -> Trained:
    plan, label = job.run(), job.data.label
    return Trained(
        mechanism="DP-SGD",
        noise_multiplier=plan.noise_multiplier,
        max_grad_norm=plan.max_grad_norm,
        sample_rate=plan.sample_rate,
        expected_batch_size=plan.expected_batch_size,
        planned_steps=plan.steps,
        canaries=job.audit.canaries or None,
        model=job.model.public().model_dump(mode="json", exclude_none=True),
        labels=label.categories if job.model.reads_text and label else None,
        optimizer=job.training.optimizer.model_dump(mode="json"),
        precision=job.training.precision,
        backend=job.training.backend,
        zero_stage=None if job.training.zero is None else job.training.zero_stage,
    )


def _libraries(job: Job) -> tuple[str, ...]:
    text = ("transformers", *(("peft",) if job.model.lora else ())) if job.model.reads_text else ()
    return (*LIBRARIES, *text, *(("deepspeed",) if job.training.zero is not None else ()))


def _public_data(job: Job) -> str:
    """What was taken to be public: weights that training began with, and files on which the model was judged or from
    which its canaries are."""
    public = []
    path = job.model.path
    if path is not None and not job.model.made_here:
        files = sorted(Path(path).glob("*.safetensors")) if Path(path).is_absolute() else []
        content = "".join(f", {file.name} SHA-256 {sha256(file)}" for file in files)
        public.append(f"the pretrained model {job.model.public().path}{content}, whose weights training began with")
    uses = (job.evaluation.source, "on which the model was judged"), (job.audit.source, "from which its canaries are")
    for source, use in uses:
        if source is not None:
            # What has gone since has no content to name, and the model may leave all the same.
            content = f" (SHA-256 {sha256(Path(source))})" if Path(source).is_file() else ""
            public.append(f"{Path(source).name}{content}, declared public by the job, {use}")
    return "; ".join(public) or "none"
