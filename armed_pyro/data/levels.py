"""Levels of the categorical columns of a table."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import pandas as pd

from armed_pyro._messages import listing
from armed_pyro.data.categories import LevelOrder
from armed_pyro.data.columns import as_numbers, check_not_numbers, check_not_paths, is_categorical
from armed_pyro.data.grouping import code_labels

__all__ = ["levels_of"]

# Bytes of the indicators of one categorical feature.
LARGEST_INDICATORS = 1e9


def levels_of(
    table: pd.DataFrame,
    columns: Sequence[str],
    factors: Collection[str],
    orders: Iterable[LevelOrder] = (),
) -> dict[str, pd.Index]:
    """Levels of the categorical columns; the other columns are checked to be numbers."""
    levels = {
        name: _levels(table[name], by_number=name in factors)
        for name in columns
        if name in factors or is_categorical(table[name])
    }
    for order in orders:
        levels[order.column] = order.applied(levels[order.column])
    for name in set(columns) - set(levels):
        as_numbers(table[name], "feature")
    return levels


def _levels(column: pd.Series, *, by_number: bool) -> pd.Index:
    """Levels of a categorical feature, checked; `by_number` if numbers may be its categories."""
    if not by_number:
        check_not_numbers(column)
        check_not_paths(column)
    levels = code_labels(column, f"feature {column.name!r}")[1]
    size = 8 * len(levels) * len(column)
    if size > LARGEST_INDICATORS:
        raise ValueError(
            f"Feature {column.name!r} has {len(levels)} levels, which would be as many columns, "
            f"{size / 1e9:.1f} GB. Leave it out, join levels, or make it a grouping factor: "
            f"(1 | {column.name})."
        )
    if len(levels) == 1:
        raise ValueError(
            f"Feature {column.name!r} has a single level, {listing(levels)}, in the {len(column)} "
            "rows without missing values: nothing can be learned from it. Leave it out."
        )
    return levels
