"""Counts: poisson, and negative binomial with quadratic or linear variance."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Bool
from numpy.random import Generator
from torch import Tensor

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.distributions.outcome_densities import LogNegativeBinomial, LogPoisson
from armed_pyro.families.family import (
    Array,
    Eta,
    Numbers,
    Parameter,
    Parameters,
    RowValues,
    Unit,
    arrays,
)
from armed_pyro.families.linked import MeanFamily
from armed_pyro.families.links import MEAN_LINKS, by_name
from armed_pyro.families.parameters import LogNormalParameter
from armed_pyro.priors import Priors
from armed_pyro.rows.batch import Rows

__all__ = [
    "CountFamily",
    "NegativeBinomial",
    "NegativeBinomial1",
    "Poisson",
    "Shape",
    "zero_and_mean_information",
]

# brms' default prior of the shape, InverseGamma(concentration, rate).
SHAPE_PRIOR = (0.4, 0.3)


@dataclass(frozen=True)
class CountFamily(MeanFamily, ABC):
    """Counts with mean mu: log, identity, sqrt or softplus link."""

    integer = True
    support = "whole numbers from 0 up"
    statistics = ("mean", "sd", "zeros")
    links = by_name(*MEAN_LINKS)

    @property
    def if_more_zeros(self) -> str:  # type: ignore[override]
        """The same family with zeros of their own."""
        return f"if the dispersion is right, use family zero_inflated({self}) or hurdle({self})"

    @property
    def coefficient_ratio(self) -> str:  # type: ignore[override]
        """The ratio of rates, for the log link."""
        return "incidence-rate ratio" if self.link == "log" else ""

    def outside(self, y: RowValues, data: ClusteredData) -> Bool[Tensor, " rows"]:
        return ~torch.isfinite(y) | (y < 0) | (y != y.round())


@dataclass(frozen=True)
class Poisson(CountFamily):
    """y ~ Poisson(mu), by default with mu = exp(eta)."""

    link: str = "log"

    name = "poisson"
    is_equidispersed = True
    if_overdispersed = (
        "use family negative_binomial, or add (1 | row), a random intercept of each row"
    )

    def distribution(self, eta: Eta, parameters: Parameters, rows: Rows) -> dist.TorchDistribution:
        return LogPoisson(self.log_mean(eta))

    def mean_variance(self, mean: Tensor, parameters: Parameters) -> Tensor:
        return mean

    def cdf(self, y: RowValues, eta: Eta, parameters: Parameters, rows: Rows) -> RowValues:
        from scipy import stats  # slow to import

        return torch.from_numpy(stats.poisson.cdf(*arrays(y, self.mean(eta, rows))))

    def simulate(self, rng: Generator, eta: Array, parameters: Numbers, trials: int) -> Array:
        return rng.poisson(self._link.inverse(torch.from_numpy(eta[:, 0])).numpy())


class Shape(Parameter):
    """Shape of a negative binomial outcome: Var[y] = mu + mu^2 / shape."""

    name = "shape"

    def sample(self, priors: Priors, unit: Unit) -> Tensor:
        concentration, rate = (unit.new_tensor(value) for value in SHAPE_PRIOR)
        return pyro.sample(self.name, dist.InverseGamma(concentration, rate))

    def describe(self, priors: Priors, spread: float) -> str:
        return "InverseGamma({:.4g}, {:.4g})".format(*SHAPE_PRIOR)


@dataclass(frozen=True)
class NegativeBinomial(CountFamily):
    """E[y] = mu, Var[y] = mu + mu^2 / shape, by default with mu = exp(eta)."""

    link: str = "log"

    name = "negative_binomial"
    if_overdispersed = "add random effects or features: the outcomes vary more than it allows"
    no_row_effects = "the shape"

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return (Shape(),)

    @property
    def is_log_concave(self) -> bool:  # type: ignore[override]
        """True for the log link."""
        return self.link == "log"

    def distribution(self, eta: Eta, parameters: Parameters, rows: Rows) -> dist.TorchDistribution:
        return LogNegativeBinomial(self.log_mean(eta), self.value(parameters, "shape"))

    def mean_variance(self, mean: Tensor, parameters: Parameters) -> Tensor:
        return mean + mean**2 / self.value(parameters, "shape")

    def cdf(self, y: RowValues, eta: Eta, parameters: Parameters, rows: Rows) -> RowValues:
        return negative_binomial_cdf(y, self.mean(eta, rows), self.value(parameters, "shape"))

    def simulate(self, rng: Generator, eta: Array, parameters: Numbers, trials: int) -> Array:
        shape = parameters["shape"]
        mean = self._link.inverse(torch.from_numpy(eta[:, 0])).numpy()
        return rng.poisson(rng.gamma(shape, mean / shape))


@dataclass(frozen=True)
class NegativeBinomial1(CountFamily):
    """E[y] = mu, Var[y] = mu (1 + phi), by default with mu = exp(eta).

    The variance is linear in the mean, as of glmmTMB's nbinom1: counts of events that come in
    bursts, whose size does not depend on the mean.
    """

    link: str = "log"

    name = "negative_binomial1"
    if_overdispersed = "use family negative_binomial, or add random effects"
    no_row_effects = "phi"
    is_log_concave = False

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return (LogNormalParameter("phi", median=1.0, log_sd=1.5),)

    def distribution(self, eta: Eta, parameters: Parameters, rows: Rows) -> dist.TorchDistribution:
        log_mean, phi = self.log_mean(eta), self.value(parameters, "phi")
        tiny = torch.finfo(eta.dtype).tiny ** 0.5
        return LogNegativeBinomial(log_mean, (log_mean.exp() / phi).clamp(min=tiny))

    def mean_variance(self, mean: Tensor, parameters: Parameters) -> Tensor:
        return mean * (1 + self.value(parameters, "phi"))

    def mean_information(self, mean: Tensor, parameters: Parameters) -> Tensor:
        """The part of mu's Fisher information that is in y and in whether y = 0; nearly all of it.

        All of it would be an infinite sum.
        """
        phi = self.value(parameters, "phi")
        slope = -torch.log1p(phi) / phi  # of log P(0) in mu
        return zero_and_mean_information(
            torch.exp(mean * slope), slope, mean, torch.ones_like(mean), mean * (1 + phi)
        )

    def cdf(self, y: RowValues, eta: Eta, parameters: Parameters, rows: Rows) -> RowValues:
        mean = self.mean(eta, rows)
        return negative_binomial_cdf(y, mean, mean / self.value(parameters, "phi"))


def zero_and_mean_information(
    zero: Tensor, zero_slope: Tensor, mean: Tensor, mean_slope: Tensor, variance: Tensor
) -> Tensor:
    r"""Fisher information that a count's mean and its share of zeros have: a lower bound.

    .. math:: c^\top \Sigma^{-1} c, \quad c = (P(0)', E[y]'), \quad \Sigma = Cov(1[y = 0], y)

    `zero_slope` is the derivative of log P(0), `mean_slope` that of the mean.
    """
    tiny = torch.finfo(zero.dtype).tiny ** 0.5
    positive = (1 - zero).clamp(min=tiny)
    odds = zero / positive
    left = variance - odds * mean**2
    # Nothing but rounding is left where y is 0 or a single other number.
    least = torch.finfo(zero.dtype).eps ** 0.75 * variance
    rest = (mean_slope + odds * zero_slope * mean) ** 2 / left.clamp(min=tiny)
    return odds * zero_slope**2 + torch.where(left > least, rest, 0.0)


def negative_binomial_cdf(y: Tensor, mean: Tensor, shape: Tensor) -> RowValues:
    """P(Y <= y) of a negative binomial variable, in double precision."""
    from scipy import special  # slow to import

    count, mu, size = arrays(y, mean, shape)
    # mu / (size + mu) is exact for large sizes; size / (size + mu) is 1 there.
    # The incomplete beta function at counts below 0 is not defined.
    below = special.betaincc(np.maximum(count, 0) + 1, size, mu / (size + mu))
    return torch.from_numpy(np.where(count < 0, 0.0, below))
