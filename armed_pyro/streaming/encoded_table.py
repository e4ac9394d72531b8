"""A table's rows, encoded, in one Parquet file, and what is known of them."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from torch import Tensor

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.data.columns import check_varying
from armed_pyro.data.grouping import Grouping
from armed_pyro.data.schema import Schema
from armed_pyro.streaming.database import database
from armed_pyro.streaming.parquet_table import TableBlocks
from armed_pyro.streaming.scan import TableScan, complete_blocks

__all__ = ["EncodedTable", "encode", "encoded_columns", "group_rows"]

# Rows that a fit keeps to be checked and saved with; fewest clusters to take them in whole.
SAMPLE_ROWS, FEWEST_CLUSTERS = 50_000, 20
# DuckDB makes row groups of multiples of 2,048 rows. Those of about a megabyte are read at 1 GB/s
# or more, and a mini-batch is mixed from several of them.
VECTOR, GROUP_BYTES = 2048, 2**20


@dataclass(frozen=True, eq=False)
class EncodedTable:
    """Encoded rows in a file.

    Its columns are the features ``x0, x1, ...``, those of ``outcome``, ``trials``, ``offset`` and
    ``weights`` that there are, the clusters ``cluster0, ...`` as positions among the levels of
    each cluster column, ``row`` (in the table), and a random ``key`` by which rows are shuffled.

    Attributes
    ----------
    path : Path
        The file.
    scanned : TableScan
        What a first pass over the table told.
    feature_mean, feature_scale : Float[Tensor, "features"]
        Means and sds of the features of all rows; 0 and 1 of indicators.
    digest : bytes
        What tells the rows from others.
    memory, seed : int
        Bytes that the fit's process is to stay within; seed of the sample that is kept.
    factors : tuple of str
        Grouping factors that the program needs.
    """

    path: Path
    scanned: TableScan
    feature_mean: Float[Tensor, " features"]
    feature_scale: Float[Tensor, " features"]
    digest: bytes
    memory: int
    seed: int
    factors: tuple[str, ...] = ()

    @property
    def features(self) -> list[str]:
        """Columns of features."""
        return _features(self.scanned.first)

    @property
    def numbers(self) -> list[str]:
        """Columns of row-wise numbers."""
        return _numbers(self.scanned.first)

    def cluster(self, factor: str) -> str:
        """The column with the clusters of a factor."""
        return f"cluster{list(self.scanned.levels).index(factor)}"

    def outcomes(self) -> ClusteredData:
        """All rows without features and clusters."""
        rows = self._rows([*self.numbers, "row"], "true")
        nothing: dict[str, Any] = dict.fromkeys(("feature_names", "sources", "continuous"), ())
        return replace(rows, features=torch.zeros(len(rows), 0), groupings={}, **nothing)

    def sample(self, factor: str | None) -> ClusteredData:
        """At most about 50,000 of the rows, in whole clusters of a factor if that makes 20."""
        where, given = f"key < {SAMPLE_ROWS} / {self.scanned.n_rows}::DOUBLE", {}
        if factor is not None:
            counts = self.scanned.counts[factor].numpy()
            order = np.random.default_rng([self.seed, 12]).permutation(len(counts))
            n = max(1, int(np.searchsorted(np.cumsum(counts[order]), SAMPLE_ROWS, "right")))
            if n >= min(FEWEST_CLUSTERS, len(counts)):
                given = {"chosen": order[:n].tolist()}
                where = f"{self.cluster(factor)} IN (SELECT unnest($chosen))"
        names = [*self.features, *self.numbers, *map(self.cluster, self.scanned.levels), "row"]
        return self._rows(names, where, **given).take(slice(None))

    def _rows(self, names: list[str], where: str, **given: Any) -> ClusteredData:
        """Columns of some rows as a table in memory would give them."""
        with database(self.memory, self.path.parent, len(names)) as connection:
            query = f"SELECT {', '.join(names)} FROM read_parquet($path) WHERE {where}"
            given["path"] = glob.escape(str(self.path))
            columns = connection.execute(query, given).fetchnumpy()
        tensors = {name: torch.from_numpy(np.asarray(values)) for name, values in columns.items()}
        features = [tensors[name] for name in self.features if name in tensors]
        none = torch.zeros(len(columns["row"]), 0, dtype=torch.float64)
        numbers: dict[str, Any] = {name: tensors[name] for name in self.numbers}
        return replace(
            self.scanned.first,
            features=torch.stack(features, 1) if features else none,
            groupings={
                factor: Grouping(tensors[self.cluster(factor)].long(), levels)
                for factor, levels in self.scanned.levels.items()
                if self.cluster(factor) in tensors
            },
            row_labels=pd.Index(columns["row"]),
            **numbers,
        )


def encode(
    table: TableBlocks,
    scanned: TableScan,
    path: Path,
    memory: int,
    seed: int,
    report: Callable[[int], Any] = lambda done: None,
) -> EncodedTable:
    """Read a table once more and write its rows, encoded, to the file `path`.

    `report` is told how many rows have been written since it was told last.

    Raises
    ------
    ValueError
        If a feature is constant.
    """
    schema, first = scanned.schema, scanned.first
    digest, rng = hashlib.blake2b(), np.random.default_rng([seed, 13])
    names = [*_features(first), *_numbers(first)]
    fields: dict[str, pa.DataType] = dict.fromkeys(names, pa.float64())
    fields |= {f"cluster{place}": pa.int32() for place in range(len(scanned.levels))}
    columns_of = pa.schema({**fields, "row": pa.int64(), "key": pa.float64()})
    # A table in single precision takes half of its size in double precision.
    settings = {
        "compression": "lz4",
        "use_dictionary": False,
        "use_byte_stream_split": [*names, "key"],
    }
    with pq.ParquetWriter(path, columns_of, **settings) as writer:
        for block in complete_blocks(table, encoded_columns(schema)):
            rows = ClusteredData.encode(block, schema, outcome_required=True)
            columns = [*rows.features.numpy().T]
            columns += [getattr(rows, name).numpy() for name in _numbers(rows)]
            for factor, levels in scanned.levels.items():
                grouping = rows.groupings[factor]
                columns.append(levels.get_indexer(grouping.levels)[grouping.codes.numpy()])
            columns.append(block.index.to_numpy())
            for column in columns:
                digest.update(np.ascontiguousarray(column).data)
            columns.append(rng.random(len(rows)))
            encoded = pa.table([*map(pa.array, columns)], names=columns_of.names)
            writer.write_table(encoded.cast(columns_of), group_rows(len(columns)))
            report(len(rows))
    mean, scale = _scaling(path, first, memory)
    return EncodedTable(path, scanned, mean, scale, digest.digest(), memory, seed)


def encoded_columns(schema: Schema) -> tuple[str, ...]:
    """The table's columns that a schema reads, each once."""
    roles = (schema.outcome, *schema.clusters, schema.trials, schema.offset, schema.weights)
    return tuple(dict.fromkeys(name for name in (*roles, *schema.columns) if name is not None))


