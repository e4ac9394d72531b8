"""Penalised-complexity priors of a process in time: they prefer a process that does not change."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

__all__ = ["PenalisedAutocorrelation", "penalised_range"]


def penalised_range(rate: Tensor) -> dist.TorchDistribution:
    r"""Prior of a range: :math:`\rho^{-1/2} \sim Exponential(rate)`.

    It is the penalised-complexity prior of the range of a process in one dimension, whose base
    model is a constant, with :math:`P(\rho < r) = \exp(-rate / \sqrt r)` (Fuglstad, Simpson,
    Lindgren, Rue 2019, JASA 114(525)).

    >>> float(penalised_range(torch.tensor(3.0)).cdf(torch.tensor(1.0)))  # exp(-3)
    0.04978...
    """
    transform = dist.transforms.PowerTransform(rate.new_tensor(-2.0))
    return dist.TransformedDistribution(dist.Exponential(rate), [transform])


class PenalisedAutocorrelation(dist.TorchDistribution):
    r"""Prior of a lag-one autocorrelation: :math:`\sqrt{1 - \phi} \sim Exponential(rate)`.

    The exponential is truncated to :math:`-1 < \phi < 1`. The base model is a constant, phi = 1
    (Sorbye and Rue 2017, Journal of Time Series Analysis 38(6)).
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.interval(-1.0, 1.0)
    has_rsample = True

    def __init__(self, rate: Tensor) -> None:
        self.rate = rate
        super().__init__(rate.shape, torch.Size(), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> PenalisedAutocorrelation:
        return PenalisedAutocorrelation(self.rate.expand(batch_shape))

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        shape = torch.Size(sample_shape) + self.batch_shape
        uniform = torch.rand(shape, dtype=self.rate.dtype, device=self.rate.device)
        distance = -torch.log1p(-uniform * self._mass()) / self.rate
        return 1 - distance.square()

    def log_prob(self, value: Tensor) -> Tensor:
        distance = (1 - value).sqrt()
        return (self.rate / (2 * distance)).log() - self.rate * distance - self._mass().log()

    def _mass(self) -> Tensor:
        """Mass of the exponential at the distances that are possible."""
        return -torch.expm1(-math.sqrt(2.0) * self.rate)
