"""Distributions of random effects in the coordinates in which their prior is standard normal."""

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

__all__ = ["Pushforward", "WhitenedDiagonal", "WhitenedNormal"]


LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


class Pushforward(dist.TorchDistribution, ABC):
    """Distribution of ``push(noise)`` for standard normal noise.

    The density of a value that `push` has just made is computed from what it was made of, which
    is cheaper than inverting the map, and exact where the map is hardly invertible.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector
    has_rsample = True
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def push(self, noise: Float[Tensor, "... size"]) -> Float[Tensor, "... size"]:
        """The value that this noise becomes."""

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        shape = torch.Size(sample_shape) + self.batch_shape + self.event_shape
        noise = torch.randn(shape, dtype=self.dtype, device=self.device)
        if noise.dim() > 1:  # one term of all clusters side by side, as they are computed
            noise = noise.mT.clone(memory_format=torch.contiguous_format).mT
        return self.push(noise)


class Whitened(Pushforward, ABC):
    r"""u = L z with z = m + C^{-\top} noise.

    No inverse of the prior's covariance L L' is needed, so a standard deviation near zero is safe.

    Parameters
    ----------
    scale : Tensor
        L.
    mean : Float[Tensor, "... terms"]
        m.
    root : Tensor
        C, with z's precision C C'.
    held : Whitened, optional
        A distribution of the same values and L, by whose density this one's draws are judged:
        with its trained parameters held fixed, gradients stick the landing.
    """

    def __init__(
        self, scale: Tensor, mean: Tensor, root: Tensor, held: Whitened | None = None
    ) -> None:
        self.scale, self.mean_whitened, self.root, self.held = scale, mean, root, held
        self.dtype, self.device = mean.dtype, mean.device
        self._drawn: tuple[Tensor, Tensor, Tensor] | None = None
        super().__init__(mean.shape[:-1], mean.shape[-1:], validate_args=False)

    @property
    def mean(self) -> Tensor:
        """L m."""
        return self._scaled(self.mean_whitened)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Whitened:
        shape = torch.Size(batch_shape)
        if shape == self.batch_shape:
            return self
        mean = self.mean_whitened.expand(shape + self.event_shape)
        held = None if self.held is None else self.held.expand(shape)
        return type(self)(self.scale, mean, self.root, held)

    def push(self, noise: Float[Tensor, "... terms"]) -> Float[Tensor, "... terms"]:
        z = self.mean_whitened + self._spread(noise)
        value = self._scaled(z)
        self._drawn = (value, z, noise)
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        if self._drawn is None or self._drawn[0] is not value:
            return self._log_prob(self._noise(self._whitened(value)))
        _, z, noise = self._drawn
        if self.held is None:
            return self._log_prob(noise)
        return self.held._log_prob(self.held._noise(z))

    def _log_prob(self, noise: Float[Tensor, "... terms"]) -> Float[Tensor, "..."]:
        """log-density of the value that this noise becomes."""
        constant = LOG_SQRT_2PI * noise.shape[-1]
        return self._log_det() - 0.5 * sum_last(noise**2) - constant

    @abstractmethod
    def _log_det(self) -> Float[Tensor, "..."]:
        """log |C| - log |L|."""

    @abstractmethod
    def _noise(self, z: Tensor) -> Tensor: ...

    @abstractmethod
    def _scaled(self, z: Tensor) -> Tensor: ...

    @abstractmethod
    def _whitened(self, value: Tensor) -> Tensor: ...

    @abstractmethod
    def _spread(self, noise: Tensor) -> Tensor: ...


class WhitenedNormal(Whitened):
    """Correlated effects: L and C lower triangular, of shape "... terms terms"."""

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
    """Independent effects: L and C vectors of shape "... terms"."""

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
