"""Formulas of features: products of columns, with or without an intercept."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from armed_pyro.data.cluster_columns import ClusterColumn, is_call, without_calls
from armed_pyro.data.columns import column_names

Terms = tuple[tuple[str, ...], ...]

_EXPECTED = (
    "Expected column names joined by + : * ^, such as 'age + sex:dose' (names with spaces in "
    "`backticks`), within(x | g), between(x | g), or a list of names."
)
# A call of R's factor() on one column, whose name may be in backticks.
_FACTOR = re.compile(r"factor\(\s*(`[^`]+`|[\w.]+)\s*\)")


@dataclass(frozen=True)
class Formula:
    """Feature terms, each a product of columns, and what a formula says beside them."""

    terms: Terms
    intercept: bool = True
    categorical: tuple[str, ...] = ()  # columns in factor()
    made: tuple[ClusterColumn, ...] = ()  # columns within(x | g) and between(x | g)

    @property
    def names(self) -> tuple[str, ...]:
        """The columns of the terms, each once."""
        return tuple(dict.fromkeys(name for term in self.terms for name in term))

    @property
    def columns(self) -> tuple[str, ...]:
        """The table columns that the terms are made from, each once."""
        sources = {column.name: column.column for column in self.made}
        return tuple(dict.fromkeys(sources.get(name, name) for name in self.names))


def parse_features(features: Sequence[str] | str) -> Formula:
    """A list of columns, or a formula with the operators ``+ : * ^``, ``0 +`` and ``factor(x)``.

    Beside these, only ``within(x | g)``, ``between(x | g)`` and plain column names are accepted: a
    formula is stored with a fit, and loading one must never execute code.

    >>> parse_features("0 + age * factor(dose)")
    Formula(terms=(('age',), ('dose',), ('age', 'dose')), intercept=False, categorical=('dose',), \
made=())
    """
    if not isinstance(features, str):
        return _listed(column_names(features, "features"))
    from formulaic import Formula as Formulaic  # slow to import
    from formulaic import SimpleFormula
    from formulaic.errors import FormulaicError
    from formulaic.parser import DefaultFormulaParser
    from formulaic.parser.types import Factor

    text, made = without_calls(features)
    text, categorical = without_factor(text)
    if not text.strip():
        raise ValueError(
            "features='' names nothing: write features='1' for an intercept alone, or leave "
            "features out for all other columns."
        )
    if re.search(r"(?<![\w.`])\.(?![\w.`])", text):
        raise ValueError(
            f"Cannot read features={features!r}: '.' stands for all other columns, but only "
            "alone, as features='.'. Name the columns."
        )
    try:
        formula = Formulaic(text)
        _check_powers(DefaultFormulaParser().get_ast(text), features)
    except FormulaicError as error:
        raise ValueError(
            f"Cannot read features={features!r}: {str(error).splitlines()[0]} {_EXPECTED}"
        ) from error
    if not isinstance(formula, SimpleFormula):
        raise ValueError(
            f"features={features!r} has a '~' or '|'. Give only what stands right of '~'; random "
            "effects such as (1 | site) belong to the model's random=[...]. within(x | g) and "
            "between(x | g) take a single column x."
        )
    terms, intercept = [], False
    for term in formula:
        for factor in term.factors:
            if factor.eval_method is Factor.EvalMethod.PYTHON:
                raise ValueError(
                    f"features={features!r} would evaluate {factor.expr!r}; only plain column "
                    "names, factor(name), within(name | group) and between(name | group) are "
                    "allowed, because a saved fit must never execute code. Compute the column "
                    "first, and name it here (a name with odd characters in `backticks`)."
                )
        names = [f.expr for f in term.factors if f.eval_method is Factor.EvalMethod.LOOKUP]
        if names and len(names) < len(term.factors):
            raise ValueError(
                f"features={features!r} scales a column by a number, in {str(term)!r}. Features "
                "are standardised anyway: name the column alone."
            )
        intercept |= not names
        if names:
            terms.append(tuple(names))
    categorical = (*categorical, *(column.column for column in made if column.categorical))
    return Formula(tuple(terms), intercept, tuple(dict.fromkeys(categorical)), made)


def _listed(names: Sequence[str]) -> Formula:
    """The formula of a list of columns; `within(x | g)` and `between(x | g)` may be among them."""
    terms, made = list[tuple[str, ...]](), list[ClusterColumn]()
    for name in names:
        columns = without_calls(name)[1] if is_call(name) else ()
        terms += [(column.name,) for column in columns] or [(name,)]
        made += columns
    categorical = dict.fromkeys(column.column for column in made if column.categorical)
    return Formula(tuple(dict.fromkeys(terms)), True, tuple(categorical), tuple(made))


def without_factor(text: str) -> tuple[str, tuple[str, ...]]:
    """The text with x in place of ``factor(x)``, and the columns that stood there.

    >>> without_factor("age + factor(dose)")
    ('age + dose', ('dose',))
    """
    names = tuple(dict.fromkeys(name.strip("`") for name in _FACTOR.findall(text)))
    return _FACTOR.sub(r"\1", text), names


def _check_powers(node: Any, features: str) -> None:
    """Raise ValueError for powers of one column: Wilkinson's ``x^2`` and ``x:x`` are x."""
    for operator, args in _operations(node):
        sides = [_single(arg) for arg in args]
        power = operator in ("^", "**") and sides[0] is not None
        product = operator in (":", "*") and sides[0] is not None and sides[0] == sides[1]
        if power or product:
            name = str(sides[0])
            raise ValueError(
                f"features={features!r} has {' '.join(map(str, (sides[0], operator, args[1])))}, "
                f"which in formulas is {name} itself, not its square. Compute the column first, "
                f"such as table['{name}_squared'] = table['{name}'] ** 2, and name it here."
            )


def _operations(node: Any) -> Iterator[tuple[str, list[Any]]]:
    """Operators and operands of a formula's syntax tree."""
    pending = [node]
    while pending:
        current = pending.pop()
        if hasattr(current, "operator"):
            args = list(current.args)
            yield current.operator.symbol, args
            pending += args


def _single(node: Any) -> str | None:
    """The column that an operand is; None for anything longer."""
    return None if hasattr(node, "operator") else str(node)
