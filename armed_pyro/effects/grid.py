"""Rows at which a fit is read: the data, their typical row, and copies at chosen values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int

from armed_pyro._messages import check_known, unknown
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.data.decoding import decoded
from armed_pyro.data.files import as_pandas
from armed_pyro.inference.posterior import Posterior

__all__ = ["Grid", "Rest", "make_grid", "variable_kind"]

Rest = Literal["observed", "mean", "balanced"]
RESTS: Mapping[str, str] = {
    "observed": "each row's own values; results are averaged over the rows",
    "mean": "one typical row: means of numbers, most frequent values of all others",
    "balanced": "every combination of categories, and means of numbers",
}
At = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Grid:
    """Rows as values of the variables, before they are encoded.

    Attributes
    ----------
    frame : pandas.DataFrame
        Variables, clusters, trials and offset; the index numbers the rows.
    fixed : tuple of str
        Variables that were set to chosen values.
    weights : Float[ndarray, "rows"] or None
        Number of times that each row counts.
    labels : pandas.Index
        Labels of the rows of the data that the rows were made from.
    typical : bool
        Whether the rows were made from a typical row, and not from rows of the data.
    """

    posterior: Posterior
    frame: pd.DataFrame
    fixed: tuple[str, ...]
    weights: Float[np.ndarray, " rows"] | None
    labels: pd.Index
    source: ClusteredData  # of arrays, which have no schema, the rows that `position` points to
    position: Int[np.ndarray, " rows"]
    typical: bool = False

    def __len__(self) -> int:
        return len(self.frame)

    def encode(self, changed: Mapping[str, Any] | None = None) -> ClusteredData:
        """The rows in the encoding of the training table, with these variables changed.

        Clusters keep the means of features that they have in the data: ``between(x | g)`` does not
        change with x.
        """
        frame = self.frame.copy()
        for name, values in (changed or {}).items():
            frame[name] = values
        if self.posterior.model.data_facts().schema is not None:
            return self.posterior.encode(frame, self.source)
        rows = self.source.take(self.position)
        names = list(rows.feature_names)
        features = torch.from_numpy(frame[names].to_numpy(dtype=np.float64, copy=True))
        return self.posterior.encode(replace(rows, features=features), self.source)

    def column(self, name: str) -> pd.Series:
        """The values of a variable; ValueError if there is none of this name."""
        if name not in self.frame:
            schema = self.posterior.model.data_facts().schema
            if schema is not None and name in schema.columns:
                raise ValueError(
                    f"the variable {name!r} cannot be recovered from the encoded rows, as it "
                    "occurs in products only: pass the table as data=table"
                )
            raise unknown("variable", name, self.frame.columns)
        return self.frame[name]


def make_grid(
    posterior: Posterior,
    data: ClusteredData | pd.DataFrame | None = None,
    at: At | None = None,
    rest: Rest = "observed",
    by: Sequence[str] = (),
) -> Grid:
    """Rows with every combination of the values `at`, and the other variables as `rest` says.

    `data` are by default the training rows. Columns `by` that are no variables of the model are
    kept, if the data are a table that has them.

    Raises
    ------
    ValueError
        If there are no rows, `rest` is none of `RESTS`, or a variable is unknown.
    """
    check_known("value of rest=", [rest], RESTS)
    whole = _observed(posterior, data, by)
    values = {name: _values(whole, name, chosen) for name, chosen in (at or {}).items()}
    if rest != "observed":
        categories = _categories(whole) if rest == "balanced" else {}
        whole = _typical(whole)
        values = {**{k: v for k, v in categories.items() if k not in values}, **values}
    fixed = tuple(at or {})
    if not values:
        return whole
    combinations = list(product(*values.values()))
    place = np.tile(np.arange(len(whole)), len(combinations))
    copied = whole.frame.iloc[place].reset_index(drop=True)
    repeats = np.repeat(np.arange(len(combinations)), len(whole))
    for number, name in enumerate(values):
        chosen = pd.Series([combination[number] for combination in combinations])
        copied[name] = chosen.iloc[repeats].to_numpy()
    return replace(
        whole,
        frame=copied,
        fixed=fixed,
        weights=None if whole.weights is None else whole.weights[place],
        labels=whole.labels.take(place),
        position=whole.position[place],
    )


def variable_kind(grid: Grid, name: str) -> Literal["category", "binary", "number"]:
    """Whether a variable holds categories, zeros and ones, or numbers."""
    facts, column = grid.posterior.model.data_facts(), grid.column(name)
    if facts.schema is None:
        binary = column.isin([0, 1]).all() and len(grid.frame) > 1
        return "binary" if binary else "number"
    if name in facts.schema.levels or name in facts.schema.clusters:
        return "category"
    return "binary" if name in facts.schema.indicators else "number"


def levels_of(grid: Grid, name: str) -> list[Any]:
    """The levels of a categorical variable or of a grouping factor, in their order."""
    facts = grid.posterior.model.data_facts()
    if facts.schema is not None and name in facts.schema.levels:
        return list(facts.schema.levels[name])
    return list(pd.unique(grid.column(name)))


def _observed(
    posterior: Posterior, data: ClusteredData | pd.DataFrame | None, by: Sequence[str]
) -> Grid:
    """The rows as they are."""
    facts = posterior.model.data_facts()
    if facts.feature_shape[1:]:
        raise ValueError(
            "the features are images, which have no variables to read effects of; see "
            "Fit.attribution"
        )
    if data is None or isinstance(data, ClusteredData):
        rows = posterior.data if data is None else data
        if not rows.n_rows:
            raise ValueError("the fit was kept without its training rows: pass rows as data=table")
        frame = decoded(rows) if rows.table is None else rows.table
    else:
        frame = as_pandas(data)
        rows = posterior.encode(frame)
        frame = frame.loc[:, [str(name) in _wanted(posterior, by) for name in frame.columns]]
    weights = rows.weights if rows.weights_kind == "frequency" else None
    return Grid(
        posterior,
        frame.reset_index(drop=True),
        (),
        None if weights is None else weights.numpy(),
        rows.row_labels,
        rows,
        np.arange(rows.n_rows),
    )


def _wanted(posterior: Posterior, by: Sequence[str]) -> set[str]:
    """Columns of a table that are kept: those of the schema, and `by`."""
    schema = posterior.model.data_facts().schema
    if schema is None:
        return set(by)
    roles = (schema.trials, schema.offset, *schema.clusters, *schema.columns)
    return {name for name in roles if name is not None} | set(by)


def _values(grid: Grid, name: str, chosen: Any) -> list[Any]:
    """Chosen values of a variable as a list, checked against its levels."""
    grid.column(name)
    scalar = isinstance(chosen, str | bytes) or not hasattr(chosen, "__iter__")
    values = [chosen] if scalar else list(chosen)
    if not values:
        raise ValueError(f"at={{{name!r}: ...}} has no values: name at least one")
    return values


def _categories(grid: Grid) -> dict[str, list[Any]]:
    """The values of all categorical and binary variables, grouping factors left out."""
    facts = grid.posterior.model.data_facts()
    clusters = set(grid.source.groupings)
    roles = set() if facts.schema is None else {facts.schema.trials, facts.schema.offset}
    kinds = {
        name: variable_kind(grid, name)
        for name in map(str, grid.frame.columns)
        if name not in clusters | roles
    }
    levels = {name: levels_of(grid, name) for name, kind in kinds.items() if kind == "category"}
    return levels | {name: [0, 1] for name, kind in kinds.items() if kind == "binary"}


def _typical(grid: Grid) -> Grid:
    """One row: means of numbers, and the most frequent value of all other variables."""
    facts = grid.posterior.model.data_facts()
    numbers = set() if facts.schema is None else {facts.schema.offset}
    row: dict[str, Any] = {}
    for name in map(str, grid.frame.columns):
        column = grid.frame[name]
        known = facts.schema is None or name in facts.schema.columns
        number = known and name not in grid.source.groupings and variable_kind(grid, name)
        if name in numbers or number == "number":
            row[name] = float(np.average(column.astype(float), weights=grid.weights))
        else:
            row[name] = column.mode().iloc[0]
    frame = pd.DataFrame({name: [value] for name, value in row.items()})
    first = np.zeros(1, dtype=np.int64)
    return replace(
        grid, frame=frame, weights=None, labels=pd.Index(["typical"]), position=first, typical=True
    )
