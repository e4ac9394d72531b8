"""Gaussian outcomes."""

from __future__ import annotations

from dataclasses import dataclass

import pyro.distributions as dist
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.families.family import Family, _known, _offset, _outcome
from armed_pyro.priors import Priors
from armed_pyro.rows.batch import Rows


@dataclass(frozen=True)
class Gaussian(Family):
    """y ~ N(eta, residual_sd^2), identity link."""

    name = "gaussian"
    dispersion_name = "residual_sd"
    support = "finite numbers"

    def outside(self, y: Float[Tensor, " rows"], data: ClusteredData) -> Bool[Tensor, " rows"]:
        return ~torch.isfinite(y)

    def center(self, data: ClusteredData) -> Float[Tensor, " columns"]:
        return (_outcome(data) - _offset(data)).mean().reshape(1)

    def spread(self, data: ClusteredData) -> float:
        spread = float((_outcome(data) - _offset(data)).std())
        if spread == 0:
            raise ValueError(f"the outcome {data.outcome_name!r} is the same in every row")
        return spread

    def effect_scale(self) -> float:
        return 1.0

    def dispersion(self, priors: Priors, unit: Float[Tensor, " 1"]) -> Tensor | None:
        prior = priors.residual_sd
        scale = prior.scales([""], unit, self.effect_scale())
        return prior.sample("residual_sd", scale[0])

    def original_dispersion(self, dispersion: Tensor, spread: float) -> Tensor:
        return dispersion * spread

    def precision(self, dispersion: Tensor | None) -> Tensor | None:
        return None if dispersion is None else dispersion**-2

    def distribution(
        self, eta: Float[Tensor, "... rows columns"], dispersion: Tensor | None, rows: Rows
    ) -> dist.TorchDistribution:
        return dist.Normal(eta[..., 0], _known(dispersion, self))

    def mean(self, eta: Float[Tensor, "... rows columns"], rows: Rows) -> Tensor:
        return eta[..., 0]

    def residual_variance(
        self, dispersion: Float[Tensor, " draws"] | None, mean: Float[Tensor, " draws"]
    ) -> Float[Tensor, " draws"]:
        return _known(dispersion, self) ** 2
