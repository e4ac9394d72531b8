"""Columns ``within(x | g)`` and ``between(x | g)`` of formulas."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Float

from armed_pyro.data.cluster_means import ClusterMeans, ClusterSums
from armed_pyro.data.columns import as_numbers, known_codes
from armed_pyro.data.grouping import Grouping, grouping_by

__all__ = [
    "ClusterColumn",
    "cluster_sums",
    "expanded",
    "is_call",
    "with_cluster_columns",
    "without_calls",
]

_NAME = r"(?:`[^`]+`|[\w.]+)"
# A call of within or between; not inside backticks, where it is a column's own name.
_CALL = re.compile(
    rf"(?<![`\w.])(within|between)\(\s*(?:factor\(\s*(?P<factor>{_NAME})\s*\)|(?P<plain>{_NAME}))"
    r"\s*\|\s*(?P<group>[^()|]+?)\s*\)"
)


@dataclass(frozen=True)
class ClusterColumn:
    """A column's shrunk mean in each cluster of a factor, or its deviation from that mean.

    >>> ClusterColumn("within", "exper", "id").name
    'within(exper | id)'
    """

    kind: Literal["within", "between"]
    column: str
    factor: str
    level: str | None = None  # of a categorical column: the column is that level's indicator
    categorical: bool = False  # whether the column stood in factor()

    @property
    def source(self) -> str:
        """Name of the column whose mean is taken, such as ``sex[T.m]``."""
        return self.column if self.level is None else f"{self.column}[T.{self.level}]"

    @property
    def name(self) -> str:
        """Name of the feature."""
        return f"{self.kind}({self.source} | {self.factor})"


def without_calls(text: str) -> tuple[str, tuple[ClusterColumn, ...]]:
    """The text with the name of a column, in backticks, in place of each call, and these columns.

    ``between(x | a/b)`` is ``between(x | a) + between(x | a:b)``; ``within(x | a/b)`` is the
    deviation from the mean of the cell of a:b.

    >>> without_calls("within(exper | id) + ed")[0]
    '`within(exper | id)` + ed'
    """
    columns = list[ClusterColumn]()

    def stand_in(match: re.Match[str]) -> str:
        path = [name.strip().strip("`") for name in match["group"].split("/")]
        cells = [":".join(path[: place + 1]) for place in range(len(path))]
        name = (match["factor"] or match["plain"]).strip("`")
        made = [
            ClusterColumn(match[1], name, re.sub(r"\s*:\s*", ":", cell).replace("`", ""))  # type: ignore[arg-type]
            for cell in (cells if match[1] == "between" else cells[-1:])
        ]
        columns.extend(replace(c, categorical=match["factor"] is not None) for c in made)
        names = " + ".join(f"`{column.name}`" for column in made)
        return f"({names})" if len(made) > 1 else names

    return _CALL.sub(stand_in, text), tuple(dict.fromkeys(columns))


def is_call(text: str) -> bool:
    """Whether a text is a single ``within(x | g)`` or ``between(x | g)``.

    >>> is_call("within(exper | id)"), is_call("exper")
    (True, False)
    """
    return _CALL.fullmatch(text.strip()) is not None


def expanded(
    columns: Iterable[ClusterColumn], levels: Mapping[str, pd.Index]
) -> dict[str, tuple[ClusterColumn, ...]]:
    """By name as written, the columns: of a categorical column one per level but the first."""
    return {
        column.name: tuple(replace(column, level=str(level)) for level in levels[column.column][1:])
        if column.column in levels
        else (column,)
        for column in columns
    }


def _values(
    columns: Iterable[str],
    made: Iterable[ClusterColumn],
    levels: Mapping[str, pd.Index],
    table: pd.DataFrame,
) -> Float[np.ndarray, "rows columns"]:
    """The columns, given by their `ClusterColumn.source`, whose means are taken."""
    by_source = {column.source: column for column in made}
    values = list[np.ndarray]()
    for source in columns:
        name, level = by_source[source].column, by_source[source].level
        if level is None:
            values.append(as_numbers(table[name], "feature"))
        else:
            codes = known_codes(table[name], levels[name], f"feature {name!r}")
            values.append((codes == [*map(str, levels[name])].index(level)).astype(float))
    return np.column_stack(values)


def cluster_sums(
    made: Iterable[ClusterColumn],
    levels: Mapping[str, pd.Index],
    table: pd.DataFrame,
    groupings: Mapping[str, Grouping],
    weights: str | None = None,
    like: Mapping[str, ClusterSums] | None = None,
) -> dict[str, ClusterSums]:
    """By factor, the sums over these rows of the columns whose means are taken.

    `weights` is a column of frequencies. Sums that are to be added have the origins of `like`.
    """
    made, sums = tuple(made), dict[str, ClusterSums]()
    frequencies = as_numbers(table[weights], "weights") if weights in table else None
    for factor in dict.fromkeys(column.factor for column in made):
        values = _values(sources(made, factor), made, levels, table)
        origin = None if not like else like[factor].origin
        grouping = grouping_by(groupings, factor)
        sums[factor] = ClusterSums.of(values, grouping, frequencies, origin)
    return sums


def sources(made: Iterable[ClusterColumn], factor: str) -> tuple[str, ...]:
    """Names of the columns whose means by a factor are taken, each once."""
    return tuple(dict.fromkeys(c.source for c in made if c.factor == factor))


def with_cluster_columns(
    made: Iterable[ClusterColumn],
    levels: Mapping[str, pd.Index],
    table: pd.DataFrame,
    groupings: Mapping[str, Grouping],
    means: Mapping[str, ClusterMeans],
    weights: str | None = None,
) -> pd.DataFrame:
    """The table with the columns x - m_g and m_g; see `armed_pyro.data.cluster_means`."""
    made, columns = tuple(made), dict[str, np.ndarray]()
    frequencies = as_numbers(table[weights], "weights") if weights in table else None
    for factor, known in means.items():
        x = _values(known.columns, made, levels, table)
        m = known.at(x, grouping_by(groupings, factor), frequencies)
        for column in made:
            if column.factor == factor:
                place = known.columns.index(column.source)
                between = column.kind == "between"
                columns[column.name] = m[:, place] if between else x[:, place] - m[:, place]
    return table.assign(**columns)
