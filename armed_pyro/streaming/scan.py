"""A first pass over a table in a file: its schema, its clusters, and whether it can be used."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from armed_pyro._messages import count_rows, listing
from armed_pyro.data.columns import Missing, column_names, is_categorical, pick
from armed_pyro.data.grouping import code_labels
from armed_pyro.data.schema import Schema, parse_terms
from armed_pyro.prediction.predict_table import TableBlocks
from armed_pyro.rows.read_ahead import ahead

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
    complete : bool
        Whether there are no others.
    """

    schema: Schema
    levels: dict[str, pd.Index]
    counts: dict[str, Tensor]
    n_rows: int
    complete: bool


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
) -> TableScan:
    """Read a table once, block by block; see `ClusteredData.from_frame` for the parameters.

    Raises
    ------
    ValueError
        As `Schema.infer`; or for missing or infinite values, with the first such row of the file.
    """
    roles = {"trials": trials, "offset": offset, "weights": weights}
    clusters = column_names(clusters, "clusters")
    reserved = [outcome, *clusters, *(name for name in roles.values() if name is not None)]
    if features is None:
        columns = [name for name in table.columns if name not in reserved]
    else:
        columns = [name for term in parse_terms(features) for name in term]
    pick(pd.DataFrame(columns=list(table.columns)), [*reserved, *columns])
    witnesses = _Witnesses([*columns, outcome])
    found = {name: _Clusters() for name in clusters}
    n_rows = 0
    for frame in complete_blocks(table, [*reserved, *columns], missing):
        witnesses.add(frame)
        for name, one in found.items():
            one.add(frame[name])
        n_rows += len(frame)
    if not n_rows:
        raise ValueError(f"Every row of {table.path} has missing values. Leave columns out.")
    if n_rows < table.n_rows:
        dropped = f"{table.n_rows - n_rows} of {count_rows(table.n_rows)}"
        warnings.warn(f"Dropped {dropped} for missing values.", stacklevel=3)
    schema = Schema.infer(
        pd.concat(witnesses.frames), outcome=outcome, clusters=clusters, features=features, **roles
    )
    sorted_ = {name: one.sorted(f"cluster column {name!r}") for name, one in found.items()}
    levels = {name: one for name, (one, _) in sorted_.items()}
    counts = {name: one for name, (_, one) in sorted_.items()}
    return TableScan(schema, levels, counts, n_rows, n_rows == table.n_rows)


def complete_blocks(
    table: TableBlocks, columns: Sequence[str], missing: Missing
) -> Iterator[pd.DataFrame]:
    """The rows without missing values in blocks read ahead; their index counts the file's rows.

    Raises
    ------
    ValueError
        For a missing value, unless they are to be dropped, and for an infinite one.
    """
    if missing not in ("error", "drop"):
        raise ValueError(f"missing must be 'error' or 'drop', found {missing!r}.")
    start = 0
    for frame in ahead(table.blocks(BLOCK_ROWS, tuple(columns))):
        frame.index = pd.RangeIndex(start, start + len(frame))
        start += len(frame)
        numbers = frame.select_dtypes("number")
        infinite = np.isinf(numbers.to_numpy(dtype=float, na_value=np.nan))
        if infinite.any():
            row, place = np.argwhere(infinite)[0]
            raise ValueError(
                f"Infinite values in {numbers.columns[place]!r}, first in row {frame.index[row]} "
                f"of {table.path}, counted from 0. Replace them by finite ones, or by missing "
                "values and pass missing='drop' (command line: --missing drop)."
            )
        holes = frame.isna().to_numpy()
        if holes.any():
            row = int(holes.any(axis=1).argmax())
            if missing == "error":
                names = listing(frame.columns[holes[row]])
                raise ValueError(
                    f"Missing values in {names}, first in row {frame.index[row]} of {table.path}, "
                    "counted from 0. Fill them in, or leave such rows out with missing='drop' "
                    "(command line: --missing drop)."
                )
            frame = frame[~holes.any(axis=1)]
        if len(frame):
            yield frame.infer_objects()


@dataclass
class _Witnesses:
    """The few rows that show all that a schema depends on.

    Of a categorical column that is every category; of a numeric one, that it holds something
    else than 0 and 1.
    """

    columns: Sequence[str]
    frames: list[pd.DataFrame] = field(default_factory=list)
    seen: dict[str, pd.Index] = field(default_factory=dict)
    fractional: set[str] = field(default_factory=set)

    def add(self, frame: pd.DataFrame) -> None:
        """Keep the rows of this block that show something new."""
        wanted = {0} if not self.frames else set[int]()
        for name in self.columns:
            column = frame[name]
            if is_categorical(column):
                labels = column.drop_duplicates()
                new = pd.Index(labels)
                if name in self.seen:
                    labels = labels[~new.isin(self.seen[name])]
                    new = self.seen[name].append(pd.Index(labels))
                self.seen[name] = new
                wanted |= set(frame.index.get_indexer(labels.index).tolist())
            elif name not in self.fractional:
                other = ~column.isin([0, 1]).to_numpy()
                if other.any():
                    self.fractional.add(name)
                    wanted.add(int(other.argmax()))
        if wanted:
            self.frames.append(frame.iloc[sorted(wanted)])


class _Clusters:
    """Labels in order of appearance, and how many rows have each."""

    def __init__(self) -> None:
        self.labels: pd.Index | None = None
        self.counts: Int[np.ndarray, " clusters"] = np.zeros(0, np.int64)

    def add(self, column: pd.Series) -> None:
        """Count the labels of one block."""
        if isinstance(column.dtype, pd.CategoricalDtype):
            column = column.astype(column.cat.categories.dtype)
        counts = column.value_counts(sort=False)
        here = pd.Index(counts.index)
        if self.labels is None:
            self.labels = here[:0]
        new = here[self.labels.get_indexer(here) < 0]
        if len(new):
            self.labels = self.labels.append(new)
            self.counts = np.append(self.counts, np.zeros(len(new), np.int64))
        self.counts[self.labels.get_indexer(here)] += counts.to_numpy()

    def sorted(self, what: str) -> tuple[pd.Index, Tensor]:
        """Labels in the order that a table in memory would give them, and their rows."""
        codes, levels = code_labels(pd.Series(self.labels), what)
        counts = np.empty_like(self.counts)
        counts[codes] = self.counts
        return levels, torch.from_numpy(counts)
