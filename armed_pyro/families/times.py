"""Times to an event: exponential, Weibull and log-logistic."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from armed_pyro._messages import check_known
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.distributions.survival_densities import LogLogisticTime, LogTime, WeibullTime
from armed_pyro.families.censorable import CensorableFamily
from armed_pyro.families.family import (
    Array,
    Draws,
    Eta,
    Parameter,
    Parameters,
    RowValues,
    mean_offset,
    outcome_of,
)
from armed_pyro.families.parameters import LogNormalParameter
from armed_pyro.rows.batch import Rows
from armed_pyro.rows.censoring import EVENT

__all__ = ["Exponential", "LogLogistic", "TimeFamily", "Weibull", "mean_time"]

# Variances of the standard distributions of log t: extreme value and logistic.
EXTREME_VALUE, LOGISTIC = math.pi**2 / 6, math.pi**2 / 3


@dataclass(frozen=True)
class TimeFamily(CensorableFamily, ABC):
    """A positive time to an event."""

    support = "positive numbers"

    def outside(self, y: RowValues, data: ClusteredData) -> Bool[Tensor, " rows"]:
        return ~((y > 0) & torch.isfinite(y))

    def check(self, data: ClusteredData) -> None:
        """Raise a `ValueError` as `Family.check`, and if no row has an event."""
        super().check(data)
        if data.status is not None and not (data.status == EVENT).any() and not _has_ends(data):
            raise ValueError(
                f"the outcome {data.outcome_name!r} is censored in every row, so that nothing is "
                "known of the times: check the status, which is 1 where the event was observed"
            )

    def center(self, data: ClusteredData) -> Float[Tensor, " columns"]:
        """Log of the mean time of exponential times, less the mean offset."""
        return (mean_time(data).log() - mean_offset(data)).reshape(1)

    def mean(self, eta: Eta, rows: Rows) -> Tensor:
        raise ValueError(f"the mean of family {self.name!r} depends on its shape: use expected()")

    def if_misfit(self, y: Array) -> str:
        return "try family piecewise_exponential, whose hazard has no fixed form, or lognormal"


@dataclass(frozen=True)
class _LogTimeFamily(TimeFamily, ABC):
    """A time whose logarithm is eta plus noise, divided by a shape."""

    # Variance of the noise, and the Fisher information of its location.
    noise: ClassVar[float]
    noise_information: ClassVar[float] = 1.0
    coefficient_ratio = "time ratio"

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return (LogNormalParameter("shape", median=1.0, log_sd=1.0),)

    @abstractmethod
    def density(self, eta: Eta, parameters: Parameters, rows: Rows) -> LogTime:
        """p(t | eta, shape)."""

    def precision(self, parameters: Parameters) -> Tensor | None:
        """The Fisher information of eta."""
        shape = parameters.get("shape")
        return None if shape is None else self.noise_information * shape**2

    def information(self, eta: Eta, parameters: Parameters, rows: Rows) -> Tensor:
        shape = self.value(parameters, "shape")
        value = self.noise_information * shape**2
        return (value[..., None] if value.dim() else value).expand_as(eta)

    def residual_variance(self, parameters: Parameters, mean: Draws) -> Draws:
        """Variance of log t given eta."""
        return self.noise / self.value(parameters, "shape") ** 2


@dataclass(frozen=True)
class Exponential(TimeFamily):
    r"""A time with a constant hazard: S(t) = exp(-t / exp(eta)), with mean exp(eta).

    exp(coefficient) is a ratio of times, and exp(-coefficient) a ratio of hazards.

    Examples
    --------
    >>> Exponential().coefficient_ratio
    'time ratio'
    """

    name = "exponential"
    coefficient_ratio = "time ratio"

    def density(self, eta: Eta, parameters: Parameters, rows: Rows) -> WeibullTime:
        return WeibullTime(eta[..., 0], torch.ones((), dtype=eta.dtype, device=eta.device))

    def mean(self, eta: Eta, rows: Rows) -> Tensor:
        return torch.exp(eta[..., 0])

    def information(self, eta: Eta, parameters: Parameters, rows: Rows) -> Tensor:
        return torch.ones_like(eta)

    def residual_variance(self, parameters: Parameters, mean: Draws) -> Draws:
        """Variance of log t given eta."""
        return torch.full_like(mean, EXTREME_VALUE)

    def if_misfit(self, y: Array) -> str:
        return "use family weibull, whose hazard may rise or fall, or piecewise_exponential"


@dataclass(frozen=True)
class Weibull(_LogTimeFamily):
    r"""A time whose hazard rises (shape above 1) or falls with a power of time.

    .. math:: S(t) = \exp\left(-(t / e^\eta)^{shape}\right) \quad \text{(link time)}, \qquad
        S(t) = \exp\left(-e^\eta (t / t_0)^{shape}\right) \quad \text{(link hazard)}

    With the link "time" (accelerated failure time), exp(coefficient) is a ratio of times. With the
    link "hazard" (proportional hazards), written ``family="weibull(hazard)"``, it is a ratio of
    hazards, and a random intercept is a log-normal frailty. Both are the same model apart from
    their priors: a coefficient of the hazard is minus the shape times that of the time.

    Parameters
    ----------
    link : {"time", "hazard"}
        The meaning of eta.
    unit : float
        t_0, the time at which exp(eta) is the cumulative hazard. It is set to the mean time when
        a program is bound.

    Raises
    ------
    ValueError
        If the link is unknown.

    Examples
    --------
    >>> Weibull().coefficient_ratio, Weibull("hazard").coefficient_ratio
    ('time ratio', 'hazard ratio')
    """

    link: str = "time"
    unit: float = 0.0

    name = "weibull"
    noise = EXTREME_VALUE

    def __post_init__(self) -> None:
        check_known(f"link of family {self.name!r}", [self.link], ("time", "hazard"))

    def __str__(self) -> str:
        return self.name if self.link == "time" else f"{self.name}({self.link})"

    @property
    def _of_hazard(self) -> bool:
        return self.link == "hazard"

    @property
    def coefficient_ratio(self) -> str:  # type: ignore[override]
        """Ratio of times or of hazards, as the link says."""
        return f"{self.link} ratio"

    def bound(self, data: ClusteredData) -> Self:
        """The family for these rows, with the unit of time of the hazard unless it has one."""
        family = super().bound(data)
        if not self._of_hazard or self.unit:
            return family
        return replace(family, unit=float(mean_time(data)))

    def center(self, data: ClusteredData) -> Float[Tensor, " columns"]:
        if not self._of_hazard:
            return super().center(data)
        unit = self.unit or float(mean_time(data))
        return (math.log(unit) - mean_time(data).log() - mean_offset(data)).reshape(1)

    def density(self, eta: Eta, parameters: Parameters, rows: Rows) -> WeibullTime:
        shape, location = self.value(parameters, "shape"), eta[..., 0]
        if self._of_hazard:
            location = math.log(self.unit or 1.0) - location / shape
        return WeibullTime(location, shape)

    def expected(self, eta: Eta, parameters: Parameters, rows: Rows) -> Tensor:
        return self.density(eta, parameters, rows).mean

    def precision(self, parameters: Parameters) -> Tensor | None:
        return None if self._of_hazard else super().precision(parameters)

    def information(self, eta: Eta, parameters: Parameters, rows: Rows) -> Tensor:
        return (
            torch.ones_like(eta) if self._of_hazard else super().information(eta, parameters, rows)
        )

    def residual_variance(self, parameters: Parameters, mean: Draws) -> Draws:
        """Variance of log t given eta; of the hazard, that of -shape log t."""
        if self._of_hazard:
            return torch.full_like(self.value(parameters, "shape"), EXTREME_VALUE)
        return super().residual_variance(parameters, mean)


@dataclass(frozen=True)
class LogLogistic(_LogTimeFamily):
    r"""A time whose hazard rises and then falls: S(t) = 1 / (1 + (t / exp(eta))^shape).

    exp(eta) is the median, and exp(coefficient) a ratio of times. Predictions are medians, as the
    mean is infinite for shapes up to 1.

    Examples
    --------
    >>> [parameter.name for parameter in LogLogistic().parameters]
    ['shape']
    """

    name = "loglogistic"
    noise = LOGISTIC
    noise_information = 1 / 3

    def density(self, eta: Eta, parameters: Parameters, rows: Rows) -> LogLogisticTime:
        return LogLogisticTime(eta[..., 0], self.value(parameters, "shape"))

    def mean(self, eta: Eta, rows: Rows) -> Tensor:
        """The median."""
        return torch.exp(eta[..., 0])


def mean_time(data: ClusteredData) -> Float[Tensor, ""]:
    """Total time at risk divided by the number of events, the mean of exponential times."""
    y = outcome_of(data)
    if data.status is None:
        return y.mean()
    entry = 0.0 if data.entry is None else data.entry.clamp(min=0)
    ends = y if data.upper is None else (y + data.upper) / 2
    known = (data.status == EVENT) | (data.status > EVENT)
    return (ends - entry).sum() / known.sum().clamp(min=1)


def _has_ends(data: ClusteredData) -> bool:
    """Whether the upper end of an outcome is known."""
    return data.status is not None and bool((data.status > EVENT).any())
