"""A source of rows in Parquet files, which a thread reads ahead."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Int
from torch import Tensor

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.rows.batch import Membership, Rows
from armed_pyro.rows.censoring import Censoring
from armed_pyro.rows.in_memory import HeldRows
from armed_pyro.rows.passes import ahead
from armed_pyro.rows.source import RowSource
from armed_pyro.streaming.database import database, quoted
from armed_pyro.streaming.encoded_table import EncodedTable, group_rows
from armed_pyro.streaming.parquet_table import group_starts, take_rows

__all__ = ["StreamedRows"]

# Number of row groups, of about a megabyte each, whose rows are mixed into mini-batches.
MIXED = 8


class StreamedRows(RowSource):
    """Rows in a file; DuckDB makes copies in the orders in which rows are needed.

    Mini-batches of rows come from a shuffled copy. Every pass draws eight of its row groups at a
    time and mixes their rows. Whole clusters come from a copy sorted by cluster. The order of the
    clusters is random, so that a batch of random clusters is one stretch of the file. A copy is
    made when it is first needed, in the folder of the encoded table's file. Memory holds only the
    current block of rows and those read ahead. Batches have the precision and device of `like`.
    `means` are columns that the rows take from their clusters, by factor: `Rows.means`.
    """

    def __init__(
        self,
        table: EncodedTable,
        like: Tensor,
        means: Mapping[str, Float[Tensor, "clusters columns"]] | None = None,
    ) -> None:
        self.table, self._like = table, like.new_zeros(0)
        self._means = {factor: values.to(like) for factor, values in (means or {}).items()}
        self.counts = {name: table.scanned.counts[name].to(like.device) for name in table.factors}
        self._sorted: dict[str, _SortedFile] = {}

    def __len__(self) -> int:
        return self.table.scanned.n_rows

    @property
    def like(self) -> Tensor:
        return self._like

    @property
    def row_shape(self) -> tuple[int, ...]:
        return (len(self.table.scanned.features),)

    def divided(self, factor: str | None, wanted: int) -> tuple[StreamedRows, ClusteredData]:
        """The rest of the rows, and a held-out part; see `EncodedTable.divided`."""
        rest, held = self.table.divided(factor, wanted)
        return StreamedRows(rest, self._like, self._means), held

    def fingerprint(self) -> Iterator[bytes]:
        yield self.table.digest

    def all(self) -> Rows:
        table = pq.read_table(self.table.path, columns=self._columns, pre_buffer=False)
        return self._held(table, encoded=True).all()

    def batches(
        self, size: int, generator: torch.Generator | None = None, *, dense_up_to: int | None = None
    ) -> Iterator[Rows]:
        # The thread that reads ahead needs a generator that no other thread uses.
        seed = int(torch.randint(2**62, (), generator=generator))
        scale, sampled = len(self) / size, self.sampled(size, dense_up_to)
        for held, order in ahead(self._mixed(self._shuffled, size, seed)):
            for start in range(0, len(order) - size + 1, size):
                taken = held.take(order[start : start + size])
                yield taken.of(self.memberships(taken.codes, scale, sampled), scale)

    def whole_clusters(self, factor: str, chosen: Int[Tensor, " chosen"]) -> Rows:
        counts = self.counts[factor]
        held = self._held(self._by_cluster(factor).read(chosen.cpu().numpy()))
        place = torch.full((len(counts),), -1, device=chosen.device)
        place[chosen] = torch.arange(len(chosen), device=chosen.device)
        scale = len(counts) / len(chosen)
        weight = self.like.new_full((len(chosen),), scale)
        membership = Membership(chosen, place[held.codes[factor]], weight, complete=False)
        return held.of({**self.memberships(held.codes), factor: membership}, scale)

    def cluster_order(self, factor: str) -> Int[Tensor, " clusters"]:
        return torch.from_numpy(self._by_cluster(factor).order).to(self.like.device)

    def cluster_batches(
        self, factor: str, size: int, generator: torch.Generator | None = None
    ) -> Iterator[Rows]:
        # Stretches of the file in random order; the random offset varies them between passes.
        order = self.cluster_order(factor)
        order = order.roll(int(torch.randint(len(order), (), generator=generator)))
        places = torch.randperm(len(order) // size, generator=generator)
        yield from ahead(
            self.whole_clusters(factor, order[size * place : size * (place + 1)])
            for place in places.tolist()
        )

    def chunks(self, size: int) -> Iterator[Rows]:
        with pq.ParquetFile(self.table.path, pre_buffer=False) as file:
            for batch in ahead(file.iter_batches(size, None, self._columns, use_threads=False)):
                held = self._held(pa.Table.from_batches([batch]), encoded=True)
                yield held.of(self.memberships(held.codes), len(self) / len(held))

    @property
    def _columns(self) -> list[str]:
        """Names of the encoded file's columns that become tensors."""
        scanned = self.table.scanned
        return [*scanned.features, *scanned.numbers, *map(scanned.cluster, self.counts)]

    @cached_property
    def _shuffled(self) -> Path:
        """The shuffled copy's file."""
        return self._copy("shuffled", "read_parquet($path)", "key, row")

    def _by_cluster(self, factor: str) -> _SortedFile:
        """The copy sorted by a factor's clusters."""
        if factor not in self._sorted:
            counts, column = self.counts[factor].cpu().numpy(), self.table.scanned.cluster(factor)
            order = np.random.default_rng(self.table.seed).permutation(len(counts))
            ranks = pa.table({"code": order, "rank": np.arange(len(order))})
            tables = f"read_parquet($path) JOIN ranks ON {column} = code"
            path = self._copy(column, tables, "rank, row", ranks)
            self._sorted[factor] = _SortedFile(path, order, counts[order])
        return self._sorted[factor]

    def _copy(self, name: str, tables: str, order: str, ranks: pa.Table | None = None) -> Path:
        """Write a file with the standardised rows in another order."""
        table, path = self.table, self.table.path.with_name(f"{name}.parquet")
        scaling = zip(table.feature_mean.tolist(), table.feature_scale.tolist(), strict=True)
        # As text, because DuckDB reads a number with a point as a fixed-point decimal.
        columns = [
            f"((x{place} - '{mean!r}'::DOUBLE) / '{scale!r}'::DOUBLE)::FLOAT AS x{place}"
            for place, (mean, scale) in enumerate(scaling)
        ]
        columns += map(quoted, self._columns[len(columns) :])
        with database(table.memory, path.parent, len(columns)) as connection:
            if ranks is not None:
                connection.register("ranks", ranks)
            connection.execute(
                f"COPY (SELECT {', '.join(columns)} FROM {tables} ORDER BY {order}) TO $target "
                f"(FORMAT parquet, COMPRESSION lz4_raw, ROW_GROUP_SIZE {group_rows(len(columns))})",
                {"path": glob.escape(str(table.path)), "target": str(path)},
            )
        return path

    def _mixed(self, path: Path, size: int, seed: int) -> Iterator[tuple[HeldRows, Tensor]]:
        """Yield the rows of a few random row groups, with those left over before, and an order."""
        generator, left = torch.Generator().manual_seed(seed), list[pa.Table]()
        with pq.ParquetFile(path, pre_buffer=False) as file:
            groups = torch.randperm(file.num_row_groups, generator=generator)
            largest = file.metadata.row_group(0).num_rows
            for mixed in groups.split(max(MIXED, 1 + size // largest)):
                read = file.read_row_groups(mixed.tolist(), use_threads=False)
                table = pa.concat_tables([*left, read])
                order = torch.randperm(len(table), generator=generator)
                yield self._held(table), order.to(self.like.device)
                left = [table.take(order[len(order) // size * size :].numpy())]

    def _held(self, table: pa.Table, *, encoded: bool = False) -> HeldRows:
        """Rows of a file as tensors; the encoded file's features are standardised here."""
        scanned = self.table.scanned
        values = np.empty((len(table), len(scanned.features)), np.float32)
        for place, name in enumerate(scanned.features):
            feature = table[name].to_numpy()
            if encoded:
                mean, scale = self.table.feature_mean[place], self.table.feature_scale[place]
                feature = (feature - float(mean)) / float(scale)
            values[:, place] = feature

        def tensor(name: str) -> Tensor | None:
            if name not in scanned.numbers:
                return None
            return torch.tensor(table[name].to_numpy()).to(self.like)

        codes = {}
        for factor in self.counts:
            column = torch.tensor(table[scanned.cluster(factor)].to_numpy())
            codes[factor] = column.to(self.like.device, torch.long)
        x, y = torch.from_numpy(values).to(self.like), tensor("outcome")
        trials, offset, weights = tensor("trials"), tensor("offset"), tensor("weights")
        parts = [values[codes[factor]] for factor, values in self._means.items()]
        means = torch.cat(parts, 1) if parts else None
        censoring = Censoring.columns(y, tensor("status"), tensor("upper"), tensor("entry"))
        parts_of_rows = (x, y, codes, self.counts, trials, offset, weights)
        return HeldRows(*parts_of_rows, means=means, censoring=censoring)


class _SortedFile:
    """A file of rows sorted by cluster; `counts` are the rows of the clusters in `order`."""

    def __init__(self, path: Path, order: np.ndarray, counts: np.ndarray) -> None:
        self.path, self.order, self.ranks = path, order, np.argsort(order)
        self.starts, self.metadata = np.cumsum([0, *counts]), pq.read_metadata(path)
        self.groups = group_starts(self.metadata)

    def read(self, chosen: Int[np.ndarray, " chosen"]) -> pa.Table:
        """All rows of the chosen clusters, in the order of the file."""
        ranks = np.sort(self.ranks[chosen])
        sizes = np.diff(self.starts)[ranks]
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        rows = np.repeat(self.starts[ranks], sizes) + within
        with pq.ParquetFile(self.path, metadata=self.metadata, pre_buffer=False) as file:
            return take_rows(file, self.groups, rows)
