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
    """All rows, in pieces of whole clusters where there are any.

    A piece counts 1 / share times in the program, and its log-weights share times in the sum.

    Attributes
    ----------
    read : callable
        Gives the pieces, one after the other.
    clusters : list of (Tensor or None)
        The nested factor's clusters in each; None for all.
    shares : list of float
        Each piece's share of all.
    """

    read: Callable[[], Iterator[Rows]]
    clusters: list[Tensor | None]
    shares: list[float]

    @classmethod
    def of(cls, source: RowSource, size: int, factor: str | None, *, keep: bool = False) -> Pieces:
        """Pieces of about `size` rows, made whenever they are read, or once and kept.

        Parameters
        ----------
        factor : str, optional
            The grouping factor whose clusters stay whole.
        """
        n = len(source)
        read: Callable[[], Iterator[Rows]]
        if n <= size:
            every = source.all()
            return cls(lambda: iter([every]), [None], [1.0])
        if factor is None:
            starts = range(0, n, size)
            shares = [min(size, n - start) / n for start in starts]
            read, clusters = partial(source.chunks, size), [None for _ in starts]
            return cls(read, list(clusters), shares)
        order = source.cluster_order(factor)
        place = (source.counts[factor][order].cumsum(0) - 1) // size
        chosen = [order[place == piece].sort().values for piece in place.unique()]
        whole = partial(source.whole_clusters, factor)
        if keep:
            held = [whole(one) for one in chosen]
            read = partial(iter, held)
        else:
            read = lambda: ahead(whole(one) for one in chosen)  # noqa: E731
        return cls(read, list(chosen), [len(one) / len(order) for one in chosen])

    def without_rows(self, every: Rows, factor: str | None) -> Iterator[Rows]:
        """The clusters of each piece without its rows, for which noise is drawn.

        Parameters
        ----------
        every : Rows
            No rows, but every cluster of every factor.
        """
        for chosen in self.clusters:
            if chosen is None or factor is None:
                yield every
                continue
            own = Membership(chosen, chosen[:0], complete=False)
            yield replace(every, memberships={**every.memberships, factor: own})
