"""Encoded rows in Parquet files: their columns, and how DuckDB puts them in order."""

from __future__ import annotations

import glob
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int
from torch import Tensor

from armed_pyro.rows.in_memory import HeldRows

__all__ = ["Layout", "database", "put_in_order"]


# DuckDB makes row groups of multiples of 2,048 rows. Those of about a megabyte are read at 1 GB/s
# or more, and a mini-batch is mixed from several of them.
VECTOR, GROUP_BYTES = 2048, 2**20
# DuckDB's share of a fit's memory; the least that it needs for a sort, and for every column (of
# 10, 100 and 500 columns, 32, 128 and 256 MB were enough).
SHARE, LEAST, LEAST_COLUMN = 1 / 8, 2**26, 2**20


@dataclass(frozen=True)
class Layout:
    """Columns of a file of encoded rows.

    ``x0, x1, ...`` are features, ``cluster0, cluster1, ...`` the positions of the rows' clusters
    among the levels of each factor, ``row`` their places in the table, ``key`` random numbers by
    which they are shuffled.

    Attributes
    ----------
    n_features : int
        Feature columns.
    numbers : tuple of str
        Those of y, trials, offset and weights that there are.
    factors : tuple of str
        Grouping factors.
    """

    n_features: int
    numbers: tuple[str, ...]
    factors: tuple[str, ...]

    @property
    def features(self) -> list[str]:
        """Names of the feature columns."""
        return [f"x{place}" for place in range(self.n_features)]

    def cluster(self, factor: str) -> str:
        """Name of the column with the clusters of a factor."""
        return f"cluster{self.factors.index(factor)}"

    @property
    def schema(self) -> pa.Schema:
        """Names and types."""
        fields: dict[str, pa.DataType] = dict.fromkeys(self.features, pa.float32())
        fields |= dict.fromkeys(self.numbers, pa.float64())
        fields |= {self.cluster(factor): pa.int32() for factor in self.factors}
        return pa.schema({**fields, "row": pa.int64(), "key": pa.int64()})

    @property
    def group_rows(self) -> int:
        """Rows in a row group."""
        return max(1, GROUP_BYTES // (4 * len(self.schema)) // VECTOR) * VECTOR

    def held(
        self,
        table: pa.Table,
        counts: Mapping[str, Int[Tensor, " clusters"]],
        like: Tensor,
        scaling: tuple[Float[np.ndarray, " features"], Float[np.ndarray, " features"]],
    ) -> HeldRows:
        """Rows of a file as tensors with the precision and device of `like`.

        Features become ``x * a + b`` with a, b the `scaling`.
        """
        x = np.empty((table.num_rows, self.n_features), np.float32)
        for place, (name, a, b) in enumerate(zip(self.features, *scaling, strict=True)):
            x[:, place] = table[name].to_numpy() * np.float32(a) + np.float32(b)

        def tensor(name: str) -> Tensor | None:
            return torch.tensor(table[name].to_numpy()).to(like) if name in numbers else None

        numbers = self.numbers
        codes = {
            factor: torch.tensor(table[self.cluster(factor)].to_numpy()).long().to(like.device)
            for factor in self.factors
        }
        optional = tensor("trials"), tensor("offset"), tensor("weights")
        return HeldRows(torch.from_numpy(x).to(like), tensor("y"), codes, counts, *optional)


@contextmanager
def database(
    memory: int, folder: str | PathLike[str] | None, columns: int = 0
) -> Iterator[duckdb.DuckDBPyConnection]:
    """DuckDB for a fit that is to stay within `memory` bytes; spills to a folder that is removed.

    Parameters
    ----------
    memory : int
        Bytes of memory of the whole fit.
    folder : path or None
        Where the temporary folder is made.
    columns : int
        Columns of the tables to be sorted.
    """
    limit = max(int(SHARE * memory), LEAST + columns * LEAST_COLUMN)
    settings: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": f"{limit}B",
        "threads": torch.get_num_threads(),
    }
    with (
        tempfile.TemporaryDirectory(prefix=".armed_pyro-sort-", dir=folder) as spill,
        duckdb.connect(config={**settings, "temp_directory": spill}) as connection,
    ):
        yield connection


def put_in_order(
    source: Path,
    target: Path,
    layout: Layout,
    memory: int,
    *,
    factor: str | None = None,
    ranks: Int[np.ndarray, " clusters"] | None = None,
) -> None:
    """Write the rows of one file to another: by the ranks of their clusters, or shuffled.

    Parameters
    ----------
    source, target : Path
        The files.
    layout : Layout
        Their columns, of which `target` lacks ``row`` and ``key``.
    memory : int
        Bytes of memory of the whole fit.
    factor : str, optional
        The factor by whose clusters rows are sorted, within clusters by ``row``; without one they
        are sorted by their random ``key``.
    ranks : Int[ndarray, "clusters"], optional
        Place of each cluster in the new order.
    """
    kept = ", ".join(layout.schema.names[:-2])
    tables, order = "read_parquet($path)", "key"
    with database(memory, target.parent, len(layout.schema)) as connection:
        if factor is not None and ranks is not None:
            table = pa.table({"code": np.arange(len(ranks), dtype=np.int32), "rank": ranks})
            connection.register("ranks", table)
            tables += f" JOIN ranks ON {layout.cluster(factor)} = code"
            order = "rank, row"
        connection.execute(
            f"COPY (SELECT {kept} FROM {tables} ORDER BY {order}) TO $target "
            f"(FORMAT parquet, COMPRESSION uncompressed, ROW_GROUP_SIZE {layout.group_rows})",
            {"path": glob.escape(str(source)), "target": str(target)},
        )
