"""Ordered categories of a latent variable that is cut at thresholds."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from armed_pyro.distributions.shapes import broadcast_shape

__all__ = ["LINKS", "CumulativeLink", "OrderedCategorical"]

# Limits of exponents: exp(20 + 60) is finite in single precision.
LARGEST_EXPONENT = 20.0
LARGEST_WIDTH = 60.0


class CumulativeLink(ABC):
    """The distribution F of a latent variable's noise: P(y <= j) = F(threshold_j - eta)."""

    variance: float  # of the noise

    @abstractmethod
    def cdf(self, x: Tensor) -> Tensor:
        """F(x)."""

    @abstractmethod
    def quantile(self, p: Tensor) -> Tensor:
        """The inverse of F."""

    @abstractmethod
    def density(self, x: Tensor) -> Tensor:
        """F'(x)."""

    @abstractmethod
    def noise(self, like: Tensor) -> Tensor:
        """Draws from F, of the shape of `like`."""

    @abstractmethod
    def log_interval(
        self, a: Tensor, b: Tensor, width: Tensor, lowest: Bool[Tensor, "..."], highest: Tensor
    ) -> Tensor:
        """log(F(b) - F(a)); a is -infinity for the lowest, b is infinity for the highest category.

        `width` is b - a, and any positive number for these two, whose a or b is finite but unused.
        """


class Logit(CumulativeLink):
    """The standard logistic distribution."""

    variance = math.pi**2 / 3

    def cdf(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)

    def quantile(self, p: Tensor) -> Tensor:
        return torch.logit(p)

    def density(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x) * torch.sigmoid(-x)

    def noise(self, like: Tensor) -> Tensor:
        return torch.logit(_uniform(like))

    def log_interval(
        self, a: Tensor, b: Tensor, width: Tensor, lowest: Bool[Tensor, "..."], highest: Tensor
    ) -> Tensor:
        """F(b) - F(a) = F(b) F(-a) (1 - exp(a - b)), which has no difference of near numbers."""
        below = torch.where(highest, 0.0, logsigmoid(b))
        above = torch.where(lowest, 0.0, logsigmoid(-a))
        return below + above + torch.where(lowest | highest, 0.0, _log1mexp(width))


class Probit(CumulativeLink):
    """The standard normal distribution."""

    variance = 1.0

    def cdf(self, x: Tensor) -> Tensor:
        return torch.special.ndtr(x)

    def quantile(self, p: Tensor) -> Tensor:
        return torch.special.ndtri(p)

    def density(self, x: Tensor) -> Tensor:
        return torch.exp(-0.5 * x**2) / math.sqrt(2 * math.pi)

    def noise(self, like: Tensor) -> Tensor:
        return torch.randn_like(like)

    def log_interval(
        self, a: Tensor, b: Tensor, width: Tensor, lowest: Bool[Tensor, "..."], highest: Tensor
    ) -> Tensor:
        """The interval is taken in the lower tail, where log F is exact."""
        upper = torch.where(lowest | (~highest & (a + b <= 0)), b, -a)
        log_upper = torch.special.log_ndtr(upper)
        ratio = log_upper - torch.special.log_ndtr(upper - width)
        return log_upper + torch.where(lowest | highest, 0.0, _log1mexp(ratio))


class Cloglog(CumulativeLink):
    """The distribution of the least extreme values, F(x) = 1 - exp(-exp(x))."""

    variance = math.pi**2 / 6

    def cdf(self, x: Tensor) -> Tensor:
        return -torch.expm1(-torch.exp(x.clamp(max=LARGEST_EXPONENT)))

    def quantile(self, p: Tensor) -> Tensor:
        return torch.log(-torch.log1p(-p))

    def density(self, x: Tensor) -> Tensor:
        x = x.clamp(max=LARGEST_EXPONENT)
        return torch.exp(x - torch.exp(x))

    def noise(self, like: Tensor) -> Tensor:
        return torch.log(-torch.log(_uniform(like)))

    def log_interval(
        self, a: Tensor, b: Tensor, width: Tensor, lowest: Bool[Tensor, "..."], highest: Tensor
    ) -> Tensor:
        """F(b) - F(a) = exp(-e^a) (1 - exp(-e^a (e^width - 1)))."""
        rate = a.clamp(max=LARGEST_EXPONENT).exp()
        inner = rate * torch.expm1(width.clamp(max=LARGEST_WIDTH))
        excess = torch.where(lowest, b.clamp(max=LARGEST_EXPONENT).exp(), inner)
        below = torch.where(highest, 0.0, _log1mexp(excess))
        return below - torch.where(lowest, 0.0, rate)


