"""Random-effect terms: what a user writes, and the columns phi(x, h) they stand for."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from jaxtyping import Float
from torch import Tensor, nn

from armed_pyro.facts import Facts
from armed_pyro.taps import pooled

__all__ = [
    "Block",
    "FilterBlock",
    "FilterScaleBias",
    "LinearBlock",
    "RandomEffects",
    "Slopes",
    "Term",
    "parse_terms",
]


class Term(ABC):
    """Random effects of one grouping factor with a covariance matrix of their own."""

    factor: str

    @abstractmethod
    def layers(self) -> tuple[str, ...]:
        """Module paths whose activations the term needs."""

    @abstractmethod
    def block(self, facts: Facts, widths: Mapping[str, int]) -> Block:
        """The term laid out for some data and a network with these activation widths."""

    @abstractmethod
    def __str__(self) -> str:
        """The term as its user would write it."""


@dataclass(frozen=True)
class RandomEffects(Term):
    """phi(x) = (1, x_1, ..., x_q): random intercept and slopes on input features.

    Attributes
    ----------
    factor : str
        Grouping factor, ``"site"`` or ``"school:class"``.
    slopes : tuple of str
        Features, by encoded name or by column (a categorical column brings all its contrasts).
    intercept : bool
        Whether there is a random intercept.
    correlated : bool
        Whether the effects are correlated, lme4's ``|``, or independent, ``||``.

    Examples
    --------
    >>> str(RandomEffects("site", ("age",)))
    '(1 + age | site)'
    """

    factor: str
    slopes: tuple[str, ...] = ()
    intercept: bool = True
    correlated: bool = True

    def __post_init__(self) -> None:
        if not self.intercept and not self.slopes:
            raise ValueError(f"the term {self} has neither an intercept nor a slope")

    def __str__(self) -> str:
        bar = "|" if self.correlated else "||"
        return f"({' + '.join(['1' if self.intercept else '0', *self.slopes])} {bar} {self.factor})"

    def layers(self) -> tuple[str, ...]:
        return ()

    def block(self, facts: Facts, widths: Mapping[str, int]) -> Block:
        columns: list[int] = []
        for slope in self.slopes:
            found = [
                position
                for position, names in enumerate(
                    zip(facts.feature_names, facts.sources, strict=True)
                )
                if slope in names
            ]
            if not found:
                known = [*facts.feature_names, *facts.sources]
                near = get_close_matches(slope, known, n=1)
                hint = f" (nearest: {near[0]!r})" if near else ""
                raise ValueError(
                    f"{self} has a slope on {slope!r}, which is not among the features{hint}; "
                    f"the features are: {', '.join(facts.feature_names) or 'none'}"
                )
            columns += [position for position in found if position not in columns]
        return InputBlock(
            names=[facts.feature_names[column] for column in columns],
            columns=columns,
            mean=[facts.feature_mean[column] for column in columns],
            scale=[facts.feature_scale[column] for column in columns],
            intercept=self.intercept,
            correlated=self.correlated,
        )


@dataclass(frozen=True)
class Slopes(Term):
    """phi(x) = h(x), the activations of a hidden layer: nonlinear random slopes.

    Attributes
    ----------
    factor : str
        Grouping factor.
    on : str
        Module path of the layer, such as ``"3"`` or ``"encoder.2"``; feature maps are averaged
        over space.
    correlated : bool
        Whether the slopes are correlated; independent by default, as layers are wide.

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

    def __str__(self) -> str:
        more = ", correlated=True" if self.correlated else ""
        return f"Slopes({self.factor!r}, on={self.on!r}{more})"

    def layers(self) -> tuple[str, ...]:
        return (self.on,)

    def block(self, facts: Facts, widths: Mapping[str, int]) -> Block:
        return LayerBlock(self.on, widths[self.on], self.correlated)


