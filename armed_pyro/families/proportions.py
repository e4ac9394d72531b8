"""Proportions: beta, zero-one-inflated beta, and overdispersed counts out of trials."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import cast

import pyro.distributions as dist
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.distributions.measurement_densities import BetaBinomialByMean, BetaByMean
from armed_pyro.distributions.zero_densities import ZeroOneInflated
from armed_pyro.families.family import (
    Array,
    Draws,
    Eta,
    Parameter,
    Parameters,
    RowValues,
    arrays,
    outcome_of,
)
from armed_pyro.families.linked import LinkedFamily
from armed_pyro.families.links import Cloglog, Logit, ProbabilityLink, Probit, by_name
from armed_pyro.families.logistic import TrialsFamily
from armed_pyro.families.parameters import LogNormalParameter, Share
from armed_pyro.rows.batch import Rows

__all__ = ["Beta", "BetaBinomial", "ZeroOneInflatedBeta"]

# Precision of the beta distribution: 2 is nearly uniform, 100 a proportion good to 0.05.
PHI = LogNormalParameter("phi", median=10.0, log_sd=1.5)
LINKS = by_name(Logit(), Probit(), Cloglog())


def _log_sides(family: LinkedFamily, eta: Eta) -> tuple[Tensor, Tensor]:
    link = cast("ProbabilityLink", family.links[family.link])
    return link.log_sides(eta[..., 0])


def _logit_variance(mean: Tensor, phi: Tensor) -> Tensor:
    """Var[log(p / (1 - p))] of a beta variable with this mean and precision."""
    least = torch.finfo(mean.dtype).tiny ** 0.25
    a, b = (mean * phi).clamp(min=least), ((1 - mean) * phi).clamp(min=least)
    return torch.special.polygamma(1, a) + torch.special.polygamma(1, b)


@dataclass(frozen=True)
class _Proportion(LinkedFamily, ABC):
    """Proportions whose part inside (0, 1) is beta with mean mu and precision phi."""

    needs_mean = True
    is_log_concave = False
    links = LINKS

    @property
    def no_row_effects(self) -> str:  # type: ignore[override]
        """The precision hides effects of single rows."""
        return "phi"

    def _beta(self, eta: Eta, parameters: Parameters) -> BetaByMean:
        return BetaByMean(*_log_sides(self, eta), self.value(parameters, "phi"))

    def mean_variance(self, mean: Tensor, parameters: Parameters) -> Tensor:
        return mean * (1 - mean) / (1 + self.value(parameters, "phi"))

    def mean_information(self, mean: Tensor, parameters: Parameters) -> Tensor:
        """phi^2 times the variance of logit(y), exactly."""
        phi = self.value(parameters, "phi")
        return phi**2 * _logit_variance(mean, phi)

    def residual_variance(self, parameters: Parameters, mean: Draws) -> Draws:
        """Variance of logit(y) at the mean outcome; by the delta method for other links."""
        phi = self.value(parameters, "phi")
        if isinstance(self._link, Logit):
            return _logit_variance(mean, phi)
        return super().residual_variance(parameters, mean)

    def _beta_cdf(self, y: RowValues, eta: Eta, parameters: Parameters) -> RowValues:
        from scipy import stats  # slow to import

        a, b = self._beta(eta, parameters).sizes
        return torch.from_numpy(stats.beta.cdf(*arrays(y, a, b)))


@dataclass(frozen=True)
class Beta(_Proportion):
    """y ~ Beta(mu phi, (1 - mu) phi), with Var[y] = mu (1 - mu) / (1 + phi); logit link."""

    link: str = "logit"

    name = "beta"
    support = "numbers between 0 and 1, without 0 and 1 (or family zero_one_inflated_beta)"

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return (PHI,)

    def outside(self, y: RowValues, data: ClusteredData) -> Bool[Tensor, " rows"]:
        return ~((y > 0) & (y < 1))

    def distribution(self, eta: Eta, parameters: Parameters, rows: Rows) -> dist.TorchDistribution:
        return self._beta(eta, parameters)

    def cdf(self, y: RowValues, eta: Eta, parameters: Parameters, rows: Rows) -> RowValues:
        return self._beta_cdf(y, eta, parameters)


@dataclass(frozen=True)
class ZeroOneInflatedBeta(_Proportion):
    """0 or 1 with probability zoi, 1 among these with coi; otherwise `Beta`.

    E[y] = zoi coi + (1 - zoi) mu.
    """

    link: str = "logit"

    name = "zero_one_inflated_beta"
    support = "numbers from 0 to 1"

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return (PHI, Share("zoi"), Share("coi"))

    def outside(self, y: RowValues, data: ClusteredData) -> Bool[Tensor, " rows"]:
        return ~((y >= 0) & (y <= 1))

    def center(self, data: ClusteredData) -> Float[Tensor, " columns"]:
        """That of the proportions between 0 and 1."""
        y = outcome_of(data)
        inside = (y > 0) & (y < 1)
        return self._link.center(y[inside] if inside.any() else y, data.offset).reshape(1)

    def distribution(self, eta: Eta, parameters: Parameters, rows: Rows) -> dist.TorchDistribution:
        zoi, coi = self.value(parameters, "zoi"), self.value(parameters, "coi")
        return ZeroOneInflated(self._beta(eta, parameters), zoi, coi)

    def mean(self, eta: Eta, rows: Rows) -> Tensor:
        raise ValueError(f"the mean of family {self.name!r} depends on zoi: use expected()")

    def expected(self, eta: Eta, parameters: Parameters, rows: Rows) -> Tensor:
        zoi, coi = self.value(parameters, "zoi"), self.value(parameters, "coi")
        return zoi * coi + (1 - zoi) * self._link.inverse(eta[..., 0])

    def mean_information(self, mean: Tensor, parameters: Parameters) -> Tensor:
        inside = 1 - self.value(parameters, "zoi")
        return inside * super().mean_information(mean, parameters)

    def cdf(self, y: RowValues, eta: Eta, parameters: Parameters, rows: Rows) -> RowValues:
        zoi = self.value(parameters, "zoi").double()
        at_one = zoi * self.value(parameters, "coi").double()
        zero, one = (zoi - at_one) * (y >= 0), at_one * (y >= 1)
        return zero + one + (1 - zoi) * self._beta_cdf(y.clamp(0, 1), eta, parameters)

    def cdf_range(
        self, y: RowValues, eta: Eta, parameters: Parameters, rows: Rows
    ) -> tuple[Array, Array]:
        upper = self.cdf(y, eta, parameters, rows)
        zoi = self.value(parameters, "zoi").double()
        at_one = zoi * self.value(parameters, "coi").double()
        jump = (zoi - at_one) * (y == 0) + at_one * (y == 1)
        return (upper - jump).cpu().numpy(), upper.cpu().numpy()


@dataclass(frozen=True)
class BetaBinomial(TrialsFamily):
    """y ~ Binomial(trials, p), p ~ Beta(mu phi, (1 - mu) phi), logit link by default.

    Var[y] = n mu (1 - mu) (phi + n) / (phi + 1): successes of a row are alike.
    """

    link: str = "logit"

    name = "beta_binomial"
    if_more_zeros = "use family zero_inflated(beta_binomial)"
    support = "whole numbers from 0 to the row's trials"
    needs_trials = True
    statistics = ("mean", "sd", "zeros")
    is_log_concave = False
    needs_mean = True
    no_row_effects = "phi"
    if_overdispersed = "more random effects, or a feature of the rows"
    links = LINKS

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return (PHI,)

    def distribution(self, eta: Eta, parameters: Parameters, rows: Rows) -> dist.TorchDistribution:
        return self._density(eta, parameters, rows)

    def _density(self, eta: Eta, parameters: Parameters, rows: Rows) -> BetaBinomialByMean:
        sides, phi = _log_sides(self, eta), self.value(parameters, "phi")
        return BetaBinomialByMean(self._trials(rows.trials), *sides, phi)

    def information(self, eta: Eta, parameters: Parameters, rows: Rows) -> Tensor:
        """(d mu / d eta)^2 times the information of mu."""
        density = self._density(eta, parameters, rows)
        return (self._link.derivative(eta[..., 0]) ** 2 * density.mean_information)[..., None]

    def residual_variance(self, parameters: Parameters, mean: Draws) -> Draws:
        """That of one trial, and for the logit link the variance of the logit of p."""
        single = super().residual_variance(parameters, mean)
        if not isinstance(self._link, Logit):
            return single
        return single + _logit_variance(mean, self.value(parameters, "phi"))

    def cdf(self, y: RowValues, eta: Eta, parameters: Parameters, rows: Rows) -> RowValues:
        double = {name: value.double() for name, value in parameters.items()}
        density = self.distribution(eta.double(), double, rows)
        total, count = torch.zeros_like(y, dtype=torch.float64), 0
        trials = self._trials(rows.trials)
        while count <= (y.max() if len(y) else -1):
            mass = density.log_prob(torch.full_like(total, float(count)).minimum(trials)).exp()
            total = total + torch.where((y >= count) & (trials >= count), mass, 0.0)
            count += 1
        return total.clamp(max=1.0)
