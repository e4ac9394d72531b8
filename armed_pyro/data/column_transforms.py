"""Transforms of a column that learn from the training rows: scaling, polynomials and splines.

The bases are formulaic's, which are those of R's ``poly`` and ``bs`` and of mgcv's ``cr`` and
``cc``. They keep their knots, means and norms when they are applied to new rows.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import numpy as np
from jaxtyping import Float

from armed_pyro._messages import listing
from armed_pyro.data.formula_syntax import Call, Items, Name, Node, Number, Sum, text_of

__all__ = [
    *("CubicSpline", "NaturalSpline", "PiecewisePolynomial", "Polynomial", "Standardised"),
    *("Learned", "Settings", "Transform"),
]

Column = Float[np.ndarray, " rows"]
Columns = Float[np.ndarray, "rows columns"]
Settings = Mapping[str, Any]
Learned = Mapping[str, list[float]]
MOST_COLUMNS = 100


@dataclass(frozen=True)
class Transform(ABC):
    """Columns made from a column, with a state that is learned once.

    `parameters` are the settings after the column and their defaults, in the order in which they
    may be written without a name; a default of None stands for "not set".
    """

    name: str
    parameters: ClassVar[Mapping[str, Any]]
    single: ClassVar[bool] = False  # whether there is always one column, called like the call

    def settings(self, call: Call, what: str) -> dict[str, Any]:
        """The settings of a call; ValueError for unknown ones, or values of another kind."""
        unnamed = call.arguments[1:]
        usage = f"{self.name}(x{''.join(f', {name}=' for name in self.parameters)})"
        if not call.arguments or len(unnamed) > len(self.parameters):
            raise ValueError(f"{what}: expected {usage}, found {text_of(call)}.")
        pairs = [*zip(self.parameters, unnamed, strict=False), *call.options]
        names = [name for name, _ in pairs]
        if wrong := [n for n in names if n not in self.parameters or names.count(n) > 1]:
            raise ValueError(f"{what}: {text_of(call)} has {wrong[0]!r}; expected {usage}.")
        values = dict(self.parameters)
        for name, node in pairs:
            values[name] = _setting(name, node, f"{what}: {text_of(call)}")
        self.check(values, f"{what}: {text_of(call)}")
        return values

    def check(self, settings: Settings, what: str) -> None:
        """Raise ValueError for settings that do not go together; by default, all do."""
        return

    @abstractmethod
    def learn(self, x: Column, settings: Settings, what: str) -> Learned:
        """What the transform keeps of the training rows."""

    @abstractmethod
    def columns(self, x: Column, settings: Settings, learned: Learned) -> Columns:
        """The columns of rows."""

    def recovered(self, columns: Columns, settings: Settings, learned: Learned) -> Column | None:
        """The column x behind its columns; None if it is no linear combination of them."""
        low, high = _range(learned)
        grid = np.linspace(low, high, 50)
        basis = np.column_stack([np.ones(50), self.columns(grid, settings, learned)])
        solved = np.linalg.lstsq(basis, grid, rcond=None)[0]
        if np.abs(basis @ solved - grid).max() > 1e-9 * (high - low):
            return None
        return np.asarray(solved[0] + columns @ solved[1:])


def _range(learned: Learned) -> tuple[float, float]:
    """A range in which the training rows have values, from what was learned of them."""
    if "knots" in learned:
        return min(learned["knots"]), max(learned["knots"])
    if "alpha" in learned:
        sd = float(np.sqrt(learned["norms2"][1] / learned["norms2"][0]))
        return learned["alpha"][0] - sd, learned["alpha"][0] + sd
    center, scale = learned.get("center", [0.0])[0], learned.get("scale", [1.0])[0]
    return center - scale, center + scale


def _setting(name: str, node: Node, what: str) -> Any:
    """The value of a setting: a whole number, a truth value, or a list of numbers."""
    if name in ("raw", "intercept"):
        words = {"True": True, "TRUE": True, "False": False, "FALSE": False}
        if isinstance(node, Name) and node.name in words:
            return words[node.name]
        raise ValueError(f"{what}: {name} must be True or False, found {text_of(node)}.")
    if name == "knots":
        items = node.items if isinstance(node, Items) else (node,)
        knots = [_number(item) for item in items]
        if not knots or any(knot is None for knot in knots):
            raise ValueError(
                f"{what}: knots must be numbers, such as [10, 20], found {text_of(node)}."
            )
        return sorted(float(knot) for knot in knots if knot is not None)
    number = _number(node)
    if number is None or not number.is_integer() or not 1 <= number <= MOST_COLUMNS:
        raise ValueError(
            f"{what}: {name} must be a whole number from 1 to {MOST_COLUMNS}, found "
            f"{text_of(node)}."
        )
    return int(number)


def _number(node: Node) -> float | None:
    """The number that a tree is; None for anything else."""
    if isinstance(node, Number):
        return node.value
    if isinstance(node, Sum) and len(node.parts) == 1 and isinstance(node.parts[0], Number):
        return node.signs[0] * node.parts[0].value
    return None


@final
@dataclass(frozen=True)
class Standardised(Transform):
    """x minus its mean, and with ``scale`` divided by its sd."""

    parameters: ClassVar[Mapping[str, Any]] = {}
    single: ClassVar[bool] = True

    def learn(self, x: Column, settings: Settings, what: str) -> Learned:
        if self.name == "center":
            return {"center": [float(x.mean())]}
        sd = float(x.std(ddof=1)) if len(x) > 1 else 0.0
        if not sd > 0:
            raise ValueError(f"{what}: the column is constant in the training rows.")
        return {"center": [float(x.mean())], "scale": [sd]}

    def columns(self, x: Column, settings: Settings, learned: Learned) -> Columns:
        values = (x - learned["center"][0]) / learned.get("scale", [1.0])[0]
        return np.asarray(values[:, None])


@final
@dataclass(frozen=True)
class Polynomial(Transform):
    """Orthogonal polynomials of the training rows, as R's ``poly``; or powers, with ``raw``."""

    parameters: ClassVar[Mapping[str, Any]] = {"degree": 1, "raw": False}

    def learn(self, x: Column, settings: Settings, what: str) -> Learned:
        from formulaic.transforms import poly  # slow to import

        degree = settings["degree"]
        _check_distinct(x, degree + 1, what)
        if settings["raw"]:
            return {}
        state: dict[str, dict[int, float]] = {}
        poly(x, degree, _state=state)
        return {
            "alpha": [float(state["alpha"][k]) for k in range(degree)],
            "norms2": [float(state["norms2"][k]) for k in range(degree + 1)],
        }

    def columns(self, x: Column, settings: Settings, learned: Learned) -> Columns:
        from formulaic.transforms import poly

        state = {name: dict(enumerate(values)) for name, values in learned.items()}
        values = poly(x, settings["degree"], raw=settings["raw"], _state=state)
        return np.asarray(getattr(values, "__wrapped__", values), dtype=np.float64)


