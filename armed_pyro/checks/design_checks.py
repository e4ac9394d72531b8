"""Checks of the design: columns that determine each other, and columns that separate outcomes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from jaxtyping import Float
from scipy.linalg import solve_triangular
from torch import Tensor

from armed_pyro.checks.check import Check, Word
from armed_pyro.inference.posterior import Posterior

__all__ = ["dependencies", "design_checks", "separating"]


MOST_ROWS = 50_000
# Share of a column's variance that other columns do not determine: below the first it is rounding,
# below the second a coefficient has a standard error 100 times that of orthogonal columns.
ROUNDING, NEARLY = 1e-10, 1e-4
MOST_TERMS = 3  # in the text of a dependency
MOST_VALUES = 200_000  # of a linear program: distinct rows times columns

Columns = Float[np.ndarray, "rows columns"]


def design_checks(posterior: Posterior, latents: Mapping[str, Tensor]) -> Iterator[Check]:
    """Checks of the features of a linear model: rank, and separation of discrete outcomes.

    Coefficients inside a network are not interpreted one by one, so that only linear models are
    checked.
    """
    model, facts = posterior.model, posterior.model.data_facts()
    # Columns that the fit dropped have no coefficients.
    names = tuple(facts.feature_names[place] for place in facts.kept)
    if not model.linear or not names:
        return
    chosen = np.random.default_rng(0).permutation(posterior.data.n_rows)[:MOST_ROWS]
    rows = model.encode(posterior.data.take(np.sort(chosen))).all()
    x = rows.x.double().cpu().numpy()[:, facts.kept]
    intercept = model.has_intercept
    yield _rank(posterior, x, names, intercept)
    sides = _sides(posterior, rows.outcome().double().cpu().numpy(), rows.trials)
    if sides is not None:
        yield _separation(x, sides, names, intercept)


# --- rank -------------------------------------------------------------------------------------


def _rank(posterior: Posterior, x: Columns, names: tuple[str, ...], intercept: bool) -> Check:
    facts = posterior.model.data_facts()
    verdict: Word
    mean = tuple(facts.feature_mean[place] for place in facts.kept)
    scale = tuple(facts.feature_scale[place] for place in facts.kept)
    found = dependencies(x, names, mean, scale, intercept)
    least = min(found.values(), default=1.0)
    if x.shape[1] + intercept > len(x):
        columns = f"{x.shape[1]} columns exceed {len(x)} rows"
        reason = (
            f"{columns}, so that their coefficients are partly their prior (rank of the design)"
        )
        advice = "leave columns out, or interpret predictions, not coefficients"
        verdict = "warn"
    elif found:
        verdict = "fail" if least <= ROUNDING else "warn"
        listed = "; ".join(list(found)[:MOST_TERMS]) + ("; ..." if len(found) > MOST_TERMS else "")
        kind = "are" if least <= ROUNDING else "are nearly"
        reason = (
            f"columns {kind} determined by others: {listed}; only the prior divides their effect "
            "among the coefficients (rank of the design)"
        )
        advice = "leave one of the columns out of each"
    else:
        verdict, reason, advice = "pass", "no column is determined by the others", ""
        if facts.dropped:
            reason += f"; those that were have been dropped: {', '.join(facts.dropped)}"
    return Check(
        "model",
        "collinear columns",
        verdict,
        reason,
        1 - least,
        "share of a column's variance that the other columns determine",
        1 - NEARLY,
        advice=advice,
        is_misfit=False,
    )


def dependencies(
    x: Columns,
    names: tuple[str, ...],
    mean: tuple[float, ...] = (),
    scale: tuple[float, ...] = (),
    intercept: bool = True,
) -> dict[str, float]:
    """Columns that are sums of others, as text, with the share of variance that is left.

    Parameters
    ----------
    x : Float[ndarray, "rows columns"]
        Columns, standardised.
    names : tuple of str
        Their names.
    mean, scale : tuple of float
        Means and scales by which they were standardised; the text is about the original columns.
    intercept : bool
        Whether a constant is among the columns.

    Examples
    --------
    >>> a = np.array([[0.0], [1.0], [5.0], [2.0]])
    >>> dependencies(np.hstack([a, 2 * a + 3]), ("a", "b"))
    {'b = 2 a + 3': 0.0}
    """
    scales = np.asarray(scale) if scale else np.ones(x.shape[1])
    means = np.asarray(mean) if mean else np.zeros(x.shape[1])
    center = x.mean(0) if intercept else np.zeros(x.shape[1])
    centred = x - center
    size = np.linalg.norm(centred, axis=0)
    unit = centred / np.where(size > 0, size, 1.0)
    found: dict[str, float] = {}
    kept = list[int]()
    # Cholesky factor of the kept columns' products, row by row; sums of squares take much longer.
    products, factor = unit.T @ unit, np.zeros((x.shape[1], x.shape[1]))
    for place in range(x.shape[1]):  # earlier columns are kept, as in lme4
        root = factor[: len(kept), : len(kept)]
        row = np.zeros(0)
        if kept:
            row = solve_triangular(root, products[kept, place], lower=True)
        left = float(products[place, place] - row @ row)
        if size[place] <= 1e-12 * (1 + np.abs(x[:, place]).max()):
            row, left = np.zeros_like(row), 0.0
        if left > NEARLY:
            factor[len(kept), : len(kept)], factor[len(kept), len(kept)] = row, left**0.5
            kept.append(place)
            continue
        weights = solve_triangular(root, row, lower=True, trans="T") if kept else row
        # Coefficients on the original scale, and the constant.
        slopes = weights * size[place] / size[kept]
        slopes = slopes * scales[place] / scales[kept]
        origin = means + scales * center
        constant = origin[place] - slopes @ origin[kept]
        text = _equation(names, place, kept, slopes, constant if intercept else 0.0)
        found[text] = 0.0 if left <= ROUNDING else left
    return found


def _equation(
    names: tuple[str, ...], place: int, kept: list[int], slopes: np.ndarray, constant: float
) -> str:
    """``b = 2 a + 3``, or the names alone if many columns are involved."""
    largest = float(np.abs(slopes).max(initial=0.0))
    used = [(names[k], s) for k, s in zip(kept, slopes, strict=False) if abs(s) > 1e-6 * largest]
    if not used:
        return f"{names[place]} is constant"
    if len(used) > MOST_TERMS:
        others = ", ".join(name for name, _ in used[:MOST_TERMS])
        return f"{names[place]} by {others} and {len(used) - MOST_TERMS} more"
    text = ""
    for name, slope in used:
        sign = "-" if slope < 0 else "+" if text else ""
        factor = "" if abs(abs(slope) - 1) < 1e-5 else f"{abs(slope):.4g} "
        text += f" {sign} {factor}{name}" if text else f"{sign}{factor}{name}"
    if abs(constant) > 1e-5 * (1 + largest):
        text += f" {'-' if constant < 0 else '+'} {abs(constant):.4g}"
    return f"{names[place]} = {text}"


# --- separation -------------------------------------------------------------------------------


def _sides(
    posterior: Posterior, y: Float[np.ndarray, " rows"], trials: Tensor | None
) -> Float[np.ndarray, " rows"] | None:
    """1 at the largest possible outcome, -1 at the smallest, 0 between; None if continuous."""
    family = posterior.model.family
    if not family.integer or family.has_class_probabilities:
        return None
    most = np.full(len(y), np.inf)
    if family.is_class:
        most = np.ones(len(y))
    elif trials is not None:
        most = trials.double().cpu().numpy()
    return np.where(y <= 0, -1.0, np.where(y >= most, 1.0, 0.0))


def _separation(
    x: Columns, sides: Float[np.ndarray, " rows"], names: tuple[str, ...], intercept: bool
) -> Check:
    columns = separating(x, sides, intercept)
    name = "separation"
    if columns is None:
        return Check("model", name, "not checked", "there are too many rows and columns to search")
    if not columns:
        return Check("model", name, "pass", "no column separates the outcomes", is_misfit=False)
    listed = ", ".join(names[place] for place in columns[:MOST_TERMS])
    more = ", ..." if len(columns) > MOST_TERMS else ""
    reason = (
        f"{listed}{more} separates the outcomes: without a prior the estimate would be infinite, "
        "so that its size is the prior's (complete or quasi-complete separation)"
    )
    advice = "report its sign, not its size; merge levels, or give a prior that you can justify"
    return Check("model", name, "warn", reason, advice=advice, is_misfit=False)


def separating(
    x: Columns, sides: Float[np.ndarray, " rows"], intercept: bool = True
) -> list[int] | None:
    """Places of the columns along which the likelihood has no maximum; None if not computed.

    A direction b separates if side * (x b) >= 0 in all rows, with equality in rows whose outcome is
    neither the largest nor the smallest possible, and > 0 in one row (Konis 2007).

    Examples
    --------
    >>> x = np.array([[0.0], [0.0], [0.0], [1.0], [1.0]])
    >>> separating(x, np.array([1.0, -1.0, 1.0, 1.0, 1.0]))
    [0]
    >>> separating(x, np.array([1.0, -1.0, 1.0, -1.0, 1.0]))
    []
    """
    design = np.column_stack([np.ones(len(x)), x]) if intercept else x
    from scipy.optimize import linprog  # slow to import, and rarely needed

    whole = np.unique(np.column_stack([sides, design]), axis=0)
    if whole.size > MOST_VALUES:
        return None
    side, design = whole[:, 0], whole[:, 1:]
    one_sided = side[:, None] * design
    inside = design[side == 0]
    bound = one_sided[side != 0]
    if not len(bound):
        return []
    result = linprog(
        -bound.sum(0),
        A_ub=-bound,
        b_ub=np.zeros(len(bound)),
        A_eq=inside if len(inside) else None,
        b_eq=np.zeros(len(inside)) if len(inside) else None,
        bounds=(-1, 1),
        method="highs",
    )
    if result.status != 0 or -result.fun < 1e-7:
        return []
    direction = np.abs(result.x[int(intercept) :])
    return [int(place) for place in np.flatnonzero(direction > 1e-6)]
