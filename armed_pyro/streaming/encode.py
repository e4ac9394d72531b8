"""From a table's blocks to one file of encoded rows, and what is known of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.data.columns import check_varying
from armed_pyro.data.grouping import check_informative
from armed_pyro.data.schema import Schema
from armed_pyro.streaming.on_disk import StreamedRows
from armed_pyro.streaming.parquet_table import TableBlocks
from armed_pyro.streaming.row_file import Layout
from armed_pyro.streaming.scan import TableScan, complete_blocks

__all__ = ["EncodedTable", "encode", "encoded_columns"]


# Rows that a fit keeps to be checked and saved with; fewest clusters to take them in whole.
SAMPLE_ROWS, FEWEST_CLUSTERS = 50_000, 20


@dataclass(frozen=True, eq=False)
class EncodedTable:
    """A table's rows, encoded in a file, and what is known of them.

    Attributes
    ----------
    table : TableBlocks
        The table.
    scanned : TableScan
        What a first pass over it told.
    path : Path
        The file of encoded rows.
    layout : Layout
        Its columns.
    first : ClusteredData
        The table's first rows.
    feature_mean, feature_scale : Float[ndarray, "features"]
        Means and sds of the features of all rows; 0 and 1 of indicators.
    scaling : (Float[ndarray, "features"], Float[ndarray, "features"])
        Factors and shifts that make the file's features those of the network.
    memory : int
        Bytes that the fit's process is to stay within.
    seed : int
        Seed of the sample that is kept.
    digest : bytes
        What tells the rows from others.
    """

    table: TableBlocks
    scanned: TableScan
    path: Path
    layout: Layout
    first: ClusteredData
    feature_mean: Float[np.ndarray, " features"]
    feature_scale: Float[np.ndarray, " features"]
    scaling: tuple[Float[np.ndarray, " features"], Float[np.ndarray, " features"]]
    memory: int
    seed: int
    digest: bytes

    @property
    def levels(self) -> dict[str, pd.Index]:
        """Labels of the clusters of the factors that the program needs."""
        return {name: self.scanned.levels[name] for name in self.layout.factors}

    @property
    def counts(self) -> dict[str, Tensor]:
        """Rows of each of these clusters."""
        return {name: self.scanned.counts[name] for name in self.layout.factors}

    def outcomes(self) -> ClusteredData:
        """All rows without features and clusters: outcome, trials, offset and weights."""
        columns = pq.read_table(self.path, columns=[*self.layout.numbers, "row"])
        numbers: dict[str, Any] = dict.fromkeys(("trials", "offset", "weights"))
        for name in self.layout.numbers:
            numbers[name] = torch.tensor(columns[name].to_numpy())
        complete = self.table.n_rows == self.scanned.n_rows
        return ClusteredData(
            features=torch.zeros(len(columns), 0),
            feature_names=(),
            sources=(),
            continuous=(),
            outcome_name=self.scanned.schema.outcome,
            outcome=numbers.pop("y"),
            classes=self.first.classes,
            groupings={},
            row_labels=(
                pd.RangeIndex(len(columns)) if complete else pd.Index(columns["row"].to_numpy())
            ),
            schema=self.scanned.schema,
            **numbers,
        )

    def sample(self, factor: str | None) -> ClusteredData:
        """At most about 50,000 of the rows, in whole clusters of a factor if that makes 20."""
        rng = np.random.default_rng([self.seed, 12])
        wanted = None if factor is None else self._some_clusters(factor, rng)
        columns = ["row"] if factor is None else ["row", self.layout.cluster(factor)]
        share, rows = SAMPLE_ROWS / self.scanned.n_rows, []
        with pq.ParquetFile(self.path) as file:
            for batch in file.iter_batches(columns=columns):
                place, *codes = (column.to_numpy() for column in batch.columns)
                taken = rng.random(len(place)) < share if wanted is None else wanted[codes[0]]
                rows.append(place[taken])
        schema = self.scanned.schema
        frame = self.table.take(np.concatenate(rows), encoded_columns(schema))
        return ClusteredData.encode(frame, schema, outcome_required=True)

    def rows(self, like: Tensor) -> StreamedRows:
        """The rows with the precision and device of a tensor."""
        return StreamedRows(
            self.path,
            self.layout,
            {name: one.to(like.device) for name, one in self.counts.items()},
            like.new_zeros(0),
            self.scaling,
            self.scanned.n_rows,
            self.memory,
            self.digest,
        )

    def _some_clusters(
        self, factor: str, rng: np.random.Generator
    ) -> Bool[np.ndarray, " clusters"] | None:
        """Clusters of about 50,000 rows, if they are enough of them."""
        counts = self.scanned.counts[factor].numpy()
        order = rng.permutation(len(counts))
        n_taken = max(1, int(np.searchsorted(np.cumsum(counts[order]), SAMPLE_ROWS, "right")))
        if n_taken < min(FEWEST_CLUSTERS, len(counts)):
            return None
        wanted = np.zeros(len(counts), dtype=bool)
        wanted[order[:n_taken]] = True
        return wanted


def encode(
    table: TableBlocks,
    scanned: TableScan,
    factors: Sequence[str],
    path: Path,
    *,
    memory: int,
    seed: int,
    report: Callable[[int], Any] = lambda done: None,
) -> EncodedTable:
    """Read a table once more and write its rows, encoded, to a file.

    Parameters
    ----------
    table, scanned : TableBlocks, TableScan
        The table, and what a first pass over it told.
    factors : sequence of str
        Grouping factors that the program needs.
    path : Path
        Where to.
    memory, seed : int
        See `EncodedTable`.
    report : callable, optional
        Told how many rows have been written since it was told last.

    Raises
    ------
    ValueError
        If a grouping factor is one of cells or cannot be fitted, or a feature is constant.
    """
    schema = scanned.schema
    _check_factors(scanned, factors)
    schema = scanned.schema
    blocks = complete_blocks(table, encoded_columns(schema))
    frame = next(blocks)
    first = ClusteredData.encode(frame, schema, outcome_required=True)
    roles = {"y": schema.outcome, "trials": schema.trials, "offset": schema.offset}
    roles["weights"] = schema.weights
    numbers = tuple(name for name, column in roles.items() if column is not None)
    layout = Layout(len(first.feature_names), numbers, tuple(factors))
    rng, digest, moments = np.random.default_rng([seed, 13]), hashlib.blake2b(), _Moments()
    # Means and sds of all rows are not known yet; single precision needs something near them.
    x, continuous = first.features.numpy(), np.asarray(first.continuous, dtype=bool)
    shift, spread = np.where(continuous, x.mean(0), 0.0), x.std(0)
    unit = np.where(continuous & (spread > 0), spread, 1.0)
    with pq.ParquetWriter(path, layout.schema, compression="NONE", use_dictionary=False) as writer:
        for block in chain([frame], blocks):
            rows = ClusteredData.encode(block, schema, outcome_required=True)
            x = rows.features.numpy()
            moments.add(x)
            arrays = [*((x - shift) / unit).astype(np.float32).T, *_others(rows, scanned, layout)]
            arrays.append(block.index.to_numpy())
            for array in arrays:
                digest.update(np.ascontiguousarray(array).data)
            arrays.append(rng.integers(2**63, size=len(rows)))
            encoded = pa.table([pa.array(array) for array in arrays], schema=layout.schema)
            writer.write_table(encoded, row_group_size=layout.group_rows)
            report(len(rows))
    check_varying(first.feature_names, torch.from_numpy(moments.varying))
    mean = np.where(continuous, moments.mean, 0.0)
    scale = np.where(continuous, moments.sds(), 1.0)
    scaling = (unit / scale, (shift - mean) / scale)
    return EncodedTable(
        table, scanned, path, layout, first, mean, scale, scaling, memory, seed, digest.digest()
    )


def encoded_columns(schema: Schema) -> tuple[str, ...]:
    """The table's columns that a schema reads, each once."""
    roles = (schema.outcome, *schema.clusters, schema.trials, schema.offset, schema.weights)
    return tuple(dict.fromkeys(name for name in (*roles, *schema.columns) if name is not None))


