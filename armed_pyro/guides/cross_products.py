r"""The matrix B = Z_1' W Z_2 between the largest grouping factor and the others.

B is dense or sparse; both forms have the same three products, and `cross_products` chooses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import reduce

import torch
from jaxtyping import Float, Int
from torch import Tensor

from armed_pyro.distributions.small_matrices import FEW, sum_last

__all__ = [
    "CachedCrossProducts",
    "CrossProducts",
    "DenseCrossProducts",
    "SparseCrossProducts",
    "SparsityPattern",
    "cross_products",
]


# A scattered sum takes as long as this many multiplications in a matrix product.
SPARSE = 30


class CrossProducts(ABC):
    r"""B, of shape "clusters terms effects".

    ``B[k, :, j]`` is the sum of Z_1' W Z_2 over the rows that belong to cluster k of the largest
    factor and to the cluster of effect j. It is zero for a pair that shares no row.
    """

    @abstractmethod
    def gram(self, half: Float[Tensor, "... clusters terms terms"]) -> Float[Tensor, "... m m"]:
        r""":math:`\sum_k (H_k B_k)^\top H_k B_k`."""

    @abstractmethod
    def times(self, effects: Float[Tensor, "... m"]) -> Float[Tensor, "... clusters terms"]:
        """B u."""

    @abstractmethod
    def transpose_times(
        self, values: Float[Tensor, "... clusters terms"]
    ) -> Float[Tensor, "... m"]:
        """B' v, summed over clusters and terms."""


