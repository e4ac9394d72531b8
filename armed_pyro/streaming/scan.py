"""A first pass over a table in a file: its schema and clusters, and errors in its values."""

from __future__ import annotations

import glob
import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from jaxtyping import Int
from numpy.typing import ArrayLike
from torch import Tensor

from armed_pyro._messages import count_rows, listing
from armed_pyro.data.cluster_means import ClusterSums, added
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.data.columns import Missing, is_categorical, pick, with_times
from armed_pyro.data.default_features import FEWEST_ROWS, NEARLY_ALL, ROW_NAMES, warn_of_identifiers
from armed_pyro.data.formula import parse_features
from armed_pyro.data.formula_functions import learns
from armed_pyro.data.grouping import Grouping, code_labels, grouping_by
from armed_pyro.data.schema import Schema, WeightsKind
from armed_pyro.data.training_checks import PER_ROW
from armed_pyro.rows.passes import ahead
from armed_pyro.streaming.database import database
from armed_pyro.streaming.parquet_table import TableBlocks

__all__ = ["TableScan", "complete_blocks", "scan", "used_columns", "with_cells"]

# Number of rows read at a time.
BLOCK_ROWS = 65_536


@dataclass(frozen=True, eq=False)
class TableScan:
    """Result of one pass over a table; `levels` and `counts` are those of every cluster column.

    `with_cells` adds those of cells.
    """

    schema: Schema  # the rules by which rows become tensors
    first: ClusteredData  # the first complete row
    levels: dict[str, pd.Index]
    counts: dict[str, Int[Tensor, " clusters"]]
    n_rows: int  # rows without missing values

    @property
    def features(self) -> list[str]:
        """Names of the feature columns of encoded rows."""
        return [f"x{place}" for place in range(self.first.n_features)]

    @property
    def numbers(self) -> list[str]:
        """Names of those among outcome, trials, offset, weights and so on that the data have."""
        names = ("outcome", *PER_ROW)
        return [name for name in names if getattr(self.first, name) is not None]

    def cluster(self, factor: str) -> str:
        """Name of the column of encoded rows with the clusters of a factor."""
        return f"cluster{list(self.levels).index(factor)}"


def scan(
    table: TableBlocks,
    outcome: str,
    clusters: Sequence[str],
    features: Sequence[str] | str | None = None,
    missing: Missing = "error",
    *,
    event: Any = None,
    memory: int,
    folder: str | PathLike[str] | None = None,
    categorical: Sequence[str] = (),
    weights_kind: WeightsKind = "frequency",
    times: Sequence[str] = (),
    **roles: str | None,
) -> TableScan:
    """Read a table once; see `ClusteredData.from_frame` for the parameters.

    Raises ValueError as `Schema.infer`, or for missing or infinite values, with the first such row
    of the file.
    """
    if missing not in ("error", "drop"):
        raise ValueError(f"missing must be 'error' or 'drop', found {missing!r}.")
    clusters = with_times(clusters, times)
    reserved = [outcome, *clusters, *(name for name in roles.values() if name is not None)]
    with database(memory, folder) as connection:
        try:
            views = _Views(connection, table)
            if features is None or features == ".":
                others = [name for name in table.columns if name not in reserved]
                identifiers = [name for name in others if views.identifies_rows(name)]
                warn_of_identifiers(identifiers)
                features = [name for name in others if name not in identifiers]
            formula = parse_features(features)
            if not formula.intercept:
                raise ValueError(
                    f"features={features!r} are without an intercept, which a streamed table "
                    "cannot be: leave '0 +' out, or read the table into memory (--memory)"
                )
            if stateful := [call for call in formula.calls if learns(call)]:
                raise ValueError(
                    f"features={features!r} has {stateful[0]}, which learns from all rows, and a "
                    "streamed table is not read at once: compute the column first, take functions "
                    "such as log(x) or I(x**2), or read the table into memory (--memory)"
                )
            columns = list(formula.columns)
            used = list(dict.fromkeys([*reserved, *columns, *formula.offset_columns]))
            pick(pd.DataFrame(columns=list(table.columns)), used)
            n_rows = views.select_complete(used, missing)
            factors = {*categorical, *formula.categorical, *([] if event is None else [outcome])}
            witnesses = views.witnesses([*columns, outcome], factors)
            labels_counts = {name: views.clusters(name) for name in clusters}
        except duckdb.Error as error:
            raise ValueError(f"{table.path} cannot be read: {error}") from error
    if n_rows < table.n_rows:
        dropped = f"{table.n_rows - n_rows} of {count_rows(table.n_rows)}"
        warnings.warn(f"Dropped {dropped} for missing values.", stacklevel=3)
    frame = table.take(witnesses)
    settings: dict[str, Any] = {"features": features, "weights_kind": weights_kind, **roles}
    settings.update(categorical=categorical, event=event, times=times)
    schema = Schema.infer(frame, outcome=outcome, clusters=clusters, **settings)
    if schema.cluster_columns:
        schema = schema.with_means(_cluster_sums(schema, table, used))
    first = ClusteredData.encode(frame.iloc[:1], schema, outcome_required=True)
    levels = {name: labels for name, (labels, _) in labels_counts.items()}
    return TableScan(schema, first, levels, {k: n for k, (_, n) in labels_counts.items()}, n_rows)


