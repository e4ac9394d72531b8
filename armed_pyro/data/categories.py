"""``factor(x)`` and ``C(x, ...)`` in formulas: categories, their order and their contrasts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import pandas as pd
from jaxtyping import Float

from armed_pyro._messages import listing
from armed_pyro.data.formula_syntax import (
    Call,
    Items,
    Name,
    Node,
    Number,
    Text,
    parse,
    quoted_name,
    text_of,
)
from armed_pyro.data.label_matching import match_labels

__all__ = [
    "Categories",
    "LevelOrder",
    "check_orders",
    "coding",
    "contrast_of",
    "encoded",
    "read_categories",
]

Label = str | int | float
Contrast = Literal["Sum", "Helmert", "Poly"]

# Names of contrasts in patsy, formulaic and R.
_CONTRASTS = {
    **dict.fromkeys(("Treatment", "treatment", "contr.treatment"), "Treatment"),
    **dict.fromkeys(("Sum", "sum", "contr.sum"), "Sum"),
    **dict.fromkeys(("Helmert", "helmert", "contr.helmert"), "Helmert"),
    **dict.fromkeys(("Poly", "poly", "contr.poly"), "Poly"),
}
_REFERENCE = ("reference", "ref", "base")


@dataclass(frozen=True)
class LevelOrder:
    """Levels of a column in another order, or another reference level, which comes first.

    >>> LevelOrder("dose", reference="high").applied(pd.Index(["high", "low", "mid"])).tolist()
    ['high', 'low', 'mid']
    """

    column: str
    reference: Label | None = None
    levels: tuple[Label, ...] = ()

    def __str__(self) -> str:
        options = list[tuple[str, Node]]()
        if self.reference is not None:
            options.append(("reference", _node(self.reference)))
        if self.levels:
            options.append(("levels", Items(tuple(map(_node, self.levels)))))
        return text_of(Call("C", (Name(self.column),), tuple(options)))

    def applied(self, levels: pd.Index) -> pd.Index:
        """The levels of the training rows in this order; ValueError for other labels."""
        if self.levels:
            places = self._places(pd.Index(list(self.levels)), levels)
            if len(set(places)) < len(levels):
                left_out = levels.delete(sorted(set(places)))
                raise ValueError(
                    f"C({quoted_name(self.column)}, levels=...) leaves out {listing(left_out)}: "
                    "name every level once."
                )
            levels = levels.take(places)
        if self.reference is not None:
            (place,) = self._places(pd.Index([self.reference]), levels)
            levels = levels.take([place, *(n for n in range(len(levels)) if n != place)])
        return levels

    def _places(self, labels: pd.Index, levels: pd.Index) -> list[int]:
        if not labels.is_unique:
            raise ValueError(
                f"C({quoted_name(self.column)}, levels=...) names {listing(labels)}: name every "
                "level once."
            )
        places = match_labels(labels, levels, f"C({quoted_name(self.column)})").tolist()
        if missing := [label for label, place in zip(labels, places, strict=True) if place < 0]:
            raise ValueError(
                f"C({quoted_name(self.column)}, ...) has the level {missing[0]!r}, which the "
                f"training rows do not have. There are: {listing(levels)}."
            )
        return cast("list[int]", places)


@dataclass(frozen=True)
class Categories:
    """A column of categories in a formula; without a `contrast`, in treatment coding."""

    column: str
    contrast: Contrast | None = None
    order: LevelOrder | None = None

    @property
    def name(self) -> str:
        """Name of the columns that the contrasts make, such as ``C(dose, Sum)``."""
        column = quoted_name(self.column)
        return self.column if self.contrast is None else f"C({column}, {self.contrast})"


def read_categories(call: Call, what: str) -> Categories:
    """The categories of ``factor(x)`` or ``C(x, ...)``; `what` names the formula in messages."""
    usage = (
        "C(x), C(x, Treatment('a')), C(x, Sum), C(x, Helmert) or C(x, Poly), with levels=['a', "
        "'b', ...] for another order of the levels"
    )
    known = call.function == "C"
    if (
        not call.arguments
        or not isinstance(call.arguments[0], Name)
        or len(call.arguments) > 1 + known
        or (call.options and not known)
    ):
        expected = usage if known else "factor(x), where x is a column"
        raise ValueError(f"{what}: expected {expected}, found {text_of(call)}.")
    column = call.arguments[0].name
    options = dict(call.options)
    coding = call.arguments[1] if len(call.arguments) > 1 else options.pop("contrasts", None)
    levels = options.pop("levels", None)
    contrast, reference = _coding(coding, call, what, usage)
    for name in _REFERENCE:
        if name in options:
            reference = _label(options.pop(name), call, what)
    if options or (contrast is not None and reference is not None):
        raise ValueError(f"{what}: expected {usage}, found {text_of(call)}.")
    order = None
    if levels is not None or reference is not None:
        listed = levels.items if isinstance(levels, Items) else ()
        if levels is not None and not listed:
            raise ValueError(f"{what}: {text_of(call)} needs levels such as ['a', 'b'].")
        order = LevelOrder(column, reference, tuple(_label(n, call, what) for n in listed))
    return Categories(column, contrast, order)


def _coding(
    node: Node | None, call: Call, what: str, usage: str
) -> tuple[Contrast | None, Label | None]:
    """The contrasts that an argument names, and their reference level."""
    name, reference = "Treatment", None
    if isinstance(node, Name):
        name = node.name
    elif isinstance(node, Call):
        name = node.function
        references = [*node.arguments, *(v for k, v in node.options if k in _REFERENCE)]
        if len(references) > 1 or len(references) < len(node.arguments) + len(node.options):
            raise ValueError(f"{what}: expected {usage}, found {text_of(call)}.")
        reference = _label(references[0], call, what) if references else None
    elif node is not None:
        raise ValueError(f"{what}: expected {usage}, found {text_of(call)}.")
    if name not in _CONTRASTS:
        raise ValueError(f"{what}: {text_of(call)} names the contrasts {name!r}; expected {usage}.")
    contrast = _CONTRASTS[name]
    return (None if contrast == "Treatment" else cast("Contrast", contrast)), reference


def _node(label: Label) -> Node:
    return Text(label) if isinstance(label, str) else Number(float(label))


def _label(node: Node, call: Call, what: str) -> Label:
    """A level that is written as text, as a number, or as a bare word."""
    match node:
        case Text(value) | Name(value):
            return value
        case Number(value):
            return int(value) if value.is_integer() else value
    raise ValueError(f"{what}: {text_of(call)} has {text_of(node)} in the place of a level.")


def check_orders(orders: Iterable[LevelOrder], what: str) -> tuple[LevelOrder, ...]:
    """The distinct orders; ValueError for two of a column. `what` names the formula."""
    by_column: dict[str, LevelOrder] = {}
    for order in orders:
        if by_column.setdefault(order.column, order) != order:
            raise ValueError(
                f"{what} orders the levels of {order.column!r} in two ways; give reference and "
                "levels in one C()."
            )
    return tuple(by_column.values())


def contrast_of(name: str) -> Categories | None:
    """The categories behind a name such as ``C(dose, Sum)``; None for other names.

    >>> contrast_of("C(dose, Sum)").column, contrast_of("log(x)")
    ('dose', None)
    """
    if not name.startswith("C("):
        return None
    call = parse(name, "call")
    return read_categories(call, name) if isinstance(call, Call) else None


def encoded(values: pd.Categorical, contrast: Contrast) -> Any:
    """The categories for formulaic, which applies the contrasts where the rank allows."""
    from formulaic.transforms.contrasts import C

    levels = list(values.categories)
    return C(pd.Series(values), contrasts=_contrasts(contrast), levels=levels)


def coding(
    levels: pd.Index, contrast: Contrast, *, reduced: bool
) -> Float[np.ndarray, "levels columns"]:
    """The rows that stand for the levels in a design; without `reduced`, indicators."""
    matrix = _contrasts(contrast).get_coding_matrix(list(levels), reduced_rank=reduced)
    return np.asarray(matrix, dtype=np.float64)


def _contrasts(contrast: Contrast) -> Any:
    from formulaic.transforms.contrasts import HelmertContrasts, PolyContrasts, SumContrasts

    kinds: Mapping[Contrast, Any] = {
        "Sum": SumContrasts,
        "Helmert": HelmertContrasts,
        "Poly": PolyContrasts,
    }
    return kinds[contrast]()
