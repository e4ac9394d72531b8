"""Names and labels of variables in the form that ArviZ and xarray accept."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Shaped

# Dimensions of ArviZ's schema and variables of constant_data: other variables must not take these
# names.
RESERVED = (
    *("chain", "draw", "sample", "row", "feature", "features", "trials", "offset", "weights"),
    *("slopes", "slope_column"),
)


@dataclass(frozen=True)
class FactorNames:
    """Names of a grouping factor's dimensions (of clusters and terms) and variables in a tree."""

    cluster: str
    term: str
    term_bis: str
    effect: str
    sd: str
    cor: str
    mode: str


def free_name(name: str, taken: Collection[str]) -> str:
    """The name, followed by ``_`` as often as needed until it is not taken.

    >>> free_name("draw", ["draw", "draw_"]), free_name("site", [])
    ('draw__', 'site')
    """
    while name in taken:
        name += "_"
    return name


def unique_names(names: Iterable[str], taken: Iterable[str] = ()) -> dict[str, str]:
    """A distinct name for each name, without ``/`` and neither reserved nor taken.

    >>> unique_names(["a/b", "a_b", "row"])
    {'a/b': 'a_b', 'a_b': 'a_b_', 'row': 'row_'}
    """
    used, unique = {*RESERVED, *taken}, dict[str, str]()
    for name in names:
        unique[name] = free_name(_path_free(name), used)
        used.add(unique[name])
    return unique


def factor_names(labels: Mapping[str, str], taken: Iterable[str] = ()) -> dict[str, FactorNames]:
    """By grouping factor, the names of its dimensions and variables, from the labels of its sites.

    >>> names = factor_names({"gen": "gen", "gen_term": "gen_term"})
    >>> names["gen"].term, names["gen_term"].cluster, names["gen"].effect
    ('gen_term_', 'gen_term', 'gen_effect')
    """
    clusters = unique_names(labels, taken)
    kinds = ("term", "term_bis", "effect", "sd", "cor", "mode")
    derived = [f"{label}_{kind}" for label in labels.values() for kind in kinds]
    made = unique_names(derived, {*taken, *clusters.values()})
    return {
        factor: FactorNames(clusters[factor], *(made[f"{label}_{kind}"] for kind in kinds))
        for factor, label in labels.items()
    }


def variable_name(name: str) -> str:
    """A column's name as a variable's name: without ``/``, and not one of the reserved names.

    >>> variable_name("km/h"), variable_name("draw"), variable_name("a:b")
    ('km_h', 'draw_', 'a:b')
    """
    return free_name(_path_free(name), RESERVED)


def _path_free(name: str) -> str:
    """The name as that of an HDF5 object: no path, and not a path's ``.``."""
    return name.replace("/", "_") if name.strip(".") else f"_{name}"


def label_values(labels: pd.Index) -> Shaped[np.ndarray, " labels"]:
    """Labels in NetCDF's types: numbers, booleans, text and timestamps; other types as text.

    Distinct labels stay distinct.

    >>> label_values(pd.Index([1, "b"], dtype=object)).tolist()
    ['1', 'b']
    """
    if isinstance(labels, pd.DatetimeIndex) and labels.tz is None:
        return labels.to_numpy()
    values = [v.item() if isinstance(v, np.generic) else v for v in labels.tolist()]
    kinds = {type(value) for value in values}
    if not values or (len(kinds) == 1 and kinds <= {bool, int, float, str}):
        return np.asarray(values, dtype=None if values else np.str_)
    text = [str(value) for value in values]
    # 1 and "1" look the same; their representations do not.
    return np.asarray(text if len(set(text)) == labels.nunique() else list(map(repr, values)))
