"""The job file with its `tuning` section: the search space and how it is searched.

Imports nothing heavy. A space is drawn from public numbers; it may not depend on the data.
"""

from __future__ import annotations

import builtins
import itertools
import math
import secrets
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cluster.accounting.costs import least_noise, most_steps, price
from cluster.accounting.mechanisms import NOISE_MULTIPLIER_BOUNDS, STEPS_BOUNDS, Charge
from cluster.accounting.orders import selection_of
from cluster.accounting.selection import POISSON
from cluster.errors import UsageError
from training.config import Job
from training.sections import Count, Section

MOST_CORNERS = 256


COSTLY = ("training.noise_multiplier", "training.steps", "training.expected_batch_size")  # they change a trial's cost
SOLVABLE = COSTLY[:2]


class Dimension(Section):
    """One searched field: choice, uniform, loguniform or int, each between declared ends; or the word auto, for a field
    that is not searched but solved: see `SweepJob.solved`."""

    solve: Literal["auto"] | None = None
    choice: Annotated[tuple[Any, ...] | None, Field(min_length=1)] = None
    uniform: tuple[float, float] | None = None
    loguniform: tuple[float, float] | None = None
    int: tuple[builtins.int, builtins.int] | None = None

    @model_validator(mode="before")
    @classmethod
    def _word(cls, values: Any) -> Any:
        if isinstance(values, str):
            if values != "auto":
                raise ValueError(f"{values!r} was given; write auto, or one of choice, uniform, loguniform, int")
            return {"solve": values}
        return values

    @model_validator(mode="after")
    def _checks(self) -> Dimension:
        if self.solve and not (self.choice or self.uniform or self.loguniform or self.int):
            return self
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("give exactly one of choice, uniform, loguniform, int")
        ends = self.uniform or self.loguniform or self.int
        if ends and not ends[0] < ends[1]:
            raise ValueError(f"{given[0]}: the low end must be below the high end")
        if self.loguniform and self.loguniform[0] <= 0:
            raise ValueError("loguniform: the low end must be above 0")
        return self

    def extremes(self) -> tuple[Any, ...]:
        """Values that bound what it may take: every choice, or both ends."""
        if self.choice is not None:
            return self.choice
        return self.uniform or self.loguniform or self.int or ()

    def at(self, share: float) -> Any:
        """The value at `share` in [0, 1) of the dimension."""
        if self.choice is not None:
            return self.choice[math.floor(share * len(self.choice))]
        if self.int is not None:
            return self.int[0] + math.floor(share * (self.int[1] - self.int[0] + 1))
        if self.uniform is not None:
            return self.uniform[0] + share * (self.uniform[1] - self.uniform[0])
        assert self.loguniform is not None
        return self.loguniform[0] * (self.loguniform[1] / self.loguniform[0]) ** share


class Repeats(Section):
    """How often a selection repeats: K is truncated negative binomial of shape `eta` (0 logarithmic, by default 0.5, 1
    geometric), or Poisson. Its mean is `tuning.trials`."""

    distribution: Literal["truncated_negative_binomial", "poisson"] = "truncated_negative_binomial"
    eta: float | None = None

    @model_validator(mode="after")
    def _checks(self) -> Repeats:
        if self.eta not in (None, 0, 0.5, 1):
            raise ValueError(f"eta: {self.eta:g} was given; it must be 0, 0.5 or 1")
        if self.distribution == "poisson" and self.eta is not None:
            raise ValueError("eta: it shapes the truncated_negative_binomial alone; leave it out for poisson")
        return self

    @property
    def shape(self) -> float:
        """As `cluster.accounting.selection` has it."""
        if self.distribution == "poisson":
            return POISSON
        return 0.5 if self.eta is None else self.eta


class Asha(Section):
    """Rungs of asynchronous successive halving: after `grace_period` steps, by default one block, and then each time
    after `reduction_factor` times as many; of the trials at a rung the better 1 in `reduction_factor` go on."""

    grace_period: Count | None = None
    reduction_factor: Literal[2, 3, 4] = 3


