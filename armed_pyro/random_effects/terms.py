"""Random-effect terms: what a user writes, and the columns phi(x, h) they stand for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from armed_pyro.program.data_spec import Facts
from armed_pyro.random_effects.design import Block, FilterBlock, InputBlock, LayerBlock

__all__ = ["FilterScaleBias", "RandomEffects", "Slopes", "Term"]


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