def _check_factors(scanned: TableScan, factors: Sequence[str]) -> None:
    """Raise ValueError for a factor that cannot be streamed, or cannot be fitted."""
    for name in factors:
        if name not in scanned.levels:
            raise ValueError(
                f"the cells of {name!r} cannot be streamed: write their labels to a column of the "
                "table, and name that column in the random effects"
            )
        check_informative(name, scanned.levels[name], scanned.counts[name])


def _others(rows: ClusteredData, scanned: TableScan, layout: Layout) -> list[np.ndarray]:
    """Values of the columns of encoded rows that are no features: numbers and clusters."""
    arrays = [getattr(rows, "outcome" if n == "y" else n).numpy() for n in layout.numbers]
    for name in layout.factors:
        grouping = rows.groupings[name]
        codes = scanned.levels[name].get_indexer(grouping.levels).astype(np.int32)
        arrays.append(codes[grouping.codes.numpy()])
    return arrays


class _Moments:
    """Means and sds of columns seen block by block (Chan, Golub, LeVeque 1983)."""

    def __init__(self) -> None:
        self.n = 0
        self.mean: Any = 0.0
        self.squares: Any = 0.0
        self.varying: Any = False
        self._first: Any = None

    def add(self, x: Float[np.ndarray, "rows columns"]) -> None:
        """Take in some rows."""
        self._first = x[0].copy() if self._first is None else self._first
        self.varying = self.varying | (x != self._first).any(0)
        mean, n = x.mean(0), self.n + len(x)
        delta = mean - self.mean
        self.squares = self.squares + ((x - mean) ** 2).sum(0) + delta**2 * self.n * len(x) / n
        self.mean = self.mean + delta * len(x) / n
        self.n = n

    def sds(self) -> Float[np.ndarray, " columns"]:
        """Standard deviations."""
        return np.asarray(np.sqrt(self.squares / max(1, self.n - 1)))
