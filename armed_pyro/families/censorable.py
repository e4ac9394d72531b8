"""Families of outcomes that may be censored or truncated."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.distributions.survival_densities import CensoredDensity, Survival
from armed_pyro.families.family import Array, Eta, Family, Parameters, RowValues
from armed_pyro.rows.batch import Rows
from armed_pyro.rows.censoring import Censoring

__all__ = ["CensorableFamily"]


@dataclass(frozen=True)
class CensorableFamily(Family, ABC):
    r"""A continuous family whose outcomes may be censored, and rows may enter late.

    A family defines `density`, a distribution that is also a
    `armed_pyro.distributions.survival_densities.Survival`. The likelihood of censored rows, and
    their residuals, follow from it:

    .. math:: p(y) = f(y), \quad S(y), \quad 1 - S(y), \quad S(y) - S(upper)

    for outcomes that are exact, or censored from the right, from the left or in an interval, each
    divided by S(entry). The residual of a censored outcome is a random quantile of its range.

    Parameters
    ----------
    censored : bool
        Whether outcomes may be censored or truncated; set when a program is bound to data.
    """

    censored: bool = field(default=False, kw_only=True)

    can_be_censored = True

    def __str__(self) -> str:
        shown = [
            f"{name}={value!r}"
            for name, value in vars(self).items()
            if name != "censored" and value != self.__dataclass_fields__[name].default
        ]
        return f"{self.name}({', '.join(shown)})" if shown else self.name

    def bound(self, data: ClusteredData) -> Self:
        """The family for these rows: censored if their statuses or entries say so."""
        return replace(self, censored=data.status is not None or data.entry is not None)

    @property
    def is_censored(self) -> bool:
        return self.censored

    def survivor(self, eta: Eta, parameters: Parameters, rows: Rows) -> Survival:
        survival: Survival = self.density(eta, parameters, rows)
        return survival

    @property
    def statistics(self) -> tuple[str, ...]:  # type: ignore[override]
        """None of censored outcomes, whose replicates would have to be censored as well."""
        return () if self.censored else Family.statistics

    @abstractmethod
    def density(self, eta: Eta, parameters: Parameters, rows: Rows) -> Any:
        """p(y | eta, parameters) of exact outcomes, with a `log_survival` and a `quantile`."""

    def distribution(self, eta: Eta, parameters: Parameters, rows: Rows) -> Any:
        base = self.density(eta, parameters, rows)
        if rows.censoring is None:
            return base
        return CensoredDensity(base, Censoring.of(rows.censoring))

    def or_scores(
        self, information: Tensor, eta: Eta, parameters: Parameters, rows: Rows
    ) -> Tensor:
        """The information of exact outcomes, and the squared score of those that are censored.

        The expectation of a squared score is the information, so it is positive where minus the
        second derivative need not be.
        """
        if rows.censoring is None or rows.y is None:
            return information
        with torch.enable_grad():
            column = eta.detach().requires_grad_(True)
            fixed = {name: value.detach() for name, value in parameters.items()}
            log_prob = self.distribution(column, fixed, rows).log_prob(rows.y.to(eta))
            (score,) = torch.autograd.grad(log_prob.sum(), column)
        exact = Censoring.of(rows.censoring).is_event[:, None]
        return torch.where(exact, information, score**2)

    def cdf(self, y: RowValues, eta: Eta, parameters: Parameters, rows: Rows) -> RowValues:
        values = {name: value.double() for name, value in parameters.items()}
        log_survival = self.density(eta.double(), values, rows).log_survival(y.double())
        return -torch.expm1(log_survival)

    def cdf_range(
        self, y: RowValues, eta: Eta, parameters: Parameters, rows: Rows
    ) -> tuple[Array, Array]:
        """The range of P(Y <= y) that the row tells, given that Y is above its entry."""

        def below(value: Tensor) -> Array:
            share = self.cdf(value, eta, parameters, rows)
            return share.detach().double().cpu().numpy()

        at = below(y)
        if rows.censoring is None:
            return at, at
        known = Censoring.of(rows.censoring.to(y))
        has_lower, has_upper = known.has_lower.cpu().numpy(), known.has_upper.cpu().numpy()
        exact = known.is_event.cpu().numpy()
        lower = np.where(has_lower | exact, at, 0.0)
        upper = np.where(exact, at, np.where(has_upper, below(known.upper), 1.0))
        if known.entry is not None:
            late = torch.isfinite(known.entry)
            entered = below(torch.where(late, known.entry, y)) * late.cpu().numpy()
            left = np.maximum(1 - entered, 1e-300)
            lower, upper = ((end - entered) / left for end in (lower, upper))
        return lower.clip(0, 1), upper.clip(0, 1)
