"""Rows of a table, encoded with the columns of a schema."""

from __future__ import annotations

from typing import Any

import torch

from armed_pyro.data import censoring
from armed_pyro.data.columns import Missing, as_numbers
from armed_pyro.data.schema import Schema
from armed_pyro.data.weights import as_weights

__all__ = ["encoded_rows"]


def encoded_rows(
    frame: Any, schema: Schema, outcome_required: bool, missing: Missing
) -> dict[str, Any]:
    """The attributes of `ClusteredData`; see `ClusteredData.encode`."""
    table = schema.select(frame, outcome_required=outcome_required, missing=missing)
    groupings = schema.groupings(table)
    whole = schema.with_cluster_columns(table, groupings)
    design, names, sources = schema.design(whole)
    extra, extra_names, extra_sources = schema.slope_design(whole)
    per_row: dict[str, Any] = dict.fromkeys(("trials", "offset", "weights"))
    observed = schema.outcomes(table), schema.status, schema.upper, schema.entry
    per_row |= censoring.observed_columns(table, *observed)
    for role in ("trials", "weights"):
        if (name := getattr(schema, role)) in table:
            per_row[role] = torch.from_numpy(as_numbers(table[name], role))
    per_row["offset"] = schema.offsets(table)
    per_row["weights"] = as_weights(per_row["weights"], schema.weights_kind, table.index)
    return dict(
        features=torch.from_numpy(design),
        feature_names=names,
        sources=tuple(":".join(source) for source in sources),
        continuous=schema.continuous(sources),
        outcome_name=schema.outcome,
        classes=None if schema.classes is None else tuple(schema.classes.tolist()),
        groupings=groupings,
        **per_row,
        row_labels=table.index,
        schema=schema,
        table=table if schema.computed else None,
        slopes=torch.from_numpy(extra) if extra_names else None,
        slope_names=extra_names,
        slope_sources=tuple(":".join(source) for source in extra_sources),
        slope_continuous=schema.continuous(extra_sources),
        weights_kind=schema.weights_kind,
    )
