"""What was done to the data: mechanisms as plain frozen facts with a versioned, allow-listed JSON form.

A mechanism is described here, never evaluated (see `costs`). Every parameter is checked against stated bounds when
a description is made or read (P4): libraries fail open on NaN, so nothing unchecked may reach them.

    >>> Charge("digits/train", PoissonSubsampledGaussian(sample_rate=0.25, noise_multiplier=8.0), 80, 20).steps
    80
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from cluster.errors import UsageError

NOISE_MULTIPLIER_BOUNDS = (0.1, 1e5)
SAMPLE_RATE_BOUNDS = (1e-9, 1.0)
STEPS_BOUNDS = (1, 10_000_000)
SENSITIVITY_BOUNDS = (1, 1_000_000)
VERSION = 1


def number(field: str, value: object, low: float, high: float) -> float:
    """`value` as a finite float within [`low`, `high`], or a UsageError that names `field`."""
    # NaN fails every comparison, so it is refused with what is out of bounds.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise UsageError(f"{field}: {value!r} was given; it must be a finite number from {low:g} to {high:g}.")
    return float(value)


def whole(field: str, value: object, low: int, high: int) -> int:
    """`value` as an integer within [`low`, `high`], or a UsageError that names `field`."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UsageError(f"{field}: {value!r} was given; it must be a whole number from {low} to {high}.")
    return value


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


Mechanism = PoissonSubsampledGaussian | DiscreteGaussian
_KINDS: Mapping[str, type[PoissonSubsampledGaussian] | type[DiscreteGaussian]] = {
    cls.kind: cls for cls in (PoissonSubsampledGaussian, DiscreteGaussian)
}


def to_json(mechanism: Mechanism) -> dict[str, Any]:
    """The JSON form kept in the ledger: kind, version and the parameters under their standard names."""
    return {"kind": mechanism.kind, "version": VERSION, **asdict(mechanism)}


def from_json(form: Mapping[str, Any]) -> Mechanism:
    """Read a JSON form back.

    Raises:
        UsageError: unknown kind, version or parameter, or a value out of bounds.
    """
    if not isinstance(form, Mapping):
        raise UsageError(f"mechanism: {form!r} was given; it must be a JSON object with kind, version and parameters.")
    kind, version = form.get("kind"), form.get("version")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise UsageError(f"mechanism.kind: {kind!r} is unknown; known are {', '.join(sorted(_KINDS))}.")
    if version != VERSION:
        raise UsageError(f"mechanism.version: {version!r} was given; this Purser reads version {VERSION}.")
    parameters = {key: value for key, value in form.items() if key not in ("kind", "version")}
    wanted = set(_KINDS[kind].__dataclass_fields__) - {"kind"}
    if set(parameters) != wanted:
        raise UsageError(f"mechanism: {kind} takes exactly {', '.join(sorted(wanted))}; got {sorted(parameters)}.")
    return _KINDS[kind](**parameters)


@dataclass(frozen=True)
class Charge:
    """A mechanism to be run `steps` times on one account, authorised in blocks of `block` steps."""

    account: str
    mechanism: Mechanism
    steps: int
    block: int

    def __post_init__(self) -> None:
        if not isinstance(self.account, str) or not self.account:
            raise UsageError(f"account: {self.account!r} was given; it must be the name of an account.")
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
