"""Names and labels of variables in the form that ArviZ and xarray accept."""

from __future__ import annotations

import numpy as np
import pandas as pd
from jaxtyping import Shaped

# Dimensions of ArviZ's schema and variables of constant_data: other variables must not take these
# names.
RESERVED = (
    *("chain", "draw", "sample", "row", "feature", "features", "trials", "offset", "weights"),
    *("slopes", "slope_column"),
)


def variable_name(name: str) -> str:
    """A column's name as a variable's name: without ``/``, and not one of the reserved names.

    >>> variable_name("km/h"), variable_name("draw"), variable_name("a:b")
    ('km_h', 'draw_', 'a:b')
    """
    name = name.replace("/", "_")
    return f"{name}_" if name in RESERVED else name


def label_values(labels: pd.Index) -> Shaped[np.ndarray, " labels"]:
    """Labels in NetCDF's types: numbers, booleans, text and timestamps; other types as text.

    Distinct labels stay distinct.

    >>> label_values(pd.Index([1, "b"], dtype=object)).tolist()
    ['1', 'b']
    """
    if isinstance(labels, pd.DatetimeIndex) and labels.tz is None:
        return labels.to_numpy()
    values = [v.item() if isinstance(v, np.generic) else v for v in labels.tolist()]
    kinds = {type(value) for value in values}
    if not values or (len(kinds) == 1 and kinds <= {bool, int, float, str}):
        return np.asarray(values, dtype=None if values else np.str_)
    text = [str(value) for value in values]
    # 1 and "1" look the same; their representations do not.
    return np.asarray(text if len(set(text)) == labels.nunique() else list(map(repr, values)))
