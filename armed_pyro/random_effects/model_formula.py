"""The formula of a whole model: ``outcome ~ features + (slopes | group)``."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

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
from armed_pyro.random_effects.parameter_formula import read_parameters
from armed_pyro.random_effects.smooth import Smooth
from armed_pyro.random_effects.terms import Process, RandomEffects, Term

__all__ = [
    "ModelFormula",
    "cluster_columns",
    "parameter_and_predictor",
    "slopes_and_parameters",
    "time_columns",
]

# Calls that name the columns of a censored outcome, with the roles of their arguments.
_OUTCOMES = {
    "event": (("outcome", "status"), ("outcome", "status", "entry")),
    "interval": (("outcome", "upper"), ("outcome", "upper", "entry")),
}
_EXPECTED = "Expected 'outcome ~ features + (slopes | group)', such as 'y ~ x + (x | site)'"
_ROLES = ("trials", "weights", "se", "entry")


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
        Columns of trials, weights or standard errors, as in ``y | trials(n) ~ x``; and of the
        status, upper end and entry of a censored outcome, as in ``event(time, status) ~ x``.
    parameters : mapping of str to str
        Predictors of the family's parameters by name, as in ``sigma ~ x + (1 | g)``.

    Examples
    --------
    >>> ModelFormula.read("Reaction ~ Days + (Days | Subject)").random
    ('(Days | Subject)',)
    """

    outcome: str
    features: str
    random: tuple[str, ...]
    roles: Mapping[str, str] = field(default_factory=dict)
    parameters: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read_all(cls, texts: str | Sequence[str]) -> ModelFormula:
        """Read the formula of the outcome, and then those of parameters.

        >>> ModelFormula.read_all(["y ~ x", "sigma ~ x"]).parameters
        {'sigma': 'x'}
        """
        if isinstance(texts, str) or not isinstance(texts, Sequence):
            return cls.read(texts)
        if not texts:
            raise ValueError(f"there is no formula. {_EXPECTED}.")
        parameters = dict[str, str]()
        for name, predictor in map(parameter_and_predictor, texts[1:]):
            if name in parameters:
                raise ValueError(f"{name!r} has two predictors: give a single formula")
            parameters[name] = predictor
        return replace(cls.read(texts[0]), parameters=parameters)

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
        fixed, random = fixed_and_random(tree.right)
        terms = [text_of(b) if isinstance(b, Call) else f"({text_of(b)})" for b in random]
        return cls(outcome, text_of(fixed), tuple(terms), roles)

    def slopes(self, columns: Collection[str]) -> str:
        """The formula of columns with random slopes or in parameters; empty without any."""
        return slopes_and_parameters(self.random, self.parameters, columns)

    def random_columns(self, columns: Collection[str], *more: str) -> dict[str, Any]:
        """The arguments clusters, slopes and times of `ClusteredData.from_frame`."""
        return {
            "clusters": self.cluster_columns(columns, *more),
            "slopes": self.slopes(columns) or (),
            "times": time_columns(parse_terms(self.random)),
        }

    def cluster_columns(self, columns: Collection[str], *more: str) -> list[str]:
        """Columns of the grouping factors of terms and features, and of `more` factors."""
        terms = [term for read in read_parameters(self.parameters) for term in read.random]
        parsed = (*parse_terms(self.random), *terms)
        return cluster_columns(parsed, self.features, columns, *more)


def parameter_and_predictor(text: str) -> tuple[str, str]:
    """The two sides of ``sigma ~ x + (1 | site)``.

    >>> parameter_and_predictor("sigma ~ 1 + x")
    ('sigma', '1 + x')
    """
    expected = "Expected 'parameter ~ predictor', such as 'sigma ~ x + (1 | site)'."
    if not isinstance(text, str):
        raise TypeError(f"the predictor of a parameter is text, found {text!r}. {expected}")
    name, tilde, predictor = (part.strip() for part in text.partition("~"))
    if not tilde or not name or not predictor:
        raise ValueError(f"cannot read the predictor of a parameter in {text!r}. {expected}")
    return name, predictor


def slopes_and_parameters(
    random: Sequence[str], parameters: Mapping[str, str], columns: Collection[str]
) -> str:
    """The formula of columns with random slopes, or in predictors of parameters."""
    read = read_parameters(parameters)
    texts = [slopes_formula(random, columns)]
    texts += [slopes_formula(list(map(_term_of, r.random)), columns) for r in read]
    texts += [feature for r in read for feature in r.features(columns)]
    return " + ".join(dict.fromkeys(filter(None, texts)))


def _term_of(term: RandomEffects) -> str:
    """A term of a parameter as one of the outcome."""
    return str(replace(term, parameter=""))


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
    grouped = [term for term in terms if not isinstance(term, Smooth)]
    factors = [*(term.factor for term in grouped), *more, *(column.factor for column in made)]
    names = [[name] if name in columns else name.split(":") for name in factors]
    return list(dict.fromkeys(part for parts in names for part in parts))


def time_columns(terms: Sequence[Term]) -> tuple[str, ...]:
    """Columns of the times of processes, each once.

    >>> time_columns(parse_terms("(1 | id) + ou(week | id)"))
    ('week',)
    """
    return tuple(dict.fromkeys(term.time for term in terms if isinstance(term, Process)))


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
    if isinstance(node, Call) and node.function in _OUTCOMES:
        outcome, observed = _observed(node, text)
        if twice := sorted(roles.keys() & observed.keys()):
            raise ValueError(f"formula={text!r} names the {twice[0]} twice.")
        return outcome, {**roles, **observed}
    if not isinstance(node, Name) or node.name == ".":
        raise ValueError(
            f"formula={text!r} has the outcome {text_of(node)}; expected the name of a column. "
            "Compute the outcome first, such as table['log_y'] = numpy.log(table['y'])."
        )
    return node.name, roles


def _observed(call: Call, text: str) -> tuple[str, dict[str, str]]:
    """The outcome's column, and those of its status or upper end, and entry."""
    choices = _OUTCOMES[call.function]
    names = [argument.name for argument in call.arguments if isinstance(argument, Name)]
    for roles in choices:
        if len(names) == len(call.arguments) == len(roles) and not call.options:
            columns = dict(zip(roles, names, strict=True))
            return columns.pop("outcome"), columns
    written = {"event": "event(time, status)", "interval": "interval(lower, upper)"}
    raise ValueError(
        f"formula={text!r} has the outcome {text_of(call)}; expected columns as in "
        f"{written[call.function]}, and a third column for a late entry."
    )
