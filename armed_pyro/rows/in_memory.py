"""Rows of data as tensors, ready for the program, and mini-batches of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from armed_pyro.rows.batch import Membership, Rows
from armed_pyro.rows.source import RowSource, memberships_of, whole_splits

__all__ = ["HeldRows"]


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
        for index in whole_splits(len(self), size, generator):
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