@dataclass(frozen=True)
class _Spline(Transform, ABC):
    """A spline between boundary knots, the range of the training rows."""

    parameters: ClassVar[Mapping[str, Any]] = {"df": None, "knots": None}

    def check(self, settings: Settings, what: str) -> None:
        if (settings["df"] is None) == (settings["knots"] is None):
            raise ValueError(f"{what}: give either df or knots.")

    def check_inside(self, x: Column, knots: list[float], what: str) -> None:
        """Raise ValueError for knots outside the range of the training rows."""
        outside = [knot for knot in knots if not x.min() < knot < x.max()]
        if outside:
            raise ValueError(
                f"{what}: the knots {listing(outside)} are not inside the range of the training "
                f"rows, {x.min():g} to {x.max():g}."
            )


@final
@dataclass(frozen=True)
class PiecewisePolynomial(_Spline):
    """B-splines, as R's ``bs``; beyond the boundary knots the outer polynomials go on."""

    parameters: ClassVar[Mapping[str, Any]] = {"df": None, "knots": None, "degree": 3}

    def check(self, settings: Settings, what: str) -> None:
        super().check(settings, what)
        if settings["df"] is not None and settings["df"] < settings["degree"]:
            raise ValueError(
                f"{what}: df must be at least the degree, {settings['degree']}, found "
                f"{settings['df']}."
            )

    def learn(self, x: Column, settings: Settings, what: str) -> Learned:
        from formulaic.transforms import basis_spline

        _check_distinct(x, settings["degree"] + 1, what)
        self.check_inside(x, settings["knots"] or [], what)
        state: dict[str, Any] = {}
        basis_spline(x, **settings, _state=state)
        bounds = {name: [float(state[name])] for name in ("lower_bound", "upper_bound")}
        return {**bounds, "knots": [float(knot) for knot in state["knots"]]}

    def columns(self, x: Column, settings: Settings, learned: Learned) -> Columns:
        from formulaic.transforms import basis_spline

        low, high = learned["lower_bound"][0], learned["upper_bound"][0]
        margin = 0.001 * (high - low)  # of steps by which derivatives are taken
        if outside := int(((x < low - margin) | (x > high + margin)).sum()):
            warnings.warn(
                f"{outside} of {len(x)} values are outside the boundary knots of "
                f"{self.name}(), {low:g} to {high:g}: the outer polynomials are extrapolated",
                UserWarning,
                stacklevel=2,
            )
        state = {"lower_bound": low, "upper_bound": high, "knots": learned["knots"]}
        made = basis_spline(x, degree=settings["degree"], extrapolation="extend", _state=state)
        return np.column_stack(list(made.values()))


