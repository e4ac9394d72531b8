"""Rows of an xarray dataset, as a table or as arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import xarray as xr

from armed_pyro._messages import check_known, check_type
from armed_pyro.data.training_checks import PER_ROW

Features = Sequence[str] | str | None
ROW_ROLES = (*PER_ROW, "se")


def table_or_arrays(
    dataset: xr.Dataset,
    outcome: str,
    clusters: Sequence[str],
    features: Features,
    row_dim: str,
    roles: Mapping[str, Any],
) -> tuple[pd.DataFrame | None, Features, dict[str, Any]]:
    """A table with its features, or the arguments of `ClusteredData.from_arrays`.

    `ClusteredData.from_xarray` documents the parameters.
    """
    advice = "ClusteredData.from_frame takes tables, and from_arrays arrays."
    check_type(dataset, xr.Dataset, "dataset", advice)
    check_known("dimension", [row_dim], dataset.dims)
    along = {
        str(name): variable.transpose(row_dim, ...)
        for name, variable in dataset.variables.items()
        if row_dim in variable.dims
    }
    row_roles = {k: v for k, v in roles.items() if k in ROW_ROLES and v}
    taken = [outcome, *clusters, *row_roles.values()]
    if features is None:
        features = [n for n in along if n in dataset.data_vars and n not in taken]
    chosen = [features] if isinstance(features, str) and features in along else features
    names = [] if isinstance(chosen, str) else list(chosen)
    check_known(f"variable along {row_dim!r} called", [*taken, *names], along)
    rows = dataset.indexes.get(row_dim, pd.RangeIndex(dataset.sizes[row_dim]))
    if all(along[name].ndim == 1 for name in names):
        columns = {name: v.to_numpy() for name, v in along.items() if v.ndim == 1}
        return pd.DataFrame(columns, index=rows), chosen, {}
    if len(names) > 1:
        raise ValueError(
            f"An array must be the only feature, found {names}. Name one with features=."
        )
    array, feature_names = along[names[0]], None
    if array.ndim == 2:
        labels = dataset.indexes.get(array.dims[1], range(array.shape[1]))
        feature_names = [v if isinstance(v, str) else f"{names[0]}[{v}]" for v in labels]
    arrays = {
        "features": array.to_numpy(),
        "outcome": along[outcome].to_numpy(),
        "clusters": {name: along[name].to_numpy() for name in clusters},
        "feature_names": feature_names,
        "outcome_name": outcome,
        "event": roles.get("event"),
        "weights_kind": roles.get("weights_kind", "frequency"),
        "row_labels": rows,
    }
    return None, chosen, arrays | {k: along[v].to_numpy() for k, v in row_roles.items()}
