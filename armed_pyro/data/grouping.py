"""Labels of clusters and classes, their codes and their JSON form."""

from __future__ import annotations

import datetime
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from armed_pyro._messages import check_type, unknown
from armed_pyro.data.label_matching import label_text

# Label of the one cluster of a smooth term.
ALL_ROWS = pd.Index(["all rows"])


@dataclass(frozen=True, eq=False)
class Grouping:
    """One grouping factor: the cluster of each row.

    `codes` are positions, Int64[Tensor, "rows"], in the labels of the clusters, `levels`. These
    have their original type, and are sorted where they can be.

    >>> Grouping.from_labels(["b", "a", "b"]).codes.tolist()
    [1, 0, 1]
    """

    codes: Tensor
    levels: pd.Index

    @classmethod
    def from_labels(cls, labels: Any, what: str = "grouping factor") -> Grouping:
        """The grouping by one label per row; `what` names the labels in messages."""
        codes, levels = code_labels(labels, what)
        return cls(torch.from_numpy(codes), levels)

    @property
    def n_clusters(self) -> int:
        """Number of clusters."""
        return len(self.levels)

    @property
    def counts(self) -> Tensor:
        """Int64[Tensor, "clusters"], the number of rows of each cluster."""
        return torch.bincount(self.codes, minlength=self.n_clusters)

    def labels(self) -> np.ndarray:
        """Label of each row's cluster, shape "rows"."""
        return self.levels.take(self.codes.numpy()).to_numpy()

    def take(self, rows: np.ndarray) -> Grouping:
        """The grouping of the rows at these positions, with the levels that occur in them."""
        present, codes = np.unique(self.codes.numpy()[rows], return_inverse=True)
        return Grouping(torch.from_numpy(codes.astype(np.int64)), self.levels.take(present))

    def cross(self, other: Grouping) -> Grouping:
        """The cells of two factors, crossed or nested: one cluster per pair that occurs.

        Levels are text, ``"a1:b1"``, in the order of this factor's levels, then of the other's. A
        whole number has no point, ``"101:1"``, so that labels are the same for all column types.
        """
        pairs, codes = np.unique(
            self.codes.numpy() * other.n_clusters + other.codes.numpy(), return_inverse=True
        )
        first, second = np.divmod(pairs, other.n_clusters)
        outer, inner = ([label_text(label) for label in g.levels] for g in (self, other))
        levels = pd.Index([f"{outer[a]}:{inner[b]}" for a, b in zip(first, second, strict=True)])
        if not levels.is_unique:
            raise ValueError(
                f"Two different cells are both called {levels[levels.duplicated()][0]!r}: labels "
                "that hold ':' make the names of cells ambiguous. Rename those labels."
            )
        return Grouping(torch.from_numpy(codes.astype(np.int64)), levels)


def is_smooth_text(factor: str) -> bool:
    """Whether a factor is that of a smooth term, whose one cluster holds all rows.

    >>> is_smooth_text("s(x, k=20)"), is_smooth_text("site")
    (True, False)
    """
    return factor.startswith("s(") and factor.endswith(")")


def grouping_by(groupings: Mapping[str, Grouping], factor: str, rows: int = 0) -> Grouping:
    """The grouping by a factor, ``"site"``, or by the cells of several, ``"school:class"``.

    All `rows` are one cluster of a smooth term, ``"s(x)"``. Raises ValueError if there is no such
    factor.
    """
    check_type(factor, str, "factor", "It is the name of a grouping factor.")
    if factor in groupings:
        return groupings[factor]
    if is_smooth_text(factor):
        return Grouping(torch.zeros(rows, dtype=torch.long), ALL_ROWS)
    outer, _, inner = factor.rpartition(":")
    if not outer:
        known = unknown("grouping factor", factor, groupings)
        raise ValueError(f"{known} Add {factor!r} to clusters=[...], as each part of 'a/b'.")
    return grouping_by(groupings, outer).cross(grouping_by(groupings, inner))


def check_several(factor: str, levels: pd.Index) -> None:
    """Raise ValueError if there is a single cluster."""
    if len(levels) == 1:
        raise ValueError(
            f"Grouping factor {factor!r} has a single level, {levels[0]}: "
            "it tells nothing of the variance between clusters. Leave it out."
        )