def used_columns(schema: Schema) -> tuple[str, ...]:
    """The table columns that encoded rows are made from, each once."""
    roles = (schema.outcome, *schema.clusters, *(getattr(schema, role) for role in PER_ROW))
    return tuple(dict.fromkeys(name for name in (*roles, *schema.columns) if name is not None))


def with_cells(scanned: TableScan, table: TableBlocks, factor: str) -> TableScan:
    """The scan with the cells of a factor ``"a:b"``, from one more pass over the table.

    Their labels, in memory, are those of a table in memory: there may be as many as rows.
    """
    schema, names = scanned.schema, factor.split(":")
    sizes = [len(scanned.levels[name]) for name in names]
    keys, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for block in complete_blocks(table, used_columns(schema)):
        groupings = schema.groupings(block)
        codes = [
            scanned.levels[name].get_indexer(groupings[name].levels)[groupings[name].codes]
            for name in names
        ]
        present, number = np.unique(np.ravel_multi_index(codes, sizes), return_counts=True)
        both, place = np.unique(np.concatenate([keys, present]), return_inverse=True)
        total = np.bincount(place, np.concatenate([counts, number])).astype(np.int64)
        keys, counts = both, total
    parts = zip(names, np.unravel_index(keys, sizes), strict=True)
    cells = {name: Grouping(torch.from_numpy(c), scanned.levels[name]) for name, c in parts}
    grouping = grouping_by(cells, factor)
    levels, sums = {**scanned.levels, factor: grouping.levels}, torch.from_numpy(counts)
    return replace(scanned, levels=levels, counts={**scanned.counts, factor: sums})


def _cluster_sums(
    schema: Schema, table: TableBlocks, used: Sequence[str]
) -> dict[str, ClusterSums]:
    """Sums of the columns whose means by cluster are features, in one pass over the rows."""
    sums: dict[str, ClusterSums] = {}
    for block in complete_blocks(table, used):
        sums = added(sums, schema.cluster_sums(block, schema.groupings(block), sums))
    return sums


