"""Columns of a table, recovered from encoded rows."""

from __future__ import annotations

import pandas as pd
from torch import Tensor

from armed_pyro.data.categories import coding, contrast_of
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.data.formula_functions import is_made, recovered
from armed_pyro.data.schema import Schema

__all__ = ["decoded"]


def decoded(data: ClusteredData) -> pd.DataFrame:
    """The columns of features, slopes, clusters and roles that these rows were encoded from.

    A column that occurs in products only, such as x in ``x:z`` alone, or in functions without an
    inverse, cannot be recovered, and is left out. Images have no columns. The rows keep their
    labels.

    >>> table = pd.DataFrame({"y": [1.0, 2.0], "sex": ["f", "m"], "site": ["a", "b"]})
    >>> rows = ClusteredData.from_frame(table, outcome="y", clusters=["site"], features=["sex"])
    >>> decoded(rows)["sex"].tolist()
    ['f', 'm']
    """
    columns: dict[str, object] = {}
    schema = data.schema
    if schema is None:
        array = data.features.numpy() if data.feature_names else data.features[:, :0].numpy()
        columns |= {name: array[:, place] for place, name in enumerate(data.feature_names)}
    else:
        for name in schema.columns:
            values = _column(data.features, data.sources, schema, name)
            if values is None and data.slopes is not None:
                values = _column(data.slopes, data.slope_sources, schema, name)
            if values is not None:
                columns[name] = values
        columns = {**_from_calls(data, schema), **columns}
        for role, tensor in ((schema.trials, data.trials), (schema.offset, data.offset)):
            if role is not None and tensor is not None:
                columns[role] = tensor.numpy()
    columns |= {name: grouping.labels() for name, grouping in data.groupings.items()}
    return pd.DataFrame(columns, index=data.row_labels)


def _from_calls(data: ClusteredData, schema: Schema) -> dict[str, object]:
    """Columns behind functions, such as ``log(x)`` or ``poly(x, 2)``, and behind the offset."""
    columns: dict[str, object] = {}
    for call, state in schema.calls.items():
        for design, sources in ((data.features, data.sources), (data.slopes, data.slope_sources)):
            places = [place for place, source in enumerate(sources) if source == call]
            if design is None or not places:
                continue
            part, choice = design[:, places].double().numpy(), contrast_of(call)
            if choice is not None and choice.contrast is not None:
                levels = schema.levels[choice.column]
                reduced = len(places) < len(levels)
                rows = coding(levels, choice.contrast, reduced=reduced)
                codes = ((part[:, None] - rows) ** 2).sum(-1).argmin(1)
                columns[choice.column] = levels.take(codes).to_numpy()
            elif (source := recovered(call, part, state)) is not None:
                columns[source[0]] = source[1]
    if schema.offset_call is not None and data.offset is not None and is_made(schema.offset_call):
        source = recovered(schema.offset_call, data.offset.double().numpy()[:, None], {})
        columns |= {} if source is None else {source[0]: source[1]}
    return columns


def _column(design: Tensor, sources: tuple[str, ...], schema: Schema, name: str) -> object | None:
    """Values of a column whose term stands alone among these; None if there is no such term."""
    places = [place for place, source in enumerate(sources) if source == name]
    if not places:
        return None
    part = design[:, places].numpy()
    if name not in schema.levels:
        return part[:, 0]
    levels = schema.levels[name]
    # In treatment coding the first level has no column.
    reference = len(places) < len(levels)
    codes = part.argmax(1) + reference
    if reference:
        codes[part.sum(1) == 0] = 0
    return levels.take(codes).to_numpy()
