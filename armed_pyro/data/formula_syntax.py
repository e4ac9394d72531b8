"""Syntax of formulas: text becomes a tree of names, numbers, calls and operators.

The grammar is Wilkinson's, as in R, lme4 and patsy. Text is read here and never evaluated as
Python.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

__all__ = [
    *("Call", "Items", "Name", "Node", "Number", "Operation", "Sum", "Text"),
    *("operands", "parse", "quoted_name", "text_of", "walk"),
]

LONGEST, DEEPEST = 100_000, 60
_TOKEN = re.compile(
    r"""\s*(?:
    (?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)
    | `(?P<quoted>[^`]+)`
    | (?P<name>\.?[^\W\d][\w.]*(?:\[[^\[\]]*\])?)
    | (?P<text>"[^"]*"|'[^']*')
    | (?P<symbol>\*\*|%in%|\|\||[-+*/:^|~(),=.\[\]])
    )""",
    re.VERBOSE,
)
_PLAIN = re.compile(r"\.?[^\W\d][\w.]*")
# How tightly operators bind, as in R.
_BINDING = {
    "~": 1,
    **{"|": 2, "||": 2},
    **{"+": 3, "-": 3},
    **{"*": 4, "/": 4},
    "%in%": 5,
    ":": 6,
    **{"^": 8, "**": 8},
}
_SIGN, _POWER = 4, 8


@dataclass(frozen=True)
class Name:
    """A column, or ``.`` for all other columns."""

    name: str


@dataclass(frozen=True)
class Number:
    """A number."""

    value: float


@dataclass(frozen=True)
class Text:
    """A text in quotation marks."""

    value: str


@dataclass(frozen=True)
class Items:
    """A list, ``[a, b]`` or ``c(a, b)``."""

    items: tuple[Node, ...]


@dataclass(frozen=True)
class Call:
    """A function with its arguments in order, and those with a name."""

    function: str
    arguments: tuple[Node, ...]
    options: tuple[tuple[str, Node], ...] = ()


@dataclass(frozen=True)
class Operation:
    """Two operands; `symbol` is one of ``~ | || * / %in% : ^``."""

    symbol: str
    left: Node
    right: Node


@dataclass(frozen=True)
class Sum:
    """Operands that are added, or subtracted where `signs` is -1."""

    parts: tuple[Node, ...]
    signs: tuple[int, ...]


Node = Name | Number | Text | Items | Call | Operation | Sum


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    place: int


def parse(text: str, what: str = "formula=") -> Node:
    """The tree of a text; `what` names it in messages.

    Raises
    ------
    ValueError
        If the text does not follow the grammar, or is too long or nested too deeply.

    Examples
    --------
    >>> parse("a + b:c")
    Sum(parts=(Name(name='a'), Operation(symbol=':', left=Name(name='b'), right=Name(name='c'))), \
signs=(1, 1))
    """
    reader = _Reader(text, what)
    tree = reader.expression(0, 0)
    if reader.next.kind != "end":
        reader.unexpected()
    return tree


def text_of(node: Node) -> str:
    """A tree as text in a single way of writing: the name of the column that it makes.

    >>> text_of(parse("poly( `dose mg`,degree = 2 )"))
    'poly(`dose mg`, degree=2)'
    """
    match node:
        case Name(name):
            return quoted_name(name)
        case Number(value):
            return repr(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
        case Text(value):
            return f"'{value}'" if '"' in value else f'"{value}"'
        case Items(items):
            return f"[{', '.join(map(text_of, items))}]"
        case Call(function, arguments, options):
            listed = [text_of(argument) for argument in arguments]
            listed += [f"{name}={text_of(value)}" for name, value in options]
            return f"{function}({', '.join(listed)})"
        case Operation(symbol, left, right):
            space = " " if symbol in ("~", "|", "||", "%in%") else ""
            bound, power = _BINDING[symbol], symbol == "^"
            sides = _inside(left, bound + power), _inside(right, bound + (not power))
            return f"{space}{symbol}{space}".join(sides)
        case Sum(parts, signs):
            joined = "".join(
                f" {'+' if sign > 0 else '-'} {_inside(part, _SIGN)}"
                for sign, part in zip(signs, parts, strict=True)
            )
            return joined[3:] if signs[0] > 0 else f"-{joined[3:]}"


def quoted_name(name: str) -> str:
    """A column's name as it is written in a formula.

    >>> quoted_name("age"), quoted_name("weight (kg)"), quoted_name(".")
    ('age', '`weight (kg)`', '.')
    """
    return name if name == "." or _PLAIN.fullmatch(name) else f"`{name}`"


def operands(node: Node) -> tuple[Node, ...]:
    """The nodes directly below a node."""
    match node:
        case Operation(_, left, right):
            return (left, right)
        case Sum(parts, _):
            return parts
        case Items(items):
            return items
        case Call(_, arguments, options):
            return (*arguments, *(value for _, value in options))
    return ()


def walk(node: Node) -> Iterator[Node]:
    """Every node of a tree, from the top."""
    yield node
    for below in operands(node):
        yield from walk(below)


def _inside(node: Node, binding: int) -> str:
    """The text of an operand, in parentheses unless it binds at least as tightly as this."""
    bound = _POWER + 1
    if isinstance(node, Operation):
        bound = _BINDING[node.symbol]
    elif isinstance(node, Sum):
        bound = _BINDING["+"]
    return text_of(node) if bound >= binding else f"({text_of(node)})"


class _Reader:
    """Reads an expression by the binding of its operators (Pratt's method)."""

    def __init__(self, text: str, what: str) -> None:
        self.text, self.what = text, what
        if len(text) > LONGEST:
            self.text = text[:200]
            self.error(f"it has {len(text)} characters, and at most {LONGEST} are read")
        self.heights: dict[int, tuple[Node, int]] = {}  # of compound nodes, by identity
        self.tokens = self._tokens()
        self.next = next(self.tokens)

    def error(self, reason: str) -> NoReturn:
        shown = self.text if len(self.text) <= 200 else f"{self.text[:197]}..."
        raise ValueError(f"Cannot read {self.what}{shown!r}: {reason}.")

    def unexpected(self) -> NoReturn:
        """The error for a token that cannot stand where it does."""
        token = self.next
        if token.kind == "end":
            self.error("it ends too early")
        if token.kind in ("name", "number", "text", "quoted") or token.text == "(":
            self.error(f"an operator is missing before {self.text[token.place :][:20]!r}")
        self.error(f"{token.text!r} is out of place, at character {token.place + 1}")

    def expression(self, binding: int, depth: int) -> Node:
        """An expression of operators that bind more tightly than `binding`."""
        if depth > DEEPEST:
            self.error("it is nested too deeply")
        left = self.operand(binding, depth)
        while self.next.kind == "symbol" and (bound := _BINDING.get(self.next.text, 0)) > binding:
            symbol = self.take()
            if symbol in ("+", "-"):
                left = self.sum(left, symbol, depth)
                continue
            right = self.expression(bound - (bound == _POWER), depth + 1)
            left = self.measured(Operation("^" if symbol == "**" else symbol, left, right))
        return left

    def measured(self, node: Node) -> Node:
        """A node whose tree is not too high for the recursion of its readers."""
        below = [self.heights.get(id(child), (child, 0))[1] for child in operands(node)]
        height = 1 + max(below, default=0)
        if height > DEEPEST:
            self.error("it is nested too deeply")
        self.heights[id(node)] = node, height
        return node

    def sum(self, first: Node, symbol: str, depth: int) -> Node:
        """The sum that a first part begins, as one flat node."""
        signed = isinstance(first, Sum) and first.signs == (-1,)
        parts = list(first.parts) if isinstance(first, Sum) and signed else [first]
        signs = [-1] if signed else [1]
        while symbol:
            signs.append(1 if symbol == "+" else -1)
            parts.append(self.expression(_BINDING["+"], depth + 1))
            follows = self.next.kind == "symbol" and self.next.text in ("+", "-")
            symbol = self.take() if follows else ""
        return self.measured(Sum(tuple(parts), tuple(signs)))

    def operand(self, binding: int, depth: int) -> Node:
        """A name, number, text, call, list or parenthesis, with signs before it."""
        token = self.next
        if token.kind == "symbol" and token.text in ("+", "-"):
            self.take()
            value = self.expression(max(_SIGN - 1, binding), depth + 1)
            return value if token.text == "+" else self.measured(Sum((value,), (-1,)))
        if token.kind == "symbol" and token.text == "~" and binding == 0:
            self.error("an outcome is missing before '~'")
        if token.kind == "symbol" and token.text in ("(", "["):
            self.take()
            if token.text == "[":
                return self.measured(Items(self.listed("]", depth)[0]))
            inside = self.expression(0, depth + 1)
            self.close(")")
            return inside
        if token.kind == "symbol" and token.text == ".":
            self.take()
            return Name(".")
        if token.kind in ("end", "symbol"):
            self.unexpected()
        self.take()
        if token.kind == "number":
            return Number(float(token.text))
        if token.kind == "text":
            return Text(token.text[1:-1])
        if token.kind == "name" and self.next.text == "(" and self.next.kind == "symbol":
            self.take()
            arguments, options = self.listed(")", depth)
            if token.text == "c" and not options:
                return self.measured(Items(arguments))
            return self.measured(Call(token.text, arguments, options))
        return Name(token.text)

    def listed(self, end: str, depth: int) -> tuple[tuple[Node, ...], tuple[tuple[str, Node], ...]]:
        """Arguments up to the closing symbol."""
        arguments, options = list[Node](), list[tuple[str, Node]]()
        while not (self.next.kind == "symbol" and self.next.text == end):
            value = self.expression(0, depth + 1)
            if self.next.kind == "symbol" and self.next.text == "=" and isinstance(value, Name):
                self.take()
                options.append((value.name, self.expression(0, depth + 1)))
            elif options:
                self.error(f"the argument {text_of(value)!r} needs a name, like those before it")
            else:
                arguments.append(value)
            if not (self.next.kind == "symbol" and self.next.text == ","):
                break
            self.take()
        self.close(end)
        return tuple(arguments), tuple(options)

    def close(self, symbol: str) -> None:
        """Pass a closing symbol."""
        if self.next.kind != "symbol" or self.next.text != symbol:
            if self.next.kind == "end":
                self.error(f"{symbol!r} is missing at the end")
            self.unexpected()
        self.take()

    def take(self) -> str:
        """The text of the present token, which is then passed."""
        text, self.next = self.next.text, next(self.tokens)
        return text

    def _tokens(self) -> Iterator[_Token]:
        place, end = 0, len(self.text.rstrip())
        while place < end:
            match = _TOKEN.match(self.text, place)
            if match is None:
                rest = self.text[place:].lstrip()
                reason = "a backtick or quotation mark is not closed"
                if rest[0] not in "`'\"":
                    reason = f"the character {rest[0]!r} has no meaning in formulas"
                self.error(reason)
            kind = match.lastgroup or ""
            yield _Token(kind, match[kind], match.start(kind))
            place = match.end()
        while True:
            yield _Token("end", "", end)
