"""All rows of a source in pieces that keep clusters whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from armed_pyro.rows.batch import Membership, Rows
from armed_pyro.rows.passes import ahead
from armed_pyro.rows.source import RowSource

__all__ = ["Pieces"]


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
        read: Callable[[], Iterator[Rows]] = lambda: ahead(map(whole, chosen))  # noqa: E731
        return cls(partial(iter, list(map(whole, chosen))) if keep else read, [*chosen], shares)

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
