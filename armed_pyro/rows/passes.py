"""Passes over rows: read ahead, in random mini-batches without end, or in whole clusters."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from armed_pyro.rows.batch import Membership, Rows
from armed_pyro.rows.source import RowSource

__all__ = ["Passes", "Pieces", "ahead"]

T = TypeVar("T")


def ahead(items: Iterable[T], depth: int = 2) -> Iterator[T]:
    """Yield the items, which a thread makes up to `depth` items ahead.

    An error in the thread is raised in place of its item. The thread ends when the loop over the
    items ends, also by an error.
    """
    iterator, end = iter(items), object()
    pool = ThreadPoolExecutor(1, "read-ahead")
    try:
        pending = deque(pool.submit(next, iterator, end) for _ in range(depth))
        while (item := pending.popleft().result()) is not end:
            pending.append(pool.submit(next, iterator, end))
            yield item  # type: ignore[misc]
    finally:
        pool.shutdown(cancel_futures=True)


class Passes:
    """Mini-batches of pass after pass, each in a new random order; can be saved and resumed.

    Torch's global generator draws the orders. Its state before a pass stands for the order of the
    rows, so a checkpoint need not hold the order. `begin` starts a pass and returns its batches.
    It must use the generator only before the first batch; otherwise a restored pass differs.
    """

    def __init__(self, begin: Callable[[torch.Generator], Iterator[Rows]]) -> None:
        self.begin = begin
        self._batches: Iterator[Rows] = iter(())
        self._state, self._taken = torch.empty(0, dtype=torch.uint8), 0

    def __next__(self) -> Rows:
        rows = next(self._batches, None)
        if rows is None:
            self._state, self._taken = torch.get_rng_state(), 0
            self._batches = self.begin(torch.default_generator)
            rows = next(self._batches)
        self._taken += 1
        return rows

    def state(self) -> dict[str, Tensor]:
        """The state of the generator before this pass, and the number of batches taken from it."""
        return {"pass": self._state, "batches_taken": torch.tensor(self._taken)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from a `state`; batches already taken are read again and skipped."""
        self._state, self._taken = tensors["pass"], int(tensors["batches_taken"])
        if len(self._state):
            generator = torch.Generator()
            generator.set_state(self._state)
            self._batches = islice(self.begin(generator), self._taken, None)


@dataclass(frozen=True)
class Pieces:
    """All rows of a source in pieces; the clusters of a nested factor stay whole.

    The program multiplies a piece by 1 / share. The sum over pieces multiplies its log-weights by
    the share: of all clusters, or of all rows without a nested factor.
    """

    read: Callable[[], Iterator[Rows]]
    clusters: list[Tensor | None]  # the nested factor's clusters in each piece; None for all
    shares: list[float]

    @classmethod
    def of(cls, source: RowSource, size: int, factor: str | None, *, keep: bool = False) -> Pieces:
        """Pieces of about `size` rows, in whole clusters of a factor.

        With `keep`, pieces of whole clusters are made once; otherwise in every pass.
        """
        n = len(source)
        if n <= size:
            return cls(partial(iter, [source.all()]), [None], [1.0])
        if factor is None:
            shares = [min(size, n - start) / n for start in range(0, n, size)]
            return cls(partial(source.chunks, size), [None] * len(shares), shares)
        order = source.cluster_order(factor)
        place = (source.counts[factor][order].cumsum(0) - 1) // size
        chosen = [order[place == piece].sort().values for piece in place.unique()]
        whole = partial(source.whole_clusters, factor)
        shares = [len(clusters) / len(order) for clusters in chosen]
        if keep:
            return cls(partial(iter, [*map(whole, chosen)]), [*chosen], shares)
        return cls(lambda: ahead(map(whole, chosen)), [*chosen], shares)

    def without_rows(self, all_clusters: Rows, factor: str | None) -> Iterator[Rows]:
        """Yield the clusters of each piece without rows; their noise is drawn for these.

        `all_clusters` has no rows, but every cluster of every factor; `factor` is the nested one.
        """
        for clusters in self.clusters:
            if clusters is None or factor is None:
                yield all_clusters
            else:
                nested = Membership(clusters, clusters[:0], complete=False)
                memberships = {**all_clusters.memberships, factor: nested}
                yield replace(all_clusters, memberships=memberships)
