"""Weights of rows, and standard errors as weights."""

from __future__ import annotations

from typing import TypeVar, get_args

import pandas as pd
from torch import Tensor

from armed_pyro.data.columns import check_rows
from armed_pyro.data.schema import WeightsKind

T = TypeVar("T")


def weights_role(
    weights: T | None, kind: WeightsKind, se: T | None
) -> tuple[T | None, WeightsKind]:
    """The weights or, with the kind "se", the standard errors that stand in their place."""
    if kind not in get_args(WeightsKind)[:2]:
        raise ValueError(f"weights_kind must be 'frequency' or 'precision', found {kind!r}.")
    if se is None:
        return weights, kind
    if weights is not None:
        raise ValueError("Give either weights or standard errors (se), not both.")
    return se, "se"


def as_weights(values: Tensor | None, kind: WeightsKind, labels: pd.Index) -> Tensor | None:
    """Row weights; those of standard errors are 1 / se^2."""
    if values is None or kind != "se":
        return values
    check_rows(values, values > 0, "standard errors", "above 0", labels)
    return values**-2


def check_weights(weights: Tensor, kind: WeightsKind, labels: pd.Index) -> None:
    """Raise ValueError for negative weights, and for precisions of 0."""
    if kind == "frequency":
        check_rows(weights, weights >= 0, "weights", "at least 0", labels)
    else:
        check_rows(weights, weights > 0, "weights", "above 0", labels)
