"""Arithmetic on named draws: a small grammar, read here and never evaluated as Python."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from armed_pyro._messages import listing

__all__ = ["Comparison", "evaluate"]

Draws = Float[np.ndarray, " draws"]
FUNCTIONS: Mapping[str, Callable[[Draws], Draws]] = {
    "exp": np.exp,
    "log": np.log,
    "sqrt": np.sqrt,
    "abs": np.abs,
}
RELATIONS = (">=", "<=", "==", ">", "<", "=")
_NUMBER = re.compile(r"(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_WORD = re.compile(r"[^\W\d][\w.]*(\[[^\]]*\])?")
_SYMBOLS = (*RELATIONS, "**", "+", "-", "*", "/", "^", "(", ")")
LONGEST, DEEPEST = 2000, 40


@dataclass(frozen=True)
class _Token:
    """A number, a name or a symbol of the text."""

    kind: str  # "number", "name", "function", "symbol" or "end"
    text: str


@dataclass(frozen=True, eq=False)
class Comparison:
    """Draws of left minus right side, and the relation between them; empty without one."""

    relation: str
    draws: Draws


def evaluate(text: str, values: Mapping[str, Draws]) -> Comparison:
    """The draws of an expression, or of the difference of its two sides.

    The grammar has numbers, names of `values` (in backticks where they have odd characters),
    ``+ - * / ^ **``, parentheses, exp, log, sqrt, abs, and one of ``> < >= <= =``.

    Raises
    ------
    ValueError
        If the text does not follow the grammar, a name is unknown, or draws are not finite.

    Examples
    --------
    >>> draws = {"a": np.array([1.0, 3.0]), "x[T.m]": np.array([1.0, 1.0])}
    >>> evaluate("2 * a - x[T.m] > 4", draws)
    Comparison(relation='>', draws=array([-3.,  1.]))
    """
    if len(text) > LONGEST:
        raise ValueError(f"the expression has {len(text)} characters; at most {LONGEST} are read")
    parser = _Parser(text, values)
    with np.errstate(all="ignore"):
        left = parser.sum(0)
        relation = parser.take(*RELATIONS)
        draws = left - parser.sum(0) if relation else left
    if parser.next.kind != "end":
        raise parser.error(f"found {parser.next.text!r} where the expression should end")
    if not np.isfinite(draws).all():
        bad = int((~np.isfinite(draws)).sum())
        raise ValueError(
            f"{text!r} is not a finite number in {bad} of {draws.size} draws, as after a division "
            "by zero or the logarithm of a negative number"
        )
    n = len(next(iter(values.values()), np.zeros(1)))
    return Comparison("==" if relation == "=" else relation, np.broadcast_to(draws, n).copy())


class _Parser:
    """Recursive descent over the tokens of a text."""

    def __init__(self, text: str, values: Mapping[str, Draws]) -> None:
        self.text, self.values, self.place = text, values, 0
        # The longest name first: x[T.m] before x.
        self.names = sorted(values, key=len, reverse=True)
        self.next = self._read()

    def error(self, reason: str) -> ValueError:
        """The error for a text that cannot be read."""
        return ValueError(
            f"cannot read {self.text!r}: {reason}. Expected numbers, names, + - * / ^, "
            f"parentheses, {', '.join(FUNCTIONS)}, and one of > < >= <= =, such as 'a - b > 0'. "
            f"The names are {listing(self.values)}"
        )

    def take(self, *symbols: str) -> str:
        """The next symbol if it is one of these, which is then passed; else an empty text."""
        if self.next.kind != "symbol" or self.next.text not in symbols:
            return ""
        text, self.next = self.next.text, self._read()
        return text

    def sum(self, depth: int) -> Draws:
        """Products joined by + and -."""
        value = self.product(depth)
        while sign := self.take("+", "-"):
            right = self.product(depth)
            value = value + right if sign == "+" else value - right
        return value

    def product(self, depth: int) -> Draws:
        """Signed powers joined by * and /."""
        value = self.signed(depth)
        while sign := self.take("*", "/"):
            right = self.signed(depth)
            value = value * right if sign == "*" else value / right
        return value

    def signed(self, depth: int) -> Draws:
        """A power, with any number of signs before it; -a^2 is -(a^2)."""
        negative = False
        while sign := self.take("+", "-"):
            negative ^= sign == "-"
        value = self.atom(depth)
        if self.take("^", "**"):
            if depth >= DEEPEST:
                raise self.error("it is nested too deeply")
            value = value ** self.signed(depth + 1)
        return -value if negative else value

    def atom(self, depth: int) -> Draws:
        """A number, a name, a function's value, or an expression in parentheses."""
        if depth >= DEEPEST:
            raise self.error("it is nested too deeply")
        token = self.next
        if token.kind == "number":
            self.next = self._read()
            return np.asarray(float(token.text))
        if token.kind == "name":
            self.next = self._read()
            return np.asarray(self.values[token.text], dtype=float)
        if token.kind == "function":
            self.next = self._read()
            if not self.take("("):
                raise self.error(f"the function {token.text} needs parentheses")
            return FUNCTIONS[token.text](self._closed(depth))
        if self.take("("):
            return self._closed(depth)
        found = "it ends too early" if token.kind == "end" else f"{token.text!r} is out of place"
        raise self.error(found)

    def _closed(self, depth: int) -> Draws:
        """The expression up to a closing parenthesis."""
        value = self.sum(depth + 1)
        if not self.take(")"):
            raise self.error("a closing parenthesis is missing")
        return value

    def _read(self) -> _Token:
        """The token at the present place, which is then passed."""
        while self.place < len(self.text) and self.text[self.place].isspace():
            self.place += 1
        rest = self.text[self.place :]
        if not rest:
            return _Token("end", "")
        if rest[0] == "`":
            name, closed, _ = rest[1:].partition("`")
            if not closed:
                raise self.error("a backtick is missing")
            return self._name(name, len(name) + 2)
        for name in self.names:
            if name and rest.startswith(name) and self._ends(name, rest[len(name) :]):
                return self._name(name, len(name))
        if number := _NUMBER.match(rest):
            self.place += number.end()
            return _Token("number", number.group())
        if word := _WORD.match(rest):
            if word.group() in FUNCTIONS:
                self.place += word.end()
                return _Token("function", word.group())
            return self._name(word.group(), word.end())
        for symbol in _SYMBOLS:
            if rest.startswith(symbol):
                self.place += len(symbol)
                return _Token("symbol", symbol)
        raise self.error(f"the character {rest[0]!r} has no meaning")

    def _ends(self, name: str, rest: str) -> bool:
        """Whether a name that was read is not the start of a longer word, or a number."""
        if _NUMBER.fullmatch(name) or (name in FUNCTIONS and rest.lstrip().startswith("(")):
            return False
        return not (re.match(r"[\w.\[:]", rest) and re.match(r"[\w.]", name[-1]))

    def _name(self, name: str, length: int) -> _Token:
        if name not in self.values:
            raise self.error(f"there is no {name!r}")
        self.place += length
        return _Token("name", name)