class _Views:
    """DuckDB's views of a file: its rows with their numbers, and those without missing values.

    DuckDB finds the numbers of rows that show every category and cluster. pyarrow reads their
    values, so that labels have the same types as in a table in memory.
    """

    def __init__(self, connection: duckdb.DuckDBPyConnection, table: TableBlocks) -> None:
        self.connection, self.table, self.types = connection, table, table.types
        # Columns are named by their place, because DuckDB treats "x" and "X" as the same name.
        self.names = {name: f"c{place}" for place, name in enumerate(table.columns)}
        path = glob.escape(str(table.path))
        connection.read_parquet(path, file_row_number=True).create_view("file")
        listed = ", ".join([*self.names.values(), "place"])
        connection.execute(f"CREATE VIEW numbered AS SELECT * FROM file AS t({listed})")

    def select_complete(self, used: list[str], missing: Missing) -> int:
        """Create the view "complete" of the rows without missing values; their number."""
        names, path = self.names, self.table.path
        floating = [names[name] for name in used if pa.types.is_floating(self.types[name])]
        holes = [f"{names[name]} IS NULL" for name in used]
        hole = " OR ".join([*holes, *(f"isnan({name})" for name in floating)])
        infinite = " OR ".join(f"isinf({name})" for name in floating) or "false"
        ((first_hole, first_infinite, n_rows),) = self._rows(
            f"SELECT min(place) FILTER ({hole}), min(place) FILTER ({infinite}), "
            f"count(*) FILTER (NOT ({hole})) FROM numbered"
        )
        if first_infinite is not None:
            row = self._take([first_infinite], used).select_dtypes("number").astype(float)
            raise ValueError(
                f"Infinite values in {row.columns[np.isinf(row.to_numpy()[0])][0]!r}, first in row "
                f"{first_infinite} of {path}, counted from 0. Replace them by finite ones, or by "
                "missing values and pass missing='drop' (command line: --missing drop)."
            )
        if first_hole is not None and missing == "error":
            row = self._take([first_hole], used)
            raise ValueError(
                f"Missing values in {listing(row.columns[row.isna().to_numpy()[0]])}, first in row "
                f"{first_hole} of {path}, counted from 0. Fill them in, or leave such rows out "
                "with missing='drop' (command line: --missing drop)."
            )
        if not n_rows:
            raise ValueError(f"Every row of {path} has missing values. Leave columns out.")
        where = "" if first_hole is None else f" WHERE NOT ({hole})"
        self.connection.execute(f"CREATE VIEW complete AS SELECT * FROM numbered{where}")
        return int(n_rows)

    def identifies_rows(self, name: str) -> bool:
        """As `default_features.identifies_rows`, for a column of the file."""
        column, rows, kind = self.names[name], self.table.n_rows, self.types[name]
        if name not in ROW_NAMES and rows < FEWEST_ROWS:
            return False
        if name not in ROW_NAMES and pa.types.is_integer(kind):
            ((low, high),) = self._rows(f"SELECT min({column}), max({column}) FROM numbered")
            if low not in (0, 1) or high - low != rows - 1:
                return False
        elif name not in ROW_NAMES and not pa.types.is_string(kind):
            return False
        ((distinct,),) = self._rows(f"SELECT count(DISTINCT {column}) FROM numbered")
        share = NEARLY_ALL if name not in ROW_NAMES and pa.types.is_string(kind) else 1.0
        return bool(distinct >= share * rows)

    def witnesses(self, columns: list[str], factors: Collection[str]) -> Int[np.ndarray, " rows"]:
        """Rows from which a schema follows: every category, and a number other than 0 and 1."""
        numeric = [
            f"min(place) FILTER ({self.names[name]} NOT IN (0, 1))"
            for name in columns
            if pa.types.is_integer(self.types[name]) or pa.types.is_floating(self.types[name])
        ]
        query = f"SELECT {', '.join(['min(place)', *numeric])} FROM complete"
        ((first, *others),) = self._rows(query)
        row = self._take([first], columns)
        places = [[first], [place for place in others if place is not None]]
        categorical = [name for name in columns if name in factors or is_categorical(row[name])]
        places += [self._groups(name)[0] for name in categorical]
        return np.unique(np.concatenate(places).astype(np.int64))

    def clusters(self, name: str) -> tuple[pd.Index, Tensor]:
        """Labels in the order of a table in memory, and their numbers of rows."""
        firsts, sizes = self._groups(name)
        labels = self._take(firsts, [name])[name]
        if isinstance(labels.dtype, pd.CategoricalDtype):
            labels = labels.astype(labels.cat.categories.dtype)
        codes, levels = code_labels(labels, f"cluster column {name!r}")
        return levels, torch.from_numpy(sizes[np.argsort(codes)])

    def _groups(self, name: str) -> Int[np.ndarray, "2 values"]:
        """First row and number of rows of every value in a column, in order of appearance."""
        column = self.names[name]
        query = f"SELECT min(place), count(*) FROM complete GROUP BY {column} ORDER BY 1"
        return np.array(self._rows(query), np.int64).T

    def _rows(self, query: str) -> list[Any]:
        return self.connection.execute(query).fetchall()

    def _take(self, rows: ArrayLike, columns: list[str]) -> pd.DataFrame:
        return self.table.take(np.asarray(rows), columns)


def complete_blocks(table: TableBlocks, columns: Sequence[str]) -> Iterator[pd.DataFrame]:
    """Yield the rows without missing values in blocks, indexed by their numbers in the file."""
    start = 0
    for frame in ahead(table.blocks(BLOCK_ROWS, tuple(columns))):
        frame.index = pd.RangeIndex(start, start + len(frame))
        start += len(frame)
        complete = frame.dropna()
        if len(complete):
            yield complete.infer_objects()
