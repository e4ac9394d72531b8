"""Priors of standard deviations, correlations and fixed effects."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor

from armed_pyro._messages import REAL, check_type, unknown

__all__ = ["Exponential", "HalfNormal", "HalfStudentT", "Known", "Priors", "ScalePrior"]

Scales = Float[Tensor, " terms"]


@dataclass(frozen=True)
class ScalePrior(ABC):
    """Prior of one grouping factor's standard deviations, or of a residual sd.

    Attributes
    ----------
    scale : float, mapping of str to float, or None
        Scale of the density in units of the outcome (of the linear predictor for non-gaussian
        families), for a random slope per unit of the feature. A mapping gives one scale per term.
        With None, and for terms that the mapping leaves out, the scale is set from the data. A
        scale that is set is that of the sd in tables: for an intercept, at x = 0.
    """

    scale: float | Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        scales = self.scale.values() if isinstance(self.scale, Mapping) else [self.scale]
        for value in scales:
            if value is not None and not value > 0:
                raise ValueError(f"the scale of a prior must be positive, not {value}")

    def scales(self, terms: Sequence[str], unit: Scales, default: Scales | float) -> Scales:
        """Scale of each term's prior in internal units: ``scale * unit``, or the default.

        `unit` is in internal units per unit of the data. A `ValueError` is raised if the mapping
        names a term that does not exist.
        """
        by_term = (
            self.scale if isinstance(self.scale, Mapping) else dict.fromkeys(terms, self.scale)
        )
        for name in by_term:
            if name not in terms:
                raise unknown("random-effect term for the prior's scale", name, terms)
        chosen = [by_term.get(term) for term in terms]
        defaults = torch.as_tensor(default).expand(len(terms)).tolist()
        values = [
            fallback if value is None else value * factor
            for value, factor, fallback in zip(chosen, unit.tolist(), defaults, strict=True)
        ]
        return unit.new_tensor(values)

    def sets(self, term: str) -> bool:
        """Whether the scale for this term is set, not scaled to the data."""
        scale = self.scale
        return term in scale if isinstance(scale, Mapping) else scale is not None

    def sample(self, name: str, scale: Tensor) -> Tensor:
        """Sample the latent site `name` from this prior, with the shape of `scale`."""
        return pyro.sample(name, self.density(scale).to_event(scale.dim()))

    @abstractmethod
    def density(self, scale: Scales) -> dist.TorchDistribution:
        """The prior with these scales, one independent element per term."""

    @abstractmethod
    def describe(self, scale: float) -> str:
        """The prior with this scale, as text."""


@dataclass(frozen=True)
class HalfNormal(ScalePrior):
    """p(sd) = 2 N(sd; 0, scale^2) for sd > 0: bambi's default family for sds.

    Examples
    --------
    >>> HalfNormal(2.0).describe(2.0)
    'HalfNormal(2)'
    """

    def density(self, scale: Scales) -> dist.TorchDistribution:
        return dist.HalfNormal(scale)

    def describe(self, scale: float) -> str:
        return f"HalfNormal({scale:.4g})"


@dataclass(frozen=True)
class HalfStudentT(ScalePrior):
    """p(sd) = 2 StudentT(sd; df, 0, scale) for sd > 0: brms' default family for sds.

    Examples
    --------
    >>> HalfStudentT(5.0).describe(5.0)
    'HalfStudentT(3, 5)'
    """

    df: float = 3.0

    def density(self, scale: Scales) -> dist.TorchDistribution:
        return dist.FoldedDistribution(dist.StudentT(self.df, scale.new_zeros(()), scale))

    def describe(self, scale: float) -> str:
        return f"HalfStudentT({self.df:.4g}, {scale:.4g})"


@dataclass(frozen=True)
class Exponential(ScalePrior):
    """p(sd) = exp(-sd / scale) / scale for sd > 0: rstanarm's default family for sds.

    Examples
    --------
    >>> Exponential(2.0).describe(2.0)
    'Exponential(mean 2)'
    """

    def density(self, scale: Scales) -> dist.TorchDistribution:
        return dist.Exponential(1 / scale)

    def describe(self, scale: float) -> str:
        return f"Exponential(mean {scale:.4g})"


@dataclass(frozen=True)
class Known(ScalePrior):
    """sd = scale: a standard deviation that is known, not estimated.

    Raises
    ------
    ValueError
        If there is no scale, or a mapping has none for one of the terms.

    Examples
    --------
    >>> Known(0.5).describe(0.5)
    'known: 0.5'
    """

    def __post_init__(self) -> None:
        if self.scale is None:
            raise ValueError("Known needs the standard deviation: Known(0.5)")
        super().__post_init__()

    def scales(self, terms: Sequence[str], unit: Scales, default: Scales | float) -> Scales:
        for term in terms:
            if isinstance(self.scale, Mapping) and term not in self.scale:
                raise ValueError(f"Known gives no standard deviation for the term {term!r}: add it")
        return super().scales(terms, unit, default)

    def sample(self, name: str, scale: Tensor) -> Tensor:
        return pyro.deterministic(name, scale, event_dim=scale.dim())

    def density(self, scale: Scales) -> dist.TorchDistribution:
        return dist.Delta(scale)

    def describe(self, scale: float) -> str:
        return f"known: {scale:.4g}"


@dataclass(frozen=True)
class Priors:
    """Priors of a program; all defaults are weakly informative and scaled to the data.

    Attributes
    ----------
    sd : ScalePrior or mapping of str to ScalePrior
        Prior of the random effects' sds, for all grouping factors or by factor. The default, after
        brms, is a half-t with 3 degrees of freedom. Its scale is sd(outcome) for gaussian outcomes
        and 2.5 on the link scale for others; for slopes, per sd of the feature, and for slopes on
        a hidden layer divided by the square root of its width. A scale that you set for an
        intercept is that of its sd at x = 0. A default scale for an intercept that is correlated
        with slopes is that of its sd at the features' means, and `Fit.summary` says so.
    cor : float
        Concentration eta of the LKJ prior of correlation matrices, p(R) ~ det(R)^(eta - 1): those
        at x = 0 or at the features' means, as the intercept's sd.
    fixed_sd : float
        sd of the normal prior of latent fixed effects, in sds of the outcome (absolute on the link
        scale): of the intercept at the features' means, of slopes per sd of the feature, and of
        the difference between any two levels of a factor. It does not depend on which level is the
        reference.
    residual_sd : ScalePrior
        Prior of the residual sd of gaussian outcomes; default as for `sd`.

    Raises
    ------
    ValueError
        If `cor` or `fixed_sd` is not positive.

    Examples
    --------
    >>> Priors(sd={"site": HalfNormal({"age": 0.5})}).of("site")
    HalfNormal(scale={'age': 0.5})
    """

    sd: ScalePrior | Mapping[str, ScalePrior] = field(default_factory=HalfStudentT)
    cor: float = 1.0
    fixed_sd: float = 2.5
    residual_sd: ScalePrior = field(default_factory=HalfStudentT)

    def __post_init__(self) -> None:
        advice = "Pass HalfNormal(1.0), for example."
        check_type(self.sd, (ScalePrior, Mapping), "sd", advice)
        for factor, prior in self.sd.items() if isinstance(self.sd, Mapping) else ():
            check_type(prior, ScalePrior, f"the prior of the sds of {factor!r}", advice)
        check_type(self.residual_sd, ScalePrior, "residual_sd", advice)
        check_type(self.cor, REAL, "cor")
        check_type(self.fixed_sd, REAL, "fixed_sd")
        if not self.cor > 0:
            raise ValueError(f"the LKJ concentration `cor` must be positive, not {self.cor}")
        if not self.fixed_sd > 0:
            raise ValueError(f"`fixed_sd` must be positive, not {self.fixed_sd}")

    def of(self, factor: str) -> ScalePrior:
        """The prior of this grouping factor's standard deviations."""
        return self.sd if isinstance(self.sd, ScalePrior) else self.sd.get(factor, HalfStudentT())
