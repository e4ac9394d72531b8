"""Rows of data as tensors, ready for the program, and mini-batches of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

import torch
from jaxtyping import Float, Int
from pyro import poutine
from torch import Tensor

__all__ = ["HeldRows", "Membership", "RowSource", "Rows", "counted", "memberships_of"]


@dataclass(frozen=True)
class Membership:
    """Which clusters of one grouping factor some rows belong to.

    Row i belongs to cluster ``index[position[i]]``. The log-density of cluster ``index[j]``'s
    random effects enters the program times ``weight[j]``, so that its expectation over
    mini-batches is the sum over all clusters.

    Attributes
    ----------
    index : Int[Tensor, "clusters"]
        Clusters whose random effects are drawn; with all clusters, ``0, 1, ..., K - 1``.
    position : Int[Tensor, "rows"]
        Each row's place in `index`.
    weight : Float[Tensor, "clusters"] or None
        Weight of each cluster's prior and entropy; None stands for 1.
    complete : bool
        Whether `index` holds every cluster that the guide holds of the factor, in order.
    labels : Int[Tensor, "rows"] or None
        Each row's cluster, where `index` numbers the clusters drawn in another way.
    """

    index: Int[Tensor, " clusters"]
    position: Int[Tensor, " rows"]
    weight: Float[Tensor, " clusters"] | None = None
    complete: bool = True
    labels: Int[Tensor, " rows"] | None = None

    def clusters(self) -> Int[Tensor, " rows"]:
        """Each row's cluster."""
        return self.index[self.position] if self.labels is None else self.labels


@dataclass(frozen=True)
class Rows:
    """Inputs, outcomes and cluster memberships of n rows out of N.

    Attributes
    ----------
    x : Float[Tensor, "rows features"] or Float[Tensor, "rows ..."]
        Standardised features.
    y : Tensor or None
        Outcomes on their original scale (class codes for categorical outcomes).
    memberships : mapping of str to Membership
        One entry a grouping factor.
    scale : float
        N / n, the factor by which the rows' log-likelihood is multiplied.
    trials, offset, weights : Float[Tensor, "rows"] or None
        Binomial denominators; a term added to the linear predictor; multipliers of each row's
        log-likelihood.
    computed : mapping of str to Tensor, or None
        What a settled network makes of x, so that it need not run again: its tapped activations
        by name, and its output under the empty name.
    """

    x: Tensor
    y: Tensor | None
    memberships: Mapping[str, Membership]
    scale: float = 1.0
    trials: Float[Tensor, " rows"] | None = None
    offset: Float[Tensor, " rows"] | None = None
    weights: Float[Tensor, " rows"] | None = None
    computed: Mapping[str, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.x)

    def outcome(self) -> Tensor:
        """The outcomes.

        Raises
        ------
        ValueError
            If they are not known.
        """
        if self.y is None:
            raise ValueError("the rows have no outcome, which their log-likelihood needs")
        return self.y

    def fingerprint(self) -> Iterator[bytes]:
        """Their values, by which other rows can be told from them."""
        codes = [one.position for one in self.memberships.values()]
        for one in (self.x, self.y, self.trials, self.offset, self.weights, *codes):
            yield b"none" if one is None else one.double().cpu().numpy().tobytes()


@contextmanager
def counted(rows: Rows) -> Iterator[None]:
    """Handlers under which the log-likelihood of each row counts its weight times the scale."""
    with ExitStack() as handlers:
        if rows.weights is None:
            handlers.enter_context(poutine.scale(scale=rows.scale))
        else:
            # Pyro's scales are positive: rows of weight 0 are masked.
            counts = cast("torch.BoolTensor", rows.weights > 0)
            weights = torch.where(counts, rows.weights, 1)
            handlers.enter_context(poutine.scale(scale=rows.scale * weights))
            handlers.enter_context(poutine.mask(mask=counts))
        yield


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
        for chosen in _whole_splits(len(self.counts[factor]), size, generator):
            yield self.whole_clusters(factor, chosen.to(self.like.device))

    @abstractmethod
    def chunks(self, size: int) -> Iterator[Rows]:
        """Consecutive blocks of at most `size` rows, in order, every cluster with weight 1."""


