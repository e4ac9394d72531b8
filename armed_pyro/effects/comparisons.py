"""Change of the expected outcome with a variable: comparisons of two values, and slopes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any, Literal

import numpy as np
import pandas as pd

from armed_pyro._messages import check_known, check_probability
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.effects.averages import ByRow, Groups, averaged, labelled, title_of
from armed_pyro.effects.expectation import Expectation, Scale, Unseen
from armed_pyro.effects.grid import At, Grid, Rest, levels_of, make_grid, variable_kind
from armed_pyro.effects.network_jackknife import NetworkUncertainty
from armed_pyro.effects.predictions import names_of
from armed_pyro.effects.result import Effects, Measure, compared, contrast_text
from armed_pyro.inference.posterior import Posterior

__all__ = ["comparisons", "slopes"]

Elasticity = Literal["dydx", "eyex", "eydx", "dyex"]
SLOPES: Mapping[str, str] = {
    "dydx": "Average slopes",
    "eyex": "Average elasticities",
    "eydx": "Average semi-elasticities d log E[y] / dx",
    "dyex": "Average semi-elasticities dy / d log x",
}
NUMERIC = ("sd", "2sd", "iqr", "minmax")
CATEGORICAL = ("reference", "pairwise", "sequential")
# Half width of the difference quotient, in sds of the variable. In double precision its error is
# about 1e-8 of the third derivative, and rounding about 1e-12 of the outcome.
STEP = 1e-4


@dataclass(frozen=True, eq=False)
class _Change:
    """Two values of a variable in every row, and the names of these values."""

    low: Any
    high: Any
    low_name: object
    high_name: object


def comparisons(
    posterior: Posterior,
    variable: str,
    contrast: float | str | Sequence[Any] | None = None,
    *,
    measure: Measure = "difference",
    at: At | None = None,
    by: str | Sequence[str] | None = None,
    rest: Rest = "observed",
    average: bool = True,
    data: ClusteredData | pd.DataFrame | None = None,
    unseen: Unseen = "population",
    scale: Scale = "response",
    draws: int = 1000,
    prob: float = 0.9,
    seed: int | None = None,
    network_uncertainty: NetworkUncertainty = "none",
) -> Effects:
    r"""Expected outcomes at two values of a variable, compared, all else as it is in each row.

    .. math:: \bar y(v) = \frac{1}{n} \sum_i E[y \mid x_i, variable = v, \theta_d], \quad
        \text{difference} = \bar y(high) - \bar y(low)

    Ratios and odds ratios are those of the averages, as of standardised risks; of single rows
    (``average=False``), those of each row.

    Parameters
    ----------
    variable : str
        A variable of the table.
    contrast : number, str or pair, optional
        Of numbers: an increase from each row's own value (by default 1); two values, low and high;
        "sd" or "2sd", that many sds around the mean; "iqr", between the quartiles; "minmax". Of
        categories: each level with the first ("reference", the default), all pairs ("pairwise"),
        neighbours ("sequential"), or two levels. Of columns with 0 and 1, 1 with 0.
    measure : {"difference", "ratio", "odds_ratio"}
        How the two are compared.
    at, by, rest, average, data, unseen, scale, draws, prob, seed, network_uncertainty
        As in `armed_pyro.effects.predictions.predictions`. ``rest="mean"`` compares at the typical
        row (marginal effect at the mean), ``at={...}`` at representative values.

    Returns
    -------
    Effects
        One quantity for each contrast, and each value of `at` and `by`.

    Raises
    ------
    ValueError
        As in `predictions`, and if there is no such contrast of the variable.

    References
    ----------
    Arel-Bundock, Greifer, Heiss (2024), Journal of Statistical Software 111(9).

    Examples
    --------
    ``fit.comparisons("dose", "pairwise", measure="odds_ratio", unseen="marginal")``
    """
    check_probability(prob)
    columns = names_of(by)
    grid = make_grid(posterior, data, at, rest, columns)
    whole = grid if rest == "observed" and not at else make_grid(posterior, data)
    expectation = Expectation.of(grid, unseen, scale, draws, seed, network_uncertainty)
    groups = Groups.of(grid, columns, average=average)
    labels, by_draw = list[pd.DataFrame](), list[np.ndarray]()
    known: dict[str, np.ndarray] = {}

    def level(value: Any) -> np.ndarray:
        """Averages at a value of the variable, each computed once."""
        key = repr(value) if np.ndim(value) == 0 else f"rows {id(value)}"
        if key not in known:
            known[key] = averaged(expectation, [grid.encode({variable: value})], groups)
        return known[key]

    changes = list(_changes(whole, grid, variable, contrast))
    for change in changes:
        values = compared(level(change.high), level(change.low), measure)
        text = contrast_text(change.high_name, change.low_name, measure)
        names = {"term": variable, "contrast": text}
        part, drawn = labelled(groups, expectation.labels, values, **names)
        labels.append(part)
        by_draw.append(drawn)
    what = {"difference": "differences", "ratio": "ratios", "odds_ratio": "odds ratios"}[measure]
    title = f"Average {what}" if average else what.capitalize()
    return Effects(
        pd.concat(labels, ignore_index=True),
        np.column_stack(by_draw),
        title_of(title, expectation),
        prob,
        note=expectation.note,
    )


def slopes(
    posterior: Posterior,
    variable: str,
    kind: Elasticity = "dydx",
    *,
    at: At | None = None,
    by: str | Sequence[str] | None = None,
    rest: Rest = "observed",
    average: bool = True,
    data: ClusteredData | pd.DataFrame | None = None,
    unseen: Unseen = "population",
    scale: Scale = "response",
    draws: int = 1000,
    prob: float = 0.9,
    seed: int | None = None,
    network_uncertainty: NetworkUncertainty = "none",
) -> Effects:
    r"""Derivative of the expected outcome in a numeric variable, through links and networks.

    .. math:: \frac{1}{n} \sum_i \frac{\partial E[y \mid x_i, \theta_d]}{\partial x_{ij}}

    The derivative is a central difference in double precision, with the network evaluated in it,
    too; products with other columns move along.

    Parameters
    ----------
    variable : str
        A numeric variable of the table.
    kind : {"dydx", "eyex", "eydx", "dyex"}
        The derivative; or, as averages over rows, d log E[y] / d log x, d log E[y] / dx, and
        dE[y] / d log x.
    at, by, rest, average, data, unseen, scale, draws, prob, seed, network_uncertainty
        As in `armed_pyro.effects.predictions.predictions`. ``rest="mean"`` is the marginal effect
        at the mean.

    Raises
    ------
    ValueError
        As in `predictions`, and if the variable is categorical.

    Examples
    --------
    ``fit.slopes("age", by="sex")``
    """
    check_probability(prob)
    check_known("kind of slope", [kind], SLOPES)
    columns = names_of(by)
    grid = make_grid(posterior, data, at, rest, columns)
    if variable_kind(grid, variable) == "category":
        raise ValueError(
            f"{variable!r} is categorical and has no slope: use comparisons({variable!r})"
        )
    expectation = Expectation.of(grid, unseen, scale, draws, seed, network_uncertainty).precise()
    groups = Groups.of(grid, columns, average=average)
    x = grid.column(variable).to_numpy(dtype=np.float64)
    whole = grid if rest == "observed" and not at else make_grid(posterior, data)
    step = STEP * (float(whole.column(variable).astype(float).std(ddof=0)) or 1.0)
    # The step as it is after rounding, which matters for values far from zero.
    high, low = x + step, x - step
    at_values = [grid.encode({variable: value}) for value in (high, low, x)]
    place = 0

    def unit(above: ByRow, below: ByRow, here: ByRow) -> ByRow:
        nonlocal place
        rows = slice(place, place := place + here.shape[1])
        slope = (above - below) / (high - low)[rows, None]
        slope = slope * x[rows, None] if kind in ("eyex", "dyex") else slope
        return slope / here if kind in ("eyex", "eydx") else slope

    values = averaged(expectation, at_values, groups, unit)
    labels, by_draw = labelled(groups, expectation.labels, values, term=variable, contrast=kind)
    title = SLOPES[kind] if average else SLOPES[kind].removeprefix("Average ").capitalize()
    return Effects(labels, by_draw, title_of(title, expectation), prob, note=expectation.note)


def _changes(
    whole: Grid, grid: Grid, variable: str, contrast: float | str | Sequence[Any] | None
) -> Iterator[_Change]:
    """The pairs of values that are compared; `whole` are the rows before values were chosen."""
    kind = variable_kind(whole, variable)
    if contrast is not None and not isinstance(contrast, str | float | int | np.number):
        pair = list(contrast)
        if len(pair) != 2:
            raise ValueError(f"contrast={contrast!r} must have two values, low and high")
        yield _Change(pair[0], pair[1], pair[0], pair[1])
    elif kind == "category":
        yield from _of_levels(levels_of(whole, variable), variable, contrast)
    elif kind == "binary" and contrast is None:
        yield _Change(0, 1, 0, 1)
    else:
        yield _of_numbers(whole, grid, variable, 1 if contrast is None else contrast)


def _of_levels(levels: list[Any], variable: str, contrast: object) -> Iterator[_Change]:
    """Pairs of levels of a categorical variable."""
    contrast = "reference" if contrast is None else contrast
    if contrast not in CATEGORICAL:
        raise ValueError(
            f"contrast={contrast!r} is none of a categorical variable, as {variable!r} is: choose "
            f"one of {', '.join(CATEGORICAL)}, or two of its levels {levels!r}"
        )
    pairs: Mapping[str, Callable[[], Any]] = {
        "reference": lambda: ((levels[0], other) for other in levels[1:]),
        "pairwise": lambda: combinations(levels, 2),
        "sequential": lambda: pairwise(levels),
    }
    for low, high in pairs[str(contrast)]():
        yield _Change(low, high, low, high)


def _of_numbers(whole: Grid, grid: Grid, variable: str, contrast: float | str) -> _Change:
    """An increase of a numeric variable, or two values by its distribution over the rows."""
    if not isinstance(contrast, str):
        own = grid.column(variable).astype(float)
        name = f"{variable} + {contrast:g}" if contrast >= 0 else f"{variable} - {-contrast:g}"
        return _Change(own, own + float(contrast), variable, f"({name})")
    if contrast not in NUMERIC:
        raise ValueError(
            f"contrast={contrast!r} is none of a numeric variable, as {variable!r} is: choose a "
            f"number, two values, or one of {', '.join(NUMERIC)}"
        )
    values = whole.column(variable).to_numpy(dtype=np.float64)
    mean, sd = values.mean(), values.std(ddof=1)
    lower, upper = np.quantile(values, [0.25, 0.75])
    ends = {
        "sd": (mean - sd / 2, mean + sd / 2),
        "2sd": (mean - sd, mean + sd),
        "iqr": (lower, upper),
        "minmax": (values.min(), values.max()),
    }
    low, high = map(float, ends[contrast])
    return _Change(low, high, low, high)
