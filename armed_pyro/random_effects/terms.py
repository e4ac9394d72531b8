"""Random-effect terms as a user writes them, in lme4's syntax or as objects."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from armed_pyro.data.categories import contrast_of
from armed_pyro.data.feature_scaling import FeatureScaling
from armed_pyro.data.formula import is_written
from armed_pyro.data.formula_functions import is_made
from armed_pyro.networks.tap import Pool, Tap, with_pool
from armed_pyro.random_effects.covariance import (
    Correlated,
    Covariance,
    Independent,
    covariance_named,
)
from armed_pyro.random_effects.design import (
    Block,
    FilterBlock,
    InputBlock,
    LayerBlock,
    ProcessBlock,
)
from armed_pyro.random_effects.process_kernels import kernel_named

__all__ = ["FilterScaleBias", "Process", "RandomEffects", "Slopes", "Term"]

# Characters that a name can have only in backticks, and names that would be read as numbers.
_QUOTED = re.compile(r"[\s+|()/*^]|-\s*1|^\d+$")


class Term(ABC):
    """Random effects of one grouping factor, ``"site"`` or ``"school:class"``.

    A term is a frozen dataclass. Its fields are saved with a fit.
    """

    factor: str

    def groupings(self) -> tuple[str, ...]:
        """The grouping factors that the term needs; by default its factor."""
        return (self.factor,)

    def layers(self) -> tuple[str, ...]:
        """Module paths of the activations that the term needs; none by default."""
        return ()

    def expanded(self, features: FeatureScaling) -> tuple[Term, ...]:
        """The terms that the term is short for, with these features; by default itself."""
        return (self,)

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
        Features, or columns of ``ClusteredData.from_frame(..., slopes=[...])``, by encoded name or
        by table column. A categorical column stands for its contrasts with an intercept; without
        an intercept, the first one stands for the indicators of all its levels.
    correlated : bool
        Whether the effects are correlated, lme4's ``|``, or independent, ``||``. With ``||``, the
        indicators of a categorical column are correlated with each other, as in lme4, and so are
        the columns of a function: ``(f || g)`` is ``(1 | g) + (0 + f | g)``.
    covariance : str, Covariance or None
        Another kind of covariance, by name or with settings, which then replaces `correlated`;
        see `armed_pyro.random_effects.covariance`.
    categorical : tuple of str
        Slopes that must be categorical columns, from ``factor()``.

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
    categorical: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _covariance(self)  # which refuses an unknown name
        if not self.intercept and not self.slopes:
            raise ValueError(f"the term {self} has neither an intercept nor a slope")

    def __str__(self) -> str:
        bar = "|" if self.correlated or self.covariance is not None else "||"
        kind = "" if self.covariance is None else str(covariance_named(self.covariance))
        slopes = [
            f"factor(`{name}`)" if name in self.categorical else quoted(name)
            for name in self.slopes
        ]
        effects = " + ".join(["1" if self.intercept else "0", *slopes])
        return f"{kind}({effects} {bar} {quoted(self.factor)})"

    def expanded(self, features: FeatureScaling) -> tuple[Term, ...]:
        joint = [*self._factors(features), *self._several(features)]
        if self.correlated or self.covariance is not None or not joint:
            return (self,)
        numbers = tuple(slope for slope in self.slopes if slope not in joint)
        whole: list[Term] = [RandomEffects(self.factor, (name,), intercept=False) for name in joint]
        if self.intercept or numbers:
            whole.insert(0, RandomEffects(self.factor, numbers, self.intercept, correlated=False))
        return tuple(whole)

    def block(self, features: FeatureScaling, widths: Mapping[str, int]) -> Block:
        categorical = self._factors(features)
        first = categorical[0] if categorical and not self.intercept else None
        # The indicators of all levels come first, as InputBlock wants them.
        slopes = sorted(self.slopes, key=lambda slope: slope != first)
        columns: list[int] = []
        names, contrasts = ["Intercept"] * self.intercept, 0
        for slope in slopes:
            places, indicators = self._places(slope, features), features.indicators.get(slope, ())
            whole = [features.names[place] for place in places] == list(indicators)
            if slope == first:
                contrasts = 0 if whole else len(places)
                names += indicators
            else:
                places = places[1:] if whole else places
                places = [place for place in places if place not in columns]
                names += [features.names[place] for place in places]
            columns += places
        kind, intercept = _covariance(self), self.intercept
        return InputBlock(features, columns, names, kind, intercept=intercept, contrasts=contrasts)

    def _factors(self, features: FeatureScaling) -> list[str]:
        """The slopes on categorical columns; a ValueError if a column in factor() is none."""
        for name in self.categorical:
            if name not in features.indicators:
                raise ValueError(
                    f"{self} takes {name!r} as categories, but the data have it as numbers: encode "
                    f"them with ClusteredData.from_frame(..., categorical=[{name!r}])"
                )
        return [slope for slope in self.slopes if slope in features.indicators]

    def _several(self, features: FeatureScaling) -> list[str]:
        """The slopes on several columns that one function makes, such as ``poly(x, 2)``."""
        calls = [slope for slope in self.slopes if "(" in slope and ":" not in slope]
        calls = [slope for slope in calls if is_made(slope) or contrast_of(slope) is not None]
        return [slope for slope in calls if len(self._places(slope, features)) > 1]

    def _places(self, slope: str, features: FeatureScaling) -> list[int]:
        """Positions of a slope's columns; a ValueError if there are none."""
        pairs = enumerate(zip(features.names, features.sources, strict=True))
        places = [place for place, names in pairs if slope in names]
        if not places:
            near = get_close_matches(slope, [*features.names, *features.sources], n=1)
            hint = f" (nearest: {near[0]!r})" if near else ""
            raise ValueError(
                f"{self} has a slope on {slope!r}, which is not among the features{hint}; "
                f"the features are: {', '.join(features.names) or 'none'}. A column that is to "
                f"have a random slope only goes to from_frame(..., slopes=[{slope!r}])"
            )
        return places


