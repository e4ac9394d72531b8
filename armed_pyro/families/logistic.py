"""Probabilities: one trial, several trials, and classes."""

from __future__ import annotations

import math
from abc import ABC
from dataclasses import dataclass

import numpy as np
import pyro.distributions as dist
import torch
from jaxtyping import Bool, Float
from numpy.random import Generator
from torch import Tensor

from armed_pyro._messages import listing
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.distributions.outcome_densities import LogitBinomial
from armed_pyro.families.family import (
    Array,
    Draws,
    Eta,
    Family,
    Numbers,
    Parameters,
    RowValues,
    arrays,
    mean_offset,
    outcome_of,
)
from armed_pyro.families.linked import LinkedFamily
from armed_pyro.families.links import BINARY_LINKS, ProbabilityLink, by_name
from armed_pyro.rows.batch import Rows

__all__ = ["Bernoulli", "Binomial", "Categorical", "TrialsFamily"]


@dataclass(frozen=True)
class TrialsFamily(LinkedFamily, ABC):
    """Successes of one or several trials, each with the probability mu."""

    integer = True
    is_probability = True

    @property
    def _probability(self) -> ProbabilityLink:
        link = self._link
        assert isinstance(link, ProbabilityLink)  # for mypy: `links` of these families are
        return link

    def _trials(self, trials: Tensor | None) -> Tensor:
        if trials is None:
            raise ValueError(f"family {self.name!r} needs the number of trials of each row")
        return trials

    def contrasts(self, output: Float[Tensor, "rows outputs"]) -> Float[Tensor, "rows columns"]:
        return output[..., 1:] - output[..., :1] if output.shape[-1] == 2 else output

    def _counts(self, rows: Rows) -> Tensor:
        """The trials of each row."""
        return self._trials(rows.trials)

    def outside(self, y: RowValues, data: ClusteredData) -> Bool[Tensor, " rows"]:
        return (y < 0) | (y != y.round()) | (y > self._trials(data.trials))

    def center(self, data: ClusteredData) -> Float[Tensor, " columns"]:
        share = outcome_of(data).sum() / self._trials(data.trials).sum()
        return self._link.center(share.reshape(1), data.offset).reshape(1)

    def spread(self, data: ClusteredData) -> float:
        return 1.0

    def mean(self, eta: Eta, rows: Rows) -> Tensor:
        return self._counts(rows) * self._link.inverse(eta[..., 0])

    def mean_variance(self, mean: Tensor, parameters: Parameters) -> Tensor:
        """The variance of one trial."""
        return mean * (1 - mean)

    def information(self, eta: Eta, parameters: Parameters, rows: Rows) -> Tensor:
        inside, outside = self._probability.log_sides(eta[..., 0])
        variance = (inside + outside).exp().clamp(min=torch.finfo(eta.dtype).tiny)
        single = self._link.derivative(eta[..., 0]) ** 2 / variance
        return (self._counts(rows) * single)[..., None]

    def residual_variance(self, parameters: Parameters, mean: Draws) -> Draws:
        """Variance of the latent variable that is cut at 0; by the delta method for a log link."""
        latent = self._probability.residual_variance
        if latent is not None:
            return torch.full_like(mean, latent)
        return super().residual_variance(parameters, mean)


@dataclass(frozen=True)
class Bernoulli(TrialsFamily):
    """P(y = 1) = mu, by default 1 / (1 + exp(-eta)), logit link."""

    link: str = "logit"

    name = "bernoulli"
    support = "outcomes 0 and 1 (or two labels)"
    is_class = True
    statistics = ("mean",)
    no_residuals = "any probability fits single trials"
    no_row_effects = "the trials' own variance"
    links = by_name(*BINARY_LINKS)

    @property
    def needs_mean(self) -> bool:  # type: ignore[override]
        """Whether the link has no latent variable."""
        return self._probability.residual_variance is None

    def outside(self, y: RowValues, data: ClusteredData) -> Bool[Tensor, " rows"]:
        return (y != 0) & (y != 1)

    def center(self, data: ClusteredData) -> Float[Tensor, " columns"]:
        return self._link.center(outcome_of(data), data.offset).reshape(1)

    def distribution(self, eta: Eta, parameters: Parameters, rows: Rows) -> dist.TorchDistribution:
        return dist.Bernoulli(logits=self._probability.logit(eta[..., 0]))

    def _counts(self, rows: Rows) -> Tensor:
        return torch.ones(())

    def simulate(self, rng: Generator, eta: Array, parameters: Numbers, trials: int) -> Array:
        return rng.binomial(1, self._link.inverse(torch.from_numpy(eta[:, 0])).numpy())


