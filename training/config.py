"""The job file: one frozen, typed description of a private run, made of `sections`. Unknown keys are refused.

Imports nothing heavy, so that every command can read a job in milliseconds. No data is touched here: every number is
declared, none derived from records (P11). `tuning.config` adds the sweep's own section.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, model_validator

from cluster.accounting.books import PARTITIONS, Dataset
from cluster.accounting.mechanisms import NOISE_MULTIPLIER_BOUNDS, SAMPLE_RATE_BOUNDS, Charge, DiscreteGaussian
from cluster.errors import UsageError
from training.engine.run import DPSGDRun
from training.jobfile import override, parse
from training.sections import LOSS_PARTS, Audit, Data, Evaluation, Model, Privacy, Release, Section, Training


class Job(Section):
    """One job file."""

    account: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
    privacy: Privacy
    data: Data
    model: Model
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    release: Release = Release()
    audit: Audit = Audit()

    @model_validator(mode="after")
    def _belongs_together(self) -> Job:
        model, data = self.model, self.data
        if model.reads_text != (data.text is not None):
            must = "is missing" if model.reads_text else "is for sequence-classification and causal-lm"
            raise ValueError(f"data.text: it {must}, and model.kind is {model.kind}")
        if model.reads_text and data.features:
            raise ValueError("data.features: a language model reads data.text; leave features out")
        if model.kind == "causal-lm":
            if data.label is not None:
                raise ValueError("data.label: a causal model predicts its text; leave label out")
            if self.evaluation.metric == "accuracy":
                raise ValueError("evaluation.metric: a causal model has no classes to be right about; write loss")
        elif data.text is not None and data.text.prompt:
            raise ValueError("data.text.prompt: it is for causal-lm; a classifier reads one column")
        if data.text is not None and data.text.packing == "unit":
            if model.kind != "causal-lm":
                raise ValueError("data.text.packing: unit is for causal-lm; a classifier reads one record in a row")
            if self.privacy.max_records_per_unit == 1:
                raise ValueError(
                    "data.text.packing: unit was given, and privacy.max_records_per_unit is 1; only records of one "
                    "unit share a row, leave packing out"
                )
        causal, kind = model.kind == "causal-lm", self.audit.kind
        if kind in (("mislabelled", "blank") if causal else ("rare-token",)):
            allowed = "rare-token or public" if causal else "mislabelled, blank or public"
            raise ValueError(f"audit.kind: {kind} was given; for model.kind: {model.kind} write {allowed}")
        if self.release.target == "adapter" and model.lora is None:
            raise ValueError("release.target: adapter needs model.lora; leave target out, or write weights")
        return self

    @property
    def target(self) -> str:
        """What is released: `weights` or `adapter`."""
        return self.release.target or ("adapter" if self.model.lora else "weights")

    @property
    def accounts(self) -> tuple[str, str]:
        """The names of the train and the validation account."""
        train, validation = (f"{self.account}/{partition}" for partition in PARTITIONS)
        return train, validation

    def dataset(self, sources: Sequence[str] = ()) -> Dataset:
        """The declared facts of the data, as the owner's books keep them; `sources` are HMACs."""
        return Dataset(
            name=self.account,
            unit=self.privacy.unit,
            units=self.privacy.units,
            max_records_per_unit=self.privacy.max_records_per_unit,
            validation_fraction=self.data.validation_fraction,
            sources=tuple(sources),
        )

    @property
    def canary_kind(self) -> str:
        """What kind of canaries it has; empty where it has none."""
        if not self.audit.canaries:
            return ""
        if self.audit.kind is not None:
            return self.audit.kind
        if self.model.kind != "causal-lm":
            return "mislabelled"
        return "rare-token" if self.audit.source is None else "public"

    def run(self) -> DPSGDRun:
        """The object that holds σ, C, q and T. q = expected_batch_size over the declared units in train, and as many
        canaries as are expected there.

        Raises:
            UsageError: the batch is larger than the train partition is declared to be.
        """
        train_units = self.privacy.units * (1 - self.data.validation_fraction) + self.audit.canaries / 2
        if self.training.expected_batch_size > train_units:
            raise UsageError(
                f"training.expected_batch_size: {self.training.expected_batch_size} was given; the train partition is "
                f"declared to hold {train_units:.0f} units (privacy.units × (1 − validation_fraction)), choose fewer."
            )
        if self.training.expected_batch_size / train_units < SAMPLE_RATE_BOUNDS[0]:
            raise UsageError(
                f"training.expected_batch_size: {self.training.expected_batch_size} was given; it must be at least "
                f"{SAMPLE_RATE_BOUNDS[0]:g} of the {train_units:.0f} units that are declared for train."
            )
        return DPSGDRun(
            noise_multiplier=self.training.noise_multiplier,
            max_grad_norm=self.training.max_grad_norm,
            sample_rate=self.training.expected_batch_size / train_units,
            expected_batch_size=self.training.expected_batch_size,
            steps=self.training.steps,
            block=min(self.training.block, self.training.steps),
            physical_batch_size=self.training.physical_batch_size,
            max_records_per_unit=self.privacy.max_records_per_unit,
        )

    @property
    def charged(self) -> tuple[str, ...]:
        """The accounts that a run is charged on, in the order of `charges`."""
        return self.accounts if self.evaluation.on == "validation" else self.accounts[:1]

    @property
    def histogram(self) -> DiscreteGaussian:
        """The mechanism of one evaluation on the validation partition.

        Raises:
            UsageError: its noise is less than may be charged for.
        """
        noise, most = self.evaluation.noise, self.privacy.max_records_per_unit
        if self.evaluation.metric == "loss":
            return DiscreteGaussian(noise * LOSS_PARTS, LOSS_PARTS)
        if noise < (least := NOISE_MULTIPLIER_BOUNDS[0] * most):
            raise UsageError(
                f"evaluation.noise: {noise:g} was given; a unit may move the counts by privacy.max_records_per_unit = "
                f"{most}, so it must be at least {least:g}."
            )
        return DiscreteGaussian(noise, most)

    @property
    def rungs(self) -> tuple[int, ...]:
        """The steps after which a run is judged on the way: those of `evaluation.rungs` that are below its steps."""
        return tuple(rung for rung in self.evaluation.rungs if rung < self.training.steps)

    def charges(self) -> list[Charge]:
        """What one run of this job asks for: its steps on train; on validation, unless it is judged on public records,
        one evaluation for each rung and one at the end.

        Raises:
            UsageError: a number that no run of this job could have, by its field.
        """
        train, validation = self.accounts
        for rung in self.evaluation.rungs:
            if rung % self.training.block:
                raise UsageError(
                    f"evaluation.rungs: {rung} was given; a run is judged between two blocks, so it must be a multiple "
                    f"of training.block = {self.training.block}."
                )
        charges = [self.run().charge(train)]
        if validation in self.charged:
            charges.append(Charge(validation, self.histogram, len(self.rungs) + 1, 1))
        return charges

    def with_values(self, values: dict[str, Any]) -> Job:
        """This job with dotted fields replaced, checked again."""
        return parse(type(self), override(self.model_dump(mode="json"), values))