@dataclass(frozen=True)
class Slopes(Term):
    """phi(x) = h(x), the activations of a hidden layer: nonlinear random slopes.

    Attributes
    ----------
    on : str
        Module path of the layer, such as ``"3"`` or ``"encoder.2"``; ``"lstm[0]"`` is the first
        element of an output that is a tuple, and ``"relu#1"`` that of a module's first call.
    correlated : bool
        Whether the slopes are correlated; independent by default, as layers are wide.
    covariance : str, Covariance or None
        As of `RandomEffects`.
    pool : {"mean", "max", "first", "last", "masked"}, optional
        How tokens, time or space become one vector per row, by default their mean. "first" and
        "last" take one token or moment; "masked" averages the tokens that the network's input
        ``attention_mask`` keeps.

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
    pool: Pool | None = None

    def __post_init__(self) -> None:
        _covariance(self)  # which refuses an unknown name
        Tap.of(*self.layers())  # which refuses an unknown pool

    def __str__(self) -> str:
        more = ", correlated=True" if self.correlated else ""
        more += f", pool={self.pool!r}" if self.pool else ""
        if self.covariance is not None:
            more += f", covariance={self.covariance!r}"
        return f"Slopes({self.factor!r}, on={self.on!r}{more})"

    def layers(self) -> tuple[str, ...]:
        return (with_pool(self.on, self.pool),)

    def block(self, features: FeatureScaling, widths: Mapping[str, int]) -> Block:
        (path,) = self.layers()
        return LayerBlock(path, widths[path], _covariance(self), self.on)


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


@dataclass(frozen=True)
class Process(Term):
    r"""A latent process in time for every cluster, ``ou(time | id)``.

    .. math:: \eta_i = \dots + u_{k}(t_i), \quad u_k(t + d) = a(d) \, u_k(t)
              + sd \sqrt{q(d)} \, \epsilon

    Rows of a cluster that are near in time have similar values of u. With ``ou``, at any times,
    :math:`a = \exp(-d / range), q = 1 - a^2`; with ``ar1``, at times that are whole numbers of
    steps apart, :math:`a = \phi^d, q = 1 - a^2`; with ``rw``, a random walk, :math:`a = 1, q = d`
    in shortest gaps between times. The Pyro site ``<id>:<time>_effect`` has one value for each
    cluster and time of the rows; ``<id>:<time>_sd`` and ``<id>:<time>_range`` (or ``_phi``) are the
    process's parameters, which are among the variance components.

    The priors of range and phi are penalised-complexity priors, which prefer a process that changes
    slowly; `Priors.sd` of the factor ``"id:time"`` is the prior of the sd.

    Attributes
    ----------
    process : {"ou", "ar1", "rw"}
        Kind of process.
    time : str
        Column of times, as numbers. It is among the ``times=[...]`` of `ClusteredData.from_frame`.
    cluster : str
        Grouping factor, ``"id"`` or ``"school:class"``.

    References
    ----------
    Fuglstad, Simpson, Lindgren, Rue (2019), JASA 114(525); Sorbye, Rue (2017), Journal of Time
    Series Analysis 38(6).

    Examples
    --------
    >>> str(Process("ou", time="week", cluster="id"))
    'ou(week | id)'
    """

    process: str
    time: str
    cluster: str

    def __post_init__(self) -> None:
        kernel_named(self.process)  # which refuses an unknown name

    @property
    def factor(self) -> str:  # type: ignore[override]
        """The factor whose clusters are the cells, ``"id:week"``."""
        return f"{self.cluster}:{self.time}"

    def groupings(self) -> tuple[str, ...]:
        return (self.cluster, self.factor)

    def block(self, features: FeatureScaling, widths: Mapping[str, int]) -> Block:
        return ProcessBlock(self.process, f"{self.process}({quoted(self.time)})")

    def __str__(self) -> str:
        return f"{self.process}({quoted(self.time)} | {quoted(self.cluster)})"


def _covariance(term: RandomEffects | Slopes) -> Covariance:
    """The term's kind of covariance, or a `ValueError` for an unknown name."""
    if term.covariance is not None:
        return covariance_named(term.covariance)
    return Correlated() if term.correlated else Independent()


def quoted(name: str) -> str:
    """A name as it is written in a formula, in backticks if it needs them.

    >>> quoted("age"), quoted("weight (kg)")
    ('age', '`weight (kg)`')
    """
    return f"`{name}`" if _QUOTED.search(name) and not is_written(name) else name
