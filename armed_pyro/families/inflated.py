"""Families with more zeros than their density has: zero-inflated and hurdle."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyro.distributions as dist
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from armed_pyro._messages import check_known
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.distributions.zero_densities import Hurdle as HurdleDensity
from armed_pyro.distributions.zero_densities import ZeroInflated as ZeroInflatedDensity
from armed_pyro.families.counts import (
    NegativeBinomial,
    NegativeBinomial1,
    Poisson,
    zero_and_mean_information,
)
from armed_pyro.families.family import (
    Array,
    Draws,
    Eta,
    Family,
    Parameter,
    Parameters,
    RowValues,
    outcome_of,
)
from armed_pyro.families.logistic import Binomial
from armed_pyro.families.parameters import Share
from armed_pyro.families.positive import Gamma, LogNormal
from armed_pyro.families.proportions import BetaBinomial
from armed_pyro.rows.batch import Rows

__all__ = ["Hurdle", "ZeroInflated"]

_COUNTS = (Poisson, NegativeBinomial, NegativeBinomial1)
_TRIALS = (Binomial, BetaBinomial)
_POSITIVE = (Gamma, LogNormal)


@dataclass(frozen=True)
class _WithZeros(Family, ABC):
    """A family around another, of the name `of` and with the link `link` (its default if empty).

    Questions about the predictor are answered by the family inside.
    """

    of: str = "poisson"
    link: str = ""

    inside: ClassVar[dict[str, type[Family]]]
    share: ClassVar[str]  # name of the parameter
    is_log_concave = False

    def __post_init__(self) -> None:
        check_known(f"family inside {self.name!r}", [self.of], self.inside)
        self.base  # noqa: B018  # raises if the link is unknown

    def __str__(self) -> str:
        return f"{self.name}({self.base})"

    @property
    def base(self) -> Family:
        """The family inside."""
        kind = self.inside[self.of]
        return kind(link=self.link) if self.link else kind()  # type: ignore[call-arg]

    # --- what the family inside answers -----------------------------------------------------

    @property
    def support(self) -> str:  # type: ignore[override]
        """Possible outcomes in words."""
        return self.base.support if self.base.integer else f"0 or {self.base.support}"

    @property
    def integer(self) -> bool:  # type: ignore[override]
        """Whether outcomes are whole numbers."""
        return self.base.integer

    @property
    def needs_trials(self) -> bool:  # type: ignore[override]
        """Whether every row needs a number of trials."""
        return self.base.needs_trials

    @property
    def coefficient_ratio(self) -> str:  # type: ignore[override]
        """Meaning of exp(coefficient) for outcomes of the family inside."""
        return self.base.coefficient_ratio

    @property
    def no_row_effects(self) -> str:  # type: ignore[override]
        """That of the family inside, or the zeros."""
        return self.base.no_row_effects

    statistics = ("mean", "sd", "zeros")
    needs_mean = True
    if_more_zeros = "more random effects or features: zeros differ between the rows"

    @property
    def if_overdispersed(self) -> str:  # type: ignore[override]
        """Advice for outcomes that vary more: a family inside that allows it."""
        if self.base.is_equidispersed:
            return f"use family {self.name}(negative_binomial)"
        return self.base.if_overdispersed

    def effect_scale(self) -> float:
        return self.base.effect_scale()

    def spread(self, data: ClusteredData) -> float:
        return self.base.spread(_positive_rows(data))

    def center(self, data: ClusteredData) -> Float[Tensor, " columns"]:
        """That of the positive outcomes."""
        return self.base.center(_positive_rows(data))

    def outside(self, y: RowValues, data: ClusteredData) -> Bool[Tensor, " rows"]:
        return (y != 0) & self.base.outside(y, data)

    def check(self, data: ClusteredData) -> None:
        """Raise a `ValueError` as `Family.check`, and if no outcome is positive."""
        super().check(data)
        if not (outcome_of(data) > 0).any():
            raise ValueError(
                f"the outcome {data.outcome_name!r} is 0 in every row, so that family "
                f"{str(self)!r} has nothing to model beside zeros"
            )

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return (*self.base.parameters, Share(self.share))

    def mean(self, eta: Eta, rows: Rows) -> Tensor:
        raise ValueError(
            f"the mean of family {self.name!r} depends on {self.share}: use expected()"
        )

    def expected(self, eta: Eta, parameters: Parameters, rows: Rows) -> Tensor:
        return self.distribution(eta, parameters, rows).mean

    def marginal_mean(
        self, eta: Float[Tensor, "draws rows columns"], variance: Float[Tensor, "draws columns"]
    ) -> Float[Tensor, "draws columns"]:
        """That of the family inside, without the share of zeros."""
        if self.base.needs_mean:
            return self.base.marginal_mean(eta, variance)
        return torch.zeros_like(variance)

    def residual_variance(self, parameters: Parameters, mean: Draws) -> Draws:
        r"""log(1 + (c + zi) / (1 - zi)) with c = exp(variance inside) - 1, from Var[y] / E[y]^2.

        For a log link, c is Var / mean^2 of the family inside, so that this is the lognormal
        approximation of Nakagawa, Johnson and Schielzeth (2017) for the whole outcome.
        """
        share = self.value(parameters, self.share)
        within = self.base.residual_variance(parameters, mean)
        return torch.log1p((torch.expm1(within) + share) / (1 - share))

    def _score_at_zero(
        self, eta: Eta, parameters: Parameters, rows: Rows
    ) -> tuple[Tensor, Tensor, Tensor]:
        """f(0), d log f(0) / d eta and the information of eta, of the family inside.

        Where the family inside has a lower bound of its information, the larger of two is taken,
        which is at least that of the zeros.
        """
        with torch.enable_grad():
            column = eta.detach().requires_grad_(True)
            density = self.base.distribution(column, parameters, rows)
            mean, variance = density.mean, density.variance.detach()
            log_zero = density.log_prob(torch.zeros_like(mean))
            (slope,) = torch.autograd.grad(log_zero.sum(), column, retain_graph=True)
            (mean_slope,) = torch.autograd.grad(mean.sum(), column)
        information = self.base.information(eta, parameters, rows)
        if information is None:
            raise ValueError(f"family {self.of!r} gives no information inside {self.name!r}")
        zero, mean = log_zero.detach().exp()[..., None], mean.detach()[..., None]
        bound = zero_and_mean_information(zero, slope, mean, mean_slope, variance[..., None])
        return zero, slope, torch.maximum(information.detach(), bound)


@dataclass(frozen=True)
class ZeroInflated(_WithZeros):
    r"""A count that is 0 with probability zi, and otherwise a count of the family inside.

    .. math:: P(0) = zi + (1 - zi) f(0), \quad P(y) = (1 - zi) f(y), \quad E[y] = (1 - zi) \mu

    Written ``family="zero_inflated(poisson)"``, or around negative_binomial, negative_binomial1,
    binomial or beta_binomial.

    Parameters
    ----------
    of : str
        Name of the family inside.
    link : str
        Its link; its default if empty.

    Raises
    ------
    ValueError
        If the family inside or its link is unknown.

    References
    ----------
    Lambert (1992), Technometrics 34(1): zero-inflated Poisson regression.

    Examples
    --------
    >>> [parameter.name for parameter in ZeroInflated("negative_binomial").parameters]
    ['shape', 'zi']
    """

    name = "zero_inflated"
    share = "zi"
    inside = {family.name: family for family in (*_COUNTS, *_TRIALS)}  # noqa: RUF012

    def distribution(self, eta: Eta, parameters: Parameters, rows: Rows) -> dist.TorchDistribution:
        share = self.value(parameters, self.share)
        return ZeroInflatedDensity(self.base.distribution(eta, parameters, rows), share)

    def information(self, eta: Eta, parameters: Parameters, rows: Rows) -> Tensor:
        r"""(1 - zi) (I - f(0) s^2) + ((1 - zi) f(0) s)^2 / P(0).

        I is the information of the family inside, s the derivative of log f(0).
        """
        share = _by_column(self.value(parameters, self.share))
        zero, slope, inside = self._score_at_zero(eta, parameters, rows)
        positive = (inside - zero * slope**2).clamp(min=0)
        part = (1 - share) * zero
        return (1 - share) * positive + (part * slope) ** 2 / (share + part).clamp(min=1e-30)

    def cdf(self, y: RowValues, eta: Eta, parameters: Parameters, rows: Rows) -> RowValues | None:
        inside = self.base.cdf(y, eta, parameters, rows)
        share = self.value(parameters, self.share).double()
        return None if inside is None else (y >= 0) * (share + (1 - share) * inside)


@dataclass(frozen=True)
class Hurdle(_WithZeros):
    r"""An outcome that is 0 with probability hu, and otherwise a positive one.

    .. math:: P(0) = hu, \quad p(y) = (1 - hu) f(y) / (1 - f(0)), \quad y > 0

    with the density f of the family inside; f(0) is 0 for gamma and lognormal outcomes. Written
    ``family="hurdle(gamma)"``, or around lognormal, poisson, negative_binomial, negative_binomial1,
    binomial or beta_binomial.

    Parameters
    ----------
    of : str
        Name of the family inside.
    link : str
        Its link; its default if empty.

    Raises
    ------
    ValueError
        If the family inside or its link is unknown.

    References
    ----------
    Mullahy (1986), Journal of Econometrics 33(3).

    Examples
    --------
    >>> str(Hurdle("gamma")), Hurdle("gamma").support
    ('hurdle(gamma)', '0 or positive numbers')
    """

    name = "hurdle"
    share = "hu"
    inside = {family.name: family for family in (*_COUNTS, *_TRIALS, *_POSITIVE)}  # noqa: RUF012

    def distribution(self, eta: Eta, parameters: Parameters, rows: Rows) -> dist.TorchDistribution:
        base, share = self.base.distribution(eta, parameters, rows), self.value(parameters, "hu")
        return HurdleDensity(base, share, is_count=self.integer)

    def information(self, eta: Eta, parameters: Parameters, rows: Rows) -> Tensor:
        r"""(1 - hu) ((I - f(0) s^2) / (1 - f(0)) - (f(0) s / (1 - f(0)))^2).

        I is the information of the family inside, s the derivative of log f(0).
        """
        share = _by_column(self.value(parameters, self.share))
        if not self.integer:
            inside = self.base.information(eta, parameters, rows)
            assert inside is not None  # for mypy: continuous families inside give it
            return (1 - share) * inside
        zero, slope, inside = self._score_at_zero(eta, parameters, rows)
        positive = (1 - zero).clamp(min=1e-12)
        value = (inside - zero * slope**2) / positive - (zero * slope / positive) ** 2
        return (1 - share) * value.clamp(min=0)

    def cdf(self, y: RowValues, eta: Eta, parameters: Parameters, rows: Rows) -> RowValues | None:
        inside = self.base.cdf(y, eta, parameters, rows)
        share = self.value(parameters, self.share).double()
        if inside is None:
            return None
        if self.integer:
            zero = self.base.cdf(torch.zeros_like(y), eta, parameters, rows)
            assert zero is not None  # for mypy, as `inside` is not None
            inside = ((inside - zero) / (1 - zero).clamp(min=1e-300)).clamp(0, 1)
        return (y >= 0) * (share + (1 - share) * (y > 0) * inside)

    def cdf_range(
        self, y: RowValues, eta: Eta, parameters: Parameters, rows: Rows
    ) -> tuple[Array, Array] | None:
        if self.integer:
            return super().cdf_range(y, eta, parameters, rows)
        upper = self.cdf(y, eta, parameters, rows)
        if upper is None:
            return None
        at = upper.cpu().numpy()
        return np.where(y.cpu().numpy() == 0, 0.0, at), at


def _by_column(value: Tensor) -> Tensor:
    """A parameter with a last dimension for the predictor's columns, if it has dimensions."""
    return value[..., None] if value.dim() else value


def _positive_rows(data: ClusteredData) -> ClusteredData:
    """The rows with positive outcomes; all rows if there are fewer than two."""
    positive = (outcome_of(data) > 0).nonzero()[:, 0].numpy()
    return data.take(positive) if len(positive) > 1 else data
