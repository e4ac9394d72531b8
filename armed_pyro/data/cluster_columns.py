"""Columns ``within(x | g)`` and ``between(x | g)`` of formulas."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Float

from armed_pyro.data.cluster_means import ClusterMeans, ClusterSums
from armed_pyro.data.columns import as_numbers, known_codes
from armed_pyro.data.formula_syntax import Call, Name, Node, Operation, parse, text_of
from armed_pyro.data.grouping import Grouping, grouping_by

__all__ = [
    "ClusterColumn",
    "cluster_sums",
    "expanded",
    "factor_path",
    "is_call",
    "read_call",
    "with_cluster_columns",
]


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


def read_call(call: Call, what: str) -> tuple[ClusterColumn, ...]:
    """The columns of ``within(x | g)`` or ``between(x | g)``; `what` names the formula.

    ``between(x | a/b)`` is ``between(x | a) + between(x | a:b)``; ``within(x | a/b)`` is the
    deviation from the mean of the cell of a:b.

    >>> [c.name for c in read_call(parse("between(exper | school/class)"), "features")]
    ['between(exper | school)', 'between(exper | school:class)']
    """
    usage = f"{call.function}(x | g) takes a single column x and a grouping factor g"
    inside = call.arguments[0] if len(call.arguments) == 1 and not call.options else None
    if not isinstance(inside, Operation) or inside.symbol != "|":
        raise ValueError(f"{what}: {usage}; found {text_of(call)}.")
    column, categorical = inside.left, False
    if isinstance(column, Call) and column.function == "factor" and len(column.arguments) == 1:
        column, categorical = column.arguments[0], True
    if not isinstance(column, Name):
        raise ValueError(f"{what}: {usage}; found {text_of(call)}. Compute the column first.")
    cells = factor_path(inside.right)
    if cells is None:
        raise ValueError(f"{what}: {usage}, such as a, a:b or a/b; found {text_of(call)}.")
    kind: Literal["within", "between"] = "between" if call.function == "between" else "within"
    return tuple(
        ClusterColumn(kind, column.name, cell, categorical=categorical)
        for cell in (cells if kind == "between" else cells[-1:])
    )


def factor_path(node: Node) -> tuple[str, ...] | None:
    """Grouping factors of ``a``, ``a:b``, or ``a/b``, which is a and a:b; None for other trees.

    >>> factor_path(parse("a/b:c"))
    ('a', 'a:b:c')
    """
    match node:
        case Name(name) if name != ".":
            return (name,)
        case Operation("/" | ":" as symbol, left, right):
            outer, inner = factor_path(left), factor_path(right)
            if outer is None or inner is None or len(inner) > 1:
                return None
            if symbol == ":" and len(outer) > 1:
                return None
            cell = f"{outer[-1]}:{inner[0]}"
            return (*outer, cell) if symbol == "/" else (cell,)
    return None


def is_call(text: str) -> bool:
    """Whether a text is a single ``within(x | g)`` or ``between(x | g)``.

    >>> is_call("within(exper | id)"), is_call("exper")
    (True, False)
    """
    if not text.strip().startswith(("within(", "between(")):
        return False
    try:
        call = parse(text)
        return isinstance(call, Call) and bool(read_call(call, "call"))
    except ValueError:
        return False


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
