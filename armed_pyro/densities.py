"""Outcome densities in the parameters that a linear predictor gives."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

__all__ = ["LogNegativeBinomial", "LogPoisson"]


class LogPoisson(dist.Poisson):
    """Poisson distribution of the logarithm of its rate, of which log y! is computed once a row."""

    def __init__(self, log_rate: Tensor) -> None:
        self.log_rate = log_rate
        super().__init__(log_rate.exp(), validate_args=False)  # type: ignore[no-untyped-call]

    def expand(self, batch_shape: Any, _instance: Any = None) -> LogPoisson:
        return LogPoisson(self.log_rate.expand(torch.Size(batch_shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        return value * self.log_rate - self.rate - torch.lgamma(value + 1)


class LogNegativeBinomial(dist.NegativeBinomial):
    """Negative binomial distribution of the logarithm of its mean and of its shape.

    What depends on the shape alone is computed once a row, not for every predictor.
    """

    def __init__(self, log_mean: Tensor, shape: Tensor) -> None:
        self.log_mean, self.shape = log_mean, shape
        super().__init__(shape, logits=log_mean - shape.log(), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> LogNegativeBinomial:
        return LogNegativeBinomial(self.log_mean.expand(torch.Size(batch_shape)), self.shape)

    def log_prob(self, value: Tensor) -> Tensor:
        shape = self.shape
        constant = torch.lgamma(value + shape) - torch.lgamma(shape) - torch.lgamma(value + 1)
        # log(shape + mean), without overflow.
        total = torch.logaddexp(self.log_mean, shape.log())
        return constant + shape * shape.log() + value * self.log_mean - (value + shape) * total
