"""The formula of a whole model: ``outcome ~ features + (slopes | group)``."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from armed_pyro.data.formula import parse_features
from armed_pyro.data.formula_syntax import (
    Call,
    Name,
    Node,
    Operation,
    Sum,
    parse,
    text_of,
)
from armed_pyro.random_effects.formula import fixed_and_random, parse_terms, slopes_formula
from armed_pyro.random_effects.terms import Term

__all__ = ["ModelFormula", "cluster_columns"]

_EXPECTED = "Expected 'outcome ~ features + (slopes | group)', such as 'y ~ x + (x | site)'"
_ROLES = ("trials", "weights", "se")


@dataclass(frozen=True)
class ModelFormula:
    """The parts of a model's formula, each as text.

    Attributes
    ----------
    outcome : str
        Name of the outcome's column.
    features : str
        Formula of the fixed effects.
    random : tuple of str
        Random-effect terms.
    roles : mapping of str to str
        Columns of trials, weights or standard errors, as in ``y | trials(n) ~ x``.

    Examples
    --------
    >>> ModelFormula.read("Reaction ~ Days + (Days | Subject)").random
    ('(Days | Subject)',)
    """

    outcome: str
    features: str
    random: tuple[str, ...]
    roles: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, text: str) -> ModelFormula:
        """Read a formula; ValueError if it does not follow the grammar."""
        if not isinstance(text, str):
            raise TypeError(f"a formula is text, found {text!r}. {_EXPECTED}.")
        try:
            tree = parse(text)
        except ValueError as error:
            raise ValueError(f"{error} {_EXPECTED}.") from None
        if not isinstance(tree, Operation) or tree.symbol != "~":
            raise ValueError(f"formula={text!r} has no outcome. {_EXPECTED}.")
        if isinstance(tree.left, Operation) and tree.left.symbol == "~":
            raise ValueError(f"formula={text!r} has several '~'. {_EXPECTED}.")
        outcome, roles = _left_side(tree.left, text)
        fixed, bars = fixed_and_random(tree.right)
        return cls(outcome, text_of(fixed), tuple(f"({text_of(bar)})" for bar in bars), roles)

    def slopes(self, columns: Collection[str]) -> str:
        """The formula of columns with random slopes; empty without any."""
        return slopes_formula(self.random, columns)

    def cluster_columns(self, columns: Collection[str], *more: str) -> list[str]:
        """Columns of the grouping factors of terms and features, and of `more` factors."""
        return cluster_columns(parse_terms(self.random), self.features, columns, *more)


def cluster_columns(
    terms: Sequence[Term],
    features: Sequence[str] | str,
    columns: Collection[str],
    *more: str,
) -> list[str]:
    """Columns of the grouping factors of terms and features, and of `more` factors.

    The factor ``a:b`` needs the columns a and b, unless there is one of its name.

    >>> cluster_columns(parse_terms("(1 | a/b)"), "within(x | id)", ["a", "b", "id"])
    ['a', 'b', 'id']
    """
    made = parse_features(features, lambda: ()).made
    factors = [*(term.factor for term in terms), *more, *(column.factor for column in made)]
    names = [[name] if name in columns else name.split(":") for name in factors]
    return list(dict.fromkeys(part for parts in names for part in parts))


def _left_side(node: Node, text: str) -> tuple[str, dict[str, str]]:
    """The outcome's column, and columns with other roles."""
    roles: dict[str, str] = {}
    if isinstance(node, Operation) and node.symbol == "|":
        calls = node.right.parts if isinstance(node.right, Sum) else (node.right,)
        node = node.left
        for call in calls:
            inside = call.arguments if isinstance(call, Call) else ()
            if (
                not isinstance(call, Call)
                or call.function not in _ROLES
                or len(inside) != 1
                or not isinstance(inside[0], Name)
            ):
                raise ValueError(
                    f"formula={text!r} has {text_of(call)} beside the outcome; expected "
                    f"{', '.join(f'{role}(column)' for role in _ROLES)}."
                )
            roles[call.function] = inside[0].name
    if not isinstance(node, Name) or node.name == ".":
        raise ValueError(
            f"formula={text!r} has the outcome {text_of(node)}; expected the name of a column. "
            "Compute the outcome first, such as table['log_y'] = numpy.log(table['y'])."
        )
    return node.name, roles