@dataclass(frozen=True)
class DenseCrossProducts(CrossProducts):
    """B as one tensor, for designs in which most pairs share rows.

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
            parts = (column[..., None] * row[:, None, :] for column, row in columns)
            product = reduce(torch.add, parts)
        flat = product.flatten(-3, -2)
        return flat.mT @ flat

    def times(self, effects: Float[Tensor, "... m"]) -> Float[Tensor, "... clusters terms"]:
        return (effects @ self.values.flatten(0, 1).mT).unflatten(-1, self.values.shape[:2])

    def transpose_times(
        self, values: Float[Tensor, "... clusters terms"]
    ) -> Float[Tensor, "... m"]:
        return values.flatten(-2) @ self.values.flatten(0, 1)


@dataclass(frozen=True)
class SparsityPattern:
    """Places of B's nonzero entries, and the pairs of entries that share a cluster.

    An entry (k, j) is nonzero if any of its terms is. The Gram matrix is a sum over pairs of
    entries of the same cluster.

    Attributes
    ----------
    shape : tuple of int
        Shape of B: clusters, terms, effects.
    cluster, effect : Int[Tensor, "entries"]
        k and j of each nonzero entry, ordered by k, then j.
    place : Int[Tensor, "terms entries"]
        Places of each entry's terms in the flattened B.
    first, second : Int[Tensor, "pairs"]
        Both entries of each pair, the effect of `second` at or before that of `first`.
    cell : Int[Tensor, "pairs"]
        Place of each pair in the flattened lower triangle of an "effects effects" matrix. Pairs
        are sorted by it: otherwise the sum over pairs would jump about in memory.
    """

    shape: tuple[int, int, int]
    cluster: Int[Tensor, " entries"]
    effect: Int[Tensor, " entries"]
    place: Int[Tensor, "terms entries"]
    first: Int[Tensor, " pairs"]
    second: Int[Tensor, " pairs"]
    cell: Int[Tensor, " pairs"]

    @classmethod
    def of(cls, between: Float[Tensor, "clusters terms effects"]) -> SparsityPattern | None:
        """The pattern of a matrix; None if the dense form is faster, with its many pairs."""
        k, t, m = between.shape
        nonzero = (between != 0).any(1)
        counts = nonzero.sum(1)
        if int((counts**2).sum()) * SPARSE > k * t * m**2:
            return None
        cluster, effect = nonzero.nonzero(as_tuple=True)
        starts = (counts.cumsum(0) - counts)[cluster]
        entry = torch.arange(len(cluster), device=cluster.device)
        # Effects are in order, so each entry pairs with itself and its cluster's earlier entries.
        n_pairs = entry - starts + 1
        first = entry.repeat_interleave(n_pairs)
        pair_start = (n_pairs.cumsum(0) - n_pairs).repeat_interleave(n_pairs)
        second = starts[first] + torch.arange(len(first), device=first.device) - pair_start
        cell, order = (effect[first] * m + effect[second]).sort()
        term = torch.arange(t, device=cluster.device)[:, None]
        place = (cluster * t + term) * m + effect
        return cls((k, t, m), cluster, effect, place, first[order], second[order], cell)


@dataclass(frozen=True)
class SparseCrossProducts(CrossProducts):
    """B as its nonzero entries, for designs in which few pairs share rows.

    Attributes
    ----------
    pattern : SparsityPattern
        Their places.
    values : Float[Tensor, "terms entries"]
        Their values.
    """

    pattern: SparsityPattern
    values: Float[Tensor, "terms entries"]

    def gram(self, half: Float[Tensor, "... clusters terms terms"]) -> Float[Tensor, "... m m"]:
        pattern, m = self.pattern, self.pattern.shape[2]
        product = half.index_select(-3, pattern.cluster) * self.values.mT[:, None, :]
        terms = sum_last(product).unbind(-1)
        pairs = (_gather(term, pattern.first) * _gather(term, pattern.second) for term in terms)
        lower = _scatter_sum(reduce(torch.add, pairs), pattern.cell, m * m).unflatten(-1, (m, m))
        return lower + lower.tril(-1).mT

    def times(self, effects: Float[Tensor, "... m"]) -> Float[Tensor, "... clusters terms"]:
        product = self.values * _gather(effects, self.pattern.effect)[..., None, :]
        return _scatter_sum(product, self.pattern.cluster, self.pattern.shape[0]).mT

    def transpose_times(
        self, values: Float[Tensor, "... clusters terms"]
    ) -> Float[Tensor, "... m"]:
        product = _gather(values.mT, self.pattern.cluster) * self.values
        return _scatter_sum(product.sum(-2), self.pattern.effect, self.pattern.shape[2])


def cross_products(
    between: Float[Tensor, "clusters terms effects"], pattern: SparsityPattern | None
) -> CrossProducts:
    """The sparse form of B with this pattern, or the dense form without one."""
    if pattern is None:
        return DenseCrossProducts(between)
    return SparseCrossProducts(pattern, between.flatten().take(pattern.place))


@dataclass(frozen=True)
class CachedCrossProducts:
    """Cross-products of a tensor as it was when they were made.

    Attributes
    ----------
    between : Float[Tensor, "clusters terms effects"]
        The tensor.
    version : int
        Its version then; torch raises it with every change in place.
    pattern : SparsityPattern or None
        The places of its nonzero entries.
    products : CrossProducts
        The dense or sparse form.
    """

    between: Float[Tensor, "clusters terms effects"]
    version: int
    pattern: SparsityPattern | None
    products: CrossProducts

    @classmethod
    def of(cls, between: Float[Tensor, "clusters terms effects"]) -> CachedCrossProducts:
        """Make the cross-products of the tensor's present values."""
        pattern = SparsityPattern.of(between)
        return cls(between, between._version, pattern, cross_products(between, pattern))

    def holds(self, between: Float[Tensor, "clusters terms effects"]) -> bool:
        """Whether this is the same tensor, and unchanged."""
        return self.between is between and self.version == between._version


# `gather` and `scatter_add` are twice as fast as `index_select` and `index_add`, with gradients.
def _gather(values: Float[Tensor, "... size"], index: Int[Tensor, " n"]) -> Float[Tensor, "... n"]:
    return values.gather(-1, index.expand(*values.shape[:-1], -1))


def _scatter_sum(
    values: Float[Tensor, "... n"], index: Int[Tensor, " n"], size: int
) -> Float[Tensor, "... size"]:
    zeros = values.new_zeros(*values.shape[:-1], size)
    return zeros.scatter_add(-1, index.expand(*values.shape[:-1], -1), values)
