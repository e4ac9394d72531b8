"""Links between the mean of an outcome and its linear predictor."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

__all__ = ["Link", "MeanLink", "ProbabilityLink", "by_name"]

# exp(30) is 1e13, beyond any count. Without this limit, one extreme draw of the predictor would
# make the mean infinite.
LARGEST_PREDICTOR = 30.0
# Nodes of the Gauss-Hermite rule for means over normal random effects. The error of a probability
# is at most 7e-5 at an sd of 4 (logit).
NODES = 41


class Link(ABC):
    """A monotone function between the mean mu of an outcome and its predictor eta.

    `name` is its name in ``family="bernoulli(probit)"``, `ratio` the meaning of exp(coefficient),
    and `effect_scale` the default prior scale of random effects, in units of `spread`.
    """

    name: ClassVar[str]
    ratio: ClassVar[str] = ""
    effect_scale: ClassVar[float] = 2.5

    @abstractmethod
    def inverse(self, eta: Tensor) -> Tensor:
        """mu, the mean at a predictor."""

    @abstractmethod
    def derivative(self, eta: Tensor) -> Tensor:
        """d mu / d eta."""

    @abstractmethod
    def of(self, mean: Tensor) -> Tensor:
        """eta, the predictor at a mean inside the link's range."""

    @abstractmethod
    def center(self, y: Tensor, offset: Tensor | None) -> Tensor:
        """The predictor of the mean of `y`, less the rows' offset."""

    def spread(self, y: Tensor) -> float:
        """Predictor units per standardised unit of the program."""
        return 1.0

    def marginal_mean(
        self, eta: Float[Tensor, "draws rows"], variance: Float[Tensor, " draws"]
    ) -> Float[Tensor, " draws"]:
        """E[mu(eta + u)] with u ~ N(0, variance), averaged over the rows."""
        nodes, weights = _rule(eta)
        sd, total = variance.sqrt()[:, None], torch.zeros_like(eta[:, 0])
        for node, weight in zip(nodes, weights, strict=True):
            total = total + weight * self.inverse(eta + node * sd).mean(-1)
        return total

    def latent_variance(self, mean: Tensor, variance: Tensor) -> Tensor:
        r"""Variance of an outcome on the scale of eta, by the delta method.

        .. math:: Var[y] / (d\mu / d\eta)^2

        References
        ----------
        Nakagawa, Johnson and Schielzeth (2017), J. R. Soc. Interface 14: 20170213.
        """
        return variance / self.derivative(self.of(mean)) ** 2


def _rule(like: Tensor) -> tuple[list[float], list[float]]:
    """Nodes and weights of the Gauss-Hermite rule for a standard normal variable."""
    import numpy as np  # only here

    nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
    return nodes.tolist(), (weights / weights.sum()).tolist()


# --- links of positive means ----------------------------------------------------------------------


class MeanLink(Link, ABC):
    """A link whose mean is positive at every predictor."""

    @abstractmethod
    def log_inverse(self, eta: Tensor) -> Tensor:
        """log mu, without rounding where mu is near 0."""

    def center(self, y: Tensor, offset: Tensor | None) -> Tensor:
        mean = self.of(y.mean().clamp(min=1e-3))
        return mean if offset is None else mean - offset.mean()


class Log(MeanLink):
    """mu = exp(eta)."""

    name = "log"

    def inverse(self, eta: Tensor) -> Tensor:
        return torch.exp(eta)

    def log_inverse(self, eta: Tensor) -> Tensor:
        return eta

    def derivative(self, eta: Tensor) -> Tensor:
        return torch.exp(eta)

    def of(self, mean: Tensor) -> Tensor:
        return torch.log(mean)

    def center(self, y: Tensor, offset: Tensor | None) -> Tensor:
        """Log of the rate: the offset is a log-exposure."""
        exposure = torch.ones(()) if offset is None else offset.exp().mean()
        return torch.log((y.mean() / exposure).clamp(min=1e-3))

    def marginal_mean(
        self, eta: Float[Tensor, "draws rows"], variance: Float[Tensor, " draws"]
    ) -> Float[Tensor, " draws"]:
        """E[exp(eta + u)] = exp(eta + variance / 2), averaged over the rows."""
        return torch.exp(eta.clamp(max=LARGEST_PREDICTOR) + variance[:, None] / 2).mean(-1)

    def latent_variance(self, mean: Tensor, variance: Tensor) -> Tensor:
        """log(1 + Var[y] / mu^2), the variance of log y if y were lognormal."""
        return torch.log1p(variance / mean**2)


