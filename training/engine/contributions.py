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
# A product of factors is a sum over a micro-batch's r units and T times. In fp32 it is off by some √(rT)·2^-24 of what
# is added up, and anew wherever one unit more comes first; if records repeat, all micro-batches may round alike. For B
# units that is up to B·√(rT)·2^-24·C (0.05 to 0.37 of it was seen). Where B·√(rT) is more than this, they are fp64.
SPREAD = 2.0**14
_RUN = 256  # how many squares are added up in fp32; how many units are copied to fp64 at once
_AT_ONCE = 1 << 24  # numbers, 64 MiB, of products that are written out


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
        summed = torch.zeros(self.count, flat.shape[1], dtype=torch.float32, device=flat.device)
        return summed.index_add_(0, self.of_record.to(flat.device), flat)

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

    def add_to(self, total: torch.Tensor, weights: torch.Tensor, holes: bool, spread: float = math.inf) -> None:
        """Add Σ_u weights[u]·gradient_u to `total`.

        Args:
            total: fp64 [parameter's numbers], added to in place.
            weights: fp32 [units].
            holes: whether a weight is 0; such a unit adds exactly nothing, whatever its gradient.
            spread: B·√r of the run, by which products of factors are taken in fp32 or fp64 (see `SPREAD`).
        """

    def inner(self, vectors: torch.Tensor) -> torch.Tensor:
        """Inner products of every unit's gradient with `vectors`, fp32 [vectors, parameter's numbers]. Shape [units,
        vectors], fp64. For canaries, which are nobody's."""


