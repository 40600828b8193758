"""The sections of a job file, frozen and typed. Unknown keys are refused; every number is declared, none derived from
records (P11). `config` makes a job of them, `tuning.config` adds the sweep's own.

Imports nothing heavy, so that every command can read a job in milliseconds. No data is touched here.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cluster.accounting.mechanisms import NOISE_MULTIPLIER_BOUNDS
from training.engine.zero_config import configuration as zero_configuration

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
OTHER = "other"  # the group of records that no declared category fits
LOSS_PARTS = 1000  # the whole numbers that a unit's loss is counted in: all of them are its bound
Count = Annotated[int, Field(ge=1, le=10_000_000)]


class Section(BaseModel):
    """A section of the job file: frozen, no unknown keys, no NaN, no silent conversions of true to 1."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_booleans(cls, values: Any) -> Any:
        for key, value in values.items() if isinstance(values, dict) else ():
            if any(isinstance(one, bool) for one in (value if isinstance(value, list) else [value])):
                raise ValueError(f"{key}: {value} was given; no field is true or false, write a number or a word")
        return values


class Privacy(Section):
    """What the owner grants over this data, for everything that ever happens to it."""

    epsilon: Annotated[float, Field(ge=1e-3, le=100)]
    delta: Annotated[float, Field(gt=0, lt=1)]
    unit: str = "row"
    units: Annotated[int, Field(ge=2, le=10**12)]
    max_records_per_unit: Annotated[int, Field(ge=1, le=1_000_000)] = 1

    @model_validator(mode="after")
    def _checks(self) -> Privacy:
        if self.delta * self.units >= 1:
            raise ValueError(f"delta: it must be below 1/units = {1 / self.units:.3g}")
        if self.unit == "row" and self.max_records_per_unit != 1:
            raise ValueError("max_records_per_unit: it must be 1 where the unit is a row")
        return self


class Feature(Section):
    """A declared column: a number with its `range`, or a category with its `categories`. Never fitted to data."""

    range: tuple[float, float] | None = None
    categories: Annotated[tuple[str, ...] | None, Field(min_length=1)] = None

    @model_validator(mode="after")
    def _checks(self) -> Feature:
        if (self.range is None) == (self.categories is None):
            raise ValueError("give either range: [low, high] or categories: [...]")
        if self.range is not None and not 0 < self.range[1] - self.range[0] < 1e300:
            raise ValueError("range: the low end must be below the high end, and both ordinary numbers")
        if self.categories is not None and len(set(self.categories)) != len(self.categories):
            raise ValueError("categories: each may be named once")
        return self


class Label(Section):
    """The column to predict and its declared categories; a record with another label counts as the first."""

    column: str
    categories: Annotated[tuple[str, ...], Field(min_length=2)]

    @model_validator(mode="after")
    def _checks(self) -> Label:
        if len(set(self.categories)) != len(self.categories):
            raise ValueError("categories: each may be named once")
        return self


class Text(Section):
    """The column that a language model reads, in `max_length` tokens: what is longer is cut, what is shorter is padded.

    With `prompt`, a column that stands before it: a causal model sees it, and does not learn to say it. With `packing`
    of unit, records of one unit share a row of `max_length` tokens where they fit, each an example of its own; only
    those that a causal model learns from.
    """

    column: str
    prompt: str | None = None
    max_length: Annotated[int, Field(ge=2, le=65_536)] = 128
    packing: Literal["none", "unit"] = "none"


class Data(Section):
    """Where the records are and how they are read; declared, so that nothing is learnt from them."""

    source: str
    validation_fraction: Annotated[float, Field(ge=0.01, le=0.9)] = 0.2
    features: dict[str, Feature] = {}
    text: Text | None = None
    label: Label | None = None

    @property
    def width(self) -> int:
        """How many numbers a record becomes."""
        return sum(len(f.categories) if f.categories is not None else 1 for f in self.features.values())


class Lora(Section):
    """Low-rank adapters beside the linear layers whose names end in one of `target_modules` (Hu et al. 2022), scaled by
    alpha / r; nothing else of the model trains, but the head of a classifier."""

    r: Annotated[int, Field(ge=1, le=1024)] = 8
    alpha: Positive = 16.0
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)]


