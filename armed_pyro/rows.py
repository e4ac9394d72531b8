"""Rows of data as tensors, ready for the program, and mini-batches of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, cast

import torch
from jaxtyping import Float, Int
from pyro import poutine
from torch import Tensor

from armed_pyro.memory import large_pages

__all__ = ["HeldRows", "Membership", "RowSource", "Rows", "counted", "memberships_of"]

# From so many rows on, of at most so many bytes, batches take consecutive ones together, and are
# made of at least so many such units.
MANY_ROWS, SMALL_ROW, TOGETHER, FEWEST_UNITS = 2**18, 256, 64, 16


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
    """All N rows a program is fitted to, wherever they are: in memory, or in files.

    Attributes
    ----------
    counts : mapping of str to Int[Tensor, "clusters"]
        Rows in each cluster, for every grouping factor.
    """

    counts: Mapping[str, Int[Tensor, " clusters"]]
    reduce: Callable[[Tensor], Tensor] | None = None
    # Whether it makes use of the rows that follow a batch.
    reads_ahead: ClassVar[bool] = False

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
    def unit(self, size: int) -> int:
        """Consecutive rows that batches of this size take together; a divisor of it."""

    @abstractmethod
    def batch(
        self,
        index: Int[Tensor, " units"],
        *,
        unit: int = 1,
        dense_up_to: int | None = None,
        following: Int[Tensor, " units"] | None = None,
    ) -> Rows:
        r"""Rows `index`, weighted so that the objective stays unbiased.

        The likelihood is multiplied by N / B. Where a factor has at most `dense_up_to` clusters
        (default: four times the batch), all of them are drawn with weight 1. Otherwise only the
        batch's clusters are drawn, and each row brings 1 / n_k of its cluster's prior and entropy:
        cluster k, with m_k of its n_k rows in the batch, gets the weight (N / B) m_k / n_k.

        Parameters
        ----------
        index : Int[Tensor, "units"]
            Rows of the batch, drawn without regard to the outcome.
        unit : int
            Consecutive rows for which a number of `index` stands: those from `unit` times it on.
        dense_up_to : int, optional
            Largest number of clusters that are all drawn in every batch.
        following : Int[Tensor, "units"], optional
            The same of the next batch, which may be read ahead.
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
    reduce : callable, optional
        Where other processes hold the rest of the rows: turns sums over these into sums over all.
    together : int
        Consecutive rows that batches take together.
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
    together: int = 1

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

    def unit(self, size: int) -> int:
        # Not so many that batches would be made of a few units.
        most = 1 << max(0, (size // FEWEST_UNITS).bit_length() - 1)
        return math.gcd(self.together, size, most)

    def mixed(self) -> HeldRows:
        """The same rows, where they are many and small in an order drawn once, at random.

        Batches then take consecutive ones together, which main memory gives as fast as one of them.
        """
        small = self.x[:1].numel() * self.x.element_size() <= SMALL_ROW
        if len(self) < MANY_ROWS or not small or self.x.is_cuda:
            return self
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))
        found = replace(self.take(order), together=TOGETHER)
        large_pages(found.x, *found.codes.values())
        return found

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

    def batch(
        self,
        index: Int[Tensor, " units"],
        *,
        unit: int = 1,
        dense_up_to: int | None = None,
        following: Int[Tensor, " units"] | None = None,
    ) -> Rows:
        def taken(values: Tensor) -> Tensor:
            # Copies whole rows, which takes a fraction of what indexing takes.
            if unit == 1:
                return values.index_select(0, index)
            units = values[: len(values) // unit * unit].unflatten(0, (-1, unit))
            return units.index_select(0, index).flatten(0, 1)

        def some(values: Tensor | None) -> Tensor | None:
            return None if values is None else taken(values)

        size = unit * len(index)
        scale = len(self) / size
        codes = {factor: taken(one) for factor, one in self.codes.items()}
        memberships = memberships_of(codes, self, scale, self.sampled(size, dense_up_to))
        computed = self.computed and {name: taken(one) for name, one in self.computed.items()}
        optional = some(self.trials), some(self.offset), some(self.weights)
        return Rows(taken(self.x), some(self.y), memberships, scale, *optional, computed)

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
