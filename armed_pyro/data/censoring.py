"""Outcomes that were not observed exactly: status, ends of intervals, and entry."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from armed_pyro._messages import listing
from armed_pyro.data.columns import as_numbers, check_rows
from armed_pyro.rows.censoring import EVENT, INTERVAL, LEFT, RIGHT

__all__ = [
    "check_censoring",
    "check_observed",
    "observed_arrays",
    "observed_columns",
    "read_status",
    "with_open_ends",
    "without_incomplete",
]

STATUS = {"right": RIGHT, "event": EVENT, "left": LEFT}
EXPECTED = (
    "1 or True where the outcome was observed, 0 or False where it is only known to be larger "
    "(censored from the right), or the texts event, right and left"
)

RowValues = Float[Tensor, " rows"]


def check_observed(status: Any, upper: Any) -> None:
    """Raise ValueError for statuses beside the ends of intervals, which say the same."""
    if status is not None and upper is not None:
        raise ValueError(
            "Give either a status, or the upper ends of intervals: equal ends are an event, and "
            "an open end (infinite, or missing in a table) is censored."
        )


def read_status(values: Any, what: str) -> RowValues:
    """Codes of `armed_pyro.rows.censoring` for the statuses of rows.

    >>> read_status(np.array(["event", "right", "left"]), "status").tolist()
    [1.0, 0.0, 2.0]
    """
    column = pd.Series(values)
    if isinstance(column.dtype, pd.CategoricalDtype):
        column = column.astype(column.cat.categories.dtype)
    if pd.api.types.is_numeric_dtype(column.dtype) or pd.api.types.is_bool_dtype(column.dtype):
        codes = column.to_numpy(dtype=float)
        wrong = (codes != RIGHT) & (codes != EVENT)
        hint = " Is 2 the code of an event, as in some of R's tables? Subtract 1 then."
        hint = hint if set(codes.tolist()) == {1.0, 2.0} else ""
    else:
        read = column.astype(str).str.strip().str.lower().map(STATUS)
        codes, wrong, hint = read.to_numpy(dtype=float), read.isna().to_numpy(), ""
    if wrong.any():
        found = listing(column[wrong].unique(), 3)
        raise ValueError(f"The {what} has {found} in {int(wrong.sum())} row(s): {EXPECTED}.{hint}")
    return torch.from_numpy(codes.copy())


def with_open_ends(table: pd.DataFrame, lower: str, upper: str | None) -> pd.DataFrame:
    """The table with infinite ends of intervals in place of missing ones; see `interval_ends`."""
    if upper is None or upper not in table or lower not in table:
        return table
    ends = {lower: -np.inf, upper: np.inf}
    for name in ends:
        if not pd.api.types.is_numeric_dtype(table[name].dtype):
            raise ValueError(
                f"The end of an interval {name!r} holds {table[name].dtype}; expected numbers, "
                "or missing values where an interval is open."
            )
    return table.assign(
        **{name: table[name].astype(float).fillna(end) for name, end in ends.items()}
    )


def without_incomplete(
    table: pd.DataFrame, observed: Set[str], *, keep: Set[str] = frozenset()
) -> pd.DataFrame:
    """The table without its columns of the outcome, unless all are there without a hole.

    Columns that have another role as well are kept.
    """
    present = observed & set(table.columns)
    complete = present == observed and not table[list(present)].isna().any(axis=None)
    return table if complete else table.drop(columns=list(present - keep))


def observed_columns(
    table: pd.DataFrame,
    outcome: Tensor | None,
    status: str | None,
    upper: str | None,
    entry: str | None,
) -> dict[str, Tensor | None]:
    """Outcome, status, upper end and entry of a table's rows; None for those that it lacks."""
    values: dict[str, Tensor | None] = dict.fromkeys(("status", "upper", "entry"))
    if outcome is not None:
        if upper is not None:
            end = torch.from_numpy(as_numbers(table[upper], "upper end"))
            outcome, values["status"], values["upper"] = interval_ends(outcome, end, table.index)
        if status is not None:
            values["status"] = read_status(table[status], f"status {status!r}")
        if entry is not None:
            values["entry"] = torch.from_numpy(as_numbers(table[entry], "entry"))
    return {"outcome": outcome, **values}


def observed_arrays(
    outcome: Any, status: Any, upper: Any, entry: Any, labels: pd.Index
) -> tuple[Any, dict[str, Any]]:
    """The outcome, and status, upper end and entry of arrays; None for those not given."""
    check_observed(status, upper)
    if upper is not None:
        low, high = (torch.as_tensor(np.asarray(end)).double() for end in (outcome, upper))
        outcome, status, upper = interval_ends(low, high, labels)
    elif status is not None:
        status = read_status(status, "status")
    return outcome, {"status": status, "upper": upper, "entry": entry}


def interval_ends(
    lower: RowValues, upper: RowValues, labels: pd.Index
) -> tuple[RowValues, RowValues, RowValues]:
    """Outcome, status and upper end of intervals.

    Equal ends are an exact outcome; an infinite upper end is censored from the right, and an
    infinite lower end from the left.
    """
    check_rows(upper, upper >= lower, "upper end", "at least the lower end", labels)
    open_below, open_above = lower == -torch.inf, upper == torch.inf
    check_rows(upper, ~(open_below & open_above), "interval", "closed on one side", labels)
    status = torch.full_like(lower, INTERVAL)
    status[lower == upper] = EVENT
    status[open_above], status[open_below] = RIGHT, LEFT
    outcome = torch.where(open_below, upper, lower)
    return outcome, status, torch.where(open_above, lower, upper)


def check_censoring(
    outcome: RowValues,
    status: RowValues | None,
    upper: RowValues | None,
    entry: RowValues | None,
    labels: pd.Index,
) -> None:
    """Raise ValueError if an upper end is below the outcome, or an entry is not."""
    if upper is not None:
        check_rows(upper, upper >= outcome, "upper end", "at least the lower end", labels)
    if entry is not None:
        expected = "below the outcome, as a row is observed after its entry only"
        check_rows(entry, entry < outcome, "entry", expected, labels)
    if status is None and upper is not None:
        raise ValueError("Rows with upper ends need a status.")
