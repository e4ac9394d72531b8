r"""The matrix B = Z_1' W Z_2 between the largest grouping factor and the others.

B is dense or sparse; both forms have the same three products, and `cross_products` chooses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import reduce

import torch
from jaxtyping import Float, Int
from torch import Tensor

from armed_pyro.distributions.small_matrices import FEW, sum_last

__all__ = ["CrossProducts", "DenseCrossProducts", "SparseCrossProducts", "cross_products"]


# A scattered sum takes as long as this many multiplications in a matrix product.
SPARSE = 30

Between = Float[Tensor, "clusters terms effects"]
Blocks = Float[Tensor, "... clusters terms terms"]
Effects = Float[Tensor, "... effects"]
Largest = Float[Tensor, "... clusters terms"]


class CrossProducts(ABC):
    r"""B, of shape "clusters terms effects".

    ``B[k, :, j]`` is the sum of Z_1' W Z_2 over the rows that belong to cluster k of the largest
    factor and to the cluster of effect j. It is zero for a pair that shares no row.
    """

    @abstractmethod
    def of(self, between: Between) -> CrossProducts:
        """Another B with nonzero entries in the same places."""

    @abstractmethod
    def gram(self, half: Blocks) -> Float[Tensor, "... effects effects"]:
        r""":math:`\sum_k (H_k B_k)^\top H_k B_k`."""

    @abstractmethod
    def times(self, effects: Effects) -> Largest:
        """B u."""

    @abstractmethod
    def transpose_times(self, values: Largest) -> Effects:
        """B' v, summed over clusters and terms."""


@dataclass(frozen=True)
class DenseCrossProducts(CrossProducts):
    """B as one tensor, for designs in which most pairs share rows."""

    values: Between

    def of(self, between: Between) -> DenseCrossProducts:
        return DenseCrossProducts(between)

    def gram(self, half: Blocks) -> Float[Tensor, "... effects effects"]:
        if self.values.shape[1] > FEW:
            product = half @ self.values
        else:
            columns = zip(half.unbind(-1), self.values.unbind(1), strict=True)
            parts = (column[..., None] * row[:, None, :] for column, row in columns)
            product = reduce(torch.add, parts)
        flat = product.flatten(-3, -2)
        return flat.mT @ flat

    def times(self, effects: Effects) -> Largest:
        return (effects @ self.values.flatten(0, 1).mT).unflatten(-1, self.values.shape[:2])

    def transpose_times(self, values: Largest) -> Effects:
        return values.flatten(-2) @ self.values.flatten(0, 1)


@dataclass(frozen=True)
class SparseCrossProducts(CrossProducts):
    """B as its nonzero entries, for designs in which few pairs share rows.

    An entry (k, j) is nonzero if any of its terms is. `cluster` and `effect` are k and j of each
    nonzero entry, ordered by k, then j; `place` is where its terms stand in the flattened B.

    The Gram matrix is a sum over pairs of entries of the same cluster, with the effect of `second`
    at or before that of `first`; `cell` is a pair's place in its flattened lower triangle. Pairs
    are sorted by it: otherwise the sum over pairs would jump about in memory.
    """

    shape: tuple[int, int, int]
    values: Float[Tensor, "terms entries"]
    place: Int[Tensor, "terms entries"]
    cluster: Int[Tensor, " entries"]
    effect: Int[Tensor, " entries"]
    first: Int[Tensor, " pairs"]
    second: Int[Tensor, " pairs"]
    cell: Int[Tensor, " pairs"]

    @classmethod
    def found_in(cls, between: Between) -> SparseCrossProducts:
        """The nonzero entries of this B."""
        k, t, m = between.shape
        nonzero = (between != 0).any(1)
        cluster, effect = nonzero.nonzero(as_tuple=True)
        term = torch.arange(t, device=between.device)[:, None]
        place = (cluster * t + term) * m + effect
        # Effects are in order, so each entry pairs with itself and its cluster's earlier entries.
        counts = nonzero.sum(1)
        start = (counts.cumsum(0) - counts)[cluster]
        entry = torch.arange(len(cluster), device=between.device)
        n_pairs = entry - start + 1
        first = entry.repeat_interleave(n_pairs)
        pair_start = (n_pairs.cumsum(0) - n_pairs).repeat_interleave(n_pairs)
        second = start[first] + torch.arange(len(first), device=between.device) - pair_start
        cell, order = (effect[first] * m + effect[second]).sort()
        pairs = first[order], second[order], cell
        return cls((k, t, m), between.take(place), place, cluster, effect, *pairs)

    def of(self, between: Between) -> SparseCrossProducts:
        return replace(self, values=between.take(self.place))

    def gram(self, half: Blocks) -> Float[Tensor, "... effects effects"]:
        m = self.shape[2]
        product = half.index_select(-3, self.cluster) * self.values.mT[:, None, :]
        terms = sum_last(product).unbind(-1)
        pairs = (_gather(term, self.first) * _gather(term, self.second) for term in terms)
        lower = _scatter_sum(reduce(torch.add, pairs), self.cell, m * m).unflatten(-1, (m, m))
        return lower + lower.tril(-1).mT

    def times(self, effects: Effects) -> Largest:
        product = self.values * _gather(effects, self.effect)[..., None, :]
        return _scatter_sum(product, self.cluster, self.shape[0]).mT

    def transpose_times(self, values: Largest) -> Effects:
        product = _gather(values.mT, self.cluster) * self.values
        return _scatter_sum(product.sum(-2), self.effect, self.shape[2])


def cross_products(between: Between) -> CrossProducts:
    """B in its sparse form, or in the dense form where that is faster because of many pairs."""
    k, t, m = between.shape
    pairs = int(((between != 0).any(1).sum(1) ** 2).sum())
    if pairs * SPARSE > k * t * m**2:
        return DenseCrossProducts(between)
    return SparseCrossProducts.found_in(between)


# `gather` and `scatter_add` are twice as fast as `index_select` and `index_add`, with gradients.
def _gather(values: Float[Tensor, "... size"], index: Int[Tensor, " n"]) -> Float[Tensor, "... n"]:
    return values.gather(-1, index.expand(*values.shape[:-1], -1))


def _scatter_sum(
    values: Float[Tensor, "... n"], index: Int[Tensor, " n"], size: int
) -> Float[Tensor, "... size"]:
    zeros = values.new_zeros(*values.shape[:-1], size)
    return zeros.scatter_add(-1, index.expand(*values.shape[:-1], -1), values)