class Tuning(Section):
    """How the sweep searches. Without a space there is one candidate: the job as it stands.

    In select mode every candidate is drawn from the space independently, those of a grid with equal chances.
    `reserve_for_final`: the steps for which the winner is trained once more; held back before the first trial.
    """

    mode: Literal["filter", "select"] = "filter"
    trials: Annotated[int, Field(ge=1, le=10_000)] = 8
    space: dict[str, Dimension] = {}
    search: Literal["random", "grid", "optuna"] = "random"
    scheduler: Literal["none", "asha"] = "none"
    asha: Asha = Asha()
    repeats: Repeats = Repeats()
    reserve_for_final: Annotated[int, Field(ge=0, le=STEPS_BOUNDS[1])] = 0

    @model_validator(mode="after")
    def _checks(self) -> Tuning:
        solved = [name for name, dimension in self.space.items() if dimension.solve]
        for name, dimension in self.space.items():
            if not name.startswith(("training.", "model.")):
                raise ValueError(f"space: {name} cannot be searched, only fields of training and model")
            if dimension.solve and name not in SOLVABLE:
                raise ValueError(f"space: {name} cannot be auto, only {' or '.join(SOLVABLE)} can be solved for")
            if self.search == "grid" and not dimension.solve and dimension.choice is None:
                raise ValueError(f"space: {name} needs choice: [...] for search: grid, or use search: random")
        if len(solved) > 1:
            raise ValueError(f"space: {' and '.join(solved)} are both auto; only one of them can be solved for")
        if self.mode == "select":
            self._check_select()
        return self

    def drawn(self) -> dict[str, Any]:
        """A candidate of the space at random, independent of all others, without what is auto; field → value.

        These numbers are public or, in a selection, sealed: none of the engine's keys are used for them.
        """
        return {name: dimension.at(secrets.randbits(53) / 2**53) for name, dimension in self.searched.items()}

    def _check_select(self) -> None:
        """Candidates of a private selection are drawn alike and independently, and only the best is released."""
        if self.trials < 2 and self.repeats.distribution != "poisson":
            raise ValueError("trials: 1 was given; in select mode it is the mean of K, choose 2 or more")
        for name in ("training.workers", "training.backend", "training.zero_stage", "model.path"):
            if name in self.space:
                raise ValueError(
                    f"space: {name} cannot be searched in select mode, its worker groups serve any candidate"
                )
        if self.search == "optuna":
            raise ValueError("search: optuna is adaptive: it learns from results; mode: select needs random or grid")
        if self.scheduler != "none":
            raise ValueError(
                f"scheduler: {self.scheduler} lets trials decide on each other; mode: select needs scheduler: none"
            )
        if self.reserve_for_final:
            raise ValueError(
                "reserve_for_final: mode: select releases the best candidate itself; leave it out, or use mode: filter"
            )
        for name in COSTLY if self.solved else ():
            if (dimension := self.searched.get(name)) and dimension.choice is None:
                raise ValueError(
                    f"space: {name} needs choice: [...] beside {self.solved}: auto in mode: select, which prices every "
                    "candidate beforehand"
                )

    @property
    def searched(self) -> dict[str, Dimension]:
        """The dimensions that values are drawn for."""
        return {name: dimension for name, dimension in self.space.items() if not dimension.solve}

    @property
    def solved(self) -> str | None:
        """The field that is auto, if there is one."""
        return next((name for name, dimension in self.space.items() if dimension.solve), None)

    def rungs(self, steps: int, block: int) -> tuple[int, ...]:
        """The steps after which ASHA judges a trial of `steps` steps; `block` is the sweep's, so that all trials have
        rungs in common."""
        at, found = self.asha.grace_period or block, []
        while at < steps:
            found.append(at)
            at *= self.asha.reduction_factor
        return tuple(found)


