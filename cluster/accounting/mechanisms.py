"""What was done to the data: mechanisms as plain frozen facts with a versioned, allow-listed JSON form.

A mechanism is described here, never evaluated (see `costs`). Every parameter is checked against stated bounds when
a description is made or read (P4): libraries fail open on NaN, so nothing unchecked may reach them.

    >>> step = PoissonSubsampledGaussian(sample_rate=0.25, noise_multiplier=8.0)
    >>> Charge("digits/train", step, 80, 20).steps
    80
    >>> run = Composition(((step, 80),))
    >>> to_json(RepeatAndSelect((run,), Poisson(mean=8.0)))["repetitions"]
    {'kind': 'poisson', 'version': 1, 'mean': 8.0}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, TypeAlias

from cluster.errors import UsageError

NOISE_MULTIPLIER_BOUNDS = (0.1, 1e5)
SAMPLE_RATE_BOUNDS = (1e-9, 1.0)
STEPS_BOUNDS = (1, 10_000_000)
SENSITIVITY_BOUNDS = (1, 1_000_000)
SHAPE_BOUNDS = (0.0, 1e3)
LEAST_SHAPE = 1e-6  # but for 0 itself: nearer to 0, E[K] would be a quotient of two numbers next to nothing
GAMMA_BOUNDS = (1e-12, 1 - 1e-12)
POISSON_MEAN_BOUNDS = (1.0, 1e6)
MOST_MECHANISMS = 1000  # in one description, counted at its leaves
MOST_LEVELS = 4  # of Composition and RepeatAndSelect within one another
VERSION = 1


def number(field: str, value: object, low: float, high: float) -> float:
    """`value` as a finite float within [`low`, `high`], or a UsageError that names `field`."""
    # NaN fails every comparison, so it is refused with what is out of bounds.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise UsageError(f"{field}: {_shown(value)} was given; it must be a finite number from {low:g} to {high:g}.")
    return float(value)


def whole(field: str, value: object, low: int, high: int) -> int:
    """`value` as an integer within [`low`, `high`], or a UsageError that names `field`."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UsageError(f"{field}: {_shown(value)} was given; it must be a whole number from {low} to {high}.")
    return value


