"""Where batches of rows come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor

from armed_pyro.rows.batch import Membership, Rows

__all__ = ["RowSource", "memberships_of", "whole_splits"]


class RowSource(ABC):
    r"""All N rows that a program is fitted to: where they are, and how they are read.

    A source gives random mini-batches of rows (`batches`), all rows of chosen clusters
    (`whole_clusters`, and `cluster_batches` of random ones), and every row once (`all`, and
    `chunks` in the order of the table). How it keeps the rows is its own business.

    Attributes
    ----------
    counts : mapping of str to Int[Tensor, "clusters"]
        Rows in each cluster, for every grouping factor.
    reduce : callable, optional
        Where other processes hold the rest of the rows: turns sums over these into sums over all.
    """

    counts: Mapping[str, Int[Tensor, " clusters"]]
    reduce: Callable[[Tensor], Tensor] | None = None

    def total(self, part: Tensor) -> Tensor:
        """A sum over these rows, or the one over all rows where other processes hold the rest."""
        return part if self.reduce is None else self.reduce(part)

    @abstractmethod
    def __len__(self) -> int: ...

    @cached_property
    def everyone(self) -> Mapping[str, Int[Tensor, " clusters"]]:
        """0, 1, ..., K - 1 for every grouping factor."""
        return {name: torch.arange(len(n), device=n.device) for name, n in self.counts.items()}

    @property
    @abstractmethod
    def like(self) -> Tensor:
        """A tensor of the rows' precision, on their device."""

    @property
    @abstractmethod
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row's features."""

    @abstractmethod
    def fingerprint(self) -> Iterator[bytes]:
        """What tells these rows from others."""

    @abstractmethod
    def all(self) -> Rows:
        """Every row and every cluster, each with weight 1."""

    @abstractmethod
    def batches(
        self,
        size: int,
        generator: torch.Generator | None = None,
        *,
        dense_up_to: int | None = None,
    ) -> Iterator[Rows]:
        r"""One pass in mini-batches of `size` rows in random order, no row twice.

        Up to ``size - 1`` rows are left out: they would make a batch of another size.

        The likelihood is multiplied by N / size, so that the objective stays unbiased. Where a
        factor has at most `dense_up_to` clusters (default: four times the batch), all of them are
        drawn with weight 1. Otherwise only the batch's clusters are drawn, and each row brings
        1 / n_k of its cluster's prior and entropy: cluster k, with m_k of its n_k rows in the
        batch, gets the weight (N / size) m_k / n_k.

        Parameters
        ----------
        size : int
            Rows of a batch.
        generator : torch.Generator, optional
            Draws the order of the rows; torch's global generator by default. Everything is drawn
            before the first batch, so that a generator in the same state gives the same pass.
        dense_up_to : int, optional
            Largest number of clusters that are all drawn in every batch.
        """

    def sampled(self, size: int, dense_up_to: int | None = None) -> set[str]:
        """Factors of which a mini-batch of `size` rows draws its own clusters only."""
        limit = 4 * size if dense_up_to is None else dense_up_to
        return {factor for factor, counts in self.counts.items() if len(counts) > limit}

    @abstractmethod
    def whole_clusters(self, factor: str, chosen: Int[Tensor, " chosen"]) -> Rows:
        """All rows of C of a factor's K clusters, drawn at random: each counts K / C times.

        The clusters of other factors are all drawn, each with weight 1.
        """

    def cluster_order(self, factor: str) -> Int[Tensor, " clusters"]:
        """A factor's clusters in the order in which their rows are read fastest."""
        return self.everyone[factor]

    def cluster_batches(
        self, factor: str, size: int, generator: torch.Generator | None = None
    ) -> Iterator[Rows]:
        """One pass in `whole_clusters`, `size` random ones at a time, no cluster twice.

        Up to ``size - 1`` clusters are left out; `generator` is used as in `batches`.
        """
        for chosen in whole_splits(len(self.counts[factor]), size, generator):
            yield self.whole_clusters(factor, chosen.to(self.like.device))

    @abstractmethod
    def chunks(self, size: int) -> Iterator[Rows]:
        """Consecutive blocks of at most `size` rows, in order, every cluster with weight 1."""


def memberships_of(
    codes: Mapping[str, Int[Tensor, " rows"]],
    source: RowSource,
    scale: float,
    sampled: Collection[str],
) -> dict[str, Membership]:
    """Clusters of a mini-batch's rows: all of a factor, or of `sampled` ones those it holds.

    See `RowSource.batch` for their weights.
    """
    memberships = {}
    for factor, rows in codes.items():
        if factor not in sampled:
            memberships[factor] = Membership(source.everyone[factor], rows)
        else:
            present, position, found = torch.unique(rows, return_inverse=True, return_counts=True)
            every = source.counts[factor]
            weight = (scale * found / every[present]).to(source.like.dtype)
            memberships[factor] = Membership(present, position, weight, complete=False)
    return memberships


def whole_splits(
    n: int, size: int, generator: torch.Generator | None
) -> Iterator[Int[Tensor, " size"]]:
    """0, 1, ..., n - 1 in random order, `size` at a time, without a shorter rest."""
    order = torch.randperm(n, generator=generator)
    for start in range(0, n - size + 1, size):
        yield order[start : start + size]
