"""Densities of measurements and proportions, stable in single precision."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor

from armed_pyro.distributions.outcome_densities import SERIES_FROM, log_rising, stirling
from armed_pyro.distributions.survival_densities import Survival
from armed_pyro.distributions.tails import log_tail, nodes_of
from armed_pyro.distributions.zero_densities import log1mexp

__all__ = ["BetaBinomialByMean", "BetaByMean", "GammaByMean", "StudentT"]

# Trials up to which a sum over all counts out of them is taken.
MOST_TRIALS = 200
# exp(30) times the mean is beyond any outcome.
LONGEST = 30.0
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class StudentT(dist.StudentT, Survival):
    """Student's t with location and scale, whose constant is exact for large degrees of freedom."""

    def __init__(self, df: Tensor, location: Tensor, scale: Tensor) -> None:
        self.parts = df, location, scale
        super().__init__(df, location, scale, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> StudentT:
        df, location, scale = self.parts
        return StudentT(df, location.expand(torch.Size(batch_shape)), scale)

    def log_prob(self, value: Tensor) -> Tensor:
        df, location, scale = self.parts
        half = torch.full_like(df, 0.5)
        constant = log_rising(half, df / 2) - scale.log() - HALF_LOG_2PI
        return constant - (df + 1) / 2 * torch.log1p(((value - location) / scale) ** 2 / df)

    positive = False

    def log_survival(self, value: Tensor) -> Tensor:
        """By quadrature of the tail on the side of the value."""
        df, location, scale = self.parts
        z = (value - location) / scale
        far = z.abs()
        slope, square = (df + 1) * far / (df + far**2), (df + 1) / (df + far**2)
        length = (slope**2 + square).rsqrt()
        step = nodes_of(length, power=2)
        inside = df[..., None] + far[..., None] ** 2
        growth = (2 * far[..., None] * step + step**2) / inside
        log_ratio = -(df[..., None] + 1) / 2 * torch.log1p(growth)
        at = self.log_prob(location + scale * far) + scale.log()
        tail = log_tail(at, log_ratio, length, power=2)
        return torch.where(z > 0, tail, log1mexp(tail))

    def exceeded(self, log_share: Tensor) -> Tensor:
        """By scipy, without gradients."""
        from scipy import stats  # slow to import

        df, location, scale = (part.detach().double().cpu().numpy() for part in self.parts)
        share = log_share.detach().double().exp().cpu().numpy()
        return torch.as_tensor(stats.t.isf(share, df, location, scale)).to(log_share)


class GammaByMean(dist.Gamma, Survival):
    """Gamma distribution with a given log-mean and shape; the variance is mean^2 / shape."""

    def __init__(self, log_mean: Float[Tensor, "... rows"], shape: Tensor) -> None:
        self.log_mean, self.size = log_mean, shape
        super().__init__(shape, shape * torch.exp(-log_mean), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> GammaByMean:
        return GammaByMean(self.log_mean.expand(torch.Size(batch_shape)), self.size)

    def log_prob(self, value: Tensor) -> Tensor:
        """No term grows with the shape but shape (r - exp(r) + 1), r = log(y / mean)."""
        ratio = value.log() - self.log_mean
        constant = 0.5 * self.size.log() - HALF_LOG_2PI - stirling_from_zero(self.size)
        return constant + self.size * (ratio - torch.expm1(ratio)) - value.log()

    def log_survival(self, value: Tensor) -> Tensor:
        """By quadrature of the density of log y in the tail on the side of the value."""
        value = value.clamp(min=torch.finfo(value.dtype).tiny)
        ratio = value.log() - self.log_mean
        at = self.log_prob(value) + value.log()
        above, below = ratio.clamp(min=0), ratio.clamp(max=0)
        upper, lower = self._tail(at, above, 1.0), self._tail(at, below, -1.0)
        return torch.where(ratio > 0, upper, log1mexp(lower))

    def _tail(self, at: Tensor, ratio: Tensor, side: float) -> Tensor:
        """log of the integral of the density of log y, from log(mean) + ratio on."""
        rise = ratio.exp()
        length = ((self.size * (1 - rise)) ** 2 + self.size * rise).rsqrt()
        step = side * nodes_of(length, power=1).clamp(max=LONGEST if side > 0 else torch.inf)
        log_ratio = self.size[..., None] * (step - rise[..., None] * torch.expm1(step))
        return log_tail(at, log_ratio, length, power=1)

    def exceeded(self, log_share: Tensor) -> Tensor:
        """By scipy, without gradients."""
        from scipy import stats  # slow to import

        size, log_mean = (
            part.detach().double().cpu().numpy() for part in (self.size, self.log_mean)
        )
        share = log_share.detach().double().exp().cpu().numpy()
        value = stats.gamma.isf(share, size, scale=np.exp(log_mean) / size)
        return torch.as_tensor(value).to(log_share)


class BetaByMean(dist.Beta):
    """Beta distribution with mean mu, given log mu and log(1 - mu), and precision phi."""

    def __init__(self, log_mean: Tensor, log_rest: Tensor, phi: Tensor) -> None:
        self.log_mean, self.log_rest, self.phi = log_mean, log_rest, phi
        # Below this size, the distribution lies at 0 or 1, and its draws would not be numbers.
        least = torch.finfo(log_mean.dtype).tiny ** 0.5
        self.sizes = tuple((log.exp() * phi).clamp(min=least) for log in (log_mean, log_rest))
        super().__init__(self.sizes[0], self.sizes[1], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> BetaByMean:
        shape = torch.Size(batch_shape)
        return BetaByMean(self.log_mean.expand(shape), self.log_rest.expand(shape), self.phi)

    def log_prob(self, value: Tensor) -> Tensor:
        """Phi times a divergence of mu from y, and terms that do not grow with phi."""
        a, b = self.sizes
        log_y, log_rest = value.log(), torch.log1p(-value)
        distance = a * (log_y - self.log_mean) + b * (log_rest - self.log_rest)
        spread = 0.5 * (a.log() + b.log() - self.phi.log()) - HALF_LOG_2PI
        series = stirling_from_zero(self.phi) - stirling_from_zero(a) - stirling_from_zero(b)
        return distance + spread + series - log_y - log_rest

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws strictly between 0 and 1."""
        value = super().sample(sample_shape)
        limits = torch.finfo(value.dtype)
        return value.clamp(limits.tiny, 1 - limits.eps)


class BetaBinomialByMean(dist.TorchDistribution):
    """Successes in `trials` whose probability is `BetaByMean`.

    Terms without mu and phi are computed once per row.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, trials: Tensor, log_mean: Tensor, log_rest: Tensor, phi: Tensor) -> None:
        self.trials, self.log_mean, self.log_rest, self.phi = trials, log_mean, log_rest, phi
        batch = torch.broadcast_shapes(trials.shape, log_mean.shape, phi.shape)
        super().__init__(batch, validate_args=False)

    @property
    def support(self) -> Any:
        """Whole numbers from 0 to the trials."""
        return dist.constraints.integer_interval(0, self.trials)

    @property
    def mean(self) -> Tensor:
        """Trials times mu."""
        return self.trials * self.log_mean.exp()

    @property
    def variance(self) -> Tensor:
        """n mu (1 - mu) (phi + n) / (phi + 1)."""
        inflation = (self.phi + self.trials) / (self.phi + 1)
        return self.mean * self.log_rest.exp() * inflation

    @property
    def mean_information(self) -> Tensor:
        r"""Fisher information of mu, exact for up to `MOST_TRIALS` trials.

        .. math:: \sum_y p(y) (\partial \log p(y) / \partial \mu)^2

        With more trials it is the lower bound :math:`(\partial E[y] / \partial \mu)^2 / Var[y]`.
        """
        n, (a, b) = self.trials, self._sizes()
        most = int(n.max()) if n.numel() else 0
        if most > MOST_TRIALS:
            return n**2 / self.variance.clamp(min=torch.finfo(a.dtype).tiny)
        log_mass, total = self.log_prob(torch.zeros_like(a + n)), torch.zeros_like(a + n)
        slope = torch.digamma(b) - torch.digamma(n + b)  # divided by phi
        for y in range(most + 1):
            total = total + torch.where(n >= y, log_mass.exp() * slope**2, 0.0)
            left = (n - y).clamp(min=1)
            log_mass = log_mass + (left * (y + a) / ((y + 1) * (left - 1 + b))).log()
            slope = slope + 1 / (y + a) + 1 / (left - 1 + b)
        return self.phi**2 * total

    def _sizes(self) -> tuple[Tensor, Tensor]:
        """The sizes mu phi and (1 - mu) phi of the beta distribution."""
        tiny = torch.finfo(self.log_mean.dtype).tiny ** 0.5
        logs = self.log_mean, self.log_rest
        return tuple((log.exp() * self.phi).clamp(min=tiny) for log in logs)  # type: ignore[return-value]

    def expand(self, batch_shape: Any, _instance: Any = None) -> BetaBinomialByMean:
        shape = torch.Size(batch_shape)
        logs = self.log_mean.expand(shape), self.log_rest.expand(shape)
        return BetaBinomialByMean(self.trials, *logs, self.phi)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw a probability, then successes."""
        probability = BetaByMean(self.log_mean, self.log_rest, self.phi).sample(sample_shape)
        trials = self.trials.expand(probability.shape)
        return torch.binomial(trials.contiguous(), probability.contiguous())

    def log_prob(self, value: Tensor) -> Tensor:
        """The binomial density, and rising factorials that go to 0 for large phi."""
        failures = self.trials - value
        constant = torch.lgamma(self.trials + 1) - torch.lgamma(value + 1)
        constant = constant - torch.lgamma(failures + 1)
        a, b = self._sizes()
        spread = log_rising(value, a) + log_rising(failures, b) - log_rising(self.trials, self.phi)
        return constant + value * self.log_mean + failures * self.log_rest + spread


def stirling_from_zero(z: Tensor) -> Tensor:
    """lgamma(z) - (z - 1/2) log(z) + z - log(2 pi) / 2 at every z > 0."""
    small, large = z.clamp(max=SERIES_FROM), z.clamp(min=SERIES_FROM)
    direct = torch.lgamma(small) - (small - 0.5) * small.log() + small - HALF_LOG_2PI
    return torch.where(z < SERIES_FROM, direct, stirling(large))