class Identity(MeanLink):
    """mu = eta, where eta is above `LEAST`; below, mu = LEAST exp(eta / LEAST - 1)."""

    name = "identity"
    effect_scale = 1.0
    LEAST: ClassVar[float] = 0.01

    def inverse(self, eta: Tensor) -> Tensor:
        return _positive(eta, self.LEAST)

    def log_inverse(self, eta: Tensor) -> Tensor:
        return _log_positive(eta, self.LEAST)

    def derivative(self, eta: Tensor) -> Tensor:
        return _slope(eta, self.LEAST)

    def of(self, mean: Tensor) -> Tensor:
        return _positive_inverse(mean, self.LEAST)

    def spread(self, y: Tensor) -> float:
        return float(y.std()) or 1.0


class Sqrt(MeanLink):
    """mu = r^2, with r = eta above `LEAST`; below, r = LEAST exp(eta / LEAST - 1)."""

    name = "sqrt"
    effect_scale = 1.0
    LEAST: ClassVar[float] = 0.1

    def inverse(self, eta: Tensor) -> Tensor:
        return _positive(eta, self.LEAST) ** 2

    def log_inverse(self, eta: Tensor) -> Tensor:
        return 2 * _log_positive(eta, self.LEAST)

    def derivative(self, eta: Tensor) -> Tensor:
        return 2 * _positive(eta, self.LEAST) * _slope(eta, self.LEAST)

    def of(self, mean: Tensor) -> Tensor:
        return _positive_inverse(mean.sqrt(), self.LEAST)

    def spread(self, y: Tensor) -> float:
        return float(y.sqrt().std()) or 1.0


class Softplus(MeanLink):
    """mu = log(1 + exp(eta)): the identity for large means, and exp(eta) for small ones."""

    name = "softplus"
    effect_scale = 1.0

    def inverse(self, eta: Tensor) -> Tensor:
        return softplus(eta)

    def log_inverse(self, eta: Tensor) -> Tensor:
        # Below -15, log(softplus(eta)) is eta - exp(eta) / 2 to single precision.
        low = eta < -15
        return torch.where(
            low, eta - eta.clamp(max=0).exp() / 2, softplus(eta.clamp(min=-15)).log()
        )

    def derivative(self, eta: Tensor) -> Tensor:
        return torch.sigmoid(eta)

    def of(self, mean: Tensor) -> Tensor:
        return mean + torch.log(-torch.expm1(-mean))

    def spread(self, y: Tensor) -> float:
        return float(y.std()) or 1.0


def _positive(eta: Tensor, least: float) -> Tensor:
    """eta above `least`; below, a positive function with the same value and slope there."""
    return torch.where(eta > least, eta, least * torch.exp(eta.clamp(max=least) / least - 1))


def _log_positive(eta: Tensor, least: float) -> Tensor:
    low = eta.clamp(max=least) / least - 1 + math.log(least)
    return torch.where(eta > least, eta.clamp(min=least).log(), low)


def _slope(eta: Tensor, least: float) -> Tensor:
    below = torch.exp(eta.clamp(max=least) / least - 1)
    return torch.where(eta > least, torch.ones_like(eta), below)


def _positive_inverse(mean: Tensor, least: float) -> Tensor:
    low = least * (mean.clamp(max=least).log() - math.log(least) + 1)
    return torch.where(mean > least, mean, low)


# --- links of probabilities -----------------------------------------------------------------------


class ProbabilityLink(Link, ABC):
    """A link whose mean is between 0 and 1.

    `residual_variance` is the variance of the latent variable that is cut at 0, or None if the
    delta method gives the variance on the scale of eta.
    """

    residual_variance: ClassVar[float | None] = None

    @abstractmethod
    def log_sides(self, eta: Tensor) -> tuple[Tensor, Tensor]:
        """log mu and log(1 - mu), without rounding at either end."""

    def logit(self, eta: Tensor) -> Tensor:
        """log(mu / (1 - mu))."""
        inside, outside = self.log_sides(eta)
        return inside - outside

    def center(self, y: Tensor, offset: Tensor | None) -> Tensor:
        mean = self.of(y.mean().clamp(0.001, 0.999))
        return mean if offset is None else mean - offset.mean()


class Logit(ProbabilityLink):
    """mu = 1 / (1 + exp(-eta))."""

    name = "logit"
    ratio = "odds ratio"
    residual_variance = math.pi**2 / 3

    def inverse(self, eta: Tensor) -> Tensor:
        return torch.sigmoid(eta)

    def derivative(self, eta: Tensor) -> Tensor:
        return torch.sigmoid(eta) * torch.sigmoid(-eta)

    def of(self, mean: Tensor) -> Tensor:
        return torch.logit(mean)

    def log_sides(self, eta: Tensor) -> tuple[Tensor, Tensor]:
        return logsigmoid(eta), logsigmoid(-eta)

    def logit(self, eta: Tensor) -> Tensor:
        return eta


