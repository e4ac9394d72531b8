"""New clusters of a nested design, whose table lacks the column of the inner factor."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable
from dataclasses import replace

import numpy as np
import pandas as pd

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.data.grouping import Grouping

# Label of the one inner cluster in every outer cluster.
NEW = "(new)"


def absent_columns(
    factors: Iterable[str], present: Collection[str], declared: Iterable[str] = ()
) -> tuple[str, ...]:
    """Columns that are absent and only name clusters inside those of a column that is present.

    With them come `declared` cluster columns that no factor uses.

    >>> absent_columns(["school", "school:class"], ["school"]), absent_columns(["a"], [])
    (('class',), ())
    """
    unused = set(declared) - {name for factor in factors for name in (factor, *factor.split(":"))}
    paths = [factor.split(":") for factor in factors if factor not in present]
    outermost = {path[0] for path in paths}
    inner = [name for path in paths if path[0] in present for name in path[1:]]
    inner = [name for name in inner if name not in outermost]
    return tuple(dict.fromkeys(name for name in [*inner, *unused] if name not in present))


def warn_of_absent(factors: Iterable[str], absent: Collection[str]) -> None:
    """Warn that each outer cluster's rows are taken as those of one new inner cluster."""
    for factor in factors:
        outer, _, inner = factor.rpartition(":")
        if inner in absent:
            warnings.warn(
                f"the rows have no column {inner!r}: the rows of each cluster of {outer!r} are "
                f"taken as those of one new cluster of {factor!r}",
                UserWarning,
                stacklevel=3,
            )


def with_new_column(table: pd.DataFrame, absent: Collection[str]) -> pd.DataFrame:
    """The table with one new label in each of these columns."""
    return table.assign(**dict.fromkeys(absent, NEW)) if absent else table


def with_new_grouping(data: ClusteredData, absent: Collection[str]) -> ClusteredData:
    """The rows with a single new cluster of each of these factors."""
    if not absent:
        return data
    new = Grouping.from_labels(np.full(data.n_rows, NEW))
    return replace(data, groupings={**data.groupings, **dict.fromkeys(absent, new)})