class Model(Section):
    """What is trained: on features linear (softmax regression), mlp (one hidden layer) or cnn (two convolutions); on
    text a transformers model from `path` (a folder, a hub's id, or `tiny:bert` and `tiny:llama`, made on the spot), in
    full or by `lora`."""

    kind: Literal["linear", "mlp", "cnn", "sequence-classification", "causal-lm"]
    hidden: Annotated[int, Field(ge=1, le=65536)] = 64
    channels: Annotated[int, Field(ge=1, le=4096)] = 16
    image: tuple[Count, Count, Count] | None = None
    path: str | None = None
    lora: Lora | None = None

    @property
    def reads_text(self) -> bool:
        """Whether it is a language model."""
        return self.kind in ("sequence-classification", "causal-lm")

    @property
    def made_here(self) -> bool:
        """Whether its first weights are made on the spot, and are nobody's."""
        return self.path is None or self.path.startswith("tiny:")

    def public(self) -> Model:
        """As others may read of it: of a folder its name, for where it lies is nobody's business."""
        if self.path is None or not Path(self.path).is_absolute():
            return self
        return self.model_copy(update={"path": Path(self.path).name})

    @model_validator(mode="after")
    def _checks(self) -> Model:
        if self.reads_text and not self.path:
            raise ValueError(f"path: it is missing; for kind: {self.kind} name a folder, a hub's id, or tiny:bert")
        for field in ("path", "lora"):
            if getattr(self, field) is not None and not self.reads_text:
                raise ValueError(f"{field}: it is for sequence-classification and causal-lm; leave it out")
        return self


class Optimizer(Section):
    """The optimizer that applies the noised gradients: sgd, or adam with decoupled weight decay (AdamW)."""

    name: Literal["sgd", "adam"] = "sgd"
    learning_rate: Positive = 1.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: Annotated[int, Field(ge=0, le=10_000_000)] = 0


class Training(Section):
    """DP-SGD: σ, C, B, T and how they are run; with device gpu each worker has a GPU of its own.

    With backend deepspeed the optimizer's states are sharded by ZeRO in stage `zero_stage`, and `deepspeed` is what of
    a DeepSpeed configuration is added to the one that is made (`training.engine.zero_config`).
    """

    backend: Literal["torch", "deepspeed"] = "torch"
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 2
    deepspeed: dict[str, Any] = {}
    workers: Annotated[int, Field(ge=1, le=64)] = 2
    device: Literal["cpu", "gpu"] = "cpu"
    steps: Count = 80
    expected_batch_size: Count = 256
    physical_batch_size: Count = 256
    noise_multiplier: Annotated[float, Field(ge=NOISE_MULTIPLIER_BOUNDS[0], le=NOISE_MULTIPLIER_BOUNDS[1])] = 8.0
    max_grad_norm: Annotated[float, Field(ge=1e-6, le=1e6)] = 1.0
    optimizer: Optimizer = Optimizer()
    block: Count = 20
    clipping: Literal["bookkeeping", "hooks"] = "bookkeeping"
    precision: Literal["fp32", "bf16"] = "fp32"
    activation_checkpointing: Literal["none", "full"] = "none"

    @model_validator(mode="after")
    def _checks(self) -> Training:
        if self.backend == "torch":
            if self.deepspeed:
                raise ValueError("deepspeed: it is for backend: deepspeed; leave it out, or write that")
        elif self.clipping == "hooks":
            raise ValueError(
                "clipping: hooks lets autograd sum gradients on parameters, where DeepSpeed would take them up before "
                "there is noise; write bookkeeping"
            )
        self.zero  # noqa: B018 (what it refuses, a job may not have)
        return self

    @property
    def zero(self) -> dict[str, Any] | None:
        """The DeepSpeed configuration, public; None with backend torch."""
        if self.backend == "torch":
            return None
        return zero_configuration(self.zero_stage, self.precision, self.physical_batch_size, self.deepspeed)


