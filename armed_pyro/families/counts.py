"""Counts with a log link."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Bool, Float
from numpy.random import Generator
from torch import Tensor

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.distributions.outcome_densities import LogNegativeBinomial, LogPoisson
from armed_pyro.families.family import (
    Array,
    Draws,
    Eta,
    Family,
    Numbers,
    Parameter,
    Parameters,
    RowValues,
    Unit,
    arrays,
    outcome_of,
)
from armed_pyro.priors import Priors
from armed_pyro.rows.batch import Rows

__all__ = ["CountFamily", "NegativeBinomial", "Poisson", "Shape"]

# brms' default prior of the shape, InverseGamma(concentration, rate).
SHAPE_PRIOR = (0.4, 0.3)
# exp(30) is 1e13, beyond any count. Without this limit, one extreme draw of the predictor would
# make the mean infinite.
LARGEST_PREDICTOR = 30


class CountFamily(Family, ABC):
    """Counts with log link: E[y] = exp(eta)."""

    integer = True
    support = "whole numbers from 0 up"
    needs_mean = True
    coefficient_ratio = "incidence-rate ratio"
    statistics = ("mean", "sd", "zeros")

    def outside(self, y: RowValues, data: ClusteredData) -> Bool[Tensor, " rows"]:
        return (y < 0) | (y != y.round())

    def center(self, data: ClusteredData) -> Float[Tensor, " columns"]:
        exposure = torch.ones(()) if data.offset is None else data.offset.exp().mean()
        rate = outcome_of(data).mean() / exposure
        return torch.log(rate.clamp(min=1e-3)).reshape(1)

    def mean(self, eta: Eta, rows: Rows) -> Tensor:
        return torch.exp(eta[..., 0])

    def marginal_mean(
        self, eta: Float[Tensor, "draws rows columns"], variance: Float[Tensor, "draws columns"]
    ) -> Float[Tensor, "draws columns"]:
        """E[exp(eta + u)] = exp(eta + variance / 2), averaged over the rows."""
        return torch.exp(eta.clamp(max=LARGEST_PREDICTOR) + variance[:, None] / 2).mean(-2)


@dataclass(frozen=True)
class Poisson(CountFamily):
    """y ~ Poisson(exp(eta)), log link."""

    name = "poisson"
    is_equidispersed = True
    if_overdispersed = (
        "use family negative_binomial, or add (1 | row), a random intercept of each row"
    )

    def distribution(self, eta: Eta, parameters: Parameters, rows: Rows) -> dist.TorchDistribution:
        return LogPoisson(eta[..., 0])

    def residual_variance(self, parameters: Parameters, mean: Draws) -> Draws:
        return torch.log1p(1 / mean)

    def cdf(self, y: RowValues, eta: Eta, parameters: Parameters, rows: Rows) -> RowValues:
        from scipy import stats  # slow to import

        return torch.from_numpy(stats.poisson.cdf(*arrays(y, self.mean(eta, rows))))

    def simulate(self, rng: Generator, eta: Array, parameters: Numbers, trials: int) -> Array:
        return rng.poisson(np.exp(eta[:, 0]))


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
    """E[y] = mu = exp(eta), Var[y] = mu + mu^2 / shape, log link."""

    name = "negative_binomial"
    no_row_effects = "the shape"

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return (Shape(),)

    def distribution(self, eta: Eta, parameters: Parameters, rows: Rows) -> dist.TorchDistribution:
        return LogNegativeBinomial(eta[..., 0], self.value(parameters, "shape"))

    def residual_variance(self, parameters: Parameters, mean: Draws) -> Draws:
        return torch.log1p(1 / mean + 1 / self.value(parameters, "shape"))

    def cdf(self, y: RowValues, eta: Eta, parameters: Parameters, rows: Rows) -> RowValues:
        from scipy import special  # slow to import

        count, mean, shape = arrays(y, self.mean(eta, rows), self.value(parameters, "shape"))
        # mean / (shape + mean) is exact for large shapes; shape / (shape + mean) is 1 there.
        # The incomplete beta function at counts below 0 is not defined.
        below = special.betaincc(np.maximum(count, 0) + 1, shape, mean / (shape + mean))
        return torch.from_numpy(np.where(count < 0, 0.0, below))

    def simulate(self, rng: Generator, eta: Array, parameters: Numbers, trials: int) -> Array:
        shape = parameters["shape"]
        return rng.poisson(rng.gamma(shape, np.exp(eta[:, 0]) / shape))
