"""`ParameterFormula`: the predictor of a family's parameter, as a user writes it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from armed_pyro._messages import listing
from armed_pyro.data.feature_scaling import FeatureScaling
from armed_pyro.data.formula import Formula, features_of
from armed_pyro.data.formula_syntax import parse, text_of
from armed_pyro.random_effects.covariance import Correlated
from armed_pyro.random_effects.design import LinearBlock
from armed_pyro.random_effects.formula import (
    fixed_and_random,
    terms_of,
    with_all_levels,
)
from armed_pyro.random_effects.terms import Process, RandomEffects, Term

__all__ = [
    "NETWORK",
    "ParameterFormula",
    "check_parameters_of",
    "further_outputs",
    "read_parameters",
]

# Fixed part of a predictor that is a further output of the network.
NETWORK = "net"
_EXPECTED = "Expected a formula such as '1 + x + (1 | site)', or 'net'"


@dataclass(frozen=True)
class ParameterFormula:
    """Fixed and random effects on a parameter of the family.

    Attributes
    ----------
    name : str
        The parameter, such as ``sigma``.
    fixed : str
        Formula of its fixed effects, or ``net`` for a further output of the network.
    random : tuple of Term
        Its random effects.

    Examples
    --------
    >>> read = ParameterFormula.read("sigma", "1 + x + (1 | site)")
    >>> read.fixed, [str(term) for term in read.random]
    ('1 + x', ['sigma ~ (1 | site)'])
    """

    name: str
    fixed: str
    random: tuple[RandomEffects, ...] = ()

    @classmethod
    def read(cls, name: str, text: str) -> ParameterFormula:
        """Read the right side of ``name ~ text``; ValueError if it does not follow the grammar."""
        what = f"the predictor of {name!r}"
        if not isinstance(text, str):
            raise TypeError(f"{what} is text, found {text!r}. {_EXPECTED}.")
        try:
            fixed, bars = fixed_and_random(parse(text))
            random = tuple(_on_parameter(t, name) for bar in bars for t in terms_of(bar))
            read = cls(name, text_of(fixed), random)
            if not read.from_network:
                formula = read._formula()
                if not formula.intercept and not formula.terms:
                    raise ValueError(f"{what} has no fixed effect, found {text!r}.")
        except ValueError as error:
            raise ValueError(f"{error} {_EXPECTED} as {what}.") from None
        return read

    @property
    def from_network(self) -> bool:
        """Whether the fixed part is an output of the network."""
        return self.fixed.strip("`") == NETWORK

    def _formula(self) -> Formula:
        what = f"the predictor {self.name} ~ {self.fixed}"
        formula = features_of(parse(self.fixed), what)
        if formula.offset is not None:
            raise ValueError(f"{what} has an offset(), which belongs to the outcome's formula.")
        return with_all_levels(formula)

    def written(self, terms: Iterable[Term]) -> str:
        """The predictor as it is written, with its random effects among these terms."""
        of_parameter = (t for t in terms if getattr(t, "parameter", "") == self.name)
        random = (str(term).removeprefix(f"{self.name} ~ ") for term in of_parameter)
        return f"{self.name} ~ {' + '.join([self.fixed, *random])}"

    def features(self, columns: Collection[str]) -> tuple[str, ...]:
        """Its features among these columns, for ``ClusteredData.from_frame(..., slopes=...)``."""
        return () if self.from_network else tuple(self._formula().texts(columns))

    def block(self, features: FeatureScaling) -> LinearBlock:
        """The columns of the fixed effects; a ValueError if a feature is missing."""
        formula = self._formula()
        slopes = tuple(dict.fromkeys(":".join(term) for term in formula.terms))
        known = {*features.names, *features.sources}
        if missing := [slope for slope in slopes if slope not in known]:
            raise ValueError(
                f"the predictor {self.name} ~ {self.fixed} has {missing[0]!r}, which is not among "
                f"the features: {listing(features.names)}. A column that only {self.name} uses "
                f"goes to from_frame(..., slopes=[{missing[0]!r}]); armed_pyro.model and the "
                "command line do that by themselves"
            )
        categorical = tuple(name for name in slopes if name in formula.categorical)
        term = RandomEffects(
            self.name, slopes, formula.intercept, covariance=Correlated(), categorical=categorical
        )
        block = term.block(features, {})
        assert isinstance(block, LinearBlock)  # for mypy: `RandomEffects` makes no other
        return block


def read_parameters(parameters: Mapping[str, str]) -> tuple[ParameterFormula, ...]:
    """The formulas of parameters by name; those that the network gives come first.

    >>> [read.name for read in read_parameters({"nu": "1", "sigma": "net"})]
    ['sigma', 'nu']
    """
    read = [ParameterFormula.read(name, text) for name, text in parameters.items()]
    return tuple(sorted(read, key=lambda formula: not formula.from_network))


def further_outputs(parameters: Mapping[str, str]) -> int:
    """The number of parameters that are outputs of the network.

    >>> further_outputs({"nu": "1", "sigma": "net + (1 | site)"})
    1
    """
    return sum(formula.from_network for formula in read_parameters(parameters))


def _on_parameter(term: Term, name: str) -> RandomEffects:
    """The term as one of a parameter."""
    if not isinstance(term, RandomEffects):
        kind = "process" if isinstance(term, Process) else "smooth term"
        raise ValueError(f"the {kind} {str(term)!r} needs the predictor of the outcome.")
    return replace(term, parameter=name)


def check_parameters_of(terms: Iterable[Term], names: Collection[str]) -> None:
    """Raise ValueError for random effects on a parameter that has no predictor."""
    for term in terms:
        name = getattr(term, "parameter", "")
        if name and name not in names:
            raise ValueError(
                f"there are random effects on {name!r}, which has no predictor: give "
                f"parameters={{{name!r}: '1'}}"
            )