class Probit(ProbabilityLink):
    """mu = Phi(eta), the normal distribution function."""

    name = "probit"
    residual_variance = 1.0

    def inverse(self, eta: Tensor) -> Tensor:
        return torch.special.ndtr(eta)

    def derivative(self, eta: Tensor) -> Tensor:
        return torch.exp(-0.5 * eta**2) / math.sqrt(2 * math.pi)

    def of(self, mean: Tensor) -> Tensor:
        return torch.special.ndtri(mean)

    def log_sides(self, eta: Tensor) -> tuple[Tensor, Tensor]:
        return torch.special.log_ndtr(eta), torch.special.log_ndtr(-eta)


class Cloglog(ProbabilityLink):
    """mu = 1 - exp(-exp(eta)): an event in unit time at the rate exp(eta)."""

    name = "cloglog"
    ratio = "hazard ratio"
    residual_variance = math.pi**2 / 6

    def inverse(self, eta: Tensor) -> Tensor:
        return -torch.expm1(-self._rate(eta))

    def _rate(self, eta: Tensor) -> Tensor:
        return torch.exp(eta.clamp(max=LARGEST_PREDICTOR))

    def derivative(self, eta: Tensor) -> Tensor:
        rate = self._rate(eta)
        return rate * torch.exp(-rate)

    def of(self, mean: Tensor) -> Tensor:
        return torch.log(-torch.log1p(-mean))

    def log_sides(self, eta: Tensor) -> tuple[Tensor, Tensor]:
        # log mu is eta - rate / 2 for small rates, and exp(-rate) is below rounding from 4 up.
        rate = torch.exp(eta.clamp(-15, 4))
        high = torch.log(-torch.expm1(-rate))
        low = eta - torch.exp(eta.clamp(max=0)) / 2
        return torch.where(eta < -15, low, high), -self._rate(eta)


class LogProbability(ProbabilityLink):
    """mu = exp(eta) up to 1 - `LEAST`; above, 1 - mu decays exponentially, with the same slope."""

    name = "log"
    ratio = "risk ratio"
    LEAST: ClassVar[float] = 1e-3

    def inverse(self, eta: Tensor) -> Tensor:
        return self.log_sides(eta)[0].exp()

    def derivative(self, eta: Tensor) -> Tensor:
        low, high = self._parts(eta)
        return torch.where(self._is_high(eta), (1 - self.LEAST) * high.exp() / self.LEAST, low)

    def _is_high(self, eta: Tensor) -> Tensor:
        return eta > math.log1p(-self.LEAST)

    def _parts(self, eta: Tensor) -> tuple[Tensor, Tensor]:
        """exp(eta) of the lower part, and log(1 - mu) of the upper part."""
        edge = math.log1p(-self.LEAST)
        excess = (eta - edge).clamp(min=0)
        high = math.log(self.LEAST) - excess * (1 - self.LEAST) / self.LEAST
        return torch.exp(eta.clamp(max=edge)), high

    def of(self, mean: Tensor) -> Tensor:
        high = math.log(self.LEAST) - torch.log1p(-mean.clamp(max=1 - 1e-12))
        above = math.log1p(-self.LEAST) + high * self.LEAST / (1 - self.LEAST)
        return torch.where(mean > 1 - self.LEAST, above, mean.log())

    def log_sides(self, eta: Tensor) -> tuple[Tensor, Tensor]:
        edge, is_high = math.log1p(-self.LEAST), self._is_high(eta)
        _, high = self._parts(eta)
        below = eta.clamp(max=edge)
        # log(1 - exp(eta)) of small |eta| and of large |eta|.
        near = torch.log(-torch.expm1(below.clamp(min=-1)))
        far = torch.log1p(-torch.exp(below.clamp(max=-0.5)))
        outside = torch.where(below > -0.7, near, far)
        inside = torch.where(is_high, torch.log1p(-high.exp()), below)
        return inside, torch.where(is_high, high, outside)


def by_name(*links: Link) -> dict[str, Link]:
    """Links by their names; the first is the default.

    >>> list(by_name(Logit(), Probit()))
    ['logit', 'probit']
    """
    return {link.name: link for link in links}


MEAN_LINKS = (Log(), Identity(), Sqrt(), Softplus())
BINARY_LINKS = (Logit(), Probit(), Cloglog(), LogProbability())