@dataclass(frozen=True)
class PerUnit:
    """Gradients as they are: fp32 [units, numbers].

    Attributes:
        turned: (in, out) where the numbers are those of a weight [out, in] turned over: a product whose narrow side
            comes first is several times faster.
    """

    gradients: torch.Tensor
    turned: tuple[int, int] | None = None

    def squared_norms(self) -> torch.Tensor:
        """See `Contribution`.

        Squares are added up in fp32 over at most 256 numbers, which takes less than 2^-15 of their sum, and in fp64
        from there on; those below what fp32 can hold lose at most 2^-126 each.
        """
        numbers = self.gradients.shape[1]
        whole = numbers // _RUN * _RUN
        squares = torch.linalg.vector_norm(self.gradients[:, whole:], dim=1).double().square()
        if whole:
            runs = self.gradients[:, :whole].unflatten(1, (-1, _RUN))
            squares += torch.linalg.vector_norm(runs, dim=2).double().square().sum(1)
        return squares + numbers * 2.0**-126

    def add_to(self, total: torch.Tensor, weights: torch.Tensor, holes: bool, spread: float = math.inf) -> None:
        """See `Contribution`."""
        gradients = _without(weights, self.gradients) if holes else self.gradients
        for some in range(0, len(weights), _RUN):
            product = gradients[some : some + _RUN].double().T @ weights[some : some + _RUN].double()
            total += product if self.turned is None else product.view(self.turned).T.flatten()

    def inner(self, vectors: torch.Tensor) -> torch.Tensor:
        """See `Contribution`."""
        if self.turned is not None:
            vectors = vectors.unflatten(1, self.turned[::-1]).mT.flatten(1)
        return (self.gradients @ vectors.T).double()


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
                self.units.gram(self.activations, a), g @ g.mT, max(a.shape[2], g.shape[2])
            )
        return norms

    def add_to(self, total: torch.Tensor, weights: torch.Tensor, holes: bool, spread: float = math.inf) -> None:
        """See `Contribution`."""
        per_record = weights[self.units.of_record.to(weights.device)]
        a, g = self.activations, self.backprops
        if holes:
            a, g = _without(per_record, a), _without(per_record, g)
        if a.shape[2] < g.shape[2]:
            a = a * per_record[:, None, None]
        else:
            g = g * per_record[:, None, None]
        into, a, g = total.view(g.shape[2], a.shape[2]), a.flatten(0, 1), g.flatten(0, 1)
        if spread * math.sqrt(self.activations.shape[1]) > SPREAD:
            into.addmm_(g.double().T, a.double())
        else:
            into += g.T @ a

    def inner(self, vectors: torch.Tensor) -> torch.Tensor:
        """See `Contribution`; where there are several times, products are written out, for as many records at once as
        _AT_ONCE allows."""
        out, width = self.backprops.shape[2], self.activations.shape[2]
        found = torch.zeros(self.units.count, len(vectors), dtype=torch.float64, device=self.backprops.device)
        some = max(1, _AT_ONCE // max(vectors.shape[1], len(vectors) * out))
        for first in range(0, len(self.backprops), some):
            g, a = self.backprops[first : first + some], self.activations[first : first + some]
            if g.shape[1] == 1:
                along = (a[:, 0] @ vectors.reshape(-1, width).T).view(len(g), len(vectors), out)
                inner = (along @ g.mT)[:, :, 0]
            else:
                inner = (g.mT @ a).flatten(1) @ vectors.T
            found.index_add_(0, self.units.of_record[first : first + some].to(found.device), inner.double())
        return found


@dataclass(frozen=True)
class Lookups:
    """Gradients of an embedding's weight [entries, width]: what each unit adds to each entry that it looked up.

    Attributes:
        entries: int64 [records, times], backprops: fp32 [records, times, width].
        shape: of the weight.
    """

    entries: torch.Tensor
    backprops: torch.Tensor
    units: Units
    shape: torch.Size

    @functools.cached_property
    def _added(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(whose [n], to which entry [n], how much: fp64 [n, width]), each pair of unit and entry once."""
        of_record = self.units.of_record.to(self.entries.device)
        pairs, where = torch.unique(of_record[:, None] * self.shape[0] + self.entries, return_inverse=True)
        much = torch.zeros(len(pairs), self.shape[1], dtype=torch.float64, device=self.backprops.device)
        much.index_add_(0, where.flatten(), self.backprops.flatten(0, 1).double())
        return pairs // self.shape[0], pairs % self.shape[0], much

    def squared_norms(self) -> torch.Tensor:
        """See `Contribution`."""
        owner, _, much = self._added
        norms = torch.zeros(self.units.count, dtype=torch.float64, device=much.device)
        return norms.index_add_(0, owner, much.square().sum(1))

    def add_to(self, total: torch.Tensor, weights: torch.Tensor, holes: bool, spread: float = math.inf) -> None:
        """See `Contribution`."""
        owner, entry, much = self._added
        if holes:
            much = _without(weights[owner], much)
        total.view(self.shape).index_add_(0, entry, much * weights[owner][:, None])

    def inner(self, vectors: torch.Tensor) -> torch.Tensor:
        """See `Contribution`."""
        owner, entry, much = self._added
        found = torch.zeros(self.units.count, len(vectors), dtype=torch.float64, device=much.device)
        for i, vector in enumerate(vectors):
            found[:, i].index_add_(0, owner, (much * vector.view(self.shape)[entry]).sum(1))
        return found


def _guarded(of_a: torch.Tensor, of_g: torch.Tensor, longest: int) -> torch.Tensor:
    """Σ_{t,s} (a_t·a_s)(g_t·g_s) per unit, raised where fp32 could have lost what is left of it. Shape [units], fp64.

    Args:
        of_a, of_g: the inner products, [units, times, times].
        longest: how many numbers at most an inner product adds up.

    Where terms cancel: an inner product of n numbers is off by less than 8·√n·2^-24 of the product of its lengths, in
    the model of independent rounding errors (Higham and Mary 2019, theorem 3.1), and a row's sum, which torch takes in
    cascades, by less than 8·log2(times)·2^-24; so the whole is off by less than twice the first and once the second
    times S², S = Σ_t ‖a_t‖·‖g_t‖. Where this may be more than 2^-11 of the whole, it is added, and from 2^-12 on some
    of it: a jump would let a unit's companions, on whose number the last digits may depend, decide on more than those.
    Where products are below what fp32 can hold: each of them loses at most 2^-126, which is added for all of them.
    """
    squared = (of_a * of_g).sum(2).sum(1, dtype=torch.float64)
    times, least = of_g.shape[1], math.sqrt(longest) * 2.0**-63  # what the squares in a length may have lost
    a, g = (products.diagonal(dim1=1, dim2=2).double().sqrt() + least for products in (of_a, of_g))
    relative = 8 * (2 * math.sqrt(longest) + math.log2(2 * times)) * _ROUNDING
    off = relative * (a * g).sum(1).square()
    lost = longest * 2.0**-126 * (a.sum(1).square() + g.sum(1).square() + times**2)
    # NaN is kept in all of this: it must be seen, and its unit counted as zero.
    squared = squared.clamp(min=0)
    return squared + torch.minimum(off, (2 * off - squared * 2.0**-11).clamp(min=0)) + lost


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
