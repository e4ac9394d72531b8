"""The encoded rows of a table in one Parquet file, and a summary of them."""

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
from jaxtyping import Float, Int
from torch import Tensor

from armed_pyro._free_space import check_free
from armed_pyro.data.cluster_means import ClusterSums
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.data.columns import check_varying
from armed_pyro.data.grouping import Grouping
from armed_pyro.streaming.database import database, quoted
from armed_pyro.streaming.parquet_table import TableBlocks
from armed_pyro.streaming.scan import TableScan, complete_blocks, used_columns

__all__ = ["EncodedTable", "encode", "group_rows"]

# Number of rows that a fit keeps for its checks and for saving, and the smallest number of whole
# clusters among them; below it, rows are kept without regard to clusters.
SAMPLE_ROWS, FEWEST_CLUSTERS = 50_000, 20
# DuckDB's row groups have multiples of 2,048 rows. Those of about a megabyte were read at 1 GB/s or
# more, and are small enough that a mini-batch is mixed from several of them.
VECTOR, GROUP_BYTES = 2048, 2**20


@dataclass(frozen=True, eq=False)
class EncodedTable:
    """Encoded rows in a Parquet file.

    The file has columns for the features (``x0, x1, ...``), for the outcome, trials, offset and
    weights, as far as the data have them, for the clusters (``cluster0, ...``, positions among the
    levels of each cluster column), for the row's number in the table (``row``), and for a random
    number by which rows are shuffled (``key``). Means and sds are those of the features of all
    rows; 0 and 1 for indicators. The average is the mean of every column, indicators included.
    """

    path: Path
    scanned: TableScan
    memory: int  # limit of the fit's process, in bytes
    seed: int  # of the shuffle and of the sample that a fit keeps
    factors: tuple[str, ...]  # grouping factors that the program needs
    digest: bytes  # hash of the rows
    feature_mean: Float[Tensor, " features"]
    feature_scale: Float[Tensor, " features"]
    feature_average: Float[Tensor, " features"]

    def outcomes(self) -> ClusteredData:
        """All rows without features and clusters."""
        rows = self._rows([*self.scanned.numbers, "row"], "true")
        nothing: dict[str, Any] = dict.fromkeys(("feature_names", "sources", "continuous"), ())
        return replace(rows, features=torch.zeros(len(rows), 0), groupings={}, **nothing)

    def sample(self, factor: str | None) -> ClusteredData:
        """About 50,000 rows at most, in whole clusters of a factor if these are at least 20."""
        scanned, parameters = self.scanned, {}
        where = f"key < {SAMPLE_ROWS} / {scanned.n_rows}::DOUBLE"
        if factor is not None:
            counts = scanned.counts[factor].numpy()
            order = np.random.default_rng([self.seed, 12]).permutation(len(counts))
            n = max(1, int(np.searchsorted(np.cumsum(counts[order]), SAMPLE_ROWS, "right")))
            if n >= min(FEWEST_CLUSTERS, len(counts)):
                parameters = {"chosen": order[:n].tolist()}
                where = f"{scanned.cluster(factor)} IN (SELECT unnest($chosen))"
        clusters = map(scanned.cluster, scanned.levels)
        names = [*scanned.features, *scanned.numbers, *clusters, "row"]
        return self._rows(names, where, **parameters).take(slice(None))

    def divided(self, factor: str | None, wanted: int) -> tuple[EncodedTable, ClusteredData]:
        """The rest of the rows, in a file of their own, and about `wanted` rows.

        These are whole clusters of the factor; single rows without one.
        """
        scanned, parameters, rng = self.scanned, dict[str, Any](), np.random.default_rng(self.seed)
        where = f"key < {wanted} / {scanned.n_rows}::DOUBLE"
        if factor is not None:
            counts = scanned.counts[factor].numpy()
            order = rng.permutation(len(counts))
            n = max(1, int(np.searchsorted(np.cumsum(counts[order]), wanted, "right")))
            parameters = {"chosen": order[:n].tolist()}
            where = f"{scanned.cluster(factor)} IN (SELECT unnest($chosen))"
        names = [*scanned.features, *scanned.numbers, *map(scanned.cluster, scanned.levels)]
        held = self._rows([*names, "row"], where, **parameters)
        path = self.path.with_name("rest.parquet")
        groups = group_rows(len(names) + 2)
        with database(self.memory, path.parent, len(names)) as connection:
            connection.execute(
                f"COPY (SELECT * FROM read_parquet($path) WHERE NOT ({where})) TO $target "
                f"(FORMAT parquet, COMPRESSION lz4_raw, ROW_GROUP_SIZE {groups})",
                {**parameters, "path": glob.escape(str(self.path)), "target": str(path)},
            )
        left = {
            name: counts - _counts_of(held, name, scanned.levels[name])
            for name, counts in scanned.counts.items()
        }
        fewer = replace(scanned, counts=left, n_rows=scanned.n_rows - held.n_rows)
        rest = replace(self, path=path, scanned=fewer, digest=self.digest + b"rest")
        return rest, held.take(slice(None))

    def cluster_sums(self, factor: str, names: tuple[str, ...]) -> ClusterSums:
        """Sums of these features, by the clusters of a factor, over all rows."""
        scanned, first = self.scanned, self.scanned.first
        places = [first.feature_names.index(name) for name in names]
        origin = first.features[0, places].double().numpy()
        counts = "weights" in scanned.numbers and first.weights_kind == "frequency"
        weight = "weights" if counts else "1"
        parts = [f"sum({weight})::DOUBLE"]
        for power in (1, 2):
            parts += [
                f"sum({weight} * (x{place} - '{float(at)!r}'::DOUBLE) ^ {power})"
                for place, at in zip(places, origin, strict=True)
            ]
        column = scanned.cluster(factor)
        with database(self.memory, self.path.parent, len(names)) as connection:
            rows = connection.read_parquet(glob.escape(str(self.path)))
            found = rows.aggregate(f"{column}, {', '.join(parts)}", column).fetchall()
        values = np.array(sorted(found), dtype=float)
        levels = scanned.levels[factor].take(values[:, 0].astype(np.int64))
        count, total, square = np.split(values[:, 1:], [1, 1 + len(names)], axis=1)
        return ClusterSums(levels, count[:, 0], total, square, origin)

    def _rows(self, names: list[str], where: str, **parameters: Any) -> ClusteredData:
        """Columns of the rows that meet a condition, encoded as those of a table in memory."""
        with database(self.memory, self.path.parent, len(names)) as connection:
            query = f"SELECT {', '.join(map(quoted, names))} FROM read_parquet($path) WHERE {where}"
            parameters["path"] = glob.escape(str(self.path))
            columns = connection.execute(query, parameters).fetchnumpy()
        scanned = self.scanned
        tensors = {name: torch.from_numpy(np.asarray(values)) for name, values in columns.items()}
        features = [tensors[name] for name in scanned.features if name in tensors]
        none = torch.zeros(len(columns["row"]), 0, dtype=torch.float64)
        numbers: dict[str, Any] = {name: tensors[name] for name in scanned.numbers}
        return replace(
            scanned.first,
            features=torch.stack(features, 1) if features else none,
            groupings={
                factor: Grouping(tensors[scanned.cluster(factor)].long(), levels)
                for factor, levels in scanned.levels.items()
                if scanned.cluster(factor) in tensors and factor in scanned.schema.clusters
            },
            row_labels=pd.Index(columns["row"]),
            table=None,
            **numbers,
        )


