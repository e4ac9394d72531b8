"""Rows in files, of which what is needed is read, and read ahead."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from armed_pyro.rows.batch import Membership, Rows
from armed_pyro.rows.in_memory import HeldRows
from armed_pyro.rows.read_ahead import Foreseen, ahead
from armed_pyro.rows.source import RowSource, memberships_of
from armed_pyro.streaming.row_file import Layout, Records, RowFile

__all__ = ["StreamedRows"]


# Rows that mini-batches take together, a tenth of a megabyte on disk.
UNIT = 32


@dataclass(frozen=True, eq=False)
class StreamedRows(RowSource):
    """Rows in two files: sorted by the clusters of one factor, and shuffled.

    Mini-batches of rows come from the shuffled file, whose order is drawn uniformly from all:
    32 consecutive rows of it at a time, anew in every epoch, so that each batch is a random
    sample. Whole clusters and passes over all rows come from the sorted one. Nothing is held but
    what was read last and what is read ahead.

    Attributes
    ----------
    layout : Layout
        What the columns of the files are.
    factor : str
        Grouping factor by which the one file is sorted; empty if there is none.
    by_cluster : RowFile
        The rows sorted by that factor's clusters.
    shuffled : RowFile or None
        The rows in random order, where mini-batches of rows are needed.
    counts : mapping of str to Int[Tensor, "clusters"]
        Rows in each cluster, for every grouping factor.
    reference : Tensor
        A tensor of the wanted precision and device.
    digest : bytes
        What tells the rows from others.
    """

    layout: Layout
    factor: str
    by_cluster: RowFile
    shuffled: RowFile | None
    counts: Mapping[str, Int[Tensor, " clusters"]]
    reference: Tensor
    digest: bytes
    reads_ahead: ClassVar[bool] = True

    def __len__(self) -> int:
        return len(self.by_cluster)

    @property
    def like(self) -> Tensor:
        return self.reference

    @property
    def row_shape(self) -> tuple[int, ...]:
        return (self.layout.n_features,)

    def fingerprint(self) -> Iterator[bytes]:
        yield self.digest

    def unit(self, size: int) -> int:
        return math.gcd(size, UNIT)

    def all(self) -> Rows:
        return self._held(self._stretch(0, len(self))).all()

    def batch(
        self,
        index: Int[Tensor, " units"],
        *,
        unit: int = 1,
        dense_up_to: int | None = None,
        following: Int[Tensor, " units"] | None = None,
    ) -> Rows:
        index = _rows(index, unit)
        following = None if following is None else _rows(following, unit)
        held = self._held(self._foreseen(index, following))
        scale = len(self) / len(index)
        sampled = self.sampled(len(index), dense_up_to)
        memberships = memberships_of(held.codes, self, scale, sampled)
        return held.of(memberships, scale)

    def whole_clusters(self, factor: str, chosen: Int[Tensor, " chosen"]) -> Rows:
        if factor != self.factor:
            raise ValueError(
                f"the streamed rows are sorted by {self.factor!r}, but whole clusters of "
                f"{factor!r} are needed: fit a table of so many rows in memory, or leave the "
                "random effects of one factor out"
            )
        counts = self.counts[factor]
        wanted = chosen.sort().values.cpu().numpy()
        held = self._held(self.by_cluster.read(self._edges[wanted], self._edges[wanted + 1]))
        place = torch.full((len(counts),), -1, device=chosen.device)
        place[chosen] = torch.arange(len(chosen), device=chosen.device)
        scale = len(counts) / len(chosen)
        memberships = memberships_of(held.codes, self, 1.0, ())
        weight = self.like.new_full((len(chosen),), scale)
        own = Membership(chosen, place[held.codes[factor]], weight, complete=False)
        return held.of({**memberships, factor: own}, scale)

    def chunks(self, size: int) -> Iterator[Rows]:
        starts = range(0, len(self), size)
        for records in ahead(self._stretch(at, min(at + size, len(self))) for at in starts):
            held = self._held(records)
            memberships = memberships_of(held.codes, self, 1.0, ())
            yield held.of(memberships, len(self) / len(records))

    @cached_property
    def _edges(self) -> Int[np.ndarray, " clusters+1"]:
        """First row of each cluster, and the number of rows."""
        return np.concatenate([[0], np.cumsum(self.counts[self.factor].cpu().numpy())])

    @cached_property
    def _foreseen(self) -> Foreseen[Records]:
        return Foreseen(self._shuffled_rows)

    def _shuffled_rows(self, index: Int[Tensor, " batch"]) -> Records:
        if self.shuffled is None:
            raise ValueError("no mini-batches of rows were foreseen for this program")
        rows = index.cpu().numpy()
        return self.shuffled.read(rows, rows + 1)

    def _stretch(self, start: int, stop: int) -> Records:
        return self.by_cluster.read(np.array([start]), np.array([stop]))

    def _held(self, records: Records) -> HeldRows:
        return self.layout.rows(records, self.counts, self.like)


def _rows(units: Int[Tensor, " units"], unit: int) -> Int[Tensor, " rows"]:
    """The consecutive rows of which units consist."""
    return (unit * units[:, None] + torch.arange(unit, device=units.device)).flatten()
