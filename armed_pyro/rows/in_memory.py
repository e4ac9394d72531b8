"""Rows in memory, and mini-batches of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from armed_pyro.rows.batch import Membership, Rows
from armed_pyro.rows.inputs import LazyInputs
from armed_pyro.rows.source import RowSource, whole_splits

__all__ = ["HeldRows"]


@dataclass(frozen=True)
class HeldRows(RowSource):
    """Rows in the memory of one device; the attributes are those of `Rows` and `RowSource`.

    Clusters may have further rows in other processes, which `counts` include.
    """

    x: Tensor
    y: Tensor | None
    codes: Mapping[str, Int[Tensor, " rows"]]  # cluster of each row, for every grouping factor
    counts: Mapping[str, Int[Tensor, " clusters"]]
    trials: Float[Tensor, " rows"] | None = None
    offset: Float[Tensor, " rows"] | None = None
    weights: Float[Tensor, " rows"] | None = None
    computed: Mapping[str, Tensor] | None = None
    reduce: Callable[[Tensor], Tensor] | None = None
    slopes: Float[Tensor, "rows columns"] | None = None
    means: Float[Tensor, "rows columns"] | None = None
    fold: Int[Tensor, " rows"] | None = None
    inputs: LazyInputs | None = None
    censoring: Float[Tensor, "rows columns"] | None = None

    def __len__(self) -> int:
        return len(self.x)

    @property
    def like(self) -> Tensor:
        return self.x if self.y is None else self.y  # images may be in the network's precision

    @property
    def row_shape(self) -> tuple[int, ...]:
        return tuple(self.x.shape[1:])

    def fingerprint(self) -> Iterator[bytes]:
        return self.all().fingerprint()

    def take(self, index: Int[Tensor, " taken"]) -> HeldRows:
        """The rows `index` as a source with the same `counts`."""

        def take(values: Any) -> Any:
            if isinstance(values, Mapping):
                return {name: take(tensor) for name, tensor in values.items()}
            # `index_select` copies whole rows, which takes a fraction of the time of indexing.
            return None if values is None else values.index_select(0, index)

        names = ("x", "y", "codes", "trials", "offset", "weights", "computed", "slopes", "means")
        further = ("fold", "censoring")
        taken = {name: take(getattr(self, name)) for name in (*names, *further)}
        inputs = None if self.inputs is None else self.inputs.take(index)
        return replace(self, **taken, inputs=inputs)

    def all(self) -> Rows:
        return self.of(self.memberships(self.codes), 1.0)

    def of(self, memberships: Mapping[str, Membership], scale: float) -> Rows:
        """All rows, with these memberships and this scale."""
        optional = (self.trials, self.offset, self.weights, self.computed, self.slopes, self.means)
        # Results of the network take the place of its inputs.
        inputs = None if self.computed is not None else self.inputs
        further = (self.fold, inputs, self.censoring)
        return Rows(self.x, self.y, memberships, scale, *optional, *further)

    def batches(
        self, size: int, generator: torch.Generator | None = None, *, dense_up_to: int | None = None
    ) -> Iterator[Rows]:
        places = list(whole_splits(len(self), size, generator))
        indices = (index.to(self.x.device) for index in places)
        batches = (self.batch(index, dense_up_to=dense_up_to) for index in indices)
        if self.inputs is None or self.computed is not None:
            yield from batches
            return
        seed = int(torch.randint(2**31, (), generator=generator))
        # The inputs first: they end a pass, and with it their workers.
        for inputs, rows in zip(self.inputs.training_batches(places, seed), batches, strict=True):
            yield replace(rows, inputs=inputs)

    def batch(self, index: Int[Tensor, " batch"], *, dense_up_to: int | None = None) -> Rows:
        """The rows `index`, drawn independently of the outcome, with the weights of `batches`."""
        scale, taken = len(self) / len(index), self.take(index)
        sampled = self.sampled(len(index), dense_up_to)
        return taken.of(self.memberships(taken.codes, scale, sampled), scale)

    def dense_batch(self, index: Int[Tensor, " batch"]) -> Rows:
        """The rows `index` as a `batch` whose memberships hold all clusters."""
        return self.batch(index, dense_up_to=max(map(len, self.counts.values()), default=0))

    def whole_clusters(self, factor: str, chosen: Int[Tensor, " chosen"]) -> Rows:
        # Time and memory do not depend on the number of clusters.
        counts, (order, starts) = self.counts[factor], self._by_cluster[factor]
        sizes, scale = counts[chosen], len(counts) / len(chosen)
        place = torch.arange(len(chosen), device=chosen.device).repeat_interleave(sizes)
        within = torch.arange(len(place), device=place.device) - (sizes.cumsum(0) - sizes)[place]
        rows = self.batch(order[starts[chosen][place] + within], dense_up_to=len(self))
        weight = self.like.new_full((len(chosen),), scale)
        whole = Membership(chosen, place, weight, complete=False)
        return replace(rows, memberships={**rows.memberships, factor: whole}, scale=scale)

    @cached_property
    def _by_cluster(self) -> dict[str, tuple[Tensor, Tensor]]:
        """For every factor, the rows sorted by cluster, and the place where each cluster starts."""
        starts = {factor: counts.cumsum(0) - counts for factor, counts in self.counts.items()}
        return {
            name: (codes.argsort(stable=True), starts[name]) for name, codes in self.codes.items()
        }

    def chunks(self, size: int) -> Iterator[Rows]:
        for start in range(0, len(self), size):
            index = torch.arange(start, min(start + size, len(self)), device=self.x.device)
            yield self.dense_batch(index)
