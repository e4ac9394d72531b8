"""Counts: poisson and negative binomial outcomes."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.distributions.outcome_densities import (
    LogNegativeBinomial,
    LogPoisson,
)
from armed_pyro.families.family import Family, _known, _offset, _outcome
from armed_pyro.priors import Priors
from armed_pyro.rows.batch import Rows


class CountFamily(Family, ABC):
    """Families of counts with log link, E[y] = exp(eta)."""

    integer = True
    support = "whole numbers from 0 up"

    def outside(self, y: Float[Tensor, " rows"], data: ClusteredData) -> Bool[Tensor, " rows"]:
        return (y < 0) | (y != y.round())

    def center(self, data: ClusteredData) -> Float[Tensor, " columns"]:
        rate = _outcome(data).mean() / _offset(data).exp().mean()
        return torch.log(rate.clamp(min=1e-3)).reshape(1)

    def mean(self, eta: Float[Tensor, "... rows columns"], rows: Rows) -> Tensor:
        return torch.exp(eta[..., 0])


@dataclass(frozen=True)
class Poisson(CountFamily):
    """y ~ Poisson(exp(eta)), log link."""

    name = "poisson"

    def distribution(
        self, eta: Float[Tensor, "... rows columns"], dispersion: Tensor | None, rows: Rows
    ) -> dist.TorchDistribution:
        return LogPoisson(eta[..., 0])

    def residual_variance(
        self, dispersion: Float[Tensor, " draws"] | None, mean: Float[Tensor, " draws"]
    ) -> Float[Tensor, " draws"]:
        return torch.log1p(1 / mean)


@dataclass(frozen=True)
class NegativeBinomial(CountFamily):
    """E[y] = mu = exp(eta), Var[y] = mu + mu^2 / shape, log link."""

    name = "negative_binomial"
    dispersion_name = "shape"

    def dispersion(self, priors: Priors, unit: Float[Tensor, " 1"]) -> Tensor | None:
        # brms' default prior of the shape.
        prior = dist.InverseGamma(unit.new_tensor(0.4), unit.new_tensor(0.3))
        return pyro.sample("shape", prior)

    def distribution(
        self, eta: Float[Tensor, "... rows columns"], dispersion: Tensor | None, rows: Rows
    ) -> dist.TorchDistribution:
        return LogNegativeBinomial(eta[..., 0], _known(dispersion, self))

    def residual_variance(
        self, dispersion: Float[Tensor, " draws"] | None, mean: Float[Tensor, " draws"]
    ) -> Float[Tensor, " draws"]:
        return torch.log1p(1 / mean + 1 / _known(dispersion, self))
