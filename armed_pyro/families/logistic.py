"""Outcomes with a logit link: one trial, several trials, and classes."""

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
from armed_pyro.rows.batch import Rows

__all__ = ["Bernoulli", "Binomial", "Categorical", "LogitFamily"]


class LogitFamily(Family, ABC):
    """Logit link; on the scale of eta, the residual is standard logistic with variance pi^2 / 3."""

    integer = True
    is_probability = True
    coefficient_ratio = "odds ratio"

    def residual_variance(self, parameters: Parameters, mean: Draws) -> Draws:
        return torch.full_like(mean, math.pi**2 / 3)


@dataclass(frozen=True)
class Bernoulli(LogitFamily):
    """P(y = 1) = 1 / (1 + exp(-eta)), logit link."""

    name = "bernoulli"
    support = "outcomes 0 and 1 (or two labels)"
    is_class = True
    statistics = ("mean",)
    no_residuals = "any probability fits single trials"
    no_row_effects = "the trials' own variance"

    def outside(self, y: RowValues, data: ClusteredData) -> Bool[Tensor, " rows"]:
        return (y != 0) & (y != 1)

    def center(self, data: ClusteredData) -> Float[Tensor, " columns"]:
        return _logit(outcome_of(data).mean(), data)

    def distribution(self, eta: Eta, parameters: Parameters, rows: Rows) -> dist.TorchDistribution:
        return dist.Bernoulli(logits=eta[..., 0])

    def mean(self, eta: Eta, rows: Rows) -> Tensor:
        return torch.sigmoid(eta[..., 0])

    def simulate(self, rng: Generator, eta: Array, parameters: Numbers, trials: int) -> Array:
        return rng.binomial(1, _sigmoid(eta[:, 0]))


@dataclass(frozen=True)
class Binomial(LogitFamily):
    """y ~ Binomial(trials, 1 / (1 + exp(-eta))), logit link."""

    name = "binomial"
    if_overdispersed = "add (1 | row), a random intercept of each row"
    support = "whole numbers from 0 to the row's trials"
    needs_trials = True
    statistics = ("mean", "sd", "zeros")

    def outside(self, y: RowValues, data: ClusteredData) -> Bool[Tensor, " rows"]:
        return (y < 0) | (y != y.round()) | (y > self._trials(data.trials))

    def _trials(self, trials: Tensor | None) -> Tensor:
        if trials is None:
            raise ValueError(f"family {self.name!r} needs the number of trials of each row")
        return trials

    def center(self, data: ClusteredData) -> Float[Tensor, " columns"]:
        return _logit(outcome_of(data).sum() / self._trials(data.trials).sum(), data)

    def distribution(self, eta: Eta, parameters: Parameters, rows: Rows) -> dist.TorchDistribution:
        return LogitBinomial(self._trials(rows.trials), eta[..., 0])

    def mean(self, eta: Eta, rows: Rows) -> Tensor:
        return self._trials(rows.trials) * torch.sigmoid(eta[..., 0])

    def cdf(self, y: RowValues, eta: Eta, parameters: Parameters, rows: Rows) -> RowValues:
        from scipy import stats  # slow to import

        hits, trials, mean = arrays(y, self._trials(rows.trials), self.mean(eta, rows))
        return torch.from_numpy(stats.binom.cdf(hits, trials, mean / trials))

    def simulate(self, rng: Generator, eta: Array, parameters: Numbers, trials: int) -> Array:
        return rng.binomial(trials, _sigmoid(eta[:, 0]))


@dataclass(frozen=True)
class Categorical(LogitFamily):
    """P(y = c) = exp(eta_c) / sum_d exp(eta_d) with eta_0 = 0: logits relative to the first class.

    The network has one output per class; the first output is subtracted from the others.
    """

    name = "categorical"
    support = "labels, or codes 0, 1, ..., C - 1 with every class present"
    is_class = True
    multiclass = True
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


def _logit(probability: Tensor, data: ClusteredData) -> Float[Tensor, " 1"]:
    return (torch.logit(probability.clamp(0.001, 0.999)) - mean_offset(data)).reshape(1)


def _sigmoid(eta: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-eta))
