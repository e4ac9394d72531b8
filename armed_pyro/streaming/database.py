"""DuckDB, limited to a share of a fit's memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any

import duckdb
import torch

__all__ = ["database", "quoted"]

# DuckDB's share of a fit's memory, and the bytes that a sort needs in any case, per table and per
# column: sorts of 10, 100 and 500 columns ran within 32, 128 and 256 MB.
SHARE, LEAST, LEAST_COLUMN = 1 / 8, 2**26, 2**20


@contextmanager
def database(
    memory: int, folder: str | PathLike[str] | None, columns: int = 0
) -> Iterator[duckdb.DuckDBPyConnection]:
    """DuckDB for a fit within `memory` bytes that sorts tables with a number of `columns`.

    DuckDB spills to a temporary folder in `folder`, which is removed afterwards.
    """
    limit = f"{max(int(SHARE * memory), LEAST + columns * LEAST_COLUMN)}B"
    settings: dict[str, Any] = {"memory_limit": limit, "threads": torch.get_num_threads()}
    with (
        tempfile.TemporaryDirectory(prefix=".armed_pyro-sort-", dir=folder) as spill,
        duckdb.connect(config={**settings, "temp_directory": spill}) as connection,
    ):
        # With prefetching, a whole row group of the table may be read at once.
        connection.execute("LOAD parquet; SET disable_parquet_prefetching = true")
        yield connection


def quoted(name: str) -> str:
    """The name of a column in a query: ``offset`` alone is a word of SQL.

    >>> quoted("offset")
    '"offset"'
    """
    return f'"{name}"'
