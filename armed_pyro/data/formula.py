"""Formulas of features: terms that are products of columns, and of columns made by functions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from armed_pyro.data.categories import LevelOrder, check_orders, read_categories
from armed_pyro.data.cluster_columns import ClusterColumn, is_call, read_call
from armed_pyro.data.columns import column_names
from armed_pyro.data.formula_functions import (
    FUNCTIONS,
    STRUCTURAL,
    check_call,
    columns_of,
    unknown_function,
)
from armed_pyro.data.formula_syntax import (
    Call,
    Name,
    Node,
    Number,
    Operation,
    Sum,
    parse,
    quoted_name,
    text_of,
    walk,
)

__all__ = ["Formula", "Terms", "features_of", "is_written", "parse_features"]

Terms = tuple[tuple[str, ...], ...]
_Products = dict[frozenset[str], tuple[str, ...]]  # by its factors, a term in their order
_INTERCEPT = frozenset[str]()

# Products beyond these would take minutes: (a + b + ...)^12 of 12 columns has 4,095 terms.
MOST_TERMS, MOST_PAIRS = 5000, 200_000
_EXPECTED = (
    "Expected column names joined by + : * / ^, such as 'age + sex:dose' (names with spaces in "
    "`backticks`), functions such as log(age) or poly(age, 2), or a list of names."
)


@dataclass(frozen=True)
class Formula:
    """Feature terms, each a product of columns, and what a formula says beside them.

    A column is one of the table, or made by a call of `calls`, ``log(x)``, or of `made`.
    """

    terms: Terms
    intercept: bool = True
    categorical: tuple[str, ...] = ()  # columns in factor() or C()
    made: tuple[ClusterColumn, ...] = ()  # columns within(x | g) and between(x | g)
    calls: tuple[str, ...] = ()
    orders: tuple[LevelOrder, ...] = ()  # of levels, in C()
    offset: str | None = None  # the expression in offset()

    @property
    def names(self) -> tuple[str, ...]:
        """The columns of the terms, each once."""
        return tuple(dict.fromkeys(name for term in self.terms for name in term))

    @property
    def columns(self) -> tuple[str, ...]:
        """The table columns that the terms are made from, each once."""
        sources: dict[str, tuple[str, ...]] = {c.name: (c.column,) for c in self.made}
        sources |= {call: columns_of(parse(call)) for call in self.calls}
        names = (source for name in self.names for source in sources.get(name, (name,)))
        return tuple(dict.fromkeys(names))

    @property
    def offset_columns(self) -> tuple[str, ...]:
        """The table columns of the offset."""
        return () if self.offset is None else columns_of(parse(self.offset))

    def texts(self, columns: Collection[str]) -> tuple[str, ...]:
        """The terms as they are written; names that are none of these columns are left out.

        >>> parse_features("age * factor(dose)").texts(["age", "dose"])
        ('age', 'factor(dose)', 'age:factor(dose)')
        """
        written = {name: name for name in (*self.calls, *(c.name for c in self.made))}
        written |= {name: quoted_name(name) for name in self.names if name in columns}
        plain = [name for name in self.categorical if name in written]
        written |= {name: f"factor({quoted_name(name)})" for name in plain}
        written |= {order.column: str(order) for order in self.orders}
        terms = [term for term in self.terms if all(name in written for name in term)]
        return tuple(":".join(written[name] for name in term) for term in terms)


def is_written(text: str) -> bool:
    """Whether a term is called as it is written, such as ``log(x):z``; names alone are not.

    >>> is_written("poly(x, 2):z"), is_written("within(x | g)"), is_written("weight (kg)")
    (True, True, False)
    """
    if "(" not in text:
        return False
    try:
        terms = parse_features(text).terms
    except ValueError:
        return False
    return [":".join(term) for term in terms] == [text]


def parse_features(
    features: Sequence[str] | str, others: Callable[[], Sequence[str]] | None = None
) -> Formula:
    """A list of columns, or a formula.

    The operators are ``+ - : * / ^ %in%``, ``0 +``, ``- 1`` and parentheses. The functions are
    those of `armed_pyro.data.formula_functions`; nothing is evaluated as Python, as a formula is
    stored with a fit, and loading one must never execute code. `others` are the columns that ``.``
    stands for.

    >>> parse_features("0 + age * factor(dose)").terms
    (('age',), ('dose',), ('age', 'dose'))
    """
    if not isinstance(features, str):
        return _listed(column_names(features, "features"))
    if not features.strip():
        raise ValueError(
            "features='' names nothing: write features='1' for an intercept alone, or leave "
            "features out for all other columns."
        )
    try:
        tree = parse(features, "features=")
    except ValueError as error:
        raise ValueError(f"{error} {_EXPECTED}") from None
    for node in walk(tree):
        if isinstance(node, Operation) and node.symbol == "~":
            raise ValueError(
                f"features={features!r} has a '~'. Give only what stands right of '~', or the "
                "whole formula to armed_pyro.model."
            )
    return features_of(tree, f"features={features!r}", others)


def features_of(
    tree: Node, what: str, others: Callable[[], Sequence[str]] | None = None
) -> Formula:
    """The formula of a syntax tree; `what` names it in messages."""
    return _Algebra(what, others).formula(tree)


def _listed(names: Sequence[str]) -> Formula:
    """The formula of a list of columns; `within(x | g)` and `between(x | g)` may be among them."""
    terms, made = list[tuple[str, ...]](), list[ClusterColumn]()
    for name in names:
        call = parse(name) if is_call(name) else None
        columns = read_call(call, f"features={name!r}") if isinstance(call, Call) else ()
        terms += [(column.name,) for column in columns] or [(name,)]
        made += columns
    categorical = dict.fromkeys(column.column for column in made if column.categorical)
    return Formula(tuple(dict.fromkeys(terms)), True, tuple(categorical), tuple(made))


@dataclass
class _Algebra:
    """Expands a syntax tree to terms, and notes the calls and categories in it."""

    what: str
    others: Callable[[], Sequence[str]] | None
    plain: dict[str, None] = field(default_factory=dict)
    categorical: dict[str, None] = field(default_factory=dict)
    made: dict[ClusterColumn, None] = field(default_factory=dict)
    calls: dict[str, None] = field(default_factory=dict)
    orders: dict[LevelOrder, None] = field(default_factory=dict)
    offsets: list[str] = field(default_factory=list)

    def formula(self, tree: Node) -> Formula:
        products: _Products = {_INTERCEPT: ()}
        self._add(products, tree, 1)
        intercept = products.pop(_INTERCEPT, None) is not None
        if clash := self.plain.keys() & self.calls.keys():
            raise ValueError(
                f"{self.what} has the column `{min(clash)}` beside the call {min(clash)}, which "
                "would have the same name. Rename the column."
            )
        terms = sorted(products.values(), key=len)
        used = {name for term in terms for name in term}
        made = tuple(column for column in self.made if column.name in used)
        calls = tuple(call for call in self.calls if call in used)
        columns = Formula(tuple(terms), made=made, calls=calls).columns
        orders = check_orders(self.orders, self.what)
        return Formula(
            tuple(terms),
            intercept,
            tuple(name for name in self.categorical if name in columns),
            made,
            calls,
            tuple(order for order in orders if order.column in columns),
            " + ".join(self.offsets) or None,
        )

    def _add(self, products: _Products, node: Node, sign: int) -> None:
        """Add the terms of a part of a sum, or take them away."""
        if isinstance(node, Sum):
            for part, part_sign in zip(node.parts, node.signs, strict=True):
                self._add(products, part, sign * part_sign)
            return
        if isinstance(node, Number):
            if node.value not in (0, 1):
                raise self._error(
                    f"has the number {text_of(node)}, but only 1 and 0, with and without an "
                    "intercept, have a meaning"
                )
            if (node.value == 1) == (sign > 0):
                products.setdefault(_INTERCEPT, ())
            else:
                products.pop(_INTERCEPT, None)
            return
        if isinstance(node, Call) and node.function == "offset":
            self._offset(node, sign)
            return
        for key, term in self._expanded(node).items():
            if sign > 0:
                products.setdefault(key, term)
            else:
                products.pop(key, None)

    def _expanded(self, node: Node) -> _Products:
        """The terms that a tree stands for."""
        match node:
            case Sum() | Number():
                products: _Products = {}
                if isinstance(node, Number) and node.value != 1:
                    raise self._error(
                        f"scales a column by a number, in {text_of(node)}. Features are "
                        "standardised anyway: name the column alone, or write I(...)"
                    )
                self._add(products, node, 1)
                return products
            case Name("."):
                return {frozenset([n]): (n,) for n in self._others()}
            case Name(name):
                self.plain[name] = None
                return {frozenset([name]): (name,)}
            case Call():
                return {frozenset([name]): (name,) for name in self._called(node)}
            case Operation("^", left, right):
                return self._power(node, self._expanded(left), right)
            case Operation(symbol, left, right) if symbol in ("*", ":", "/", "%in%"):
                return self._product(node, self._expanded(left), self._expanded(right))
        if isinstance(node, Operation) and node.symbol in ("|", "||"):
            raise self._error(
                "has a '~' or '|'. Give only fixed effects here; random effects such as "
                "(1 | site) belong to the model's random=[...] or to the formula of "
                "armed_pyro.model. within(x | g) and between(x | g) take a single column x"
            )
        raise self._error(f"has {text_of(node)}, which is no column. {_EXPECTED[:-1]}")

    def _product(self, node: Operation, left: _Products, right: _Products) -> _Products:
        if (
            node.symbol in ("*", ":")
            and len(left) == 1
            and left == right
            and _INTERCEPT not in left
        ):
            raise self._square(node)
        if node.symbol == "/":
            whole = tuple(dict.fromkeys(name for term in left.values() for name in term))
            return self._check_size(_union(left, self._crossed({frozenset(whole): whole}, right)))
        crossed = self._crossed(left, right)
        return self._check_size(_union(left, right, crossed) if node.symbol == "*" else crossed)

    def _power(self, node: Operation, base: _Products, exponent: Node) -> _Products:
        if (
            not isinstance(exponent, Number)
            or not exponent.value.is_integer()
            or exponent.value < 1
        ):
            raise self._error(
                f"has the power {text_of(node)}, whose exponent must be a whole number: (a + b)^2 "
                "are all terms of up to two factors"
            )
        if len(base) == 1 and exponent.value > 1:
            raise self._square(node)
        products = dict(base)
        for _ in range(int(min(exponent.value, 64)) - 1):
            more = self._check_size(_union(products, self._crossed(products, base)))
            if len(more) == len(products):
                break
            products = more
        return products

    def _crossed(self, left: _Products, right: _Products) -> _Products:
        if len(left) * len(right) > MOST_PAIRS:
            raise self._error(f"has more than {MOST_TERMS} terms")
        products: _Products = {}
        for a, first in left.items():
            for b, second in right.items():
                products.setdefault(a | b, tuple(dict.fromkeys((*first, *second))))
        return products

    def _check_size(self, products: _Products) -> _Products:
        if len(products) > MOST_TERMS:
            raise self._error(f"has more than {MOST_TERMS} terms")
        return products

    def _called(self, call: Call) -> list[str]:
        """Names of the columns that a call makes, which are noted."""
        name = call.function
        if name not in FUNCTIONS:
            raise unknown_function(name, self.what)
        if name in ("factor", "C"):
            categories = read_categories(call, self.what)
            self.categorical[categories.column] = None
            if categories.order is not None:
                self.orders[categories.order] = None
            if categories.contrast is None:
                return [categories.column]
            self.calls[categories.name] = None
            return [categories.name]
        if name in ("within", "between"):
            columns = read_call(call, self.what)
            for column in columns:
                self.made[column] = None
                if column.categorical:
                    self.categorical[column.column] = None
            return [column.name for column in columns]
        if name in STRUCTURAL:
            raise self._error(f"has {text_of(call)} in a product; an offset stands in a sum alone")
        check_call(call, self.what)
        text = text_of(call)
        self.calls[text] = None
        return [text]

    def _offset(self, call: Call, sign: int) -> None:
        """Note the expression of an offset."""
        if len(call.arguments) != 1 or call.options or sign < 0:
            raise self._error(
                "has an offset that is no sum of offset(x), where x is a column or an expression, "
                "such as offset(log(days))"
            )
        inside = call.arguments[0]
        check_call(Call("I", (inside,)), self.what)
        self.offsets.append(text_of(inside))

    def _others(self) -> Sequence[str]:
        if self.others is None:
            raise self._error("has a '.', which stands for all other columns of a table")
        return self.others()

    def _square(self, node: Operation) -> ValueError:
        name = text_of(node.left)
        power = text_of(node.right) if node.symbol == "^" else "2"
        return ValueError(
            f"{self.what} has {text_of(node)}, which in formulas is {name} itself, not its square. "
            f"Write I({name}**{power}), or poly({name}, {power})."
        )

    def _error(self, reason: str) -> ValueError:
        return ValueError(f"{self.what} {reason}.")


def _union(*several: _Products) -> _Products:
    """The terms of all, each as it is first written."""
    whole: _Products = {}
    for products in several:
        for key, term in products.items():
            whole.setdefault(key, term)
    return whole