def _counts_of(rows: ClusteredData, factor: str, levels: pd.Index) -> Int[Tensor, " clusters"]:
    """Number of these rows in every cluster of a factor."""
    grouping = rows.grouping(factor)
    places = torch.from_numpy(levels.get_indexer(grouping.levels))
    return torch.bincount(places[grouping.codes], minlength=len(levels))


def encode(
    table: TableBlocks,
    scanned: TableScan,
    path: Path,
    memory: int,
    seed: int,
    factors: tuple[str, ...],
    report: Callable[[int], Any],
) -> EncodedTable:
    """Read a scanned table again and write its encoded rows to the file `path`.

    `report` gets the number of rows written since its last call. Constant features are refused.
    """
    schema = scanned.schema
    digest, rng = hashlib.blake2b(), np.random.default_rng([seed, 13])
    names = [*scanned.features, *scanned.numbers]
    fields: dict[str, pa.DataType] = dict.fromkeys(names, pa.float64())
    fields |= {f"cluster{place}": pa.int32() for place in range(len(scanned.levels))}
    # Numbers of single precision hardly become smaller; indicators take next to nothing.
    numbers = sum(scanned.first.continuous) + len(scanned.numbers)
    check_free(path.parent, 2 * scanned.n_rows * numbers, "a copy of the rows")
    columns_of = pa.schema({**fields, "row": pa.int64(), "key": pa.float64()})
    # In split byte streams, values that fit single precision take half of the space.
    settings = {"compression": "lz4", "use_byte_stream_split": [*names, "key"]}
    with pq.ParquetWriter(path, columns_of, use_dictionary=False, **settings) as writer:
        for block in complete_blocks(table, used_columns(schema)):
            rows = ClusteredData.encode(block, schema, outcome_required=True)
            columns = [*rows.features.numpy().T]
            columns += [getattr(rows, name).numpy() for name in scanned.numbers]
            for factor, levels in scanned.levels.items():
                grouping = rows.grouping(factor)
                columns.append(levels.get_indexer(grouping.levels)[grouping.codes.numpy()])
            columns.append(block.index.to_numpy())
            for column in columns:
                digest.update(np.ascontiguousarray(column).data)
            columns.append(rng.random(len(rows)))
            encoded = pa.table([*map(pa.array, columns)], names=columns_of.names)
            writer.write_table(encoded.cast(columns_of), group_rows(len(columns)))
            report(len(rows))
    scaling = _scaling(path, scanned, memory)
    return EncodedTable(path, scanned, memory, seed, factors, digest.digest(), *scaling)


def group_rows(columns: int) -> int:
    """Number of rows in a row group of about a megabyte, for a number of columns."""
    return max(1, GROUP_BYTES // (4 * columns) // VECTOR) * VECTOR


def _scaling(path: Path, scanned: TableScan, memory: int) -> tuple[Tensor, Tensor, Tensor]:
    """Means and sds of the features, 0 and 1 for indicators, and the means of all columns."""
    first, names = scanned.first, scanned.features
    if not names:
        return torch.zeros(0), torch.ones(0), torch.zeros(0)
    moments = [f"avg({x}), stddev_samp({x}), (min({x}) < max({x}))::DOUBLE" for x in names]
    with database(memory, path.parent, len(names)) as connection:
        rows = connection.read_parquet(glob.escape(str(path)))
        (values,) = rows.aggregate(", ".join(moments)).fetchall()
    mean, sd, varying = torch.tensor(values, dtype=torch.float64).reshape(-1, 3).T
    check_varying(first.feature_names, varying > 0)
    continuous = torch.tensor(first.continuous)
    scaled = mean.where(continuous, torch.zeros_like(mean))
    return scaled, sd.where(continuous, torch.ones_like(sd)), mean
