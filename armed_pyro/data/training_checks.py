"""Checks of rows before training, whose errors name the column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
from torch import Tensor

from armed_pyro.data.grouping import Grouping, check_several, index_to_json

__all__ = ["CENSORING", "PER_ROW", "check_magnitudes", "check_training"]

CENSORING = ("status", "upper", "entry")
PER_ROW = ("trials", "offset", "weights", *CENSORING)
# Squares, and products of a few numbers between these, are neither infinite nor 0.
SMALLEST, LARGEST = 1e-100, 1e100


def check_training(
    values: Mapping[str, Tensor],
    columns: Mapping[str, Sequence[str]],
    varying: bool,
    groupings: Mapping[str, Grouping],
    row_labels: pd.Index,
) -> None:
    """Check that there are rows, an outcome and variation, and that the fit can be saved.

    `values` are the rows by role and `columns` the names of their columns; see
    `ClusteredData.check_training`. Unless `varying`, the outcome may be constant.
    """
    (outcome,) = columns["outcome"]
    if not len(row_labels):
        raise ValueError("There are no rows to train on.")
    if "outcome" not in values:
        raise ValueError(f"Training needs the outcome {outcome!r}; there is none.")
    if varying and bool((values["outcome"] == values["outcome"][0]).all()):
        raise ValueError(f"The outcome {outcome!r} has one value in all rows.")
    check_magnitudes(values, columns, smallest=SMALLEST)
    for name, grouping in groupings.items():
        check_several(name, grouping.levels)
    names = [name for group in columns.values() for name in group]
    for what, labels in {"names of columns": pd.Index(names), "labels of rows": row_labels}.items():
        try:
            # Labels of mixed types and of composite indexes are saved as text.
            index_to_json(labels.map(str) if labels.dtype == object else labels)
        except (TypeError, UnicodeError) as error:
            raise ValueError(
                f"The {what} cannot be saved: {error}. Rename them, or number the rows: "
                "table.reset_index(drop=True)"
            ) from error


def check_magnitudes(
    values: Mapping[str, Tensor], columns: Mapping[str, Sequence[str]], *, smallest: float = 0.0
) -> None:
    """Raise ValueError, with its name, for a column whose largest number is too large or small.

    Columns of zeros are not too small. Images are not checked.
    """
    for role, rows in values.items():
        if rows.numel() and rows.dim() <= 2:
            most = rows.reshape(len(rows), -1).abs().amax(0)
            wrong = (most > LARGEST) | ((most < smallest) & (most > 0))
            for place in wrong.nonzero().flatten().tolist():
                raise ValueError(
                    f"The column {columns[role][place]!r} ({role}) has numbers up to "
                    f"{float(most[place]):.3g} in size, expected between {SMALLEST:g} and "
                    f"{LARGEST:g}. Change its unit, or leave out the rows in which such a number "
                    "stands for a missing one."
                )