def _shown(value: object) -> str:
    """`value` for an error message: short, whatever it is."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # integers of more than 4,300 digits; lists nested without end
        text = f"something of type {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:100]}…"


@dataclass(frozen=True)
class Gaussian:
    """A vector of L2 sensitivity 1 released with Gaussian noise of standard deviation `noise_multiplier`
    (Mironov 2017)."""

    noise_multiplier: float
    kind: ClassVar[str] = "gaussian"

    def __post_init__(self) -> None:
        number("noise_multiplier", self.noise_multiplier, *NOISE_MULTIPLIER_BOUNDS)


@dataclass(frozen=True)
class Laplace:
    """A vector of L1 sensitivity 1 released with Laplace noise of scale `noise_multiplier` (Mironov 2017)."""

    noise_multiplier: float
    kind: ClassVar[str] = "laplace"

    def __post_init__(self) -> None:
        number("noise_multiplier", self.noise_multiplier, *NOISE_MULTIPLIER_BOUNDS)


@dataclass(frozen=True)
class PoissonSubsampledGaussian:
    """One DP-SGD step: each unit joins with probability `sample_rate`, Gaussian noise of `noise_multiplier` × the
    clip norm is added to the sum. Adjacency: one unit added or removed (Mironov, Talwar and Zhang 2019)."""

    sample_rate: float
    noise_multiplier: float
    kind: ClassVar[str] = "poisson_subsampled_gaussian"

    def __post_init__(self) -> None:
        number("sample_rate", self.sample_rate, *SAMPLE_RATE_BOUNDS)
        number("noise_multiplier", self.noise_multiplier, *NOISE_MULTIPLIER_BOUNDS)


@dataclass(frozen=True)
class DiscreteGaussian:
    """One vector of counts released with independent discrete Gaussian noise of standard-deviation parameter `scale`;
    a unit moves the counts by at most `l2_sensitivity` (Canonne, Kamath and Steinke 2020)."""

    scale: float
    l2_sensitivity: int
    kind: ClassVar[str] = "discrete_gaussian"

    def __post_init__(self) -> None:
        whole("l2_sensitivity", self.l2_sensitivity, *SENSITIVITY_BOUNDS)
        number("scale", self.scale, *NOISE_MULTIPLIER_BOUNDS)
        number("scale / l2_sensitivity", self.scale / self.l2_sensitivity, *NOISE_MULTIPLIER_BOUNDS)


@dataclass(frozen=True)
class Composition:
    """Mechanisms run one after another on the same units, each `count` times; `parts` are (mechanism, count)."""

    parts: tuple[tuple[Mechanism, int], ...]
    kind: ClassVar[str] = "composition"

    def __post_init__(self) -> None:
        _check_tuple("parts", self.parts)
        for part in self.parts:
            if not isinstance(part, tuple) or len(part) != 2:
                raise UsageError(f"parts: {_shown(part)} was given; each part must be a mechanism and its count.")
            _check_mechanism("parts", part[0])
            whole("count", part[1], *STEPS_BOUNDS)
        _check_extent("parts", self)


@dataclass(frozen=True)
class TruncatedNegativeBinomial:
    """K ≥ 1 with P[K = k] proportional to (1−γ)^k · Π_{l<k} (l+η)/(l+1) for `shape` η: 0 is the logarithmic, 1 the
    geometric distribution (Papernot and Steinke 2022, definition 1)."""

    shape: float
    gamma: float
    kind: ClassVar[str] = "truncated_negative_binomial"

    def __post_init__(self) -> None:
        shape = number("shape", self.shape, *SHAPE_BOUNDS)
        if 0 < shape < LEAST_SHAPE:
            raise UsageError(f"shape: {shape!r} was given; it must be 0, or a number from {LEAST_SHAPE:g} on.")
        number("gamma", self.gamma, *GAMMA_BOUNDS)


@dataclass(frozen=True)
class Poisson:
    """K ≥ 0 with the Poisson distribution of mean `mean`; where K = 0, nothing but that is released."""

    mean: float
    kind: ClassVar[str] = "poisson"

    def __post_init__(self) -> None:
        number("mean", self.mean, *POISSON_MEAN_BOUNDS)


Repetitions: TypeAlias = TruncatedNegativeBinomial | Poisson


@dataclass(frozen=True)
class RepeatAndSelect:
    """Only the best of K candidates is released (Papernot and Steinke 2022).

    K is drawn from `repetitions`. Each candidate is drawn independently, from one distribution over `candidates` that
    does not depend on the data, then run on it; the order by which the best is chosen depends on what the candidates
    release and on nothing else of the data. K and the losers stay hidden.
    """

    candidates: tuple[Mechanism, ...]
    repetitions: Repetitions
    kind: ClassVar[str] = "repeat_and_select"

    def __post_init__(self) -> None:
        _check_tuple("candidates", self.candidates)
        for candidate in self.candidates:
            _check_mechanism("candidates", candidate)
            if _selects(candidate):
                raise UsageError("candidates: a repeat_and_select may not run within another; declare one selection.")
        if not isinstance(self.repetitions, Repetitions):
            raise UsageError(
                f"repetitions: {_shown(self.repetitions)} was given; it must be a distribution of how often to repeat."
            )
        _check_extent("candidates", self)


Mechanism: TypeAlias = Gaussian | Laplace | PoissonSubsampledGaussian | DiscreteGaussian | Composition | RepeatAndSelect
_MECHANISMS: Mapping[str, type[Mechanism]] = {
    cls.kind: cls
    for cls in (Gaussian, Laplace, PoissonSubsampledGaussian, DiscreteGaussian, Composition, RepeatAndSelect)
}
_REPETITIONS: Mapping[str, type[Repetitions]] = {cls.kind: cls for cls in (TruncatedNegativeBinomial, Poisson)}


def _check_tuple(field: str, value: object) -> None:
    if not isinstance(value, tuple) or not 1 <= len(value) <= MOST_MECHANISMS:
        given = f"{len(value)} of them were" if isinstance(value, (tuple, list)) else f"{_shown(value)} was"
        raise UsageError(f"{field}: {given} given; it must be a tuple of 1 to {MOST_MECHANISMS}.")


def _check_mechanism(field: str, value: object) -> None:
    if not isinstance(value, Mechanism):
        raise UsageError(f"{field}: {_shown(value)} was given; it must be a mechanism.")


def _within(mechanism: Mechanism) -> tuple[Mechanism, ...]:
    if isinstance(mechanism, Composition):
        return tuple(part for part, _ in mechanism.parts)
    return mechanism.candidates if isinstance(mechanism, RepeatAndSelect) else ()


def _levels(mechanism: Mechanism) -> int:
    return 1 + max(map(_levels, _within(mechanism)), default=-1)


def _leaves(mechanism: Mechanism) -> int:
    return sum(map(_leaves, _within(mechanism))) or 1


def _selects(mechanism: Mechanism) -> bool:
    return isinstance(mechanism, RepeatAndSelect) or any(map(_selects, _within(mechanism)))


def _check_extent(field: str, mechanism: Mechanism) -> None:
    """Whoever prices or writes a description walks all of it, so that must end soon. What is within it was checked
    when it was made: the walk here meets at most MOST_MECHANISMS × MOST_MECHANISMS leaves."""
    if _levels(mechanism) > MOST_LEVELS:
        raise UsageError(f"{field}: mechanisms lie within one another more than {MOST_LEVELS} deep; declare them flat.")
    if _leaves(mechanism) > MOST_MECHANISMS:
        raise UsageError(f"{field}: more than {MOST_MECHANISMS} mechanisms were given in all.")


def to_json(mechanism: Mechanism) -> dict[str, Any]:
    """The JSON form kept in the ledger: kind, version and the parameters under their standard names."""
    parameters: dict[str, Any]
    if isinstance(mechanism, Composition):
        parameters = {"parts": [{"mechanism": to_json(part), "count": count} for part, count in mechanism.parts]}
    elif isinstance(mechanism, RepeatAndSelect):
        repetitions = mechanism.repetitions
        parameters = {
            "candidates": [to_json(candidate) for candidate in mechanism.candidates],
            "repetitions": {"kind": repetitions.kind, "version": VERSION, **asdict(repetitions)},
        }
    else:
        parameters = asdict(mechanism)
    return {"kind": mechanism.kind, "version": VERSION, **parameters}


def from_json(form: Mapping[str, Any]) -> Mechanism:
    """Read a JSON form back.

    Raises:
        UsageError: unknown kind, version or parameter, a value out of bounds, or more than may be nested.
    """
    return _from_json(form, MOST_LEVELS)


def _from_json(form: object, levels: int) -> Mechanism:
    cls, parameters = _read("mechanism", form, _MECHANISMS)
    if cls in (Composition, RepeatAndSelect) and levels == 0:
        raise UsageError(f"mechanism: forms lie within one another more than {MOST_LEVELS} deep; declare them flat.")
    if cls is Composition:
        parts = []
        for part in _read_list("parts", parameters["parts"]):
            if not isinstance(part, Mapping) or set(part) != {"mechanism", "count"}:
                raise UsageError("parts: each must hold exactly count, mechanism.")
            parts.append((_from_json(part["mechanism"], levels - 1), part["count"]))
        return Composition(tuple(parts))
    if cls is RepeatAndSelect:
        distribution, its = _read("repetitions", parameters["repetitions"], _REPETITIONS)
        candidates = [_from_json(one, levels - 1) for one in _read_list("candidates", parameters["candidates"])]
        return RepeatAndSelect(tuple(candidates), distribution(**its))
    return cls(**parameters)


def _read(field: str, form: object, kinds: Mapping[str, type[Any]]) -> tuple[type[Any], dict[str, Any]]:
    """The class that `form` is of and its parameters: exactly those, unchecked but for their names."""
    if not isinstance(form, Mapping):
        raise UsageError(
            f"{field}: {_shown(form)} was given; it must be a JSON object with kind, version and parameters."
        )
    kind, version = form.get("kind"), form.get("version")
    if not isinstance(kind, str) or kind not in kinds:
        raise UsageError(f"{field}.kind: {_shown(kind)} is unknown; known are {', '.join(sorted(kinds))}.")
    if type(version) is not int or version != VERSION:  # True and 1.0 equal 1
        raise UsageError(f"{field}.version: {_shown(version)} was given; this Purser reads version {VERSION}.")
    parameters = {key: value for key, value in form.items() if key not in ("kind", "version")}
    wanted = {one.name for one in fields(kinds[kind])}
    if set(parameters) != wanted:
        raise UsageError(
            f"{field}: {kind} takes exactly {', '.join(sorted(wanted))}; got {_shown(sorted(map(str, parameters)))}."
        )
    return kinds[kind], parameters


def _read_list(field: str, value: object) -> list[Any]:
    if not isinstance(value, list) or len(value) > MOST_MECHANISMS:
        raise UsageError(f"{field}: it must be a list of 1 to {MOST_MECHANISMS}.")
    return value


@dataclass(frozen=True)
class Charge:
    """A mechanism to be run `steps` times on one account, authorised in blocks of `block` steps."""

    account: str
    mechanism: Mechanism
    steps: int
    block: int

    def __post_init__(self) -> None:
        if not isinstance(self.account, str) or not self.account:
            raise UsageError(f"account: {_shown(self.account)} was given; it must be the name of an account.")
        _check_mechanism("mechanism", self.mechanism)
        whole("steps", self.steps, *STEPS_BOUNDS)
        whole("block", self.block, *STEPS_BOUNDS)

    def to_json(self) -> dict[str, Any]:
        """The form that travels to the accountant and into `reserve` entries."""
        return {
            "account": self.account,
            "mechanism": to_json(self.mechanism),
            "steps": self.steps,
            "block": self.block,
        }

    @staticmethod
    def from_json(form: Mapping[str, Any]) -> Charge:
        """Read the form back, checking everything again."""
        wanted = {"account", "mechanism", "steps", "block"}
        if not isinstance(form, Mapping) or set(form) != wanted:
            raise UsageError(f"charge: it must hold exactly {', '.join(sorted(wanted))}.")
        return Charge(form["account"], from_json(form["mechanism"]), form["steps"], form["block"])