@dataclass(frozen=True)
class HeldRows(RowSource):
    """Rows held on one device and sliced into mini-batches.

    Attributes
    ----------
    codes : mapping of str to Int[Tensor, "rows"]
        Cluster of each row, for every grouping factor.
    counts : mapping of str to Int[Tensor, "clusters"]
        Rows in each cluster.
    """

    x: Tensor
    y: Tensor | None
    codes: Mapping[str, Int[Tensor, " rows"]]
    counts: Mapping[str, Int[Tensor, " clusters"]]
    trials: Float[Tensor, " rows"] | None = None
    offset: Float[Tensor, " rows"] | None = None
    weights: Float[Tensor, " rows"] | None = None
    computed: Mapping[str, Tensor] | None = None
    reduce: Callable[[Tensor], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.x)

    @property
    def like(self) -> Tensor:
        return self.x

    @property
    def row_shape(self) -> tuple[int, ...]:
        return tuple(self.x.shape[1:])

    def fingerprint(self) -> Iterator[bytes]:
        return self.all().fingerprint()

    def take(self, index: Int[Tensor, " taken"]) -> HeldRows:
        """Some of the rows, as a source of their own that counts clusters as this one does."""

        def some(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.index_select(0, index)

        return replace(
            self,
            x=self.x.index_select(0, index),
            y=some(self.y),
            codes={factor: one.index_select(0, index) for factor, one in self.codes.items()},
            trials=some(self.trials),
            offset=some(self.offset),
            weights=some(self.weights),
            computed=self.computed
            and {name: one.index_select(0, index) for name, one in self.computed.items()},
        )

    def all(self) -> Rows:
        return self.of(memberships_of(self.codes, self, 1.0, ()), 1.0)

    def of(self, memberships: Mapping[str, Membership], scale: float) -> Rows:
        """All rows, with these memberships and this scale."""
        optional = (self.trials, self.offset, self.weights, self.computed)
        return Rows(self.x, self.y, memberships, scale, *optional)

    def batches(
        self,
        size: int,
        generator: torch.Generator | None = None,
        *,
        dense_up_to: int | None = None,
    ) -> Iterator[Rows]:
        for index in _whole_splits(len(self), size, generator):
            yield self.batch(index.to(self.x.device), dense_up_to=dense_up_to)

    def batch(self, index: Int[Tensor, " batch"], *, dense_up_to: int | None = None) -> Rows:
        """Rows `index`, drawn without regard to the outcome, weighted as in `batches`."""
        scale = len(self) / len(index)
        # Copies whole rows, which takes a fraction of what indexing takes.
        taken = self.take(index)
        sampled = self.sampled(len(index), dense_up_to)
        return taken.of(memberships_of(taken.codes, self, scale, sampled), scale)

    def whole_clusters(self, factor: str, chosen: Int[Tensor, " chosen"]) -> Rows:
        # In time and memory that do not depend on K.
        counts, n = self.counts[factor], len(self.counts[factor])
        sizes, (order, starts) = counts[chosen], self._by_cluster[factor]
        place = torch.arange(len(chosen), device=chosen.device).repeat_interleave(sizes)
        within = torch.arange(len(place), device=place.device) - (sizes.cumsum(0) - sizes)[place]
        rows = self.batch(order[starts[chosen][place] + within], dense_up_to=len(self))
        weight = self.x.new_full((len(chosen),), n / len(chosen))
        own = Membership(chosen, place, weight, complete=False)
        return replace(rows, memberships={**rows.memberships, factor: own}, scale=n / len(chosen))

    @cached_property
    def _by_cluster(self) -> dict[str, tuple[Tensor, Tensor]]:
        """For every factor, rows in the order of their clusters, and where each cluster starts."""
        starts = {factor: counts.cumsum(0) - counts for factor, counts in self.counts.items()}
        return {
            factor: (codes.argsort(stable=True), starts[factor])
            for factor, codes in self.codes.items()
        }

    def chunks(self, size: int) -> Iterator[Rows]:
        for start in range(0, len(self), size):
            index = torch.arange(start, min(start + size, len(self)), device=self.x.device)
            yield self.batch(index, dense_up_to=max(map(len, self.counts.values()), default=0))


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


def _whole_splits(
    n: int, size: int, generator: torch.Generator | None
) -> Iterator[Int[Tensor, " size"]]:
    """0, 1, ..., n - 1 in random order, `size` at a time, without a shorter rest."""
    order = torch.randperm(n, generator=generator)
    for start in range(0, n - size + 1, size):
        yield order[start : start + size]
