"""The penalised part of a smooth term ``s(x)``: a spline's departure from a straight line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import numpy as np
import scipy
from jaxtyping import Float

from armed_pyro._messages import listing
from armed_pyro.data.column_transforms import Column, Columns, Learned, Settings, Transform
from armed_pyro.data.formula_syntax import Call, Name, text_of

__all__ = ["PenalisedSpline", "cardinal", "check_features", "roughness_root"]

FEWEST_KNOTS = 3


@final
@dataclass(frozen=True)
class PenalisedSpline(Transform):
    r"""Columns z with :math:`f(x) = \beta_0 + \beta_1 x + z(x)^\top u`, a natural cubic spline.

    .. math:: \int f''(t)^2 \, dt = c^2 u^\top u

    so that independent u ~ N(0, sd^2) are the penalty of a smoothing spline with k knots, at
    quantiles of the distinct values of the training rows. The columns are orthogonal to 1 and x
    over the training rows, which makes :math:`\beta_1` the trend of the whole curve, and c scales
    them to a mean square of :math:`z^\top z` of 1: sd is that of the curve about its line.

    References
    ----------
    Wood (2017), Generalized Additive Models, sections 5.3.1 and 5.8. Ruppert, Wand, Carroll (2003),
    Semiparametric Regression, chapter 4.
    """

    parameters: ClassVar[Mapping[str, Any]] = {"k": 10, "knots": None}

    def settings(self, call: Call, what: str) -> dict[str, Any]:
        if not call.arguments or not isinstance(call.arguments[0], Name):
            raise ValueError(
                f"{what}: {text_of(call)} must be of a column, such as s(x) or s(x, k=20). Compute "
                "other variables first."
            )
        return super().settings(call, what)

    def check(self, settings: Settings, what: str) -> None:
        size = settings["k"] if settings["knots"] is None else len(settings["knots"])
        if size < FEWEST_KNOTS:
            raise ValueError(f"{what}: s() needs at least {FEWEST_KNOTS} knots, found {size}.")

    def learn(self, x: Column, settings: Settings, what: str) -> Learned:
        distinct = np.unique(x)
        knots = settings["knots"]
        if knots is None:
            if len(distinct) < settings["k"]:
                raise ValueError(
                    f"{what}: the training rows have {len(distinct)} distinct values, fewer than "
                    f"the {settings['k']} knots. Write s(..., k={max(len(distinct), 3)}) or less."
                )
            knots = np.quantile(distinct, np.linspace(0, 1, settings["k"])).tolist()
        if outside := [knot for knot in knots if not distinct[0] <= knot <= distinct[-1]]:
            raise ValueError(
                f"{what}: the knots {listing(outside)} are outside the range of the training rows, "
                f"{distinct[0]:g} to {distinct[-1]:g}."
            )
        if len(set(knots)) < len(knots):
            raise ValueError(f"{what}: the knots {listing(knots)} are not distinct.")
        return {"knots": knots, "map": _map(x, np.asarray(knots)).ravel().tolist()}

    def columns(self, x: Column, settings: Settings, learned: Learned) -> Columns:
        knots = np.asarray(learned["knots"])
        return cardinal(x, knots) @ np.asarray(learned["map"]).reshape(len(knots), -1)


def check_features(calls: Iterable[str]) -> None:
    """Raise ValueError for a smooth term among the features, whose penalty would be lost."""
    for call in calls:
        if call.startswith("s("):
            raise ValueError(
                f"features have the smooth term {call}, which is a random effect: write it in the "
                "formula of armed_pyro.model, in a sum of terms, or among random=[...] with "
                f"features of its column and slopes={call!r}. ns() and bs() are curves without a "
                "penalty."
            )


def cardinal(x: Column, knots: Float[np.ndarray, " k"]) -> Float[np.ndarray, "rows k"]:
    """Natural cubic splines that are 1 at one knot and 0 at the others; straight outside.

    >>> cardinal(np.array([0.0, 1.0]), np.array([0.0, 1.0, 2.0])).round(3)
    array([[1., 0., 0.],
           [0., 1., 0.]])
    """
    spline = scipy.interpolate.CubicSpline(knots, np.eye(len(knots)), bc_type="natural")
    inside = np.clip(x, knots[0], knots[-1])
    ends = np.where(x < knots[0], knots[0], knots[-1])
    beyond = (x - inside)[:, None] * spline(ends, 1)
    return np.asarray(spline(inside) + beyond)


def roughness_root(knots: Float[np.ndarray, " k"]) -> Float[np.ndarray, "k-2 k"]:
    """R with |R b|^2 the integral of the squared second derivative of the spline through b.

    It is B^(-1/2) D of Wood (2017), table 5.1.
    """
    h, size = np.diff(knots), len(knots) - 2
    rows = np.arange(size)
    second = np.zeros((size, len(knots)))
    second[rows, rows], second[rows, rows + 2] = 1 / h[:-1], 1 / h[1:]
    second[rows, rows + 1] = -1 / h[:-1] - 1 / h[1:]
    band = np.diag((h[:-1] + h[1:]) / 3)
    band[rows[1:], rows[:-1]] = band[rows[:-1], rows[1:]] = h[1:-1] / 6
    return np.asarray(np.linalg.solve(np.linalg.cholesky(band), second))


def _map(x: Column, knots: Float[np.ndarray, " k"]) -> Float[np.ndarray, "k k-2"]:
    """Takes u to the spline's values at the knots."""
    root = roughness_root(knots)
    values = np.linalg.pinv(root)
    line = np.column_stack([np.ones(len(x)), x - x.mean()])
    trend = np.linalg.lstsq(line, cardinal(x, knots) @ values, rcond=None)[0]
    values = values - np.column_stack([np.ones(len(knots)), knots - x.mean()]) @ trend
    size = np.square(cardinal(x, knots) @ values).sum(1).mean()
    return np.asarray(values / np.sqrt(size))
