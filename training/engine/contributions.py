"""What the units of one micro-batch contribute to each parameter: their norms, and their weighted sum (P8).

A contribution is kept as per-unit gradients, or as the two factors whose product they are, where the products would
be larger than their factors. Norm and sum come from the same numbers, so that a unit cannot be clipped by one and
added by another. Everything here is private and lives for one micro-batch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch

_ROUNDING = 2.0**-24  # of fp32


@dataclass(frozen=True)
class Units:
    """Which unit each record of a micro-batch belongs to; records of one unit need not lie together.

    Attributes:
        of_record: int64 [records], from 0; on the CPU.
        count: how many units there are.
    """

    of_record: torch.Tensor
    count: int
    _grams: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    @functools.cached_property
    def single(self) -> bool:
        """Whether each record is a unit of its own, in order."""
        return self.count == len(self.of_record) and torch.equal(self.of_record, torch.arange(self.count))

    def sums(self, records: torch.Tensor) -> torch.Tensor:
        """Sum over each unit's records. Shape [records, ...] → [units, numbers], fp32."""
        flat = records.flatten(1).float()
        if self.single:
            return flat
        summed = torch.zeros(self.count, flat.shape[1], device=flat.device)
        return summed.index_add_(0, self.of_record.to(flat.device), flat)

    def rows(self, part: slice) -> slice | torch.Tensor:
        """The records of the units from part.start to part.stop."""
        if part.start <= 0 and part.stop >= self.count:
            return slice(None)
        if self.single:
            return part
        return ((self.of_record >= part.start) & (self.of_record < part.stop)).nonzero()[:, 0]

    def by_size(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Units with equally many records, together: (unit numbers [n], their records [n, size])."""
        if self.single:
            yield self.of_record, self.of_record[:, None]
            return
        order = torch.argsort(self.of_record, stable=True)
        sizes = torch.bincount(self.of_record, minlength=self.count)
        starts = torch.cumsum(sizes, 0) - sizes
        for size in sizes.unique().tolist():
            if size:
                units = (sizes == size).nonzero()[:, 0]
                yield units, order[starts[units][:, None] + torch.arange(size)]

    def joined(self, records: torch.Tensor, of_unit: torch.Tensor) -> torch.Tensor:
        """Records joined along time: [records, times, ...] and [units, size] → [units, size·times, ...]."""
        return records if self.single else records[of_unit.to(records.device)].flatten(1, 2)

    def gram(self, activations: torch.Tensor, of_units: torch.Tensor) -> torch.Tensor:
        """Inner products of a unit's times, of `of_units` = (units, size, records joined) of `activations`; computed
        once for all layers that share an input."""
        key = (id(activations), of_units.shape[1])
        if key not in self._grams:
            self._grams[key] = of_units @ of_units.mT
        return self._grams[key]


class Contribution(Protocol):
    """The gradients of every unit with respect to one parameter."""

    def squared_norms(self) -> torch.Tensor:
        """Shape [units], fp64; never below the true value by more than the run's margin covers."""

    def add_to(self, total: torch.Tensor, weights: torch.Tensor, part: slice, holes: bool) -> None:
        """Add Σ_u weights[u]·gradient_u over the units of `part` to `total`.

        Args:
            total: fp32 [parameter's numbers], added to in place.
            weights: fp32 [units], of all units.
            part: from which unit to which.
            holes: whether a weight is 0; such a unit adds exactly nothing, whatever its gradient.
        """


@dataclass(frozen=True)
class PerUnit:
    """Gradients as they are: fp32 [units, numbers]."""

    gradients: torch.Tensor

    def squared_norms(self) -> torch.Tensor:
        """See `Contribution`."""
        return torch.linalg.vector_norm(self.gradients, dim=1, dtype=torch.float64).square()

    def add_to(self, total: torch.Tensor, weights: torch.Tensor, part: slice, holes: bool) -> None:
        """See `Contribution`."""
        weights, gradients = weights[part], self.gradients[part]
        if holes:
            gradients = _without(weights, gradients)
        total.addmv_(gradients.T, weights)


@dataclass(frozen=True)
class Products:
    """Gradients of a weight [out, in] as Σ_t backprops[t]ᵀ·activations[t], never written out.

    Norms by the identity ‖Σ_t g_t·a_tᵀ‖² = Σ_{t,s} (a_t·a_s)(g_t·g_s), over all times of all records of a unit (ghost
    norms: Goodfellow 2015; Li et al. 2022, section 4; Bu et al. 2023 for one backward pass).

    Attributes:
        activations: [records, times, in], backprops: [records, times, out]; fp32.
    """

    activations: torch.Tensor
    backprops: torch.Tensor
    units: Units

    def squared_norms(self) -> torch.Tensor:
        """See `Contribution`."""
        norms = torch.zeros(self.units.count, dtype=torch.float64, device=self.backprops.device)
        for numbers, records in self.units.by_size():
            a, g = (self.units.joined(t, records) for t in (self.activations, self.backprops))
            norms[numbers.to(norms.device)] = _guarded(
                (self.units.gram(self.activations, a) * (g @ g.mT)).sum((1, 2), dtype=torch.float64),
                a,
                g,
                max(a.shape[2], g.shape[2]),
            )
        return norms

    def add_to(self, total: torch.Tensor, weights: torch.Tensor, part: slice, holes: bool) -> None:
        """See `Contribution`."""
        rows = self.units.rows(part)
        per_record = weights[self.units.of_record[rows].to(weights.device)]
        a, g = self.activations[rows], self.backprops[rows]
        if holes:
            a, g = _without(per_record, a), _without(per_record, g)
        if a.shape[2] < g.shape[2]:
            a = a * per_record[:, None, None]
        else:
            g = g * per_record[:, None, None]
        total.view(g.shape[2], a.shape[2]).addmm_(g.flatten(0, 1).T, a.flatten(0, 1))


@dataclass(frozen=True)
class Lookups:
    """Gradients of an embedding's weight [entries, width]: backprops are added up by entry, never written out.

    Attributes:
        entries: int64 [records, times], backprops: fp32 [records, times, width].
    """

    entries: torch.Tensor
    backprops: torch.Tensor
    units: Units
    shape: torch.Size

    def squared_norms(self) -> torch.Tensor:
        """See `Contribution`."""
        norms = torch.zeros(self.units.count, dtype=torch.float64, device=self.backprops.device)
        for numbers, records in self.units.by_size():
            entries, g = (self.units.joined(t, records) for t in (self.entries, self.backprops))
            same = entries[:, :, None] == entries[:, None, :]
            norms[numbers.to(norms.device)] = _guarded(
                (same * (g @ g.mT)).sum((1, 2), dtype=torch.float64), None, g, g.shape[2]
            )
        return norms

    def add_to(self, total: torch.Tensor, weights: torch.Tensor, part: slice, holes: bool) -> None:
        """See `Contribution`."""
        rows = self.units.rows(part)
        per_record = weights[self.units.of_record[rows].to(weights.device)]
        g = self.backprops[rows]
        if holes:
            g = _without(per_record, g)
        g = g * per_record[:, None, None]
        total.view(self.shape).index_add_(0, self.entries[rows].flatten(), g.flatten(0, 1))


def _guarded(squared: torch.Tensor, a: torch.Tensor | None, g: torch.Tensor, longest: int) -> torch.Tensor:
    """`squared`, raised where fp32 could have lost what is left of it.

    Where terms cancel: an inner product of n numbers is off by less than 8·√n·2^-24 of the product of its lengths, in
    the model of independent rounding errors (Higham and Mary 2019, theorem 3.1), so the sum is off by less than twice
    that times S², S = Σ_t ‖a_t‖·‖g_t‖. Where this may be more than 2^-11 of the sum, it is added. Where products are
    below what fp32 can hold: each of them loses at most 2^-126, which is added for all of them.
    """
    times, least = g.shape[1], math.sqrt(longest) * 2.0**-63  # what the squares in a length may have lost
    of_g = torch.linalg.vector_norm(g, dim=2).double() + least
    of_a = torch.ones_like(of_g) if a is None else torch.linalg.vector_norm(a, dim=2).double() + least
    off = 2 * 8 * math.sqrt(longest) * _ROUNDING * (of_a * of_g).sum(1).square()
    lost = longest * 2.0**-126 * (of_a.sum(1).square() + of_g.sum(1).square() + times**2)
    # Written so that NaN is kept: it must be seen, and its unit counted as zero.
    return torch.where(squared >= 2.0**11 * off, squared, squared.clamp(min=0) + off) + lost


def _without(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`values` with zeros in place of what has weight 0: 0 × Inf would be NaN."""
    return values.masked_fill((weights == 0).view(-1, *[1] * (values.dim() - 1)), 0.0)


def clip_factors(squared_norms: torch.Tensor, max_grad_norm: float) -> torch.Tensor:
    """min(1, C/‖·‖) per unit, and 0 for a unit that may not count. Shape [units], fp32.

    An Inf or NaN would poison the sum and single its unit out: the whole contribution counts as zero. So does one so
    large that its factor would be a subnormal fp32 number, which keeps too few bits for the bound.
    """
    norms = squared_norms.sqrt()
    usable = torch.isfinite(norms) & (norms < max_grad_norm * 2.0**120)
    factors = (max_grad_norm / norms.clamp(min=1e-300)).clamp(max=1.0)
    return torch.where(usable, factors, 0.0).float()