@dataclass(frozen=True)
class Binomial(TrialsFamily):
    """y ~ Binomial(trials, mu), by default with mu = 1 / (1 + exp(-eta)), logit link."""

    link: str = "logit"

    name = "binomial"
    if_more_zeros = "if the dispersion is right, use family zero_inflated(binomial)"
    if_overdispersed = "use family beta_binomial, or add (1 | row), a random intercept of each row"
    support = "whole numbers from 0 to the row's trials"
    needs_trials = True
    statistics = ("mean", "sd", "zeros")
    links = by_name(*BINARY_LINKS)

    @property
    def needs_mean(self) -> bool:  # type: ignore[override]
        """Whether the link has no latent variable."""
        return self._probability.residual_variance is None

    def distribution(self, eta: Eta, parameters: Parameters, rows: Rows) -> dist.TorchDistribution:
        return LogitBinomial(self._trials(rows.trials), self._probability.logit(eta[..., 0]))

    def cdf(self, y: RowValues, eta: Eta, parameters: Parameters, rows: Rows) -> RowValues:
        from scipy import stats  # slow to import

        hits, trials, mean = arrays(y, self._trials(rows.trials), self.mean(eta, rows))
        return torch.from_numpy(stats.binom.cdf(hits, trials, mean / trials))

    def simulate(self, rng: Generator, eta: Array, parameters: Numbers, trials: int) -> Array:
        return rng.binomial(trials, self._link.inverse(torch.from_numpy(eta[:, 0])).numpy())


@dataclass(frozen=True)
class Categorical(Family):
    """P(y = c) = exp(eta_c) / sum_d exp(eta_d) with eta_0 = 0: logits relative to the first class.

    The network has one output per class; the first output is subtracted from the others.
    """

    name = "categorical"
    support = "labels, or codes 0, 1, ..., C - 1 with every class present"
    is_class = True
    multiclass = True
    integer = True
    is_probability = True
    coefficient_ratio = "odds ratio"
    has_class_probabilities = True
    statistics = ("mean",)
    no_residuals = "classes have no order"
    no_row_effects = "the classes' own variance"

    def check(self, data: ClusteredData) -> None:
        y = outcome_of(data)
        present = torch.unique(y)
        if len(present) < 2:
            raise ValueError(
                f"the outcome {data.outcome_name!r} has a single class: nothing to model"
            )
        if data.classes is None and not torch.equal(present, torch.arange(len(present)).to(y)):
            raise ValueError(
                f"family {self.name!r} needs {self.support}, but {data.outcome_name!r} has the "
                f"values {listing(present.tolist(), 6)}: store the classes as strings, or recode "
                "them"
            )

    def outside(self, y: RowValues, data: ClusteredData) -> Bool[Tensor, " rows"]:
        return torch.zeros_like(y, dtype=torch.bool)

    def columns(self, data: ClusteredData) -> tuple[str, ...]:
        if data.classes is not None:
            return tuple(str(label) for label in data.classes[1:])
        return tuple(str(code) for code in range(1, int(outcome_of(data).max()) + 1))

    def center(self, data: ClusteredData) -> Float[Tensor, " columns"]:
        counts = torch.bincount(outcome_of(data).long(), minlength=len(self.columns(data)) + 1)
        logs = torch.log(counts.to(torch.float64) + 0.5)
        return logs[1:] - logs[0] - mean_offset(data)

    def outputs(self, columns: int) -> int:
        return columns + 1

    def contrasts(self, output: Float[Tensor, "rows outputs"]) -> Float[Tensor, "rows columns"]:
        return output[..., 1:] - output[..., :1]

    def _logits(self, eta: Float[Tensor, "... rows columns"]) -> Tensor:
        return torch.cat([torch.zeros_like(eta[..., :1]), eta], -1)

    def distribution(self, eta: Eta, parameters: Parameters, rows: Rows) -> dist.TorchDistribution:
        return dist.Categorical(logits=self._logits(eta))

    def mean(self, eta: Eta, rows: Rows) -> Tensor:
        return torch.softmax(self._logits(eta), -1)

    def simulate(self, rng: Generator, eta: Array, parameters: Numbers, trials: int) -> Array:
        # The largest of logits plus Gumbel noise is a draw from their softmax.
        logits = np.hstack([np.zeros_like(eta[:, :1]), eta])
        return (logits + rng.gumbel(size=logits.shape)).argmax(1)

    def residual_variance(self, parameters: Parameters, mean: Draws) -> Draws:
        return torch.full_like(mean, math.pi**2 / 3)
