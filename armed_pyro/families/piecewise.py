"""Times to an event whose hazard is constant between cuts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from jaxtyping import Float
from numpy.random import Generator
from torch import Tensor

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.distributions.survival_densities import PiecewiseTime
from armed_pyro.families.family import (
    Array,
    Draws,
    Eta,
    Labelled,
    Numbers,
    Parameter,
    Parameters,
    mean_offset,
    outcome_of,
)
from armed_pyro.families.parameters import LogNormalParameter
from armed_pyro.families.times import EXTREME_VALUE, TimeFamily, mean_time
from armed_pyro.rows.batch import Rows
from armed_pyro.rows.censoring import RIGHT

__all__ = ["PiecewiseExponential"]

# By the prior, the hazard of a piece is between a seventh and seven times that of the one before.
STEP_SD = 1.0


@dataclass(frozen=True)
class PiecewiseExponential(TimeFamily):
    r"""A time whose hazard is constant between cuts: Cox regression's hazard in a full likelihood.

    .. math:: h(t) = e^\eta r_j, \quad c_{j-1} < t \le c_j, \quad \prod_j r_j = 1

    The ratio of each piece's hazard to that before is a latent site, LogNormal(0, 1).
    exp(coefficient) is a hazard ratio, and a random intercept is a log-normal frailty. Tables have
    the hazards r_j relative to their geometric mean.

    Parameters
    ----------
    pieces : int
        Number of pieces, written ``family="piecewise_exponential(8)"``. Cuts are at quantiles of
        the observed times.
    cuts : tuple of float
        The cuts, in place of a number of pieces; set when a program is bound to data.

    Raises
    ------
    ValueError
        If there are fewer than two pieces, or cuts are not positive and ascending.

    References
    ----------
    Friedman (1982), "Piecewise exponential models for survival data with covariates", Annals of
    Statistics 10(1).

    Examples
    --------
    >>> PiecewiseExponential(cuts=(1.0, 2.5)).labels
    ('0-1', '1-2.5', '2.5-')
    """

    pieces: int = 5
    cuts: tuple[float, ...] = ()

    name = "piecewise_exponential"
    coefficient_ratio = "hazard ratio"

    def __post_init__(self) -> None:
        if self.pieces < 2:
            raise ValueError(
                f"family {self.name!r} needs at least 2 pieces, found {self.pieces}: choose family "
                "'exponential' for a constant hazard"
            )
        if self.cuts and (self.cuts[0] <= 0 or (np.diff(self.cuts) <= 0).any()):
            raise ValueError(f"cuts must be positive and ascending, found {list(self.cuts)}")

    def __str__(self) -> str:
        return self.name if self.pieces == 5 else f"{self.name}({self.pieces})"

    def bound(self, data: ClusteredData) -> Self:
        """The family for these rows, with cuts at quantiles of their times unless it has cuts."""
        family = super().bound(data)
        if self.cuts:
            return family
        y = outcome_of(data)
        times = y if data.status is None else y[data.status != RIGHT]
        times = times if len(times) else y
        shares = np.arange(1, self.pieces) / self.pieces
        cuts = np.unique(np.quantile(times.numpy(), shares))
        # A cut beyond every time, and one at 0, would bound a piece without times.
        cuts = cuts[(cuts > 0) & (cuts < float(y.max()))]
        if not len(cuts):
            raise ValueError(
                f"family {self.name!r} needs several distinct times of events: choose family "
                "'exponential' for a constant hazard"
            )
        return replace(family, cuts=tuple(cuts.tolist()))

    def center(self, data: ClusteredData) -> Float[Tensor, " columns"]:
        """Log of the mean hazard, less the mean offset."""
        return (-mean_time(data).log() - mean_offset(data)).reshape(1)

    @property
    def labels(self) -> tuple[str, ...]:
        """The pieces, by their ends."""
        ends = [f"{cut:.4g}" for cut in self.cuts]
        return tuple(f"{a}-{b}" for a, b in zip(["0", *ends], [*ends, ""], strict=True))

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        count = len(self.cuts)
        return tuple(
            LogNormalParameter(f"hazard_step_{k + 1}", median=1.0, log_sd=STEP_SD)
            for k in range(count)
        )

    def log_ratios(self, parameters: Parameters) -> Float[Tensor, "... pieces"]:
        """Logarithm of r_j, with mean zero."""
        if not self.cuts:
            raise ValueError(
                f"family {self.name!r} does not know its cuts yet: bind the program to data, or "
                "give them as PiecewiseExponential(cuts=(1.0, 2.0))"
            )
        steps = [self.value(parameters, parameter.name).log() for parameter in self.parameters]
        log_steps = torch.stack(steps, -1)
        levels = torch.cat([torch.zeros_like(log_steps[..., :1]), log_steps.cumsum(-1)], -1)
        return levels - levels.mean(-1, keepdim=True)

    def density(self, eta: Eta, parameters: Parameters, rows: Rows) -> PiecewiseTime:
        return PiecewiseTime(eta[..., 0], self.log_ratios(parameters), eta.new_tensor(self.cuts))

    def expected(self, eta: Eta, parameters: Parameters, rows: Rows) -> Tensor:
        return self.density(eta, parameters, rows).mean

    def information(self, eta: Eta, parameters: Parameters, rows: Rows) -> Tensor:
        return torch.ones_like(eta)

    def residual_variance(self, parameters: Parameters, mean: Draws) -> Draws:
        """Variance of the log of the cumulative hazard at the event."""
        return torch.full_like(mean, EXTREME_VALUE)

    def residual_rows(self, parameters: Parameters) -> dict[str, Draws]:
        if not parameters:
            return {}
        ratios = self.log_ratios(parameters).exp()
        return {f"hazard[{label}]": ratios[..., j] for j, label in enumerate(self.labels)}

    def labelled(self, parameters: Parameters) -> dict[str, Labelled]:
        if not parameters:
            return {}
        return {"hazard": Labelled("piece", self.labels, self.log_ratios(parameters).exp())}

    def simulate(self, rng: Generator, eta: Array, parameters: Numbers, trials: int) -> Array:
        """By default with cuts at 0.5, 1 and 2, and equal hazards."""
        family = self if self.cuts else replace(self, cuts=(0.5, 1.0, 2.0))
        steps = {p.name: 1.0 for p in family.parameters} | dict(parameters)
        return super(PiecewiseExponential, family).simulate(rng, eta, steps, trials)

    def if_misfit(self, y: Array) -> str:
        return f"take more pieces, such as family 'piecewise_exponential({2 * self.pieces})'"
