"""Priors of a family's further parameters: positive numbers and probabilities."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
from torch import Tensor

from armed_pyro.families.family import Parameter, Unit
from armed_pyro.priors import Priors

__all__ = ["LogNormalParameter", "Share"]


class LogNormalParameter(Parameter):
    """A positive parameter without units: log of it ~ N(log(median), log_sd^2)."""

    def __init__(self, name: str, median: float, log_sd: float) -> None:
        self.name, self.start = name, median
        self.median, self.log_sd = median, log_sd

    def sample(self, priors: Priors, unit: Unit) -> Tensor:
        location, scale = unit.new_tensor(math.log(self.median)), unit.new_tensor(self.log_sd)
        return pyro.sample(self.name, dist.LogNormal(location, scale))

    def describe(self, priors: Priors, spread: float) -> str:
        return f"LogNormal(log({self.median:.4g}), {self.log_sd:.4g})"


class Share(Parameter):
    """A probability, uniform between 0 and 1 in the prior, as in brms."""

    start = 0.2

    def __init__(self, name: str) -> None:
        self.name = name

    def sample(self, priors: Priors, unit: Unit) -> Tensor:
        return pyro.sample(self.name, dist.Beta(unit.new_tensor(1.0), unit.new_tensor(1.0)))

    def describe(self, priors: Priors, spread: float) -> str:
        return "Uniform(0, 1)"

    def simulated(self, dispersion: float) -> float:
        """0.2, as a dispersion is no probability."""
        return self.start