LINKS: dict[str, CumulativeLink] = {"logit": Logit(), "probit": Probit(), "cloglog": Cloglog()}


class OrderedCategorical(dist.TorchDistribution):
    """Categories first, first + 1, ... of a latent variable eta + noise, cut at thresholds.

    The thresholds increase along the last dimension. Their other dimensions are those of eta, or
    broadcast with them.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        eta: Float[Tensor, "... rows"],
        thresholds: Float[Tensor, "... boundaries"],
        link: CumulativeLink,
        first: int,
    ) -> None:
        self.eta, self.thresholds, self.link, self.first = eta, thresholds, link, first
        batch = broadcast_shape(eta.shape, thresholds.shape[:-1])
        super().__init__(batch, validate_args=False)

    @property
    def support(self) -> Any:
        """Whole numbers from the first category to the last."""
        last = self.first + self.thresholds.shape[-1]
        return dist.constraints.integer_interval(self.first, last)

    @property
    def probabilities(self) -> Float[Tensor, "... rows categories"]:
        """Probability of each category; exact also where 1 - F(threshold - eta) rounds to 0."""
        ratings = [rating.expand(self.batch_shape) for rating in self._ratings]
        return torch.stack([self.log_prob(rating) for rating in ratings], -1).exp()

    @property
    def _ratings(self) -> Float[Tensor, " categories"]:
        count = self.thresholds.shape[-1] + 1
        return self.first + torch.arange(count).to(self.thresholds)

    @property
    def mean(self) -> Tensor:
        """Expected category as a number."""
        return self.probabilities @ self._ratings

    @property
    def variance(self) -> Tensor:
        """Variance of the category as a number."""
        deviation = self._ratings - self.mean[..., None]
        return (self.probabilities * deviation**2).sum(-1)

    @property
    def information(self) -> Tensor:
        """Fisher information of eta: the sum over categories of (dp / d eta)^2 / p."""
        density = self.link.density(self.thresholds - self.eta[..., None])
        zero = torch.zeros_like(density[..., :1])
        slope = torch.cat([zero, density, zero], -1).diff(dim=-1)
        # Where a probability is 0, so is its slope.
        probabilities = self.probabilities.clamp(min=torch.finfo(slope.dtype).tiny)
        return (slope * (slope / probabilities)).sum(-1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> OrderedCategorical:
        eta = self.eta.expand(torch.Size(batch_shape))
        return OrderedCategorical(eta, self.thresholds, self.link, self.first)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw categories, as numbers."""
        eta = self.eta.expand(self._extended_shape(torch.Size(sample_shape)))
        latent = eta + self.link.noise(eta)
        return self.first + (latent[..., None] > self.thresholds).sum(-1).to(eta)

    def log_prob(self, value: Tensor) -> Tensor:
        boundaries = self.thresholds.shape[-1]
        shape = broadcast_shape(self.batch_shape, value.shape)
        code = (value - self.first).long().expand(shape)
        lowest, highest = code == 0, code == boundaries
        cuts = self.thresholds.expand(*shape, boundaries)
        b = cuts.gather(-1, code.clamp(max=boundaries - 1)[..., None])[..., 0]
        a = cuts.gather(-1, (code - 1).clamp(min=0)[..., None])[..., 0]
        # A width of 0 would have an infinite gradient even where it is not used.
        width = torch.where(lowest | highest, torch.ones_like(b), b - a)
        return self.link.log_interval(a - self.eta, b - self.eta, width, lowest, highest)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(-x)) for x > 0."""
    x = x.clamp(min=torch.finfo(x.dtype).tiny)
    small = x < math.log(2)
    near = torch.log(-torch.expm1(-torch.where(small, x, torch.ones_like(x))))
    far = torch.log1p(-torch.exp(-torch.where(small, torch.ones_like(x), x)))
    return torch.where(small, near, far)


def _uniform(like: Tensor) -> Tensor:
    """Uniform numbers between 0 and 1, neither of which occurs."""
    limits = torch.finfo(like.dtype)
    return torch.rand_like(like).clamp(limits.tiny, 1 - limits.eps)