class Groups(Section):
    """A declared column by whose categories the accuracy is told as well; other values are one more group, `other`."""

    column: str
    categories: Annotated[tuple[str, ...], Field(min_length=1, max_length=100)]

    @model_validator(mode="after")
    def _checks(self) -> Groups:
        if len(set(self.categories)) != len(self.categories) or OTHER in self.categories:
            raise ValueError(f"categories: each may be named once, and {OTHER} is the name of all others")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Of all groups, in the order of their cells."""
        return (*self.categories, OTHER)


class Evaluation(Section):
    """How the model is judged, at the end and at each of `rungs`, the steps after which it is judged on the way.

    On the validation partition a (correct, wrong) histogram is released with discrete Gaussian noise of standard
    deviation `noise` records in each cell, and charged. With metric `loss` it is the mean over units of their records'
    mean loss, each clipped to `loss_bound` nats, and `noise` is in units. With `groups` each group has two cells of its
    own. A unit moves all of them together by no more than it moved two, so that the price stays what it is; the noise
    of the whole figure is that of all cells.

    On public the records are those of `source`, a file like the data's that is nobody's secret: free, and exact.
    """

    on: Literal["validation", "public"] = "validation"
    source: str | None = None
    metric: Literal["accuracy", "loss"] = "accuracy"
    loss_bound: Positive = 10.0
    noise: Annotated[float, Field(ge=0.1, le=1e5)] = 5.0
    rungs: Annotated[tuple[Count, ...], Field(max_length=100)] = ()
    groups: Groups | None = None

    @model_validator(mode="after")
    def _checks(self) -> Evaluation:
        if any(low >= high for low, high in itertools.pairwise(self.rungs)):
            raise ValueError("rungs: each must be above the one before it")
        if self.on == "public" and not self.source:
            raise ValueError("source: it is missing; with on: public, name a file of records that are nobody's secret")
        if self.on == "validation" and self.source:
            raise ValueError("source: it is read with on: public only; the validation partition is part of data.source")
        if self.noise > self.most_noise:
            raise ValueError(f"noise: {self.noise:g} was given; for a loss it is in units, {self.most_noise:g} at most")
        return self

    @property
    def most_noise(self) -> float:
        """The largest `noise` that a release can have."""
        return NOISE_MULTIPLIER_BOUNDS[1] / (LOSS_PARTS if self.metric == "loss" else 1)

    @property
    def most(self) -> float:
        """The largest figure that it can come to: 1, or for a loss its bound in nats."""
        return self.loss_bound if self.metric == "loss" else 1.0

    @property
    def measured(self) -> str:
        """What it releases, in words."""
        what = "clipped loss" if self.metric == "loss" else "accuracy"
        return f"noised {what}" if self.on == "validation" else f"{what} on public records"

    @property
    def error(self) -> str:
        """What its error bars are, in words."""
        return f"95 % of the {'noise' if self.on == 'validation' else 'chance of which public records were judged'}"


class Release(Section):
    """What leaves: the weights, or of a model with adapters the adapters alone, which is the default there."""

    target: Literal["weights", "adapter"] | None = None


class Audit(Section):
    """Canaries: `canaries` made-up records, each a unit of its own and in the train partition by a fair coin, by which
    `purser audit RUN` later sees how much of the claimed ε shows. The model that leaves has learnt from them, too.

    `kind`: mislabelled (values at the ends of their declared ranges, any of the categories, random tokens, and a label
    drawn for them), blank (nothing but one such value) or, for a causal model, rare-token (random tokens, of which the
    last is to be said). With `source` they are records of a file that is nobody's secret: public as they are,
    mislabelled with another label. `guesses` is how many guesses are made; by default it is chosen from public numbers
    before the run begins.
    """

    canaries: Annotated[int, Field(ge=0, le=100_000)] = 0
    kind: Literal["mislabelled", "blank", "rare-token", "public"] | None = None
    source: str | None = None
    guesses: Annotated[int, Field(ge=2, le=100_000)] | None = None
    confidence: Annotated[float, Field(ge=0.5, le=1 - 1e-7)] = 0.95

    @model_validator(mode="after")
    def _checks(self) -> Audit:
        if 0 < self.canaries < 10:
            raise ValueError(f"canaries: {self.canaries} was given; write 0, or 10 or more: fewer show nothing")
        if not self.canaries and (self.kind, self.source, self.guesses) != (None, None, None):
            raise ValueError("canaries: it is 0, and the rest is for audits only; write how many, such as 500")
        if self.guesses is not None and self.guesses > self.canaries:
            raise ValueError(f"guesses: {self.guesses} was given; there is one for each of {self.canaries} at most")
        if self.kind in ("blank", "rare-token") and self.source is not None:
            raise ValueError(f"source: it is for kind: public and mislabelled; leave it out with {self.kind}")
        if self.kind == "public" and self.source is None:
            raise ValueError(
                "source: it is missing; with kind: public, name a file of records that are nobody's secret"
            )
        return self
