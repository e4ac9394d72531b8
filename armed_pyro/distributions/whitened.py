"""Distributions of random effects u = L z, in coordinates z with a standard normal prior."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import constraints

from armed_pyro.distributions.small_matrices import multiply, solve, solve_lower, sum_last

__all__ = ["LOG_SQRT_2PI", "Pushforward", "Whitened", "WhitenedDiagonal", "WhitenedNormal"]


LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


class Pushforward(dist.TorchDistribution, ABC):
    """Distribution of ``push(noise)`` for standard normal noise.

    `push` keeps its last value and noise. The density of that very tensor is computed from the
    noise, which is cheaper than inverting the map, and exact where the map is hardly invertible.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector
    has_rsample = True
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def push(self, noise: Float[Tensor, "... size"]) -> Float[Tensor, "... size"]:
        """The draw made of this noise."""

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        shape = torch.Size(sample_shape) + self.batch_shape + self.event_shape
        noise = torch.randn(shape, dtype=self.dtype, device=self.device)
        if noise.dim() > 1:  # Each term of all clusters is contiguous, as the formulas work on it.
            noise = noise.mT.clone(memory_format=torch.contiguous_format).mT
        return self.push(noise)


class Whitened(Pushforward, ABC):
    r"""u = L z with z = m + C^{-\top} noise.

    L is `scale`, m is `mean` and C is `root`; z's precision is C C'. The prior's covariance L L'
    is never inverted, so a standard deviation near zero is safe.

    `detached` is the same distribution with trained parameters that get no gradients. If given, it
    supplies the density of draws, and gradients stick the landing (Roeder, Wu, Duvenaud 2017).
    """

    def __init__(
        self,
        scale: Tensor,
        mean: Float[Tensor, "... terms"],
        root: Tensor,
        detached: Whitened | None = None,
    ) -> None:
        self.scale, self.mean_whitened, self.root = scale, mean, root
        self.detached = detached
        self.dtype, self.device = mean.dtype, mean.device
        self._drawn: tuple[Tensor, Tensor, Tensor] | None = None
        super().__init__(mean.shape[:-1], mean.shape[-1:], validate_args=False)

    @property
    def mean(self) -> Tensor:
        """Mean of u: L m."""
        return self._scaled(self.mean_whitened)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Whitened:
        shape = torch.Size(batch_shape)
        if shape == self.batch_shape:
            return self
        mean = self.mean_whitened.expand(shape + self.event_shape)
        detached = None if self.detached is None else self.detached.expand(shape)
        return type(self)(self.scale, mean, self.root, detached)

    def push(self, noise: Float[Tensor, "... terms"]) -> Float[Tensor, "... terms"]:
        z = self.mean_whitened + self._spread(noise)
        value = self._scaled(z)
        self._drawn = (value, z, noise)
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        if self._drawn is None or self._drawn[0] is not value:
            return self._log_prob(self._noise(self._whitened(value)))
        _, z, noise = self._drawn
        if self.detached is None:
            return self._log_prob(noise)
        return self.detached._log_prob(self.detached._noise(z))

    def _log_prob(self, noise: Float[Tensor, "... terms"]) -> Float[Tensor, "..."]:
        """log q(u) of the u made of this noise."""
        constant = LOG_SQRT_2PI * noise.shape[-1]
        return self._log_det() - 0.5 * sum_last(noise**2) - constant

    @abstractmethod
    def _log_det(self) -> Float[Tensor, "..."]:
        """log |C| - log |L|."""

    @abstractmethod
    def _noise(self, z: Tensor) -> Tensor:
        """C' (z - m)."""

    @abstractmethod
    def _scaled(self, z: Tensor) -> Tensor:
        """L z."""

    @abstractmethod
    def _whitened(self, value: Tensor) -> Tensor:
        """L^{-1} u."""

    @abstractmethod
    def _spread(self, noise: Tensor) -> Tensor:
        """C^{-T} noise."""


class WhitenedNormal(Whitened):
    """`Whitened` with lower triangular L and C, of shape "... terms terms".

    Examples
    --------
    >>> unit = torch.eye(2)
    >>> WhitenedNormal(2 * unit, torch.ones(2), unit).mean
    tensor([2., 2.])
    """

    def _log_det(self) -> Float[Tensor, "..."]:
        log_det = self.root.diagonal(dim1=-2, dim2=-1).log()
        return sum_last(log_det - self.scale.diagonal(dim1=-2, dim2=-1).log())

    def _noise(self, z: Tensor) -> Tensor:
        return multiply(self.root.mT, z - self.mean_whitened)

    def _scaled(self, z: Tensor) -> Tensor:
        return multiply(self.scale, z)

    def _whitened(self, value: Tensor) -> Tensor:
        return solve_lower(self.scale, value)

    def _spread(self, noise: Tensor) -> Tensor:
        return solve(self.root.mT, noise[..., None], upper=True)[..., 0]


class WhitenedDiagonal(Whitened):
    """`Whitened` with diagonal L and C, of shape "... terms": independent effects.

    Examples
    --------
    >>> WhitenedDiagonal(torch.tensor([2.0]), torch.tensor([3.0]), torch.tensor([1.0])).mean
    tensor([6.])
    """

    def _log_det(self) -> Float[Tensor, "..."]:
        return sum_last((self.root / self.scale).log())

    def _noise(self, z: Tensor) -> Tensor:
        return self.root * (z - self.mean_whitened)

    def _scaled(self, z: Tensor) -> Tensor:
        return self.scale * z

    def _whitened(self, value: Tensor) -> Tensor:
        return value / self.scale

    def _spread(self, noise: Tensor) -> Tensor:
        return noise / self.root
