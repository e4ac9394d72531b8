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

__all__ = ["CountFamily", "NegativeBinomial", "NegativeBinomial1", "Poisson", "Shape"]

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

    def cdf(self, y: RowValues, eta: Eta, parameters: Parameters, rows: Rows) -> RowValues:
        mean = self.mean(eta, rows)
        return negative_binomial_cdf(y, mean, mean / self.value(parameters, "phi"))


def negative_binomial_cdf(y: Tensor, mean: Tensor, shape: Tensor) -> RowValues:
    """P(Y <= y) of a negative binomial variable, in double precision."""
    from scipy import special  # slow to import

    count, mu, size = arrays(y, mean, shape)
    # mu / (size + mu) is exact for large sizes; size / (size + mu) is 1 there.
    # The incomplete beta function at counts below 0 is not defined.
    below = special.betaincc(np.maximum(count, 0) + 1, size, mu / (size + mu))
    return torch.from_numpy(np.where(count < 0, 0.0, below))
