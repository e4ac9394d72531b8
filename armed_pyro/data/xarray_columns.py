"""Variables of an xarray dataset with one value, or one array, per row."""

from __future__ import annotations

from collections.abc import Sequence

import xarray as xr

from armed_pyro._messages import check_known

ROW_ROLES = ("trials", "offset", "weights", "se")
Chosen = Sequence[str] | str


def row_variables(
    dataset: xr.Dataset, row_dim: str, features: Chosen | None, taken: Sequence[str]
) -> tuple[dict[str, xr.Variable], Chosen]:
    """The variables along `row_dim`, rows first, and the features: by default all not `taken`."""
    check_known("dimension", [row_dim], dataset.dims)
    along = {
        str(name): variable.transpose(row_dim, ...)
        for name, variable in dataset.variables.items()
        if row_dim in variable.dims
    }
    if features is None:
        features = [n for n in along if n in dataset.data_vars and n not in taken]
    chosen = [features] if isinstance(features, str) and features in along else features
    names = [] if isinstance(chosen, str) else list(chosen)
    check_known(f"variable along {row_dim!r} called", [*taken, *names], along)
    return along, chosen


def column_labels(dataset: xr.Dataset, array: xr.Variable, name: str) -> list[str] | None:
    """Names of the features in an array "rows features"; None for arrays of more dimensions."""
    if array.ndim != 2:
        return None
    labels = dataset.indexes.get(array.dims[1], range(array.shape[1]))
    return [label if isinstance(label, str) else f"{name}[{label}]" for label in labels]
