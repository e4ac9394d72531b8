"""The interface of sources of rows, and the memberships of their batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor

from armed_pyro.rows.batch import Membership, Rows

__all__ = ["RowSource", "whole_splits"]


class RowSource(ABC):
    r"""All N rows that a program is fitted to, in memory, in files or made as they are needed.

    A source yields random mini-batches of rows (`batches`), all rows of chosen clusters
    (`whole_clusters`) or of random clusters (`cluster_batches`), and every row once (`all`, or
    `chunks` in the order of the table).

    Attributes
    ----------
    counts : mapping of str to Int[Tensor, "clusters"]
        Number of rows in each cluster, for every grouping factor.
    reduce : callable, optional
        Turns sums over these rows into sums over all rows, if other processes hold the rest.

    Examples
    --------
    >>> from armed_pyro.rows.in_memory import HeldRows
    >>> source = HeldRows(torch.zeros(4, 1), torch.arange(4.0), {}, {})
    >>> batch = next(source.batches(2))
    >>> len(batch), batch.scale
    (2, 2.0)
    """

    counts: Mapping[str, Int[Tensor, " clusters"]]
    reduce: Callable[[Tensor], Tensor] | None = None

    def total(self, part: Tensor) -> Tensor:
        """The sum over all rows, from the sum over the rows of this process."""
        return part if self.reduce is None else self.reduce(part)

    @abstractmethod
    def __len__(self) -> int: ...

    @cached_property
    def all_clusters(self) -> Mapping[str, Int[Tensor, " clusters"]]:
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
        """Bytes that differ between different rows; checkpoints store a hash of them."""

    @abstractmethod
    def all(self) -> Rows:
        """Every row and every cluster, each with weight 1."""

    @abstractmethod
    def batches(
        self, size: int, generator: torch.Generator | None = None, *, dense_up_to: int | None = None
    ) -> Iterator[Rows]:
        r"""Yield one pass over the rows in random order, in mini-batches of `size` rows.

        No row comes twice. Up to ``size - 1`` rows are left out, as their batch would be smaller.

        The likelihood is multiplied by N / size, so that the objective stays unbiased. If a
        factor has at most `dense_up_to` clusters (by default 4 `size`), all of them are drawn with
        weight 1. Otherwise only the batch's clusters are drawn: cluster k, with m_k of its n_k
        rows in the batch, gets the weight (N / size) m_k / n_k, the share of its prior and entropy
        that its rows bring.

        The generator, by default torch's global one, draws the order of the rows. All draws must
        come before the first batch, so that a generator in the same state yields the same pass.
        """

    def sampled(self, size: int, dense_up_to: int | None = None) -> set[str]:
        """Factors for which a mini-batch of `size` rows draws only the clusters of its rows."""
        limit = 4 * size if dense_up_to is None else dense_up_to
        return {factor for factor, counts in self.counts.items() if len(counts) > limit}

    @abstractmethod
    def whole_clusters(self, factor: str, chosen: Int[Tensor, " chosen"]) -> Rows:
        """All rows of C randomly drawn clusters out of a factor's K, with weight K / C each.

        All clusters of the other factors are drawn, with weight 1.
        """

    def cluster_order(self, factor: str) -> Int[Tensor, " clusters"]:
        """A factor's clusters in the order in which reading their rows is fastest."""
        return self.all_clusters[factor]

    def cluster_batches(
        self, factor: str, size: int, generator: torch.Generator | None = None
    ) -> Iterator[Rows]:
        """Yield `whole_clusters` of `size` random clusters at a time; no cluster comes twice.

        Up to ``size - 1`` clusters are left out. The generator is used as in `batches`.
        """
        for chosen in whole_splits(len(self.counts[factor]), size, generator):
            yield self.whole_clusters(factor, chosen.to(self.like.device))

    @abstractmethod
    def chunks(self, size: int) -> Iterator[Rows]:
        """Yield blocks of at most `size` rows in order; every cluster is drawn with weight 1."""

    def memberships(
        self,
        codes: Mapping[str, Int[Tensor, " rows"]],
        scale: float = 1.0,
        sampled: Collection[str] = (),
    ) -> dict[str, Membership]:
        """Memberships of the rows with these clusters, weighted as in `batches`.

        All clusters of a factor are drawn; of the `sampled` factors, only the clusters of the
        rows. `scale` is N divided by the number of rows.
        """
        memberships = {}
        for factor, rows in codes.items():
            if factor not in sampled:
                memberships[factor] = Membership(self.all_clusters[factor], rows)
            else:
                present, position, m = torch.unique(rows, return_inverse=True, return_counts=True)
                weight = (scale * m / self.counts[factor][present]).to(self.like.dtype)
                memberships[factor] = Membership(present, position, weight, complete=False)
        return memberships


def whole_splits(
    n: int, size: int, generator: torch.Generator | None
) -> Iterator[Int[Tensor, " size"]]:
    """Yield 0, 1, ..., n - 1 in random order, `size` at a time; a shorter rest is left out."""
    order = torch.randperm(n, generator=generator)
    for start in range(0, n - size + 1, size):
        yield order[start : start + size]
