"""Measurements with outliers."""

from __future__ import annotations

from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.distributions.measurement_densities import StudentT
from armed_pyro.families.censorable import CensorableFamily
from armed_pyro.families.family import (
    Array,
    Draws,
    Eta,
    Parameter,
    Parameters,
    RowValues,
    Unit,
    arrays,
    varying,
    without_offset,
)
from armed_pyro.families.gaussian import ResidualScale, symmetric_misfit
from armed_pyro.priors import Priors
from armed_pyro.rows.batch import Rows

__all__ = ["DegreesOfFreedom", "Student"]

# brms' default prior of the degrees of freedom, Gamma(concentration, rate).
DF_PRIOR = (2.0, 0.1)
# The variance is infinite at 2 degrees of freedom. In tables of variance components, it is taken
# at this value if there are fewer.
LEAST_DF = 2.1


class DegreesOfFreedom(Parameter):
    """Degrees of freedom of Student's t: heavy tails below 10, nearly normal above 30."""

    name = "nu"
    start = 8.0

    def sample(self, priors: Priors, unit: Unit) -> Tensor:
        concentration, rate = (unit.new_tensor(value) for value in DF_PRIOR)
        return pyro.sample(self.name, dist.Gamma(concentration, rate))

    def describe(self, priors: Priors, spread: float) -> str:
        return "Gamma({:.4g}, {:.4g})".format(*DF_PRIOR)


@dataclass(frozen=True)
class Student(CensorableFamily):
    """y = eta + residual_scale t, t ~ Student(nu), identity link; eta is the mean if nu > 1."""

    name = "student"
    support = "finite numbers"
    is_log_concave = False
    no_row_effects = "the residual scale"

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return (ResidualScale(), DegreesOfFreedom())

    def outside(self, y: RowValues, data: ClusteredData) -> Bool[Tensor, " rows"]:
        return ~torch.isfinite(y)

    def center(self, data: ClusteredData) -> Float[Tensor, " columns"]:
        """The median, which outliers do not move."""
        return without_offset(data).median().reshape(1)

    def spread(self, data: ClusteredData) -> float:
        """Median absolute deviation, scaled to the sd of normal outcomes; the sd if it is 0."""
        y = without_offset(data)
        spread = 1.4826 * float((y - y.median()).abs().median()) or float(y.std())
        return varying(spread, data)

    def effect_scale(self) -> float:
        return 1.0

    def precision(self, parameters: Parameters) -> Tensor | None:
        """The Fisher information of eta, (nu + 1) / (nu + 3) / scale^2."""
        if not {"nu", "residual_scale"} <= set(parameters):
            return None
        nu = parameters["nu"]
        return (nu + 1) / (nu + 3) / parameters["residual_scale"] ** 2

    def information(self, eta: Eta, parameters: Parameters, rows: Rows) -> Tensor:
        precision = self.precision(parameters)
        if precision is None:
            raise ValueError(f"family {self.name!r} needs its residual_scale and nu")
        value = precision[..., None] if precision.dim() else precision
        return self.or_scores(value.expand_as(eta), eta, parameters, rows)

    def parameter_information(
        self, name: str, eta: Eta, parameters: Parameters, rows: Rows
    ) -> Tensor | None:
        """2 nu / (nu + 3) for log(residual_scale)."""
        if name != "residual_scale":
            return None
        nu = self.value(parameters, "nu")
        return (2 * nu / (nu + 3)).expand(eta.shape[:-1])

    def density(self, eta: Eta, parameters: Parameters, rows: Rows) -> StudentT:
        nu, scale = self.value(parameters, "nu"), self.value(parameters, "residual_scale")
        return StudentT(nu, eta[..., 0], scale)

    def mean(self, eta: Eta, rows: Rows) -> Tensor:
        return eta[..., 0]

    def if_misfit(self, y: Array) -> str:
        return symmetric_misfit(y)

    def residual_variance(self, parameters: Parameters, mean: Draws) -> Draws:
        nu = self.value(parameters, "nu").clamp(min=LEAST_DF)
        return self.value(parameters, "residual_scale") ** 2 * nu / (nu - 2)

    def cdf(self, y: RowValues, eta: Eta, parameters: Parameters, rows: Rows) -> RowValues:
        from scipy import stats  # slow to import

        nu, scale = self.value(parameters, "nu"), self.value(parameters, "residual_scale")
        return torch.from_numpy(stats.t.cdf(*arrays(y, nu, eta[..., 0], scale)))
