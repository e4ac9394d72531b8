"""Numbers of tables as text, with digits by which an estimate and its interval differ."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

# Significant digits of a number, and of its sd if that asks for more; a double has no more than 15.
DIGITS, OF_SD, MOST = 4, 2, 15
ESTIMATES = ("mean", "median", "lower", "upper")


def as_text(table: pd.DataFrame) -> pd.DataFrame:
    """The table with its numbers as text; missing values are empty.

    >>> as_text(pd.DataFrame({"mean": [1e8 + 1], "sd": [0.5], "lower": [1e8]})).iloc[0].tolist()
    ['100000001', '0.5', '100000000']
    """
    spreads = table["sd"] if "sd" in table else [math.nan] * len(table)
    columns = {}
    for name in table.columns:
        by_row = spreads if name in ESTIMATES else [math.nan] * len(table)
        columns[name] = [cell(v, sd) for v, sd in zip(table[name], by_row, strict=True)]
    return pd.DataFrame(columns, index=table.index, dtype=object)


def cell(value: Any, sd: float = math.nan) -> str:
    """A value as text: four significant digits, or more if its sd is small beside it.

    >>> cell((0.5, 1.25)), cell("a")
    ('0.5 to 1.25', 'a')
    """
    if isinstance(value, str):
        return value
    if isinstance(value, tuple):
        return " to ".join(cell(end) for end in value)
    if pd.isna(value):
        return ""
    if isinstance(value, int | np.integer | np.bool_):
        return str(value)
    digits = DIGITS
    if math.isfinite(value) and value and sd > 0 and math.isfinite(sd):
        digits = math.floor(math.log10(abs(value))) - math.floor(math.log10(sd)) + OF_SD
        digits = min(MOST, max(DIGITS, digits))
    return f"{value:.{digits}g}"
