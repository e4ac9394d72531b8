"""What rows say jointly of one factor's effects and of the others', and sums over it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import reduce

import torch
from jaxtyping import Float, Int
from torch import Tensor

from armed_pyro.distributions.small_matrices import FEW, sum_last

__all__ = ["Couplings", "DenseCouplings", "Known", "Pattern", "SparseCouplings", "coupled"]


# Multiplications of a matrix product in the time of one scattered sum.
SPARSE = 30


class Couplings(ABC):
    """B, of shape "clusters terms effects": sums over the rows of a cluster and of an effect."""

    @abstractmethod
    def gram(self, half: Float[Tensor, "... clusters terms terms"]) -> Float[Tensor, "... m m"]:
        r"""Sum over clusters, :math:`\sum_k (H_k B_k)^\top H_k B_k`."""

    @abstractmethod
    def along(self, effects: Float[Tensor, "... m"]) -> Float[Tensor, "... clusters terms"]:
        """B effects."""

    @abstractmethod
    def across(self, values: Float[Tensor, "... clusters terms"]) -> Float[Tensor, "... m"]:
        """B' values, summed over clusters and terms."""


@dataclass(frozen=True)
class DenseCouplings(Couplings):
    """Couplings of which most are there.

    Attributes
    ----------
    values : Float[Tensor, "clusters terms effects"]
        B.
    """

    values: Float[Tensor, "clusters terms effects"]

    def gram(self, half: Float[Tensor, "... clusters terms terms"]) -> Float[Tensor, "... m m"]:
        terms = self.values.shape[1]
        if terms > FEW:
            product = half @ self.values
        else:
            columns = zip(half.unbind(-1), self.values.unbind(1), strict=True)
            parts = (one[..., None] * other[:, None, :] for one, other in columns)
            product = reduce(torch.add, parts)
        flat = product.flatten(-3, -2)
        return flat.mT @ flat

    def along(self, effects: Float[Tensor, "... m"]) -> Float[Tensor, "... clusters terms"]:
        return (effects @ self.values.flatten(0, 1).mT).unflatten(-1, self.values.shape[:2])

    def across(self, values: Float[Tensor, "... clusters terms"]) -> Float[Tensor, "... m"]:
        return values.flatten(-2) @ self.values.flatten(0, 1)


@dataclass(frozen=True)
class Pattern:
    """Which clusters and effects are coupled, and all pairs of effects that share a cluster.

    Attributes
    ----------
    shape : tuple of int
        Clusters, terms, effects.
    cluster, effect : Int[Tensor, "couplings"]
        Of each coupling.
    place : Int[Tensor, "terms couplings"]
        Where B has it.
    one, other, cell : Int[Tensor, "pairs"]
        Both couplings of each pair, and its place in the lower triangle of a matrix of all effects;
        in the order of these places, or a sum over pairs would jump about in memory.
    """

    shape: tuple[int, int, int]
    cluster: Int[Tensor, " couplings"]
    effect: Int[Tensor, " couplings"]
    place: Int[Tensor, "terms couplings"]
    one: Int[Tensor, " pairs"]
    other: Int[Tensor, " pairs"]
    cell: Int[Tensor, " pairs"]

    @classmethod
    def of(cls, between: Float[Tensor, "clusters terms effects"]) -> Pattern | None:
        """That of these couplings; None where pairs are so many that a matrix product is faster."""
        k, t, m = between.shape
        coupled = (between != 0).any(1)
        counts = coupled.sum(1)
        if int((counts**2).sum()) * SPARSE > k * t * m**2:
            return None
        cluster, effect = coupled.nonzero(as_tuple=True)
        starts = (counts.cumsum(0) - counts)[cluster]
        own = torch.arange(len(cluster), device=cluster.device)
        # Effects are in order, so that a coupling pairs with itself and those before it.
        before = own - starts + 1
        one = own.repeat_interleave(before)
        first = (before.cumsum(0) - before).repeat_interleave(before)
        other = starts[one] + torch.arange(len(one), device=one.device) - first
        cell, order = (effect[one] * m + effect[other]).sort()
        term = torch.arange(t, device=cluster.device)[:, None]
        at = (cluster * t + term) * m + effect
        return cls((k, t, m), cluster, effect, at, one[order], other[order], cell)


@dataclass(frozen=True)
class SparseCouplings(Couplings):
    """Couplings of which few are there.

    Attributes
    ----------
    pattern : Pattern
        Which.
    values : Float[Tensor, "terms couplings"]
        Those elements of B.
    """

    pattern: Pattern
    values: Float[Tensor, "terms couplings"]

    def gram(self, half: Float[Tensor, "... clusters terms terms"]) -> Float[Tensor, "... m m"]:
        pattern, m = self.pattern, self.pattern.shape[2]
        product = half.index_select(-3, pattern.cluster) * self.values.mT[:, None, :]
        terms = sum_last(product).unbind(-1)
        pairs = (_picked(one, pattern.one) * _picked(one, pattern.other) for one in terms)
        lower = _summed(reduce(torch.add, pairs), pattern.cell, m * m).unflatten(-1, (m, m))
        return lower + lower.tril(-1).mT

    def along(self, effects: Float[Tensor, "... m"]) -> Float[Tensor, "... clusters terms"]:
        product = self.values * _picked(effects, self.pattern.effect)[..., None, :]
        return _summed(product, self.pattern.cluster, self.pattern.shape[0]).mT

    def across(self, values: Float[Tensor, "... clusters terms"]) -> Float[Tensor, "... m"]:
        product = _picked(values.mT, self.pattern.cluster) * self.values
        return _summed(product.sum(-2), self.pattern.effect, self.pattern.shape[2])


def coupled(between: Float[Tensor, "clusters terms effects"], pattern: Pattern | None) -> Couplings:
    """These couplings, of which the pattern's are there; all, without one."""
    if pattern is None:
        return DenseCouplings(between)
    return SparseCouplings(pattern, between.flatten().take(pattern.place))


@dataclass(frozen=True)
class Known:
    """Couplings of a matrix as it was at some time.

    Attributes
    ----------
    between : Float[Tensor, "clusters terms effects"]
        The matrix.
    version : int
        Its version, by which changes in place can be told.
    pattern : Pattern or None
        Which of its elements are not zero.
    couplings : Couplings
        These.
    """

    between: Float[Tensor, "clusters terms effects"]
    version: int
    pattern: Pattern | None
    couplings: Couplings

    @classmethod
    def of(cls, between: Float[Tensor, "clusters terms effects"]) -> Known:
        """Those that it has now."""
        pattern = Pattern.of(between)
        return cls(between, between._version, pattern, coupled(between, pattern))

    def on(self, device: torch.device) -> bool:
        """Whether they are on this device."""
        return self.between.device == device


# `gather` and `scatter_add` are twice as fast as `index_select` and `index_add`, with gradients.
def _picked(values: Float[Tensor, "... size"], index: Int[Tensor, " n"]) -> Float[Tensor, "... n"]:
    return values.gather(-1, index.expand(*values.shape[:-1], -1))


def _summed(
    values: Float[Tensor, "... n"], index: Int[Tensor, " n"], size: int
) -> Float[Tensor, "... size"]:
    zeros = values.new_zeros(*values.shape[:-1], size)
    return zeros.scatter_add(-1, index.expand(*values.shape[:-1], -1), values)