def warn_of_float_labels(table: pd.DataFrame) -> None:
    """Warn of columns of clusters that are fractions, whose way of writing is lost."""
    for name in table:
        column = table[name].dropna()
        if pd.api.types.is_float_dtype(column.dtype) and bool((column % 1 != 0).any()):
            warnings.warn(
                f"The clusters of {name!r} are floating-point numbers such as "
                f"{column[column % 1 != 0].iloc[0]}: labels that differ only in how they are "
                "written, such as 0.1 and 0.10, are one cluster. Read the column as text: "
                "read_table(path, labels=[...]), or pandas.read_csv(path, dtype={...: str})",
                UserWarning,
                stacklevel=4,
            )


def code_labels(labels: Any, what: str) -> tuple[np.ndarray, pd.Index]:
    """Codes of row labels, and the levels they index: sorted, or in a categorical's own order.

    Labels may be of a mixture of types that cannot be sorted. `what` names them in messages, such
    as ``"cluster column 'site'"``.
    """
    series = pd.Series(labels.numpy() if isinstance(labels, Tensor) else labels)
    if pd.api.types.is_float_dtype(series.dtype) and bool((series.abs() >= 2**53).any()):
        raise ValueError(
            f"The {what} has floating-point numbers beyond 2^53, where different whole numbers are "
            "the same: read them as text or integers, for example with read_table(path, "
            "labels=[...]) or astype('Int64')."
        )
    if n_missing := int(series.isna().sum()):
        raise ValueError(
            f"The {what} has {n_missing} missing labels among {len(series)}; leave those rows "
            "out, or give them a label of their own."
        )
    try:
        if isinstance(series.dtype, pd.CategoricalDtype):
            kept = series.cat.remove_unused_categories()
            codes, levels = kept.cat.codes.to_numpy(), kept.cat.categories
        else:
            try:
                codes, levels = pd.factorize(series, sort=True)
            except TypeError:  # labels with no common order
                codes, levels = pd.factorize(series)
        index_to_json(levels)
    except (TypeError, UnicodeError) as error:
        raise ValueError(f"The {what} cannot serve as labels: {error}") from error
    return codes.astype(np.int64), levels.rename(None)


def index_to_json(index: pd.Index) -> dict[str, Any]:
    """Labels as ``{"dtype", "values"}`` in JSON's types; `index_from_json` reads it back."""
    dtype, values = str(index.dtype), list(index.tolist())
    if isinstance(index, pd.DatetimeIndex):
        return {"dtype": dtype, "values": [value.isoformat() for value in values]}
    if all(type(value) is datetime.date for value in values) and values:
        return {"dtype": "date", "values": [value.isoformat() for value in values]}
    values = [value.item() if isinstance(value, np.generic) else value for value in values]
    for value in values:
        if not isinstance(value, bool | int | float | str):
            raise TypeError(
                f"label {value!r} is a {type(value).__name__}, expected numbers, text, dates or "
                "timestamps. Turn the labels into text: column.astype(str)."
            )
        _check_storable(value)
    return {"dtype": dtype, "values": values}


def _check_storable(label: bool | int | float | str) -> None:
    """Raise TypeError for a label that JSON or NetCDF files could not hold."""
    if isinstance(label, int) and not -(2**63) <= label < 2**64:
        raise TypeError(f"label {label} has more than 64 bits. Turn the labels into text.")
    if isinstance(label, str):
        if "\0" in label:
            raise TypeError(f"label {label!r} has a NUL character, which files cannot hold")
        try:
            label.encode()
        except UnicodeEncodeError:
            raise TypeError(f"label {label!r} is not valid Unicode") from None


def index_from_json(content: Mapping[str, Any]) -> pd.Index:
    """Read labels that `index_to_json` wrote, with their dtype."""
    try:
        dtype, values = content["dtype"], content["values"]
        if dtype == "date":
            dates = [datetime.date.fromisoformat(value) for value in values]
            return pd.Index(dates, dtype=object)
        if dtype.startswith("datetime64"):
            return pd.to_datetime(values, utc="," in dtype, format="ISO8601").astype(dtype)
        return pd.Index(values, dtype=dtype)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"Expected labels as written by index_to_json, found {str(content)[:80]} ({error!r})."
        ) from error
