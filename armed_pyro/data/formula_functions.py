"""Functions of formulas: a closed list, evaluated on columns of numbers by their syntax tree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from armed_pyro._messages import count_rows, listing
from armed_pyro.data.column_transforms import (
    CubicSpline,
    NaturalSpline,
    PiecewisePolynomial,
    Polynomial,
    Standardised,
    Transform,
)
from armed_pyro.data.columns import as_numbers
from armed_pyro.data.formula_syntax import (
    Call,
    Items,
    Name,
    Node,
    Number,
    Operation,
    Sum,
    Text,
    parse,
    text_of,
    walk,
)
from armed_pyro.data.penalised_spline import PenalisedSpline

__all__ = [
    "FUNCTIONS",
    "CallState",
    "check_call",
    "columns_of",
    "evaluate",
    "is_made",
    "learns",
    "recovered",
]

# By the text of each call that learns from the training rows, what it learned.
CallState = Mapping[str, Mapping[str, list[float]]]

ELEMENTWISE: Mapping[str, Callable[[Any], Any]] = {
    "log": np.log,
    "log2": np.log2,
    "log10": np.log10,
    "log1p": np.log1p,
    "exp": np.exp,
    "sqrt": np.sqrt,
    "abs": np.abs,
}
INVERSE: Mapping[str, Callable[[Any], Any]] = {
    "log": np.exp,
    "log2": np.exp2,
    "log10": lambda x: 10.0**x,
    "log1p": np.expm1,
    "exp": np.log,
    "sqrt": np.square,
}
STATEFUL: Mapping[str, Transform] = {
    "scale": Standardised("scale"),
    "center": Standardised("center"),
    "poly": Polynomial("poly"),
    "bs": PiecewisePolynomial("bs"),
    "ns": NaturalSpline("ns"),
    "cr": CubicSpline("cr"),
    "cc": CubicSpline("cc", cyclic=True),
    "s": PenalisedSpline("s"),
}
# Functions that the grammar of terms reads, and not arithmetic.
STRUCTURAL = ("factor", "C", "offset", "within", "between")
FUNCTIONS = (*ELEMENTWISE, "I", *STATEFUL, *STRUCTURAL)


def unknown_function(name: str, what: str) -> ValueError:
    """The error for a function that is not on the list."""
    last = name.rpartition(".")[2]
    hint = f" Write {last}(...)." if last in FUNCTIONS and last != name else ""
    return ValueError(
        f"{what} calls {name!r}, which is not a function of formulas.{hint} The functions are "
        f"{', '.join(FUNCTIONS)}; formulas are never evaluated as Python. Compute the column "
        "first, and name it here (a name with odd characters in `backticks`)."
    )


def check_call(call: Call, what: str) -> None:
    """Raise ValueError unless a call and all calls inside it can be evaluated."""
    for node in walk(call):
        if isinstance(node, Call):
            _check_one(node, what, outermost=node is call)
        elif isinstance(node, Operation) and node.symbol not in ("*", "/", "^"):
            raise ValueError(
                f"{what}: {text_of(call)} has {node.symbol!r}; inside a function only the "
                "arithmetic + - * / ** is known."
            )
    if not columns_of(call):
        raise ValueError(f"{what}: {text_of(call)} names no column.")


def _check_one(call: Call, what: str, *, outermost: bool) -> None:
    name = call.function
    if name not in FUNCTIONS:
        raise unknown_function(name, what)
    if name in STRUCTURAL:
        raise ValueError(f"{what}: {text_of(call)} cannot stand inside another function.")
    if name in STATEFUL:
        STATEFUL[name].settings(call, what)
        if not outermost and not STATEFUL[name].single:
            raise ValueError(
                f"{what}: {text_of(call)} makes several columns, and cannot stand inside another "
                "function."
            )
    elif len(call.arguments) != 1 or call.options:
        raise ValueError(
            f"{what}: {name}() takes one column or expression, such as {name}(x); found "
            f"{text_of(call)}."
        )
    if any(isinstance(argument, Text | Items) for argument in call.arguments[:1]):
        raise ValueError(f"{what}: {text_of(call)} needs a column in the first place.")


@lru_cache(maxsize=256)
def _parsed(text: str) -> Call:
    call = parse(text, "call=")
    if not isinstance(call, Call) or call.function in STRUCTURAL[1:]:
        raise ValueError(f"{text!r} is not a call of a formula's function.")
    check_call(call, f"call={text!r}")
    return call


def is_made(text: str) -> bool:
    """Whether a name is that of a column made by a call, such as ``log(x)``.

    >>> is_made("poly(x, 2)"), is_made("weight (kg)"), is_made("x")
    (True, False, False)
    """
    if "(" not in text:
        return False
    try:
        return text_of(_parsed(text)) == text
    except ValueError:
        return False


def columns_of(node: Node) -> tuple[str, ...]:
    """The table columns that a tree reads, each once.

    >>> columns_of(parse("I(a / b**2) "))
    ('a', 'b')
    """
    names: list[str] = []
    for below in walk(_without_options(node)):
        if isinstance(below, Name):
            names.append(below.name)
    return tuple(dict.fromkeys(names))


def _without_options(node: Node) -> Node:
    """The tree without arguments that are settings, whose words are no columns."""
    match node:
        case Call(function, arguments, _):
            kept = arguments[:1] if function in (*STATEFUL, "C") else arguments
            return Call(function, tuple(map(_without_options, kept)))
        case Operation(symbol, left, right):
            return Operation(symbol, _without_options(left), _without_options(right))
        case Sum(parts, signs):
            return Sum(tuple(map(_without_options, parts)), signs)
    return node


def learns(text: str) -> bool:
    """Whether a call learns from the training rows, as ``poly(x, 2)`` does.

    >>> learns("I(scale(x)**2)"), learns("log(x)")
    (True, False)
    """
    return any(isinstance(node, Call) and node.function in STATEFUL for node in walk(parse(text)))


def evaluate(
    text: str, table: pd.DataFrame, state: CallState | None = None
) -> tuple[Float[np.ndarray, "rows columns"], CallState]:
    """The columns that a call makes from a table, and its state, learned here if there is none.

    Raises ValueError if a value is not finite, such as the logarithm of zero.

    >>> evaluate("center(x)", pd.DataFrame({"x": [1.0, 3.0]}))
    (array([[-1.],
           [ 1.]]), {'center(x)': {'center': [2.0]}})
    """
    call, run = _parsed(text), _Evaluation(table, state)
    with np.errstate(all="ignore"):
        values = np.asarray(run.call(call), dtype=np.float64)
    _check_finite(text, values, call, table)
    return values.reshape(len(table), -1), run.state


def recovered(
    text: str, columns: Float[np.ndarray, "rows columns"], state: CallState
) -> tuple[str, Float[np.ndarray, " rows"]] | None:
    """The table column that a call of one column was made from, up to 12 digits, and its name.

    None if it cannot be told, as of ``abs(x)``, ``I(x**2)`` or cyclic splines.

    >>> recovered("log(x)", np.log([[2.0], [3.0]]), {})
    ('x', array([2., 3.]))
    """
    call = _parsed(text)
    inside = call.arguments[0]
    if not isinstance(inside, Name):
        return None
    values: np.ndarray | None = None
    if call.function in INVERSE:
        values = INVERSE[call.function](columns[:, 0])
    elif call.function in STATEFUL:
        transform = STATEFUL[call.function]
        settings = transform.settings(call, text)
        values = transform.recovered(columns, settings, state.get(text, {}))
    if values is None:
        return None
    return inside.name, np.array([float(f"{value:.12g}") for value in values])


def _check_finite(text: str, values: np.ndarray, call: Call, table: pd.DataFrame) -> None:
    wrong = ~np.isfinite(values.reshape(len(table), -1)).all(1)
    if wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        found = ", ".join(f"{name} = {table[name].iloc[first]}" for name in columns_of(call))
        raise ValueError(
            f"{text} is not a finite number in {count_rows(int(wrong.sum()))}, such as row "
            f"{listing(table.index[[first]])}, where {found}. Change the formula, or leave those "
            "rows out."
        )


@dataclass
class _Evaluation:
    """Evaluates trees on a table; states are learned where none is known."""

    table: pd.DataFrame
    known: CallState | None
    state: dict[str, Mapping[str, list[float]]] = field(default_factory=dict)

    def call(self, node: Call) -> Any:
        name = node.function
        if name in STATEFUL:
            transform, text = STATEFUL[name], text_of(node)
            x = np.broadcast_to(self.numbers(node.arguments[0]), len(self.table)).astype(float)
            _check_finite(text_of(node.arguments[0]), x, node, self.table)
            settings = transform.settings(node, text)
            if self.known is None:
                self.state[text] = transform.learn(x, settings, text)
            else:
                self.state[text] = self.known[text]
            values = transform.columns(x, settings, self.state[text])
            return values[:, 0] if transform.single else values
        value = self.numbers(node.arguments[0])
        return value if name == "I" else ELEMENTWISE[name](value)

    def numbers(self, node: Node) -> Any:
        match node:
            case Name(name):
                return as_numbers(self.table[name], "feature")
            case Number(value):
                return np.asarray(value)
            case Call():
                return self.call(node)
            case Sum(parts, signs):
                total = np.asarray(0.0)
                for part, sign in zip(parts, signs, strict=True):
                    total = total + sign * self.numbers(part)
                return total
            case Operation(symbol, left, right):
                a, b = self.numbers(left), self.numbers(right)
                return a * b if symbol == "*" else a / b if symbol == "/" else np.power(a, b)
        raise ValueError(f"{text_of(node)} is not a number or a column.")
