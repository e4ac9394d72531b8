"""Normal outcomes."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.random import Generator
from torch import Tensor

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.distributions.survival_densities import NormalSurvival
from armed_pyro.families.censorable import CensorableFamily
from armed_pyro.families.family import (
    Array,
    Draws,
    Eta,
    Numbers,
    Parameter,
    Parameters,
    RowValues,
    Unit,
    arrays,
    varying,
    without_offset,
)
from armed_pyro.priors import Known, Priors
from armed_pyro.rows.batch import Rows

__all__ = ["Gaussian", "NormalResiduals", "ResidualScale", "ResidualSd", "ResidualSpread"]


class ResidualSpread(Parameter, ABC):
    """A spread of residuals with the prior `Priors.residual_sd`, in units of the predictor."""

    alias = "sigma"

    def _scale(self, priors: Priors, unit: Unit) -> Tensor:
        return priors.residual_sd.scales([""], unit, Gaussian().effect_scale())[0]

    def sample(self, priors: Priors, unit: Unit) -> Tensor:
        return priors.residual_sd.sample(self.name, self._scale(priors, unit))

    def known(self, priors: Priors, unit: Unit) -> Tensor | None:
        return self._scale(priors, unit) if isinstance(priors.residual_sd, Known) else None

    def describe(self, priors: Priors, spread: float) -> str:
        scale = priors.residual_sd.scale
        if isinstance(scale, float | int):
            return priors.residual_sd.describe(float(scale))
        return f"{priors.residual_sd.describe(spread)}, scaled to the data"

    def original(self, value: Tensor, spread: float) -> Tensor:
        return value * spread


class ResidualSd(ResidualSpread):
    """Residual sd of an outcome, or of its logarithm."""

    name = "residual_sd"


class ResidualScale(ResidualSpread):
    """Residual scale of a distribution with heavy tails, below its sd."""

    name = "residual_scale"


@dataclass(frozen=True)
class NormalResiduals(CensorableFamily, ABC):
    """An outcome that is, in units of eta, normal with the variance residual_sd^2."""

    no_row_effects = "the residual sd"

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return (ResidualSd(),)

    def effect_scale(self) -> float:
        return 1.0

    def precision(self, parameters: Parameters) -> Tensor | None:
        sd = parameters.get("residual_sd")
        return None if sd is None else sd**-2

    def information(self, eta: Eta, parameters: Parameters, rows: Rows) -> Tensor:
        sd = self.value(parameters, "residual_sd")
        return (sd[..., None] if sd.dim() else sd).expand_as(eta) ** -2

    def parameter_information(
        self, name: str, eta: Eta, parameters: Parameters, rows: Rows
    ) -> Tensor | None:
        """2 for log(residual_sd)."""
        return torch.full_like(eta[..., 0], 2.0)

    def residual_variance(self, parameters: Parameters, mean: Draws) -> Draws:
        return self.value(parameters, "residual_sd") ** 2


@dataclass(frozen=True)
class Gaussian(NormalResiduals):
    """y ~ N(eta, residual_sd^2), identity link."""

    name = "gaussian"
    support = "finite numbers"
    has_residual_variance = True
    if_heavy_tails = "use family student, or look at the outlying rows"

    @property
    def is_quadratic(self) -> bool:  # type: ignore[override]
        """True unless outcomes are censored."""
        return not self.censored

    def outside(self, y: RowValues, data: ClusteredData) -> Bool[Tensor, " rows"]:
        return ~torch.isfinite(y)

    def center(self, data: ClusteredData) -> Float[Tensor, " columns"]:
        return without_offset(data).mean().reshape(1)

    def spread(self, data: ClusteredData) -> float:
        """sd(y - offset)."""
        return varying(float(without_offset(data).std()), data)

    def precision_weighted(self, parameters: Parameters, weights: RowValues) -> Parameters:
        return {**parameters, "residual_sd": self.value(parameters, "residual_sd") / weights.sqrt()}

    def density(self, eta: Eta, parameters: Parameters, rows: Rows) -> NormalSurvival:
        return NormalSurvival(eta[..., 0], self.value(parameters, "residual_sd"))

    def mean(self, eta: Eta, rows: Rows) -> Tensor:
        return eta[..., 0]

    def if_misfit(self, y: Array) -> str:
        return symmetric_misfit(y)

    def residual_rows(self, parameters: Parameters) -> dict[str, Draws]:
        sd = self.value(parameters, "residual_sd")
        return {"sd": sd, "variance": sd**2}

    def cdf(self, y: RowValues, eta: Eta, parameters: Parameters, rows: Rows) -> RowValues:
        from scipy import stats  # slow to import

        outcome, mean, sd = arrays(y, self.mean(eta, rows), self.value(parameters, "residual_sd"))
        return torch.from_numpy(stats.norm.cdf(outcome, mean, sd))

    def simulate(self, rng: Generator, eta: Array, parameters: Numbers, trials: int) -> Array:
        return rng.normal(eta[:, 0], parameters["residual_sd"])


def symmetric_misfit(y: Array) -> str:
    """The family to try in place of a symmetric one, by the range of the outcomes."""
    if (y > 0).all() and (y < 1).all():
        return "use family beta, for proportions"
    if (y >= 0).all() and (y <= 1).all() and (np.mod(y, 1) > 0).any():
        return "use family zero_one_inflated_beta, for proportions from 0 to 1"
    if (y >= 0).all() and (y == y.round()).all():
        return "use family negative_binomial, for counts"
    if (y > 0).all():
        return "use family gamma or lognormal, for positive outcomes with a long right tail"
    if (y >= 0).all() and (y == 0).any():
        return "use family hurdle(gamma) or hurdle(lognormal), for outcomes that are 0 or positive"
    return "try another family, or transform the outcome"
