"""The training rows of a saved fit: what the manifest says of them, and the rows themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.data.grouping import Grouping, index_from_json, index_to_json
from armed_pyro.data.training_checks import PER_ROW
from armed_pyro.data.xarray_names import label_values, variable_name
from armed_pyro.program.data_spec import Facts
from armed_pyro.storage.row_file import LABELS, Expected, open_plain, read_values
from armed_pyro.summaries.datatree import GROUPS

__all__ = ["describe_rows", "read_rows", "training_rows", "with_inputs"]

OBSERVED, CONSTANT = "observed_data", "constant_data"
COLUMNS = ("features", "slopes", *PER_ROW, "fold")


def describe_rows(data: ClusteredData) -> dict[str, Any]:
    """Properties of the training rows that ``posterior.nc`` does not hold."""
    try:
        row_dtype = index_to_json(data.row_labels)["dtype"]
    except TypeError:  # a composite index, whose labels are read back as text
        row_dtype = None
    present = [name for name in COLUMNS[1:] if getattr(data, name) is not None]
    return {
        "continuous": list(data.continuous),
        "slope_continuous": list(data.slope_continuous),
        "levels": {
            name: index_to_json(grouping.levels) for name, grouping in data.groupings.items()
        },
        "row_dtype": row_dtype,
        "row_name": data.row_labels.name if isinstance(data.row_labels.name, str) else None,
        "rows": data.n_rows,
        "columns": ["features", *present] if data.n_features else present,
    }


def read_rows(path: Path, record: Mapping[str, Any], facts: Facts) -> dict[str, np.ndarray]:
    """Arrays of the training rows by variable, the outcome's under the empty name.

    Their sizes must be those that the manifest says; ValueError names a variable that is missing,
    or is not as expected.
    """
    needed = record.get("columns")
    if needed is None:  # a fit of an earlier version
        widths = {"features": math.prod(facts.feature_shape), "slopes": len(facts.slope_names)}
        needed = [name for name, width in widths.items() if width]
    outcome, arrays = variable_name(facts.outcome_name), dict[str, np.ndarray]()
    with open_plain(path, frozenset(GROUPS)) as datasets:
        wanted = [(OBSERVED, outcome), (OBSERVED, "row"), *((CONSTANT, name) for name in needed)]
        for place in wanted:
            if place not in datasets:
                raise ValueError(f"there is no variable {'/' + '/'.join(place)!r}")
        count = record.get("rows", datasets[OBSERVED, "row"].shape[0])
        if count > facts.n_rows:
            raise ValueError(f"there are {count} rows, but the fit had {facts.n_rows}")
        row, labels = Expected((count,)), Expected((count,), LABELS)
        shapes = {
            **dict.fromkeys(COLUMNS, row),
            "features": Expected((count, *facts.feature_shape)),
            "slopes": Expected((count, len(facts.slope_names))),
        }
        arrays[""] = read_values(datasets[OBSERVED, outcome], row)
        arrays["row"] = read_values(datasets[OBSERVED, "row"], labels)
        for (group, name), dataset in datasets.items():
            # Beside these columns there are only labels of grouping factors, and axes.
            if group == CONSTANT and "CLASS" not in dataset.attrs:
                arrays[name] = read_values(dataset, shapes.get(name, labels))
    return arrays


def training_rows(
    arrays: Mapping[str, np.ndarray],
    record: Mapping[str, Any],
    facts: Facts,
    names: Mapping[str, str],
) -> ClusteredData:
    """The training rows of `read_rows`; `names` are the variables of grouping factors."""
    outcome, labels = arrays[""], pd.Index(arrays["row"])
    groupings = {}
    for name, content in record["levels"].items():
        levels = index_from_json(content)
        # Fits saved before all names were distinct have no other name than `variable_name`.
        stored = arrays.get(names[name], arrays.get(variable_name(name)))
        if stored is None:
            raise ValueError(f"there are no clusters of {name!r}")
        codes = pd.Index(label_values(levels)).get_indexer(pd.Index(stored))
        if (codes < 0).any():
            raise ValueError(f"clusters of {name!r} that the manifest does not know")
        groupings[name] = Grouping(torch.from_numpy(codes.astype(np.int64)), levels)
    if record["row_dtype"] is not None:
        labels = index_from_json({"dtype": record["row_dtype"], "values": labels.tolist()})

    def tensor(name: str) -> Tensor | None:
        return torch.from_numpy(arrays[name].copy()) if name in arrays else None

    features = tensor("features")
    if features is None:
        features = torch.zeros(len(outcome), *facts.feature_shape, dtype=torch.float64)
    return ClusteredData(
        features=features,
        feature_names=facts.feature_names,
        sources=facts.sources,
        continuous=tuple(record["continuous"]),
        outcome_name=facts.outcome_name,
        outcome=torch.from_numpy(outcome.astype(np.float64)),
        classes=facts.classes,
        groupings=groupings,
        trials=tensor("trials"),
        offset=tensor("offset"),
        weights=tensor("weights"),
        status=tensor("status"),
        upper=tensor("upper"),
        entry=tensor("entry"),
        weights_kind=facts.weights_kind or "frequency",
        row_labels=labels.rename(record["row_name"]),
        schema=facts.schema,
        slopes=tensor("slopes"),
        slope_names=facts.slope_names,
        slope_sources=facts.slope_sources,
        slope_continuous=tuple(record.get("slope_continuous", ())),
        fold=tensor("fold"),
    )


def with_inputs(rows: ClusteredData, data: ClusteredData) -> ClusteredData:
    """The training rows with the inputs of `data`; ValueError unless these are the same rows."""
    same = data.n_rows == rows.n_rows and data.inputs is not None
    if same and rows.outcome is not None and data.outcome is not None:
        same = torch.equal(rows.outcome, data.outcome.to(rows.outcome))
    for name, grouping in rows.groupings.items():
        known = same and name in data.groupings
        same = known and bool((data.grouping(name).labels() == grouping.labels()).all())
    if not same:
        raise ValueError(
            f"data= must be the {rows.n_rows} training rows with their inputs, as "
            "ClusteredData.from_dataset made them for the fit; found other rows or none"
        )
    return replace(rows, inputs=data.inputs)
