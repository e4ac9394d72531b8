"""All rows, a piece of whole clusters after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from armed_pyro.rows.batch import Membership, Rows
from armed_pyro.rows.read_ahead import ahead
from armed_pyro.rows.source import RowSource

__all__ = ["Pieces"]


@dataclass(frozen=True)
class Pieces:
    """All rows, in pieces of whole clusters of one factor where there is one.

    A piece counts 1 / share times in the program, and its log-weights share times in the sum.

    Attributes
    ----------
    read : callable
        Gives the pieces, one after the other.
    clusters : list of (Tensor or None)
        The factor's clusters in each piece; None for all.
    shares : list of float
        Each piece's share of all clusters, or of all rows without a factor.
    factor : str or None
        The factor whose clusters are kept whole.
    """

    read: Callable[[], Iterator[Rows]]
    clusters: list[Tensor | None]
    shares: list[float]
    factor: str | None = None

    @classmethod
    def of(
        cls, source: RowSource, size: int, factor: str | None = None, *, keep: bool = False
    ) -> Pieces:
        """Pieces of about `size` rows, made whenever they are read, or once and kept."""
        n = len(source)
        read: Callable[[], Iterator[Rows]]
        if n <= size:
            every = source.all()
            return cls(lambda: iter([every]), [None], [1.0])
        if factor is None:
            starts = range(0, n, size)
            shares = [min(size, n - start) / n for start in starts]
            return cls(partial(source.chunks, size), [None for _ in starts], shares)
        order = source.cluster_order(factor)
        place = (source.counts[factor][order].cumsum(0) - 1) // size
        chosen = [order[place == piece].sort().values for piece in place.unique()]
        whole = partial(source.whole_clusters, factor)
        if keep:
            held = [whole(clusters) for clusters in chosen]
            read = partial(iter, held)
        else:
            read = lambda: ahead(whole(clusters) for clusters in chosen)  # noqa: E731
        return cls(read, list(chosen), [len(clusters) / len(order) for clusters in chosen], factor)

    def without_rows(self, every: Rows) -> Iterator[Rows]:
        """The clusters of each piece without its rows; `every` has all clusters and no rows."""
        for chosen in self.clusters:
            if chosen is None or self.factor is None:
                yield every
                continue
            membership = Membership(chosen, chosen[:0], complete=False)
            yield replace(every, memberships={**every.memberships, self.factor: membership})
