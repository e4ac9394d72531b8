"""Densities with probabilities of their own at 0, or at 0 and 1."""

from __future__ import annotations

from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor

__all__ = ["Hurdle", "ZeroInflated", "ZeroOneInflated", "log1mexp"]

# Attempts to draw a positive outcome by rejection. Rows that are left have a small mean, for which
# a search of the distribution function is short.
ATTEMPTS = 64


class _Mixture(dist.TorchDistribution):
    """A base distribution, mixed with a probability `share` of zeros."""

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, base: Any, share: Tensor) -> None:
        self.base, self.share = base, share
        super().__init__(torch.broadcast_shapes(base.batch_shape, share.shape), validate_args=False)

    @property
    def support(self) -> Any:
        """That of the base distribution, with 0."""
        return dist.constraints.real

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        return type(self)(self.base.expand(torch.Size(batch_shape)), self.share)

    def _zero(self, sample_shape: Any) -> Tensor:
        """Whether each draw is one of the mixture's zeros."""
        shape = self._extended_shape(torch.Size(sample_shape))
        return torch.rand(shape, dtype=self.share.dtype, device=self.share.device) < self.share


class ZeroInflated(_Mixture):
    r"""0 with probability zi, otherwise a count from the base distribution.

    .. math:: P(0) = zi + (1 - zi) f(0), \quad P(y) = (1 - zi) f(y)
    """

    @property
    def mean(self) -> Tensor:
        """(1 - zi) times the mean of the base distribution."""
        return (1 - self.share) * self.base.mean

    @property
    def variance(self) -> Tensor:
        """(1 - zi) (Var + zi mean^2), of the base distribution."""
        return (1 - self.share) * (self.base.variance + self.share * self.base.mean**2)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw from the base distribution, and replace draws by 0."""
        with torch.no_grad():
            zero = self._zero(sample_shape)
            value = self.base.sample(torch.Size(sample_shape))
            return torch.where(zero, torch.zeros_like(value), value)

    def log_prob(self, value: Tensor) -> Tensor:
        density = torch.log1p(-self.share) + self.base.log_prob(value)
        # The share is above the least positive number, whose logarithm is finite.
        log_share = self.share.clamp(min=torch.finfo(self.share.dtype).tiny).log()
        both = torch.logaddexp(log_share.expand_as(density), density)
        return torch.where(value == 0, both, density)


class Hurdle(_Mixture):
    r"""0 with probability hu, otherwise a positive outcome from the base distribution.

    .. math:: P(0) = hu, \quad p(y) = (1 - hu) f(y) / (1 - f(0)), \quad y > 0

    with f(0) = 0 for a continuous base distribution.
    """

    def __init__(self, base: Any, share: Tensor, *, is_count: bool) -> None:
        self.is_count = is_count
        super().__init__(base, share)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Hurdle:
        base = self.base.expand(torch.Size(batch_shape))
        return Hurdle(base, self.share, is_count=self.is_count)

    def log_zero(self) -> Tensor:
        """log f(0) of a count."""
        return self.base.log_prob(torch.zeros_like(self.base.mean))

    def _positive(self) -> Tensor:
        """P(y > 0) of the base distribution."""
        if not self.is_count:
            return torch.ones_like(self.base.mean)
        tiny = torch.finfo(self.share.dtype).tiny ** 0.5
        return (-torch.expm1(self.log_zero())).clamp(min=tiny)

    @property
    def mean(self) -> Tensor:
        """(1 - hu) mean / (1 - f(0)), with the mean of the base distribution."""
        return (1 - self.share) * self.base.mean / self._positive()

    @property
    def variance(self) -> Tensor:
        """E[y^2] - E[y]^2."""
        square = self.base.variance + self.base.mean**2
        return (1 - self.share) * square / self._positive() - self.mean**2

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw positive outcomes, and replace draws by 0."""
        with torch.no_grad():
            zero = self._zero(sample_shape)
            value = self.base.sample(torch.Size(sample_shape))
            value = self._above_zero(value, sample_shape) if self.is_count else value
            return torch.where(zero, torch.zeros_like(value), value)

    def _above_zero(self, value: Tensor, sample_shape: Any) -> Tensor:
        """Draws without zeros: other draws in their place, or the inverse distribution function."""
        for _ in range(ATTEMPTS):
            if (value > 0).all():
                return value
            value = torch.where(value > 0, value, self.base.sample(torch.Size(sample_shape)))
        uniform = torch.rand_like(value) * self._positive()
        count, reached = torch.ones_like(value), torch.zeros_like(value)
        left = value == 0
        while left.any():
            reached = reached + self.base.log_prob(count).exp()
            done = left & (reached >= uniform)
            # Beyond the mean, the mass of a count that adds nothing ends the search.
            done |= left & (count > 50 + 10 * self.base.mean)
            value = torch.where(done, count, value)
            left, count = left & ~done, count + 1
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        tiny = torch.finfo(self.share.dtype).tiny
        inside = torch.where(value > 0, value, torch.ones_like(value))
        density = torch.log1p(-self.share) + self.base.log_prob(inside)
        if self.is_count:
            density = density - log1mexp(self.log_zero())
        return torch.where(value == 0, self.share.clamp(min=tiny).log(), density)


class ZeroOneInflated(_Mixture):
    """0 or 1 with probability zoi, and 1 among these with coi; otherwise between 0 and 1."""

    def __init__(self, base: Any, share: Tensor, ones: Tensor) -> None:
        self.ones = ones
        super().__init__(base, share)

    def expand(self, batch_shape: Any, _instance: Any = None) -> ZeroOneInflated:
        return ZeroOneInflated(self.base.expand(torch.Size(batch_shape)), self.share, self.ones)

    @property
    def mean(self) -> Tensor:
        """Zoi coi + (1 - zoi) mu."""
        return self.share * self.ones + (1 - self.share) * self.base.mean

    @property
    def variance(self) -> Tensor:
        """E[y^2] - E[y]^2."""
        square = self.base.variance + self.base.mean**2
        return self.share * self.ones + (1 - self.share) * square - self.mean**2

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw from the base distribution, and replace draws by 0 or 1."""
        with torch.no_grad():
            end, value = self._zero(sample_shape), self.base.sample(torch.Size(sample_shape))
            one = torch.rand_like(value) < self.ones
            return torch.where(end, one.to(value), value)

    def log_prob(self, value: Tensor) -> Tensor:
        tiny = torch.finfo(self.share.dtype).tiny
        is_end = (value == 0) | (value == 1)
        inside = torch.where(is_end, torch.full_like(value, 0.5), value)
        density = torch.log1p(-self.share) + self.base.log_prob(inside)
        log_share = self.share.clamp(min=tiny).log()
        zero = log_share + torch.log1p(-self.ones)
        one = log_share + self.ones.clamp(min=tiny).log()
        return torch.where(value == 0, zero, torch.where(value == 1, one, density))


def log1mexp(log_p: Tensor) -> Tensor:
    """log(1 - exp(log_p)) for log_p < 0, without rounding at either end."""
    least = torch.finfo(log_p.dtype).tiny ** 0.5
    log_p = log_p.clamp(max=-least)
    near = torch.log(-torch.expm1(log_p.clamp(min=-1)))
    return torch.where(log_p > -0.7, near, torch.log1p(-torch.exp(log_p.clamp(max=-0.5))))