def group_rows(columns: int) -> int:
    """Rows of so many columns in a row group of about a megabyte."""
    return max(1, GROUP_BYTES // (4 * columns) // VECTOR) * VECTOR


def _features(rows: ClusteredData) -> list[str]:
    """Names of the feature columns in a file."""
    return [f"x{place}" for place in range(rows.n_features)]


def _numbers(rows: ClusteredData) -> list[str]:
    """Names of the row-wise numbers that there are."""
    names = ("outcome", "trials", "offset", "weights")
    return [name for name in names if getattr(rows, name) is not None]


def _scaling(path: Path, first: ClusteredData, memory: int) -> tuple[Tensor, Tensor]:
    """Means and sds of the features in a file; 0 and 1 of indicators."""
    if not first.n_features:
        return torch.zeros(0), torch.ones(0)
    names = _features(first)
    moments = [f"avg({x}), stddev_samp({x}), (min({x}) < max({x}))::DOUBLE" for x in names]
    with database(memory, path.parent, len(names)) as connection:
        rows = connection.read_parquet(glob.escape(str(path)))
        (values,) = rows.aggregate(", ".join(moments)).fetchall()
    mean, sd, varying = torch.tensor(values, dtype=torch.float64).reshape(-1, 3).T
    check_varying(first.feature_names, varying > 0)
    continuous = torch.tensor(first.continuous)
    return mean.where(continuous, torch.zeros_like(mean)), sd.where(continuous, torch.ones_like(sd))
