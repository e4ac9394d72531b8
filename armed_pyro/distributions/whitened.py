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

from armed_pyro.distributions.small_matrices import multiply, solve, sum_last

__all__ = [
    "LOG_SQRT_2PI",
    "PrecisionNormal",
    "Pushforward",
    "Whitened",
    "WhitenedDiagonal",
    "WhitenedNormal",
]


Vectors = Float[Tensor, "... terms"]
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
    def push(self, noise: Vectors) -> Vectors:
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
        self, scale: Tensor, mean: Vectors, root: Tensor, detached: Whitened | None = None
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

    def push(self, noise: Vectors) -> Vectors:
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

    def _log_prob(self, noise: Vectors) -> Float[Tensor, "..."]:
        """log q(u) of the u made of this noise."""
        constant = LOG_SQRT_2PI * noise.shape[-1]
        return self._log_det() - 0.5 * sum_last(noise**2) - constant

    @abstractmethod
    def _log_det(self) -> Float[Tensor, "..."]:
        """log |C| - log |L|."""

    @abstractmethod
    def _noise(self, z: Vectors) -> Vectors:
        """C' (z - m)."""

    @abstractmethod
    def _scaled(self, z: Vectors) -> Vectors:
        """L z."""

    @abstractmethod
    def _whitened(self, value: Vectors) -> Vectors:
        """L^{-1} u."""

    @abstractmethod
    def _spread(self, noise: Vectors) -> Vectors:
        """C^{-T} noise."""


class WhitenedNormal(Whitened):
    """`Whitened` with lower triangular L and C, of shape "... terms terms"."""

    def _log_det(self) -> Float[Tensor, "..."]:
        log_det = self.root.diagonal(dim1=-2, dim2=-1).log()
        return sum_last(log_det - self.scale.diagonal(dim1=-2, dim2=-1).log())

    def _noise(self, z: Vectors) -> Vectors:
        return multiply(self.root.mT, z - self.mean_whitened)

    def _scaled(self, z: Vectors) -> Vectors:
        return multiply(self.scale, z)

    def _whitened(self, value: Vectors) -> Vectors:
        return solve(self.scale, value[..., None], upper=False)[..., 0]

    def _spread(self, noise: Vectors) -> Vectors:
        return solve(self.root.mT, noise[..., None], upper=True)[..., 0]


class WhitenedDiagonal(Whitened):
    """`Whitened` with diagonal L and C, of shape "... terms": independent effects."""

    def _log_det(self) -> Float[Tensor, "..."]:
        return sum_last((self.root / self.scale).log())

    def _noise(self, z: Vectors) -> Vectors:
        return self.root * (z - self.mean_whitened)

    def _scaled(self, z: Vectors) -> Vectors:
        return self.scale * z

    def _whitened(self, value: Vectors) -> Vectors:
        return value / self.scale

    def _spread(self, noise: Vectors) -> Vectors:
        return noise / self.root


class PrecisionNormal(WhitenedNormal):
    r"""z ~ N(m, P^{-1}) with m = P^{-1} r, drawn as :math:`m + C^{-\top} noise` with C C' = P.

    P is `precision` and r is `pull`; `detached` is as of `Whitened`. The gradient of the density
    of a value that was not drawn here needs P^{-1} only:

    .. math:: \log N(z) = \tfrac12 \log |P| - \tfrac12 (z^\top P z - 2 z^\top r + r^\top P^{-1} r)
        + const, \quad \nabla_P = \tfrac12 (P^{-1} - z z^\top + m m^\top)

    This takes a fourth of the work of the gradient through the Cholesky factor.
    """

    def __init__(
        self,
        precision: Float[Tensor, "... terms terms"],
        pull: Vectors,
        detached: Whitened | None = None,
    ) -> None:
        self.precision, self.pull = precision, pull
        root = torch.linalg.cholesky(precision)
        # Two triangular solves, because `cholesky_solve` would copy the matrix.
        half = torch.linalg.solve_triangular(root, pull[..., None], upper=False)
        mean = torch.linalg.solve_triangular(root.mT, half, upper=True)[..., 0]
        super().__init__(mean.new_ones(()), mean, root, detached)

    def expand(self, batch_shape: Any, _instance: Any = None) -> PrecisionNormal:
        shape = torch.Size(batch_shape)
        if shape == self.batch_shape:
            return self
        detached = None if self.detached is None else self.detached.expand(shape)
        return PrecisionNormal(self.precision, self.pull.expand(shape + self.event_shape), detached)

    def log_prob(self, value: Tensor) -> Tensor:
        drawn = self._drawn is not None and self._drawn[0] is value
        if drawn or not (torch.is_grad_enabled() and self.precision.requires_grad):
            return super().log_prob(value)
        with torch.no_grad():
            density = super().log_prob(value)
        arguments = density, self.precision, self.pull, value, self.root.detach()
        return _Density.apply(*arguments)  # type: ignore[no-untyped-call]

    def _log_det(self) -> Float[Tensor, "..."]:
        return self.root.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def _scaled(self, z: Vectors) -> Vectors:
        return z

    def _whitened(self, value: Vectors) -> Vectors:
        return value


class _Density(torch.autograd.Function):
    """The known log N(z; P^{-1} r, P^{-1}), with gradients in P, r and z."""

    @staticmethod
    def forward(
        ctx: Any, density: Tensor, precision: Tensor, pull: Tensor, z: Tensor, root: Tensor
    ) -> Tensor:
        ctx.save_for_backward(precision, pull, z, root)
        return density.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        precision, pull, z, root = ctx.saved_tensors
        (gradient,) = gradients
        inverse: Tensor = _Inverse.apply(precision, root)  # type: ignore[no-untyped-call]
        mean = (inverse @ pull[..., None])[..., 0]
        # z z' - m m' as (z - m)((z + m) / 2)' and its transpose, without cancellation near z = m.
        off, middle = z - mean, 0.5 * (z + mean)
        outer = off[..., :, None] * middle[..., None, :]
        by_precision = 0.5 * gradient[..., None, None] * (inverse - outer - outer.mT)
        by_pull = gradient[..., None] * off
        by_z = gradient[..., None] * (pull - (precision @ z[..., None])[..., 0])
        return (
            None,
            by_precision.sum_to_size(precision.shape),
            by_pull.sum_to_size(pull.shape),
            by_z.sum_to_size(z.shape),
            None,
        )


class _Inverse(torch.autograd.Function):
    """P^{-1} from the known C, with gradients in P."""

    @staticmethod
    def forward(ctx: Any, precision: Tensor, root: Tensor) -> Tensor:
        inverse = torch.cholesky_inverse(root)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        return -(inverse @ gradients[0] @ inverse), None
