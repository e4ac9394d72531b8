"""Random-effect terms as a user writes them, in lme4's syntax or as objects."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import accumulate

from armed_pyro.data.feature_scaling import FeatureScaling
from armed_pyro.random_effects.covariance import (
    Correlated,
    Covariance,
    Independent,
    covariance_named,
)
from armed_pyro.random_effects.design import Block, FilterBlock, InputBlock, LayerBlock

__all__ = ["FilterScaleBias", "RandomEffects", "Slopes", "Term", "parse_terms"]

_TERM = re.compile(r"^\s*\(?([^()|]+?)(\|\|?)([^()|]+?)\)?\s*$")
_GRAMMAR = "write it as '(1 + x | site)', '(1 + x || site)', '(0 + x | site)' or '(1 | a/b)'"


class Term(ABC):
    """Random effects of one grouping factor, ``"site"`` or ``"school:class"``.

    A term is a frozen dataclass. Its fields are saved with a fit.
    """

    factor: str

    def layers(self) -> tuple[str, ...]:
        """Module paths of the activations that the term needs; none by default."""
        return ()

    @abstractmethod
    def block(self, features: FeatureScaling, widths: Mapping[str, int]) -> Block:
        """The term's columns, for these features and widths of the activations at `layers`.

        Raises
        ------
        ValueError
            If the term names a feature that the data do not have.
        """

    @abstractmethod
    def __str__(self) -> str:
        """The term as the user writes it."""


@dataclass(frozen=True)
class RandomEffects(Term):
    """phi(x) = (1, x_1, ..., x_q): random intercept and slopes on input features.

    Attributes
    ----------
    factor : str
        Grouping factor, ``"site"`` or ``"school:class"``.
    slopes : tuple of str
        Features, by encoded name or by column. A categorical column stands for all its contrasts.
    correlated : bool
        Whether the effects are correlated, lme4's ``|``, or independent, ``||``.
    covariance : str, Covariance or None
        Another kind of covariance, by name or with settings, which then replaces `correlated`;
        see `armed_pyro.random_effects.covariance`.

    Examples
    --------
    >>> str(RandomEffects("site", ("age",)))
    '(1 + age | site)'
    """

    factor: str
    slopes: tuple[str, ...] = ()
    intercept: bool = True
    correlated: bool = True
    covariance: str | Covariance | None = None

    def __post_init__(self) -> None:
        _covariance(self)  # which refuses an unknown name
        if not self.intercept and not self.slopes:
            raise ValueError(f"the term {self} has neither an intercept nor a slope")

    def __str__(self) -> str:
        bar = "|" if self.correlated or self.covariance is not None else "||"
        kind = "" if self.covariance is None else str(covariance_named(self.covariance))
        effects = " + ".join(["1" if self.intercept else "0", *self.slopes])
        return f"{kind}({effects} {bar} {self.factor})"

    def block(self, features: FeatureScaling, widths: Mapping[str, int]) -> Block:
        columns: list[int] = []
        for slope in self.slopes:
            pairs = enumerate(zip(features.names, features.sources, strict=True))
            positions = [position for position, names in pairs if slope in names]
            if not positions:
                known = [*features.names, *features.sources]
                near = get_close_matches(slope, known, n=1)
                hint = f" (nearest: {near[0]!r})" if near else ""
                raise ValueError(
                    f"{self} has a slope on {slope!r}, which is not among the features{hint}; "
                    f"the features are: {', '.join(features.names) or 'none'}"
                )
            columns += [position for position in positions if position not in columns]
        return InputBlock(features, columns, self.intercept, _covariance(self))


@dataclass(frozen=True)
class Slopes(Term):
    """phi(x) = h(x), the activations of a hidden layer: nonlinear random slopes.

    Attributes
    ----------
    on : str
        Module path of the layer, such as ``"3"`` or ``"encoder.2"``; feature maps are averaged
        over space.
    correlated : bool
        Whether the slopes are correlated; independent by default, as layers are wide.
    covariance : str, Covariance or None
        As of `RandomEffects`.

    References
    ----------
    Nguyen, Treacher, Montillo (2023), IEEE TPAMI 45(7), section 3.2.

    Examples
    --------
    >>> str(Slopes("site", on="3"))
    "Slopes('site', on='3')"
    """

    factor: str
    on: str
    correlated: bool = False
    covariance: str | Covariance | None = None

    def __post_init__(self) -> None:
        _covariance(self)  # which refuses an unknown name

    def __str__(self) -> str:
        more = ", correlated=True" if self.correlated else ""
        if self.covariance is not None:
            more += f", covariance={self.covariance!r}"
        return f"Slopes({self.factor!r}, on={self.on!r}{more})"

    def layers(self) -> tuple[str, ...]:
        return (self.on,)

    def block(self, features: FeatureScaling, widths: Mapping[str, int]) -> Block:
        return LayerBlock(self.on, widths[self.on], _covariance(self))


@dataclass(frozen=True)
class FilterScaleBias(Term):
    r"""Filters of a layer scaled and shifted by cluster.

    .. math:: h'_{ic} = (1 + a_{kc}) h_{ic} + b_{kc}, \quad k = g(i), \quad
              a_{kc} \sim N(0, sd_{a,c}^2), \quad b_{kc} \sim N(0, sd_{b,c}^2)

    for every filter (or unit) c of a layer's output h. A hook does this; the network is not edited.
    After instance or batch normalisation, effects are in units of the filters' sds; after other
    layers, in units of the layer's output. The sds' prior scale is 0.3 unless `Priors` sets it.

    Attributes
    ----------
    at : str
        Module path of the layer, such as ``"decoder.conv3"``.

    References
    ----------
    Nguyen, Treacher, Montillo (2023), IEEE TPAMI 45(7), section 3.4.

    Examples
    --------
    >>> str(FilterScaleBias("batch", at="decoder.conv3"))
    "FilterScaleBias('batch', at='decoder.conv3')"
    """

    factor: str
    at: str

    def __str__(self) -> str:
        return f"FilterScaleBias({self.factor!r}, at={self.at!r})"

    def layers(self) -> tuple[str, ...]:
        return (self.at,)

    def block(self, features: FeatureScaling, widths: Mapping[str, int]) -> Block:
        return FilterBlock(self.at, widths[self.at])


def _covariance(term: RandomEffects | Slopes) -> Covariance:
    """The term's kind of covariance, or a `ValueError` for an unknown name."""
    if term.covariance is not None:
        return covariance_named(term.covariance)
    return Correlated() if term.correlated else Independent()