@dataclass(frozen=True)
class FilterScaleBias(Term):
    r"""Filters of a layer scaled and shifted by cluster.

    .. math:: h'_{ic} = (1 + a_{kc}) h_{ic} + b_{kc}, \quad k = g(i), \quad
              a_{kc} \sim N(0, sd_{a,c}^2), \quad b_{kc} \sim N(0, sd_{b,c}^2)

    for every filter c (or unit) of a layer's output h, by hook: the network is not edited. After
    an instance or batch normalisation, effects are in units of the filters' sds; elsewhere in
    those of the layer's output. The sds' prior scale is 0.3 unless `Priors` says otherwise.

    Attributes
    ----------
    factor : str
        Grouping factor.
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

    def block(self, facts: Facts, widths: Mapping[str, int]) -> Block:
        return FilterBlock(self.at, widths[self.at])


class Block(nn.Module, ABC):
    """Effects of one term, laid out for given data.

    Attributes
    ----------
    names : tuple of str
        One an effect.
    correlated : bool
        Whether the effects are correlated.
    width : int
        Effects that stand for one thing together: those of the units of a hidden layer.
    to_original : Float[Tensor, "columns columns"]
        u_original = to_original @ u_internal, apart from the outcome's spread.
    """

    names: tuple[str, ...]
    correlated: bool
    width: int = 1
    to_original: Tensor

    def __init__(
        self, names: Iterable[str], correlated: bool, to_original: Float[Tensor, "q q"]
    ) -> None:
        super().__init__()
        self.names = tuple(names)
        self.correlated = correlated and len(self.names) > 1
        self.register_buffer("to_original", to_original, persistent=False)


class LinearBlock(Block, ABC):
    """Columns phi, which effects multiply in the linear predictor."""

    @abstractmethod
    def columns(
        self, x: Tensor, activations: Mapping[str, Tensor]
    ) -> Float[Tensor, "rows columns"]:
        """phi of some rows with standardised features x."""

    def paths(self) -> tuple[str, ...]:
        """Module paths of the activations that it reads."""
        return ()


class InputBlock(LinearBlock):
    """Intercept and (standardised) input features.

    In a correlated block with an intercept the features are centred: the model is the same, as
    the covariance matrix is full, and inference is easier. Otherwise they are only scaled,
    because independence of intercept and slope holds at x = 0, as in lme4.
    """

    shift: Tensor
    index: Tensor

    def __init__(
        self,
        names: list[str],
        columns: list[int],
        mean: list[float],
        scale: list[float],
        intercept: bool,
        correlated: bool,
    ) -> None:
        centred = intercept and correlated
        slope = torch.diag(1 / torch.tensor(scale, dtype=torch.float64))
        if intercept:
            size = len(names) + 1
            to_original = torch.eye(size, dtype=torch.float64)
            to_original[1:, 1:] = slope
            if centred:
                to_original[0, 1:] = -torch.tensor(mean, dtype=torch.float64) @ slope
        else:
            to_original = slope
        super().__init__(["Intercept"] * intercept + names, correlated, to_original)
        self.intercept = intercept
        shift = torch.tensor(mean, dtype=torch.float64) @ slope
        self.register_buffer("shift", torch.zeros_like(shift) if centred else shift, False)
        self.register_buffer("index", torch.tensor(columns, dtype=torch.long), False)

    def columns(
        self, x: Tensor, activations: Mapping[str, Tensor]
    ) -> Float[Tensor, "rows columns"]:
        slopes = [x[:, self.index] + self.shift] if len(self.index) else []
        return torch.cat([x.new_ones(len(x), 1)] * self.intercept + slopes, -1)


class LayerBlock(LinearBlock):
    """Activations of a hidden layer."""

    def __init__(self, path: str, width: int, correlated: bool) -> None:
        names = [f"{path}[{unit}]" for unit in range(width)]
        super().__init__(names, correlated, torch.eye(width, dtype=torch.float64))
        self.path = path
        self.width = width

    def columns(
        self, x: Tensor, activations: Mapping[str, Tensor]
    ) -> Float[Tensor, "rows columns"]:
        return pooled(activations[self.path])

    def paths(self) -> tuple[str, ...]:
        return (self.path,)


class FilterBlock(Block):
    """Scales, then biases, of a layer's filters."""

    def __init__(self, path: str, filters: int) -> None:
        names = [f"{path}.{kind}[{c}]" for kind in ("scale", "bias") for c in range(filters)]
        super().__init__(names, False, torch.eye(2 * filters, dtype=torch.float64))
        self.path = path
        self.width = 2 * filters


_TERM = re.compile(r"^\s*\(?([^()|]+?)(\|\|?)([^()|]+?)\)?\s*$")
_GRAMMAR = "write it as '(1 + x | site)', '(1 + x || site)', '(0 + x | site)' or '(1 | a/b)'"


def parse_terms(terms: str | Term | Iterable[str | Term]) -> tuple[Term, ...]:
    """Random-effect terms from lme4's syntax.

    ``(1 + x | g)`` correlated intercept and slope (the intercept is implied, ``0 +`` removes it),
    ``(1 + x || g)`` independent ones, ``(1 | a/b)`` nested, short for ``(1 | a)`` and
    ``(1 | a:b)``. Several terms may stand in one string, joined by ``+``.

    Raises
    ------
    ValueError
        If a string does not follow the syntax, or two terms give a factor the same column.

    Examples
    --------
    >>> [str(term) for term in parse_terms("(1 + age | site) + (1 | school/class)")]
    ['(1 + age | site)', '(1 | school)', '(1 | school:class)']
    """
    given = [terms] if isinstance(terms, str | Term) else list(terms)
    parsed: list[Term] = []
    for term in given:
        if isinstance(term, Term):
            parsed.append(term)
        elif isinstance(term, str):
            pieces = re.findall(r"\([^()]*\)", term) if term.strip().startswith("(") else [term]
            rest = re.sub(r"\([^()]*\)", "", term).replace("+", "").strip()
            if not pieces or (rest and term.strip().startswith("(")):
                raise ValueError(f"cannot read the random-effect term {term!r}: {_GRAMMAR}")
            for piece in pieces:
                parsed += _parse(piece)
        else:
            raise TypeError(f"a random-effect term is a string or a Term, not {term!r}")
    _check_overlap(parsed)
    return tuple(parsed)


def _parse(text: str) -> list[Term]:
    match = _TERM.match(text)
    if match is None:
        raise ValueError(f"cannot read the random-effect term {text!r}: {_GRAMMAR}")
    left, bar, right = match.groups()
    pieces = [piece.strip() for piece in re.sub(r"-\s*1\b", "+ 0", left).split("+")]
    if not all(pieces):
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
    factors = [":".join(path[: depth + 1]) for depth in range(len(path))]
    factors = [re.sub(r"\s*:\s*", ":", factor) for factor in factors]
    return [RandomEffects(factor, slopes, intercept, bar == "|") for factor in factors]


def _check_overlap(terms: list[Term]) -> None:
    taken: dict[tuple[str, str], Term] = {}
    for term in terms:
        # A layer may be called "1", as the intercept is.
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
