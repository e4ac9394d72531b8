"""Averages over rows, within groups of rows, of functions of expected outcomes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.data.label_matching import match_labels
from armed_pyro.effects.expectation import CLUSTERS, Expectation
from armed_pyro.effects.grid import Grid
from armed_pyro.effects.result import ESTIMATES

__all__ = ["Groups", "averaged", "labelled", "title_of"]

ByRow = Float[np.ndarray, "draws rows outputs"]
# Columns of tables of effects.
TAKEN = ("row", "term", "contrast", "class", *ESTIMATES)
Averages = Float[np.ndarray, "draws groups outputs"]


@dataclass(frozen=True, eq=False)
class Groups:
    """The group of every row, with labels of the groups; without averages, each row is a group."""

    codes: Int[np.ndarray, " rows"]
    labels: pd.DataFrame
    weights: Float[np.ndarray, " rows"]

    @classmethod
    def of(cls, grid: Grid, by: Sequence[str], *, average: bool = True) -> Groups:
        """Rows with the same chosen values and the same values of `by`.

        Chosen values keep their order. Categories have the order of their levels. Variables with
        the name of a column of results, such as ``class``, are followed by ``_`` in the labels.
        """
        n, keys = len(grid), list(dict.fromkeys([*grid.fixed, *by]))
        columns = {name: grid.column(name) for name in keys}
        if not average:
            values = {_free(name): column.array for name, column in columns.items()}
            labels = pd.DataFrame({"row": grid.labels, **values})
            return cls(np.arange(n), labels, np.ones(n))
        weights = np.ones(n) if grid.weights is None else grid.weights
        if not keys:
            return cls(np.zeros(n, dtype=np.int64), pd.DataFrame(index=range(1)), weights)
        places = np.column_stack([_places(grid, name) for name in keys])
        _, first, codes = np.unique(places, axis=0, return_index=True, return_inverse=True)
        values = {_free(name): column.iloc[first].array for name, column in columns.items()}
        chosen = pd.DataFrame(values)
        return cls(codes.reshape(-1), chosen, weights)

    def __len__(self) -> int:
        return len(self.labels)


def _free(name: str) -> str:
    """The name of a variable in tables of results, whose columns' names are taken."""
    return f"{name}_" if name in TAKEN else name


def _places(grid: Grid, name: str) -> Int[np.ndarray, " rows"]:
    """Each row's place among the distinct values of a variable."""
    column = grid.column(name)
    if name in grid.fixed:
        return pd.factorize(column)[0]
    schema = grid.posterior.model.data_facts().schema
    if schema is not None and name in schema.levels:
        return match_labels(pd.Index(column.unique()), schema.levels[name], name)[
            pd.factorize(column)[0]
        ]
    try:
        return pd.factorize(column, sort=True)[0]
    except TypeError:  # labels with no common order
        return pd.factorize(column)[0]


def averaged(
    expectation: Expectation,
    rows: Sequence[ClusteredData],
    groups: Groups,
    unit: Callable[..., ByRow] | None = None,
) -> Averages:
    """Weighted means over the rows of each group of unit(values at the first of `rows`, ...).

    Without `unit` they are means of the values at the only one of `rows`.
    """
    totals = np.zeros((expectation.draws, len(groups), len(expectation.labels)))
    sizes = np.bincount(groups.codes, groups.weights, minlength=len(groups))
    single, start = len(groups) == len(groups.codes), 0
    for parts in zip(*map(expectation.blocks, rows), strict=True):
        values = parts[0] if unit is None else unit(*parts)
        stop = start + values.shape[1]
        codes, weights = groups.codes[start:stop], groups.weights[start:stop]
        if single:
            totals[:, codes] += weights[:, None] * values
        else:
            present, places = np.unique(codes, return_inverse=True)
            members = np.zeros((len(codes), len(present)))
            members[np.arange(len(codes)), places] = weights
            totals[:, present] += np.einsum("drp,rg->dgp", values, members, optimize=True)
        start = stop
    if not (sizes > 0).all():
        raise ValueError("a group has no rows of positive weight: leave it out")
    return totals / sizes[:, None]


def labelled(
    groups: Groups, outputs: Sequence[str], draws: Averages, **first: str
) -> tuple[pd.DataFrame, Float[np.ndarray, "draws quantities"]]:
    """The labels of every group and output, and its draws side by side."""
    labels = groups.labels.loc[np.repeat(groups.labels.index, len(outputs))].reset_index(drop=True)
    if tuple(outputs) != ("",):
        labels["class"] = np.tile(np.array(outputs, dtype=object), len(groups))
    for place, (name, value) in enumerate(first.items()):
        labels.insert(place, name, value)
    return labels, draws.reshape(len(draws), -1)


def title_of(what: str, expectation: Expectation) -> str:
    """What quantities are, of which outcome, on which scale, and for which clusters."""
    facts, family = expectation.model.data_facts(), expectation.model.family
    outcome = facts.outcome_name
    event = expectation.model.event
    if event is not None:
        outcome = f"P({outcome} = {event})"
    if expectation.scale == "link":
        outcome = f"the linear predictor of {outcome}"
    elif family.is_probability and event is None:
        outcome = f"the probability of {outcome}"
    return f"{what} of {outcome}, {CLUSTERS[expectation.unseen]}"