class SweepJob(Job):
    """A job file with everything in it."""

    tuning: Tuning = Tuning()

    @model_validator(mode="after")
    def _checks(self) -> SweepJob:
        if self.evaluation.rungs and self.tuning.mode == "select":
            raise ValueError("evaluation.rungs: mode: select releases one accuracy, of the best; leave rungs out")
        if self.tuning.scheduler == "asha":
            if self.evaluation.rungs:
                raise ValueError("evaluation.rungs: tuning.asha says at which steps trials are judged; leave it out")
            grace, block = self.tuning.asha.grace_period, self.training.block
            if grace and grace % block:
                raise ValueError(
                    f"tuning.asha.grace_period: {grace} was given; trials are judged between two blocks, so it must be "
                    f"a multiple of training.block = {block}"
                )
        return self

    @property
    def plain(self) -> Job:
        """The job of one run, without the sweep."""
        return Job.model_validate(self.model_dump(mode="json", exclude={"tuning"}))

    def check_swept(self) -> None:
        """See that it may be a sweep.

        Raises:
            UsageError: it has canaries: an audit's bound is for one run, not for the one that was chosen of several.
        """
        if self.audit.canaries:
            raise UsageError(
                f"audit.canaries: {self.audit.canaries} was given, and a sweep is not audited; write audit.canaries=0 "
                "behind the job, and audit one run of it with purser train."
            )

    def candidate(self, values: dict[str, Any]) -> Job:
        """The run of one trial, with the rungs at which its scheduler judges it.

        Raises:
            UsageError: a value that the field does not allow, named.
        """
        run = self.plain.with_values(values)
        if self.tuning.scheduler == "none":
            return run
        return run.with_values({"evaluation.rungs": list(self.tuning.rungs(run.training.steps, self.training.block))})

    def final(self, values: dict[str, Any]) -> Job:
        """The run that trains the configuration `values` once more, after all trials."""
        return self.plain.with_values({**values, "training.steps": self.tuning.reserve_for_final})

    def solved(self, values: dict[str, Any], order: int | None) -> dict[str, Any]:
        """`values` with the field that is auto solved, so that the candidate costs at `order` of the train account what
        the job as it stands does, or less by no more than rounding. Without an order that field stays as it stands.

        Raises:
            UsageError: no value that the field may have is cheap enough.
        """
        name = self.tuning.solved
        if name is None or order is None:
            return values
        allowed = price(self.plain.charges()[0], order)
        charge = self.plain.with_values(values).charges()[0]
        steps = name == "training.steps"
        found = most_steps(charge, order, allowed) if steps else least_noise(charge, order, allowed)
        if not found:
            said = ", ".join(f"{key}={value}" for key, value in values.items()) or "the job as it stands"
            most = "one step" if steps else f"even noise_multiplier {NOISE_MULTIPLIER_BOUNDS[1]:g}"
            raise UsageError(
                f"tuning.space: {name} is auto, but for {said} {most} costs more than the job as it stands "
                "does; choose values nearer to the job's."
            )
        return {**values, name: found}

    def selection(self, order: int | None = None) -> list[Charge]:
        """What select mode asks for, once, whatever K turns out to be: the best of K candidates, each any of the space,
        on train; and on validation the best of as many evaluations.

        The pointwise maximum over the space is that over its corners: RDP falls with noise_multiplier and rises with
        sample_rate and steps at every order, and nothing else that can be searched enters a cost.

        Args:
            order: of the train account, at which a field that is auto is solved.
        """
        runs = [run.charges() for run in self.corners(order)]
        tuning = self.tuning
        return [
            Charge(account, selection_of([run[i] for run in runs], tuning.trials, tuning.repeats.shape), 1, 1)
            for i, account in enumerate(self.charged)
        ]

    def grid(self) -> Iterator[dict[str, Any]]:
        """Every combination of the choices; the last dimension varies fastest."""
        names = list(self.tuning.searched)
        for values in itertools.product(*(self.tuning.searched[name].choice or () for name in names)):
            yield dict(zip(names, values, strict=True))

    def corners(self, order: int | None = None) -> list[Job]:
        """The runs of `extremes`. All are checked.

        Raises:
            UsageError: a corner that is no valid run, or more corners than can be priced.
        """
        return [self.candidate(values) for values in self.extremes(order)]

    def extremes(self, order: int | None = None) -> list[dict[str, Any]]:
        """Candidates at the extremes of the space and one within: cheapest and dearest are among them.

        Args:
            order: of the train account, at which a field that is auto is solved.
        """
        names = list(self.tuning.searched)
        extremes = [self.tuning.searched[name].extremes() for name in names]
        if math.prod(map(len, extremes)) > MOST_CORNERS:
            raise UsageError(
                f"tuning.space: it has {math.prod(map(len, extremes))} corners; at most {MOST_CORNERS} can be priced, "
                "search fewer dimensions or choices."
            )
        inner = [
            self.tuning.searched[name].at(0.381966) for name in names
        ]  # a fraction where whole numbers are needed shows
        runs = [dict(zip(names, values, strict=True)) for values in (*itertools.product(*extremes), inner)]
        return [self.solved(values, order) for values in runs]


def dearest(runs: Sequence[Job], orders: Sequence[int]) -> list[Charge]:
    """On each account the largest charge that one of `runs` makes, at the account's order."""
    return [max(charges, key=lambda charge: price(charge, order)) for charges, order in _by_account(runs, orders)]


def cheapest(runs: Sequence[Job], orders: Sequence[int]) -> list[Charge]:
    """On each account the smallest charge that one of `runs` makes: where this does not fit, none of them does."""
    return [min(charges, key=lambda charge: price(charge, order)) for charges, order in _by_account(runs, orders)]


def _by_account(runs: Sequence[Job], orders: Sequence[int]) -> Iterator[tuple[tuple[Charge, ...], int]]:
    """The charges of `runs` on each account that they are charged on, and its order."""
    return zip(zip(*(run.charges() for run in runs), strict=True), orders, strict=False)
