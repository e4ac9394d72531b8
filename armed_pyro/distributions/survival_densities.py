"""Densities with a survivor function, and the likelihood of censored outcomes made from both."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from armed_pyro.distributions.zero_densities import log1mexp
from armed_pyro.rows.censoring import Censoring

__all__ = [
    "CensoredDensity",
    "LogLogisticTime",
    "LogNormalTime",
    "LogTime",
    "NormalSurvival",
    "PiecewiseTime",
    "Survival",
    "WeibullTime",
]

# exp(50) times an event is beyond any data; without this limit, extreme draws would be infinite.
LARGEST = 50.0
# log of the ratio S(b) / S(a) of an open interval.
OPEN = -100.0
EULER = 0.5772156649015329


class Survival(ABC):
    """What the likelihood of a censored outcome asks of a distribution beside its `log_prob`.

    `positive` says whether outcomes are positive; an entry, or the lower end of an interval, at 0
    or below then says nothing.
    """

    positive: ClassVar[bool] = True

    @abstractmethod
    def log_survival(self, value: Tensor) -> Tensor:
        """log P(y > value), without rounding at either end."""

    @abstractmethod
    def exceeded(self, log_share: Tensor) -> Tensor:
        """The value above which a share of the outcomes lies, given by its logarithm."""

    def quantile(self, share: Tensor) -> Tensor:
        """The value below which this share of the outcomes lies."""
        return self.exceeded(torch.log1p(-share))


class LogTime(dist.TorchDistribution, Survival, ABC):
    r"""A positive time with a standard distribution of :math:`z = (\log t - \eta) \cdot shape`."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = dist.constraints.positive

    def __init__(self, eta: Float[Tensor, "... rows"], shape: Tensor) -> None:
        self.eta, self.shape_ = eta, shape
        super().__init__(torch.broadcast_shapes(eta.shape, shape.shape), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> LogTime:
        return type(self)(self.eta.expand(torch.Size(batch_shape)), self.shape_)

    def standard(self, value: Tensor) -> Tensor:
        """Z at these times."""
        tiny = torch.finfo(value.dtype).tiny
        return (value.clamp(min=tiny).log() - self.eta) * self.shape_

    @abstractmethod
    def log_standard(self, z: Tensor) -> Tensor:
        """Log of the density of z."""

    @abstractmethod
    def standard_exceeded(self, log_share: Tensor) -> Tensor:
        """The value of z above which a share lies, given by its logarithm."""

    def log_prob(self, value: Tensor) -> Tensor:
        tiny = torch.finfo(value.dtype).tiny
        jacobian = self.shape_.log() - value.clamp(min=tiny).log()
        return self.log_standard(self.standard(value)) + jacobian

    def exceeded(self, log_share: Tensor) -> Tensor:
        return torch.exp(self.eta + self.standard_exceeded(log_share) / self.shape_)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Quantiles of uniform numbers."""
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            uniform = torch.rand(shape, dtype=self.eta.dtype, device=self.eta.device)
            eps = torch.finfo(uniform.dtype).eps
            return self.quantile(uniform.clamp(eps, 1 - eps))


class WeibullTime(LogTime):
    r"""S(t) = exp(-(t / exp(eta))^shape); z has the smallest extreme value distribution."""

    def log_standard(self, z: Tensor) -> Tensor:
        z = z.clamp(max=LARGEST)
        return z - torch.exp(z)

    def log_survival(self, value: Tensor) -> Tensor:
        return -torch.exp(self.standard(value).clamp(max=LARGEST))

    def standard_exceeded(self, log_share: Tensor) -> Tensor:
        return torch.log(-log_share)

    @property
    def mean(self) -> Tensor:
        """Scale times Gamma(1 + 1 / shape)."""
        return torch.exp(self.eta + torch.lgamma(1 + 1 / self.shape_))

    @property
    def variance(self) -> Tensor:
        """Scale^2 (Gamma(1 + 2 / shape) - Gamma(1 + 1 / shape)^2)."""
        first, second = torch.lgamma(1 + 1 / self.shape_), torch.lgamma(1 + 2 / self.shape_)
        return torch.exp(2 * (self.eta + first)) * torch.expm1(second - 2 * first)


class LogLogisticTime(LogTime):
    """S(t) = 1 / (1 + (t / exp(eta))^shape), with median exp(eta); z is logistic."""

    def log_standard(self, z: Tensor) -> Tensor:
        return z - 2 * softplus(z)

    def log_survival(self, value: Tensor) -> Tensor:
        return -softplus(self.standard(value))

    def standard_exceeded(self, log_share: Tensor) -> Tensor:
        return log1mexp(log_share) - log_share

    @property
    def mean(self) -> Tensor:
        """Median (pi / shape) / sin(pi / shape); infinite for shapes up to 1."""
        angle = math.pi / self.shape_
        factor = torch.where(self.shape_ > 1, angle / torch.sin(angle), torch.inf)
        return torch.exp(self.eta) * factor

    @property
    def variance(self) -> Tensor:
        """Median^2 (2a / sin(2a) - (a / sin(a))^2), a = pi / shape; infinite up to shape 2."""
        angle = math.pi / self.shape_
        second = 2 * angle / torch.sin(2 * angle) - (angle / torch.sin(angle)) ** 2
        return torch.exp(2 * self.eta) * torch.where(self.shape_ > 2, second, torch.inf)


class LogNormalTime(dist.LogNormal, Survival):
    """log t ~ N(location, sd^2)."""

    def __init__(self, location: Tensor, sd: Tensor) -> None:
        self.parts = location, sd
        super().__init__(location, sd, validate_args=False)  # type: ignore[no-untyped-call]

    def expand(self, batch_shape: Any, _instance: Any = None) -> LogNormalTime:
        location, sd = self.parts
        return LogNormalTime(location.expand(torch.Size(batch_shape)), sd)

    def log_survival(self, value: Tensor) -> Tensor:
        location, sd = self.parts
        tiny = torch.finfo(value.dtype).tiny
        return torch.special.log_ndtr((location - value.clamp(min=tiny).log()) / sd)

    def exceeded(self, log_share: Tensor) -> Tensor:
        location, sd = self.parts
        return torch.exp(location - sd * torch.special.ndtri(log_share.exp()))


class NormalSurvival(dist.Normal, Survival):
    """y ~ N(mean, sd^2)."""

    positive = False

    def expand(self, batch_shape: Any, _instance: Any = None) -> NormalSurvival:
        return NormalSurvival(self.loc.expand(torch.Size(batch_shape)), self.scale)

    def log_survival(self, value: Tensor) -> Tensor:
        return torch.special.log_ndtr((self.loc - value) / self.scale)

    def exceeded(self, log_share: Tensor) -> Tensor:
        return self.loc - self.scale * torch.special.ndtri(log_share.exp())


class PiecewiseTime(dist.TorchDistribution, Survival):
    r"""A time whose hazard is constant between cuts.

    .. math:: h(t) = e^{\eta} r_j, \quad c_{j-1} < t \le c_j, \quad c_0 = 0, \; c_J = \infty

    `log_ratio` is log r_j "... pieces", which may have a 1 in the place of the rows.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = dist.constraints.positive

    def __init__(
        self, eta: Float[Tensor, "... rows"], log_ratio: Tensor, cuts: Float[Tensor, " cuts"]
    ) -> None:
        self.eta, self.log_ratio, self.cuts = eta, log_ratio, cuts
        batch = torch.broadcast_shapes(eta.shape, log_ratio.shape[:-1])
        super().__init__(batch, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> PiecewiseTime:
        return PiecewiseTime(self.eta.expand(torch.Size(batch_shape)), self.log_ratio, self.cuts)

    @property
    def _starts(self) -> Float[Tensor, " pieces"]:
        return torch.cat([self.cuts.new_zeros(1), self.cuts])

    @property
    def _lengths(self) -> Float[Tensor, " pieces"]:
        return torch.cat([self._starts.diff(), self.cuts.new_full((1,), torch.inf)])

    def _within(self, value: Tensor) -> Float[Tensor, "... rows pieces"]:
        """Time that is spent in each piece up to `value`."""
        return torch.minimum((value[..., None] - self._starts).clamp(min=0), self._lengths)

    def _rate(self) -> Float[Tensor, "... rows"]:
        return torch.exp(self.eta.clamp(max=LARGEST))

    def log_survival(self, value: Tensor) -> Tensor:
        return -self._rate() * (self._within(value) * self.log_ratio.exp()).sum(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        piece = torch.bucketize(value, self.cuts)
        chosen = torch.nn.functional.one_hot(piece, len(self.cuts) + 1).to(self.log_ratio)
        log_hazard = self.eta + (chosen * self.log_ratio).sum(-1)
        return log_hazard + self.log_survival(value)

    def _at_starts(self) -> Float[Tensor, "... rows pieces"]:
        """Cumulative hazard at the start of each piece, divided by exp(eta)."""
        steps = self.log_ratio[..., :-1].exp() * self._starts.diff()
        return torch.cat([torch.zeros_like(self.log_ratio[..., :1]), steps.cumsum(-1)], -1)

    def exceeded(self, log_share: Tensor) -> Tensor:
        wanted = (-log_share / self._rate())[..., None]
        at = self._at_starts()
        piece = (wanted >= at).sum(-1, keepdim=True) - 1
        shape = torch.broadcast_shapes(wanted.shape[:-1], at.shape[:-1])
        at = at.expand(*shape, at.shape[-1]).gather(-1, piece.expand(*shape, 1))
        ratio = self.log_ratio.exp().expand(*shape, self.log_ratio.shape[-1])
        ratio = ratio.gather(-1, piece.expand(*shape, 1))
        return (self._starts[piece] + (wanted - at) / ratio)[..., 0]

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Quantiles of uniform numbers."""
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            uniform = torch.rand(shape, dtype=self.eta.dtype, device=self.eta.device)
            return self.quantile(uniform.clamp(max=1 - torch.finfo(uniform.dtype).eps))

    @property
    def mean(self) -> Tensor:
        """The integral of S(t)."""
        rate = self._rate()[..., None]
        hazard = rate * self.log_ratio.exp()
        alive = torch.exp(-rate * self._at_starts())
        return (alive * -torch.expm1(-hazard * self._lengths) / hazard).sum(-1)


class CensoredDensity(dist.TorchDistribution):
    r"""Likelihood of outcomes of which some are only known to lie in a range.

    .. math:: p = f(y), \; S(y), \; 1 - S(y) \text{ or } S(y) - S(upper), \quad \text{divided by }
        S(entry)

    for an exact outcome, or one censored from the right, from the left, or in an interval. Draws
    are of outcomes above their entries, and nothing censors them.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, base: Any, censoring: Censoring) -> None:
        self.base, self.censoring = base, censoring
        super().__init__(base.batch_shape, validate_args=False)

    @property
    def support(self) -> Any:
        """That of the exact outcomes."""
        return self.base.support

    @property
    def mean(self) -> Tensor:
        """That of the exact outcomes."""
        return self.base.mean

    @property
    def variance(self) -> Tensor:
        """That of the exact outcomes."""
        return self.base.variance

    def expand(self, batch_shape: Any, _instance: Any = None) -> CensoredDensity:
        return CensoredDensity(self.base.expand(torch.Size(batch_shape)), self.censoring)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        entry = self.censoring.entry
        if entry is None:
            return self.base.sample(sample_shape)
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            uniform = torch.rand(shape, dtype=entry.dtype, device=entry.device)
            eps = torch.finfo(uniform.dtype).eps
            uniform = uniform.clamp(eps, 1 - eps)
            late = self._late(entry)
            at_entry = self.base.log_survival(torch.where(late, entry, 1.0))
            drawn = self.base.exceeded(at_entry * late + uniform.log())
            return torch.where(late, torch.maximum(drawn, entry), drawn)

    def _late(self, entry: Tensor) -> Tensor:
        """Whether an entry excludes any outcome."""
        return entry > (0.0 if self.base.positive else -torch.inf)

    def log_prob(self, value: Tensor) -> Tensor:
        known = self.censoring
        likelihood = torch.where(known.is_event, self.base.log_prob(value), self._range(value))
        if known.entry is None:
            return likelihood
        late = self._late(known.entry)
        at_entry = self.base.log_survival(torch.where(late, known.entry, value))
        return likelihood - at_entry * late

    def _range(self, value: Tensor) -> Tensor:
        """log P(lower < y <= upper), with lower or upper open."""
        known = self.censoring
        upper = torch.where(known.has_upper, known.upper, value)
        lower = torch.where(known.has_lower, value, upper)
        at_lower, at_upper = self.base.log_survival(lower), self.base.log_survival(upper)
        above = known.has_lower & ~(self._open_below(lower))
        start = at_lower * above
        share = torch.where(known.has_upper, at_upper - start, OPEN)
        wide = start + log1mexp(share)
        length = upper - lower
        # Where rounding would leave half of the digits of the difference, the interval is so narrow
        # that its probability is the density at its middle times its length.
        rounding = torch.finfo(value.dtype).eps ** 0.5
        narrow = (share.abs() < rounding * start.abs()) & known.has_upper & above
        middle = self.base.log_prob((lower + upper) / 2)
        flat = (
            middle + torch.where(narrow, length, 1.0).clamp(min=torch.finfo(value.dtype).tiny).log()
        )
        return torch.where(narrow, flat, wide)

    def _open_below(self, lower: Tensor) -> Tensor:
        """Whether the lower end is that of the support, where log S = 0."""
        return (lower <= 0) if self.base.positive else torch.zeros_like(lower, dtype=torch.bool)
