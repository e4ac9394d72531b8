"""Smooth terms ``s(x)``: penalised splines, whose wiggliness is a variance component."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast, final

import torch
from torch import Tensor

from armed_pyro.data.feature_scaling import FeatureScaling
from armed_pyro.data.formula_syntax import Call, Name, Node, Operation, parse, quoted_name, text_of
from armed_pyro.random_effects.covariance import Independent
from armed_pyro.random_effects.design import Block, Columns, LinearBlock
from armed_pyro.random_effects.terms import Term

__all__ = ["Smooth", "SmoothBlock", "is_smooth", "without_smooths"]

Parts = list[tuple[Node, int]]  # of a sum, with their signs
_EXPECTED = "write it as s(x), s(x, k=20) or s(x, by=group), added to other terms"


def is_smooth(node: Node) -> bool:
    """Whether a tree is a call of ``s``."""
    return isinstance(node, Call) and node.function == "s"


@final
@dataclass(frozen=True)
class Smooth(Term):
    r"""f(x) = trend + z(x)' u with u ~ N(0, sd^2): a smooth curve beside the fixed effect of x.

    The columns z are those of `armed_pyro.data.penalised_spline.PenalisedSpline`; all of them share
    one sd, which is the sd of the curve about its straight line over the training rows. An sd of 0
    is a straight line. The effects belong to one cluster that holds all rows, so that they are
    never new. With ``by``, every level of a category has a curve and an sd of its own.

    The straight line belongs to the fixed effects: ``armed_pyro.model("y ~ s(x)", table)`` adds x
    to them, and ``by=f`` adds x:f. A program made from parts needs both, as in
    ``ClusteredData.from_frame(..., features="x", slopes="s(x)")``.

    Attributes
    ----------
    factor : str
        The term as it is written, which is also the name of its grouping factor.

    Raises
    ------
    ValueError
        If the text is no call of ``s`` of a column.

    References
    ----------
    Wood (2017), Generalized Additive Models, section 5.8.

    Examples
    --------
    >>> Smooth("s(age, k=20)").variable
    'age'
    """

    factor: str

    def __post_init__(self) -> None:
        tree = parse(self.factor, "the smooth term ")
        options = dict(tree.options) if isinstance(tree, Call) else {}
        named = isinstance(tree, Call) and any(isinstance(a, Name) for a in tree.arguments[:1])
        if not is_smooth(tree) or not named or not isinstance(options.get("by", Name("")), Name):
            raise ValueError(f"cannot read the smooth term {self.factor!r}: {_EXPECTED}")

    def __str__(self) -> str:
        return self.factor

    @property
    def _call(self) -> Call:
        return cast("Call", parse(self.factor))

    @property
    def variable(self) -> str:
        """The column that the curve is over."""
        return cast("Name", self._call.arguments[0]).name

    @property
    def by(self) -> str | None:
        """The categorical column whose levels have curves of their own; None without one."""
        return cast("Name", dict(self._call.options).get("by", Name(""))).name or None

    @property
    def columns(self) -> str:
        """The call that makes the columns z, for ``ClusteredData.from_frame(..., slopes=...)``."""
        options = tuple(pair for pair in self._call.options if pair[0] != "by")
        return text_of(Call("s", self._call.arguments, options))

    @property
    def trend(self) -> Node:
        """The fixed effects beside the curve: x, or x:f."""
        return (
            Name(self.variable)
            if self.by is None
            else Operation(":", Name(self.variable), Name(self.by))
        )

    @property
    def slopes(self) -> tuple[str, ...]:
        """The columns that the term reads, for ``ClusteredData.from_frame(..., slopes=...)``."""
        return (self.columns, *([] if self.by is None else [quoted_name(self.by)]))

    def block(self, features: FeatureScaling, widths: Mapping[str, int]) -> Block:
        places = [n for n, source in enumerate(features.sources) if source == self.columns]
        if not places:
            raise ValueError(
                f"the term {self.factor} needs its columns: pass "
                f"slopes={' + '.join(self.slopes)!r} to ClusteredData.from_frame, "
                "or the whole formula to armed_pyro.model"
            )
        levels: tuple[str, ...] = ()
        coded: list[int] = []
        if self.by is not None:
            levels = features.indicators.get(self.by, ())
            names = features.names
            coded = [names.index(level) if level in names else -1 for level in levels]
            treated = [n for n, source in enumerate(features.sources) if source == self.by]
            if not levels:
                raise ValueError(f"{self.factor}: by={self.by} is not a categorical column")
            if -1 in coded:  # all levels but the first, in treatment coding
                coded = [-1, *treated]
            if len(coded) != len(levels):
                raise ValueError(
                    f"{self.factor}: by={self.by} must be coded by treatment contrasts; leave "
                    f"C({self.by}, ...) out"
                )
        return SmoothBlock(self.factor, features, places, levels, coded)


@final
class SmoothBlock(LinearBlock):
    """Columns of a smooth term in their own units, once per level of ``by``, with an sd for each.

    `coded` are the positions of the levels' indicators; -1 stands for the level that has none.
    """

    scale: Tensor
    mean: Tensor
    index: Tensor

    def __init__(
        self,
        name: str,
        features: FeatureScaling,
        places: list[int],
        levels: tuple[str, ...],
        coded: list[int],
    ) -> None:
        curves = [f"{name}[{level}]" for level in levels] or [name]
        names = [f"{curve}[{n + 1}]" for curve in curves for n in range(len(places))]
        super().__init__(names, Independent(), torch.eye(len(names), dtype=torch.float64))
        self.width = len(places)
        self.shared = tuple(curve for curve in curves for _ in places)
        self.coded = coded
        self.register_buffer("index", torch.tensor(places, dtype=torch.long), persistent=False)
        for quantity in ("mean", "scale"):
            values = torch.tensor(getattr(features, quantity), dtype=torch.float64)
            self.register_buffer(quantity, values, persistent=False)

    def columns(self, x: Tensor, activations: Mapping[str, Tensor]) -> Columns:
        z = x[:, self.index] * self.scale[self.index].to(x) + self.mean[self.index].to(x)
        if not self.coded:
            return z
        known = [place for place in self.coded if place >= 0]
        indicators = x[:, known] * self.scale[known].to(x) + self.mean[known].to(x)
        if len(known) < len(self.coded):
            indicators = torch.cat([1 - indicators.sum(1, keepdim=True), indicators], 1)
        return torch.cat([column[:, None] * z for column in indicators.unbind(1)], 1)


def without_smooths(parts: Parts) -> tuple[Parts, list[Call]]:
    """Signed parts of a sum with straight lines in place of smooth terms, and these."""
    kept, smooths = Parts(), list[Call]()
    for part, sign in parts:
        if not (isinstance(part, Call) and is_smooth(part)):
            kept.append((part, sign))
            continue
        if sign < 0:
            raise ValueError(f"the smooth term {text_of(part)} cannot be subtracted")
        smooths.append(part)
        kept.append((Smooth(text_of(part)).trend, 1))
    return kept, smooths
