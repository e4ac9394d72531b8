"""Rows in Parquet files, of which what is needed is read, and read ahead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Int
from torch import Tensor

from armed_pyro.rows.batch import Membership, Rows
from armed_pyro.rows.in_memory import HeldRows
from armed_pyro.rows.read_ahead import ahead
from armed_pyro.rows.source import RowSource, memberships_of
from armed_pyro.streaming.row_file import Layout, put_in_order

__all__ = ["StreamedRows"]


# Row groups of about a megabyte that are mixed at once into mini-batches.
MIXED = 8
# Seed of the order of clusters in a file; any will do.
ORDER_SEED = 0


@dataclass(frozen=True, eq=False)
class StreamedRows(RowSource):
    """Rows in a file, of which copies are made in the order in which rows are asked for.

    Mini-batches of rows come from a copy that is shuffled once: eight of its row groups, drawn
    anew in every pass, are mixed at a time. Whole clusters come from a copy that is sorted by
    their factor, the clusters in an order drawn once: those beside each other are random ones,
    so that a batch of clusters is read in one stretch. DuckDB makes a copy when it is first
    needed. Nothing is held but what was read last and what is read ahead.

    Attributes
    ----------
    path : Path
        The file, in the order of the table; copies are made beside it.
    layout : Layout
        What its columns are.
    counts : mapping of str to Int[Tensor, "clusters"]
        Rows in each cluster, for every grouping factor.
    reference : Tensor
        A tensor of the wanted precision and device.
    scaling : (Float[ndarray, "features"], Float[ndarray, "features"])
        Factors and shifts that make the file's features those of the network.
    n_rows : int
        Number of rows.
    memory : int
        Bytes that the process is to stay within.
    digest : bytes
        What tells the rows from others.
    """

    path: Path
    layout: Layout
    counts: Mapping[str, Int[Tensor, " clusters"]]
    reference: Tensor
    scaling: tuple[Float[np.ndarray, " features"], Float[np.ndarray, " features"]]
    n_rows: int
    memory: int
    digest: bytes

    def __len__(self) -> int:
        return self.n_rows

    @property
    def like(self) -> Tensor:
        return self.reference

    @property
    def row_shape(self) -> tuple[int, ...]:
        return (self.layout.n_features,)

    def fingerprint(self) -> Iterator[bytes]:
        yield self.digest

    def all(self) -> Rows:
        return self._held(pq.read_table(self.path)).all()

    def batches(
        self,
        size: int,
        generator: torch.Generator | None = None,
        *,
        dense_up_to: int | None = None,
    ) -> Iterator[Rows]:
        # The generator of a thread that reads ahead must not be used by anything else.
        seed = int(torch.randint(2**62, (), generator=generator))
        scale, sampled = len(self) / size, self.sampled(size, dense_up_to)
        for held, order in ahead(self._mixed(self._shuffled, size, seed)):
            for start in range(0, len(order) - size + 1, size):
                taken = held.take(order[start : start + size])
                yield taken.of(memberships_of(taken.codes, self, scale, sampled), scale)

    def whole_clusters(self, factor: str, chosen: Int[Tensor, " chosen"]) -> Rows:
        counts = self.counts[factor]
        held = self._held(self._by_cluster(factor).read(chosen.cpu().numpy()))
        place = torch.full((len(counts),), -1, device=chosen.device)
        place[chosen] = torch.arange(len(chosen), device=chosen.device)
        scale = len(counts) / len(chosen)
        memberships = memberships_of(held.codes, self, 1.0, ())
        weight = self.like.new_full((len(chosen),), scale)
        membership = Membership(chosen, place[held.codes[factor]], weight, complete=False)
        return held.of({**memberships, factor: membership}, scale)

    def cluster_order(self, factor: str) -> Int[Tensor, " clusters"]:
        return torch.from_numpy(self._by_cluster(factor).order).to(self.like.device)

    def cluster_batches(
        self, factor: str, size: int, generator: torch.Generator | None = None
    ) -> Iterator[Rows]:
        # Stretches of the file in random order; where they begin differs between passes.
        order = self.cluster_order(factor)
        order = order.roll(int(torch.randint(len(order), (), generator=generator)))
        places = torch.randperm(len(order) // size, generator=generator)
        yield from ahead(
            self.whole_clusters(factor, order[size * place : size * (place + 1)])
            for place in places.tolist()
        )

    def chunks(self, size: int) -> Iterator[Rows]:
        with pq.ParquetFile(self.path) as file:
            for batch in ahead(file.iter_batches(size, use_threads=False)):
                held = self._held(pa.Table.from_batches([batch]))
                memberships = memberships_of(held.codes, self, 1.0, ())
                yield held.of(memberships, len(self) / len(held))

    @cached_property
    def _shuffled(self) -> Path:
        """The shuffled copy."""
        path = self.path.with_name("shuffled.parquet")
        put_in_order(self.path, path, self.layout, self.memory)
        return path

    @cached_property
    def _sorted(self) -> dict[str, _SortedFile]:
        return {}

    def _by_cluster(self, factor: str) -> _SortedFile:
        """The copy sorted by a factor's clusters."""
        if factor not in self._sorted:
            path = self.path.with_name(f"{self.layout.cluster(factor)}.parquet")
            counts = self.counts[factor].cpu().numpy()
            order = np.random.default_rng(ORDER_SEED).permutation(len(counts))
            ranks = np.argsort(order)
            put_in_order(self.path, path, self.layout, self.memory, factor=factor, ranks=ranks)
            self._sorted[factor] = _SortedFile(path, order, ranks, counts)
        return self._sorted[factor]

    def _mixed(self, path: Path, size: int, seed: int) -> Iterator[tuple[HeldRows, Tensor]]:
        """Random row groups, some at a time with what was left of those before, and an order."""
        generator = torch.Generator().manual_seed(seed)
        with pq.ParquetFile(path) as file:
            groups = torch.randperm(file.num_row_groups, generator=generator)
            left: list[pa.Table] = []
            for some in groups.split(max(MIXED, 1 + size // self.layout.group_rows)):
                read = file.read_row_groups(some.tolist(), use_threads=False)
                table = pa.concat_tables([*left, read])
                order = torch.randperm(len(table), generator=generator)
                yield self._held(table), order.to(self.like.device)
                left = [table.take(order[len(order) // size * size :].numpy())]

    def _held(self, table: pa.Table) -> HeldRows:
        return self.layout.held(table, self.counts, self.like, self.scaling)


class _SortedFile:
    """Rows sorted by clusters, of which whole ones are read.

    Parameters
    ----------
    path : Path
        The file.
    order, ranks : Int[ndarray, "clusters"]
        The clusters in the order in which they lie, and each one's place.
    counts : Int[ndarray, "clusters"]
        Rows of each.
    """

    def __init__(self, path: Path, order: np.ndarray, ranks: np.ndarray, counts: np.ndarray):
        self.path, self.order, self.ranks = path, order, ranks
        self._edges = np.concatenate([[0], np.cumsum(counts[order])])
        self._metadata = pq.read_metadata(path)
        groups = range(self._metadata.num_row_groups)
        sizes = [self._metadata.row_group(group).num_rows for group in groups]
        self._groups = np.concatenate([[0], np.cumsum(sizes)])

    def read(self, chosen: Int[np.ndarray, " chosen"]) -> pa.Table:
        """All rows of these clusters, of the row groups that hold them."""
        ranks = np.sort(self.ranks[chosen])
        firsts, lengths = self._edges[ranks], np.diff(self._edges)[ranks]
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        rows = np.repeat(firsts, lengths) + within
        groups = np.searchsorted(self._groups, rows, "right") - 1
        parts = []
        with pq.ParquetFile(self.path, metadata=self._metadata) as file:
            for group in np.unique(groups):
                low, high = np.searchsorted(groups, [group, group + 1])
                table = file.read_row_group(group, use_threads=False)
                parts.append(table.take(rows[low:high] - self._groups[group]))
        return pa.concat_tables(parts)
