"""The columns that become features where none are named."""

from __future__ import annotations

import warnings
from collections.abc import Collection

import numpy as np
import pandas as pd
from pandas.api import types as dtypes

from armed_pyro._messages import listing
from armed_pyro.data.columns import is_categorical

# Names under which R and pandas write row names.
ROW_NAMES = ("rownames", "row.names", "row_names", "Unnamed: 0", "level_0", "index")
# Below this number of rows, columns with as many values as rows are common by chance.
FEWEST_ROWS = 20
# Share of rows from which a column with so many distinct categories identifies rows.
NEARLY_ALL = 0.9


def default_features(table: pd.DataFrame, reserved: Collection[str]) -> tuple[str, ...]:
    """Every column without another role, except row names and identifiers of rows.

    A warning names the columns that are left out.
    """
    names = [str(name) for name in table.columns if name not in reserved]
    left_out = [name for name in names if identifies_rows(table[name])]
    warn_of_identifiers(left_out)
    return tuple(name for name in names if name not in left_out)


def identifies_rows(column: pd.Series) -> bool:
    """Whether a column holds row names, a running number, or about one category per row."""
    if column.name in ROW_NAMES and column.is_unique:
        return True
    if len(column) < FEWEST_ROWS:
        return False
    if is_categorical(column):
        return bool(column.nunique() >= NEARLY_ALL * len(column))
    if not dtypes.is_integer_dtype(column.dtype) or column.hasnans:
        return False
    values = np.sort(column.to_numpy())
    return values[0] in (0, 1) and bool((np.diff(values) == 1).all())


def warn_of_identifiers(names: Collection[str]) -> None:
    """Warn of columns that are not taken as features by default, if there are any."""
    if names:
        warnings.warn(
            f"not taken as features, as they identify rows (row names, a running number, or nearly "
            f"as many categories as rows): {listing(names)}. To take them, name the features "
            "(features=[...], command line: --features).",
            UserWarning,
            stacklevel=5,
        )
