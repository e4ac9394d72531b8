"""Positive measurements with a long right tail: lognormal and gamma."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.distributions.measurement_densities import GammaByMean
from armed_pyro.distributions.survival_densities import LogNormalTime
from armed_pyro.families.censorable import CensorableFamily
from armed_pyro.families.family import (
    Array,
    Draws,
    Eta,
    Parameter,
    Parameters,
    RowValues,
    arrays,
    outcome_of,
    varying,
)
from armed_pyro.families.gaussian import NormalResiduals
from armed_pyro.families.linked import MeanFamily
from armed_pyro.families.links import Identity, Log, Softplus, by_name
from armed_pyro.families.parameters import LogNormalParameter
from armed_pyro.rows.batch import Rows

__all__ = ["Gamma", "LogNormal"]


@dataclass(frozen=True)
class LogNormal(NormalResiduals):
    """log y ~ N(eta, residual_sd^2); E[y] = exp(eta + residual_sd^2 / 2)."""

    name = "lognormal"
    support = "positive numbers"
    coefficient_ratio = "ratio of medians"

    def outside(self, y: RowValues, data: ClusteredData) -> Bool[Tensor, " rows"]:
        return ~((y > 0) & torch.isfinite(y))

    def center(self, data: ClusteredData) -> Float[Tensor, " columns"]:
        return _log_outcome(data).mean().reshape(1)

    def spread(self, data: ClusteredData) -> float:
        """sd(log y - offset)."""
        return varying(float(_log_outcome(data).std()), data)

    def density(self, eta: Eta, parameters: Parameters, rows: Rows) -> LogNormalTime:
        return LogNormalTime(eta[..., 0], self.value(parameters, "residual_sd"))

    def mean(self, eta: Eta, rows: Rows) -> Tensor:
        raise ValueError("the mean of family 'lognormal' depends on its sd: use expected()")

    def expected(self, eta: Eta, parameters: Parameters, rows: Rows) -> Tensor:
        return torch.exp(eta[..., 0] + self.value(parameters, "residual_sd") ** 2 / 2)

    def if_misfit(self, y: Array) -> str:
        return "try family gamma, a feature, or a transformed outcome"

    def cdf(self, y: RowValues, eta: Eta, parameters: Parameters, rows: Rows) -> RowValues:
        from scipy import stats  # slow to import

        value, mean, sd = arrays(y, eta[..., 0], self.value(parameters, "residual_sd"))
        with np.errstate(divide="ignore"):
            return torch.from_numpy(stats.norm.cdf(np.log(value.clip(min=0)), mean, sd))


@dataclass(frozen=True)
class Gamma(MeanFamily, CensorableFamily):
    """y ~ Gamma with mean mu and variance mu^2 / shape; log, identity or softplus link."""

    link: str = "log"

    name = "gamma"
    if_heavy_tails = "use family lognormal, whose right tail is heavier"
    support = "positive numbers"
    no_row_effects = "the shape"
    links = by_name(Log(), Identity(), Softplus())

    @property
    def coefficient_ratio(self) -> str:  # type: ignore[override]
        """The ratio of means, for the log link."""
        return "ratio of means" if self.link == "log" else ""

    @property
    def is_log_concave(self) -> bool:  # type: ignore[override]
        """True for the log link."""
        return self.link == "log"

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return (LogNormalParameter("shape", median=2.0, log_sd=1.5),)

    def outside(self, y: RowValues, data: ClusteredData) -> Bool[Tensor, " rows"]:
        return ~((y > 0) & torch.isfinite(y))

    def precision(self, parameters: Parameters) -> Tensor | None:
        """The Fisher information of eta for the log link, the shape."""
        return parameters.get("shape") if self.link == "log" else None

    def density(self, eta: Eta, parameters: Parameters, rows: Rows) -> GammaByMean:
        return GammaByMean(self.log_mean(eta), self.value(parameters, "shape"))

    def information(self, eta: Eta, parameters: Parameters, rows: Rows) -> Tensor:
        value = super().information(eta, parameters, rows)
        return self.or_scores(value, eta, parameters, rows)

    def parameter_information(
        self, name: str, eta: Eta, parameters: Parameters, rows: Rows
    ) -> Tensor | None:
        """shape^2 (trigamma(shape) - 1 / shape) for log(shape)."""
        shape = self.value(parameters, "shape")
        small = shape.clamp(max=100.0)
        exact = small**2 * (torch.special.polygamma(1, small) - 1 / small)
        # Large shapes would cancel.
        return torch.where(shape > 100, 0.5 + 1 / (6 * shape), exact).expand(eta.shape[:-1])

    def if_misfit(self, y: Array) -> str:
        return "try family lognormal, a feature, or a transformed outcome"

    def mean_variance(self, mean: Tensor, parameters: Parameters) -> Tensor:
        return mean**2 / self.value(parameters, "shape")

    def residual_variance(self, parameters: Parameters, mean: Draws) -> Draws:
        """Var(log y), the trigamma function of the shape, for the log link."""
        if self.link == "log":
            return torch.special.polygamma(1, self.value(parameters, "shape"))
        return super().residual_variance(parameters, mean)

    def cdf(self, y: RowValues, eta: Eta, parameters: Parameters, rows: Rows) -> RowValues:
        from scipy import stats  # slow to import

        value, mean, shape = arrays(y, self.mean(eta, rows), self.value(parameters, "shape"))
        return torch.from_numpy(stats.gamma.cdf(value, shape, scale=mean / shape))


def _log_outcome(data: ClusteredData) -> Float[Tensor, " rows"]:
    log_y = outcome_of(data).log()
    return log_y if data.offset is None else log_y - data.offset