def parse_terms(terms: str | Term | Iterable[str | Term]) -> tuple[Term, ...]:
    """Random-effect terms from lme4's syntax.

    ``(1 + x | g)`` is a correlated intercept and slope; the intercept is implied, and ``0 +``
    removes it. ``(1 + x || g)`` makes them independent. ``(1 | a/b)`` is nested, short for
    ``(1 | a)`` and ``(1 | a:b)``. One string may hold several terms, joined by ``+``.

    Raises
    ------
    ValueError
        If a string does not follow the syntax, or two terms of a factor have the same column.

    Examples
    --------
    >>> [str(term) for term in parse_terms("(1 + age | site) + (1 | school/class)")]
    ['(1 + age | site)', '(1 | school)', '(1 | school:class)']
    """
    if terms is None:
        raise TypeError("random effects are text such as '(1 | site)' or terms; () has none")
    parsed: list[Term] = []
    for term in [terms] if isinstance(terms, str | Term) else terms:
        if not isinstance(term, str | Term):
            raise TypeError(f"a random-effect term is a string or a Term, not {term!r}")
        parsed += _parse(term) if isinstance(term, str) else [term]
    _check_overlap(parsed)
    return tuple(parsed)


def _parse(text: str) -> list[Term]:
    """Terms of a string, which may join several in parentheses."""
    if not text.strip().startswith("("):
        return _parse_term(text)
    pieces = re.findall(r"\([^()]*\)", text)
    if not pieces or re.sub(r"\([^()]*\)", "", text).replace("+", "").strip():
        raise ValueError(f"cannot read the random-effect term {text!r}: {_GRAMMAR}")
    return [term for piece in pieces for term in _parse_term(piece)]


def _parse_term(text: str) -> list[Term]:
    match = _TERM.match(text)
    if match is None:
        raise ValueError(f"cannot read the random-effect term {text!r}: {_GRAMMAR}")
    left, bar, right = match.groups()
    pieces = [piece.strip() for piece in re.sub(r"-\s*1\b", "+ 0", left).split("+")]
    pieces = [piece for piece in pieces if piece]
    bad = [piece for piece in pieces if re.search(r"[*/^(]", piece)]
    if bad or not pieces:
        raise ValueError(
            f"cannot read {bad[0] if bad else left!r} in the term {text!r}: slopes are names of "
            f"features joined by '+'; {_GRAMMAR}"
        )
    slopes = tuple(dict.fromkeys(piece for piece in pieces if piece not in ("0", "1")))
    intercept = "0" not in pieces
    path = [name.strip() for name in right.split("/")]
    if not all(path):
        raise ValueError(f"a grouping factor is missing in the term {text!r}: {_GRAMMAR}")
    factors = [re.sub(r"\s*:\s*", ":", factor) for factor in accumulate(path, "{}:{}".format)]
    return [RandomEffects(factor, slopes, intercept, bar == "|") for factor in factors]


def _check_overlap(terms: list[Term]) -> None:
    taken: dict[tuple[str, str], Term] = {}
    for term in terms:
        # A layer's path may be "1", which is also the name of the intercept.
        kind = "filters of" if isinstance(term, FilterScaleBias) else "layer"
        names = tuple(f"{kind} {path}" for path in term.layers())
        if isinstance(term, RandomEffects):
            names = (*(("1",) if term.intercept else ()), *term.slopes)
        for name in names:
            other = taken.setdefault((term.factor, name), term)
            if other is not term:
                raise ValueError(
                    f"{other} and {term} both give {term.factor!r} the column {name!r}: "
                    "write '0 +' in one of them, or join them"
                )