@final
@dataclass(frozen=True)
class CubicSpline(_Spline):
    """Centred cubic regression splines, as mgcv's ``cr``, and cyclic ones, as ``cc``.

    The `df` columns sum to zero over the training rows, so that an intercept can stand beside them.
    Natural splines are straight beyond the boundary knots.
    """

    cyclic: bool = False

    def check(self, settings: Settings, what: str) -> None:
        super().check(settings, what)
        fewest = 2 if self.cyclic else 1
        if settings["df"] is not None and settings["df"] < fewest:
            raise ValueError(f"{what}: df must be at least {fewest}, found {settings['df']}.")

    def learn(self, x: Column, settings: Settings, what: str) -> Learned:
        knots = settings["knots"]
        _check_distinct(x, (settings["df"] or len(knots)) + 2, what)
        self.check_inside(x, knots or [], what)
        state: dict[str, Any] = {}
        self._made(x, state, df=settings["df"], knots=knots, constraints="center")
        return {
            "lower_bound": [float(state["lower_bound"])],
            "upper_bound": [float(state["upper_bound"])],
            "knots": [float(knot) for knot in state["knots"]],
            "constraints": np.asarray(state["constraints"], dtype=float)[0].tolist(),
        }

    def columns(self, x: Column, settings: Settings, learned: Learned) -> Columns:
        state = {
            "lower_bound": learned["lower_bound"][0],
            "upper_bound": learned["upper_bound"][0],
            "knots": learned["knots"],
            "constraints": np.array([learned["constraints"]]),
            "cyclic": self.cyclic,
        }
        return self._made(x, state)

    def _made(self, x: Column, state: dict[str, Any], **settings: Any) -> Columns:
        from formulaic.transforms import cyclic_cubic_spline, natural_cubic_spline

        spline = cyclic_cubic_spline if self.cyclic else natural_cubic_spline
        return np.column_stack(list(spline(x, **settings, _state=state).values()))


@final
@dataclass(frozen=True)
class NaturalSpline(_Spline):
    """Natural cubic splines with the knots of R's ``ns``: quantiles of the training rows.

    With an intercept they span the same functions. The columns are the values at the inner and
    the upper knots (a cardinal basis), so that coefficients are differences from the function at
    the lowest knot, which R's are not.
    """

    def learn(self, x: Column, settings: Settings, what: str) -> Learned:
        inner = settings["knots"]
        if inner is None:
            inner = np.quantile(x, np.linspace(0, 1, settings["df"] + 1)[1:-1]).tolist()
        else:
            self.check_inside(x, inner, what)
        knots = [float(x.min()), *inner, float(x.max())]
        if len(set(knots)) < len(knots) or not knots[0] < knots[-1]:
            raise ValueError(
                f"{what}: the training rows have too few distinct values for "
                f"{len(knots)} knots: {listing(knots)}. Take a smaller df."
            )
        return {"knots": knots}

    def columns(self, x: Column, settings: Settings, learned: Learned) -> Columns:
        from formulaic.transforms import natural_cubic_spline

        knots = learned["knots"]
        if len(knots) == 2:  # a straight line
            return np.asarray((x[:, None] - knots[0]) / (knots[1] - knots[0]))
        state = {
            "lower_bound": knots[0],
            "upper_bound": knots[-1],
            "knots": knots,
            "constraints": None,
            "cyclic": False,
        }
        made = natural_cubic_spline(x, _state=state)
        return np.column_stack(list(made.values()))[:, 1:]


def _check_distinct(x: Column, fewest: int, what: str) -> None:
    """Raise ValueError for too few distinct values."""
    if (distinct := len(np.unique(x))) < fewest:
        raise ValueError(
            f"{what}: the training rows have {distinct} distinct values, but at least {fewest} are "
            "needed. Take fewer degrees of freedom."
        )
