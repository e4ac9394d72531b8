"""Outcome densities, parameterised by a linear predictor."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from armed_pyro.distributions.shapes import broadcast_shape

__all__ = ["IndependentNormal", "LogNegativeBinomial", "LogPoisson", "LogitBinomial"]


class LogPoisson(dist.Poisson):
    """Poisson distribution with a given log-rate.

    log y! is computed once per row, not once per draw of the log-rate ("... rows").
    """

    def __init__(self, log_rate: Float[Tensor, "... rows"]) -> None:
        self.log_rate = log_rate
        super().__init__(log_rate.exp(), validate_args=False)  # type: ignore[no-untyped-call]

    def expand(self, batch_shape: Any, _instance: Any = None) -> LogPoisson:
        return LogPoisson(self.log_rate.expand(torch.Size(batch_shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        return value * self.log_rate - self.rate - torch.lgamma(value + 1)


class LogitBinomial(dist.Binomial):
    """Binomial distribution with a given logit of the probability.

    The binomial coefficient is computed once per row, not once per draw of the logit.
    """

    def __init__(self, trials: Float[Tensor, " rows"], logit: Float[Tensor, "... rows"]) -> None:
        self.trials, self.logit = trials, logit
        super().__init__(trials, logits=logit, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> LogitBinomial:
        return LogitBinomial(self.trials, self.logit.expand(torch.Size(batch_shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        constant = torch.lgamma(self.trials + 1) - torch.lgamma(value + 1)
        constant = constant - torch.lgamma(self.trials - value + 1)
        # Two terms of one sign each: y eta - n log(1 + exp(eta)) would cancel at large n and eta.
        failures = self.trials - value
        return constant + value * logsigmoid(self.logit) + failures * logsigmoid(-self.logit)


class LogNegativeBinomial(dist.NegativeBinomial):
    """Negative binomial distribution with a given log-mean and shape.

    The variance is mu + mu^2 / alpha, with the mean mu and the shape alpha. Terms without the mean
    are computed once per draw of the shape and row.
    """

    def __init__(self, log_mean: Float[Tensor, "... rows"], shape: Float[Tensor, "..."]) -> None:
        self.log_mean, self.shape = log_mean, shape
        super().__init__(shape, logits=log_mean - shape.log(), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> LogNegativeBinomial:
        return LogNegativeBinomial(self.log_mean.expand(torch.Size(batch_shape)), self.shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """No term grows with the shape: as it goes to infinity, they become those of a Poisson."""
        shape = self.shape
        excess = self.log_mean - shape.log()
        log_ratio = torch.logaddexp(excess, torch.zeros_like(excess))  # log(1 + mean / shape)
        constant = log_rising(value, shape) - torch.lgamma(value + 1)
        return constant + value * self.log_mean - (value + shape) * log_ratio


# From this shape on, `log_rising` uses Stirling's series, whose five terms are exact to 1e-16.
SERIES_FROM = 16.0
STIRLING = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188)


def log_rising(y: Tensor, shape: Tensor) -> Tensor:
    """lgamma(y + shape) - lgamma(shape) - y log(shape), which goes to 0 for large shapes.

    Differences of lgamma at a large shape would be lost to rounding.
    """
    small, large = shape.clamp(max=SERIES_FROM), shape.clamp(min=SERIES_FROM)
    direct = torch.lgamma(y + small) - torch.lgamma(small) - y * small.log()
    series = (y + large - 0.5) * torch.log1p(y / large) - y
    series = series + stirling(y + large) - stirling(large)
    return torch.where(shape < SERIES_FROM, direct, series)


def stirling(z: Tensor) -> Tensor:
    """lgamma(z) - (z - 1/2) log(z) + z - log(2 pi) / 2, by its series in 1 / z."""
    inverse, total = 1 / z, torch.zeros_like(z)
    for coefficient in reversed(STIRLING):
        total = total * inverse**2 + coefficient
    return total * inverse


class IndependentNormal(dist.TorchDistribution):
    """Independent normal values around a mean, with one sd for all values of a row.

    The sum of squares is computed once, not once per draw of the sd. The mean's last `event_dim`
    dimensions are those of a row's values, which the sd ("..." or "... 1") does not have.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, mean: Tensor, sd: Tensor, event_dim: int) -> None:
        self.mean_values, self.sd = mean, sd
        split = mean.dim() - event_dim
        batch = broadcast_shape(mean.shape[:split], sd.shape)
        super().__init__(batch, mean.shape[split:], validate_args=False)

    @property
    def support(self) -> Any:
        """All real values."""
        return dist.constraints.independent(dist.constraints.real, self.event_dim)

    @property
    def mean(self) -> Tensor:
        """Mean of the values."""
        return self.mean_values

    def expand(self, batch_shape: Any, _instance: Any = None) -> IndependentNormal:
        return IndependentNormal(self.mean_values, self.sd.expand(batch_shape), self.event_dim)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw values, with gradients in the mean and the sd."""
        shape = self._extended_shape(torch.Size(sample_shape))
        over = (...,) + (None,) * self.event_dim
        noise = torch.randn(shape, dtype=self.sd.dtype, device=self.sd.device)
        return self.mean_values + self.sd[over] * noise

    def log_prob(self, value: Tensor) -> Tensor:
        squares = ((value - self.mean_values) ** 2).flatten(-self.event_dim)
        squares = squares.sum(-1, dtype=self.sd.dtype)
        count = self.event_shape.numel()
        constant = 0.5 * count * math.log(2 * math.pi)
        return -0.5 * squares / self.sd**2 - count * self.sd.log() - constant
