"""The job file with its `tuning` section: the search space and how it is searched.

Imports nothing heavy. A space is drawn from public numbers; it may not depend on the data.
"""

from __future__ import annotations

import builtins
import itertools
import math
import secrets
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cluster.accounting.mechanisms import Charge
from cluster.accounting.orders import selection_of
from cluster.accounting.selection import POISSON
from cluster.errors import UsageError
from training.config import Job, Section

MOST_CORNERS = 256


class Dimension(Section):
    """One searched field: choice, uniform, loguniform or int, each between declared ends."""

    choice: Annotated[tuple[Any, ...] | None, Field(min_length=1)] = None
    uniform: tuple[float, float] | None = None
    loguniform: tuple[float, float] | None = None
    int: tuple[builtins.int, builtins.int] | None = None

    @model_validator(mode="after")
    def _checks(self) -> Dimension:
        given = [name for name in ("choice", "uniform", "loguniform", "int") if getattr(self, name) is not None]
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
    """How often a selection repeats: K is truncated negative binomial of shape `eta` (0 logarithmic, 1 geometric), or
    Poisson. Its mean is `tuning.trials`."""

    distribution: Literal["truncated_negative_binomial", "poisson"] = "truncated_negative_binomial"
    eta: float = 0.5

    @model_validator(mode="after")
    def _checks(self) -> Repeats:
        if self.eta not in (0, 0.5, 1):
            raise ValueError(f"eta: {self.eta:g} was given; it must be 0, 0.5 or 1")
        if self.distribution == "poisson" and "eta" in self.model_fields_set:
            raise ValueError("eta: it shapes the truncated_negative_binomial alone; leave it out for poisson")
        return self

    @property
    def shape(self) -> float:
        """As `cluster.accounting.selection` has it."""
        return POISSON if self.distribution == "poisson" else self.eta


class Tuning(Section):
    """How the sweep searches. Without a space there is one candidate: the job as it stands.

    In select mode every candidate is drawn from the space independently, those of a grid with equal chances.
    """

    mode: Literal["filter", "select"] = "filter"
    trials: Annotated[int, Field(ge=1, le=10_000)] = 8
    space: dict[str, Dimension] = {}
    search: Literal["random", "grid"] = "random"
    scheduler: Literal["none"] = "none"
    repeats: Repeats = Repeats()

    @model_validator(mode="after")
    def _checks(self) -> Tuning:
        if self.mode == "select" and self.trials < 2 and self.repeats.distribution != "poisson":
            raise ValueError("trials: 1 was given; in select mode it is the mean of K, choose 2 or more")
        for name, dimension in self.space.items():
            if not name.startswith(("training.", "model.")):
                raise ValueError(f"space: {name} cannot be searched, only fields of training and model")
            if self.mode == "select" and name in ("training.workers", "training.backend"):
                raise ValueError(
                    f"space: {name} cannot be searched in select mode, its worker groups serve any candidate"
                )
            if self.search == "grid" and dimension.choice is None:
                raise ValueError(f"space: {name} needs choice: [...] for search: grid, or use search: random")
        return self

    def drawn(self) -> dict[str, Any]:
        """A candidate of the space at random, independent of all others; dotted field → value.

        These numbers are public or, in a selection, sealed: none of the engine's keys are used for them.
        """
        return {name: dimension.at(secrets.randbits(53) / 2**53) for name, dimension in self.space.items()}


class SweepJob(Job):
    """A job file with everything in it."""

    tuning: Tuning = Tuning()

    @property
    def plain(self) -> Job:
        """The job of one run, without the sweep."""
        return Job.model_validate(self.model_dump(mode="json", exclude={"tuning"}))

    def candidate(self, values: dict[str, Any]) -> Job:
        """The run of one trial.

        Raises:
            UsageError: a value that the field does not allow, named.
        """
        return self.plain.with_values(values)

    def selection(self) -> list[Charge]:
        """What select mode asks for, once, whatever K turns out to be: the best of K candidates, each any of the space,
        on train; and on validation the best of as many evaluations.

        The pointwise maximum over the space is that over its corners: RDP falls with noise_multiplier and rises with
        sample_rate and steps at every order, and nothing else that can be searched enters a cost.
        """
        runs = [run.charges() for run in self.corners()]
        tuning = self.tuning
        return [
            Charge(account, selection_of([run[i] for run in runs], tuning.trials, tuning.repeats.shape), 1, 1)
            for i, account in enumerate(self.accounts)
        ]

    def grid(self) -> Iterator[dict[str, Any]]:
        """Every combination of the choices; the last dimension varies fastest."""
        names = list(self.tuning.space)
        for values in itertools.product(*(self.tuning.space[name].choice or () for name in names)):
            yield dict(zip(names, values, strict=True))

    def corners(self) -> list[Job]:
        """Candidates at the extremes of the space and one within: cheapest and dearest are among them. All are checked.

        Raises:
            UsageError: a corner that is no valid run, or more corners than can be priced.
        """
        names = list(self.tuning.space)
        extremes = [self.tuning.space[name].extremes() for name in names]
        if math.prod(map(len, extremes)) > MOST_CORNERS:
            raise UsageError(
                f"tuning.space: it has {math.prod(map(len, extremes))} corners; at most {MOST_CORNERS} can be priced, "
                "search fewer dimensions or choices."
            )
        inner = [
            self.tuning.space[name].at(0.381966) for name in names
        ]  # a fraction where whole numbers are needed shows
        runs = [dict(zip(names, values, strict=True)) for values in (*itertools.product(*extremes), inner)]
        return [self.candidate(values) for values in runs]
