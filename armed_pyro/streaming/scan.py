"""A first pass over a table in a file: its schema, its clusters, and whether it can be used."""

from __future__ import annotations

import glob
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from torch import Tensor

from armed_pyro._messages import count_rows, listing
from armed_pyro.data.columns import Missing, column_names, is_categorical, pick
from armed_pyro.data.grouping import code_labels
from armed_pyro.data.schema import Schema, parse_terms
from armed_pyro.rows.read_ahead import ahead
from armed_pyro.streaming.parquet_table import TableBlocks
from armed_pyro.streaming.row_file import database

__all__ = ["TableScan", "complete_blocks", "scan"]


# Rows read at a time.
BLOCK_ROWS = 65_536


@dataclass(frozen=True, eq=False)
class TableScan:
    """What one pass over a table tells.

    Attributes
    ----------
    schema : Schema
        How its rows become tensors.
    levels : mapping of str to pandas.Index
        Labels of the clusters of every grouping factor.
    counts : mapping of str to Int64[Tensor, "clusters"]
        Rows of each.
    n_rows : int
        Rows without missing values.
    """

    schema: Schema
    levels: dict[str, pd.Index]
    counts: dict[str, Tensor]
    n_rows: int


def scan(
    table: TableBlocks,
    *,
    outcome: str,
    clusters: Sequence[str],
    features: Sequence[str] | str | None = None,
    trials: str | None = None,
    offset: str | None = None,
    weights: str | None = None,
    missing: Missing = "error",
    memory: int,
    folder: str | os.PathLike[str] | None = None,
) -> TableScan:
    """Read a table once, by DuckDB; see `ClusteredData.from_frame` for the parameters.

    DuckDB tells rows by their number; their values, and so all labels, are read by pyarrow.

    Raises
    ------
    ValueError
        As `Schema.infer`; or for missing or infinite values, with the first such row of the file.
    """
    if missing not in ("error", "drop"):
        raise ValueError(f"missing must be 'error' or 'drop', found {missing!r}.")
    roles = {"trials": trials, "offset": offset, "weights": weights}
    clusters = column_names(clusters, "clusters")
    reserved = [outcome, *clusters, *(name for name in roles.values() if name is not None)]
    if features is None:
        columns = [name for name in table.columns if name not in reserved]
    else:
        columns = [name for term in parse_terms(features) for name in term]
    pick(pd.DataFrame(columns=list(table.columns)), [*reserved, *columns])
    with database(memory, folder) as connection:
        rows = _Query(connection, table, tuple(dict.fromkeys([*reserved, *columns])))
        n_rows = rows.check(missing)
        # These rows show all that a schema depends on: every category of a categorical column,
        # and of a numeric one that it holds something else than 0 and 1.
        shown = rows.witnesses([*columns, outcome])
        schema = Schema.infer(
            table.take(shown), outcome=outcome, clusters=clusters, features=features, **roles
        )
        found = {name: rows.clusters(name) for name in clusters}
    if n_rows < table.n_rows:
        dropped = f"{table.n_rows - n_rows} of {count_rows(table.n_rows)}"
        warnings.warn(f"Dropped {dropped} for missing values.", stacklevel=3)
    levels = {name: index for name, (index, _) in found.items()}
    counts = {name: count for name, (_, count) in found.items()}
    return TableScan(schema, levels, counts, n_rows)


class _Query:
    """Questions to DuckDB about a table's rows, which it tells by their numbers.

    Columns are named by their place in the file: DuckDB does not tell "x" from "X".
    """

    def __init__(
        self, connection: duckdb.DuckDBPyConnection, table: TableBlocks, used: tuple[str, ...]
    ) -> None:
        self.connection, self.table, self.used = connection, table, used
        places = {name: f"c{place}" for place, name in enumerate(table.columns)}
        self.columns = {name: places[name] for name in used}
        self.path = glob.escape(str(table.path))
        self.names = ", ".join([*places.values(), "place"])
        types = {name: table.types[name] for name in used}
        self.floating = [self.columns[name] for name in used if pa.types.is_floating(types[name])]
        self.numeric = [*(name for name in used if pa.types.is_integer(types[name])),
                        *(name for name in used if pa.types.is_floating(types[name]))]  # fmt: skip
        holes = [f"{column} IS NULL" for column in self.columns.values()]
        holes += [f"isnan({column})" for column in self.floating]
        self.hole = "(" + " OR ".join(holes) + ")"
        self.where = ""

    def rows(self, what: str, more: str = "") -> list[tuple[Any, ...]]:
        """Results of a query."""
        source = f"read_parquet($path, file_row_number = true) AS t({self.names})"
        query = f"SELECT {what} FROM {source} {self.where} {more}"
        try:
            return self.connection.execute(query, {"path": self.path}).fetchall()
        except duckdb.Error as error:
            raise ValueError(f"{self.table.path} cannot be read: {error}") from error

    def check(self, missing: Missing) -> int:
        """Number of complete rows; from here on the others are left out."""
        infinite = " OR ".join(f"isinf({column})" for column in self.floating) or "false"
        ((complete, hole, infinity),) = self.rows(
            f"count(*) FILTER (NOT {self.hole}), min(place) FILTER ({self.hole}), "
            f"min(place) FILTER ({infinite})"
        )
        if infinity is not None:
            numbers = self.table.take(np.array([infinity]), self.used).select_dtypes("number")
            wrong = np.isinf(numbers.to_numpy(dtype=float, na_value=np.nan))[0]
            raise ValueError(
                f"Infinite values in {numbers.columns[wrong.argmax()]!r}, first in row {infinity} "
                f"of {self.table.path}, counted from 0. Replace them by finite ones, or by missing "
                "values and pass missing='drop' (command line: --missing drop)."
            )
        if hole is not None and missing == "error":
            row = self.table.take(np.array([hole]), self.used)
            names = listing(row.columns[row.isna().to_numpy()[0]])
            raise ValueError(
                f"Missing values in {names}, first in row {hole} of {self.table.path}, "
                "counted from 0. Fill them in, or leave such rows out with missing='drop' "
                "(command line: --missing drop)."
            )
        if not complete:
            raise ValueError(
                f"Every row of {self.table.path} has missing values. Leave columns out."
            )
        self.where = f"WHERE NOT {self.hole}" if hole is not None else ""
        return complete

    def groups(self, name: str) -> list[tuple[int, ...]]:
        """First row and number of rows of every value in a column, in order of appearance."""
        return self.rows("min(place), count(*)", f"GROUP BY {self.columns[name]} ORDER BY 1")

    def witnesses(self, names: Sequence[str]) -> np.ndarray:
        """Numbers of rows that hold every category, and a number other than 0 and 1."""
        ((first, *others),) = self.rows(
            ", ".join(
                ["min(place)"]
                + [
                    f"min(place) FILTER ({self.columns[name]} NOT IN (0, 1))"
                    for name in names
                    if name in self.numeric
                ]
            )
        )
        row = self.table.take(np.array([first]), self.used)
        wanted = {first, *(place for place in others if place is not None)}
        for name in names:
            if is_categorical(row[name]):
                wanted |= {place for place, _ in self.groups(name)}
        return np.array(sorted(wanted))

    def clusters(self, name: str) -> tuple[pd.Index, Tensor]:
        """Labels in the order that a table in memory would give them, and their rows."""
        firsts, sizes = np.array(self.groups(name), np.int64).T
        labels = self.table.take(firsts, (name,))[name]
        if isinstance(labels.dtype, pd.CategoricalDtype):
            labels = labels.astype(labels.cat.categories.dtype)
        codes, levels = code_labels(labels, f"cluster column {name!r}")
        counts = np.empty_like(sizes)
        counts[codes] = sizes
        return levels, torch.from_numpy(counts)


def complete_blocks(table: TableBlocks, columns: Sequence[str]) -> Iterator[pd.DataFrame]:
    """The rows without missing values in blocks read ahead; their index counts the file's rows."""
    start = 0
    for frame in ahead(table.blocks(BLOCK_ROWS, tuple(columns))):
        frame.index = pd.RangeIndex(start, start + len(frame))
        start += len(frame)
        complete = frame.dropna()
        if len(complete):
            yield complete.infer_objects()
