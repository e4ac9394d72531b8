"""Outcomes with a logit link: bernoulli, binomial, categorical."""

from __future__ import annotations

import math
from abc import ABC
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.distributions.outcome_densities import (
    LogitBinomial,
)
from armed_pyro.families.family import Family, _offset, _outcome, _some
from armed_pyro.rows.batch import Rows


def _logit(probability: Tensor, data: ClusteredData) -> Tensor:
    return (torch.logit(probability.clamp(0.001, 0.999)) - _offset(data).mean()).reshape(1)


class LogitFamily(Family, ABC):
    """Families with logit link: on the latent scale a standard logistic residual."""

    integer = True

    def residual_variance(
        self, dispersion: Float[Tensor, " draws"] | None, mean: Float[Tensor, " draws"]
    ) -> Float[Tensor, " draws"]:
        return torch.full_like(mean, math.pi**2 / 3)


@dataclass(frozen=True)
class Bernoulli(LogitFamily):
    """P(y = 1) = 1 / (1 + exp(-eta)), logit link."""

    name = "bernoulli"
    support = "outcomes 0 and 1 (or two labels)"

    def outside(self, y: Float[Tensor, " rows"], data: ClusteredData) -> Bool[Tensor, " rows"]:
        return (y != 0) & (y != 1)

    def center(self, data: ClusteredData) -> Float[Tensor, " columns"]:
        return _logit(_outcome(data).mean(), data)

    def distribution(
        self, eta: Float[Tensor, "... rows columns"], dispersion: Tensor | None, rows: Rows
    ) -> dist.TorchDistribution:
        return dist.Bernoulli(logits=eta[..., 0])

    def mean(self, eta: Float[Tensor, "... rows columns"], rows: Rows) -> Tensor:
        return torch.sigmoid(eta[..., 0])


@dataclass(frozen=True)
class Binomial(LogitFamily):
    """y ~ Binomial(trials, 1 / (1 + exp(-eta))), logit link."""

    name = "binomial"
    support = "whole numbers from 0 to the row's trials"

    def check(self, data: ClusteredData) -> None:
        if data.trials is None:
            raise ValueError(
                "family 'binomial' needs the number of trials of each row: name its column with "
                "trials='...' (command line: --trials COLUMN)"
            )
        super().check(data)

    def outside(self, y: Float[Tensor, " rows"], data: ClusteredData) -> Bool[Tensor, " rows"]:
        return (y < 0) | (y != y.round()) | (y > self._trials(data.trials))

    def _trials(self, trials: Tensor | None) -> Tensor:
        if trials is None:
            raise ValueError("family 'binomial' needs the number of trials of each row")
        return trials

    def center(self, data: ClusteredData) -> Float[Tensor, " columns"]:
        return _logit(_outcome(data).sum() / self._trials(data.trials).sum(), data)

    def distribution(
        self, eta: Float[Tensor, "... rows columns"], dispersion: Tensor | None, rows: Rows
    ) -> dist.TorchDistribution:
        return LogitBinomial(self._trials(rows.trials), eta[..., 0])

    def mean(self, eta: Float[Tensor, "... rows columns"], rows: Rows) -> Tensor:
        return self._trials(rows.trials) * torch.sigmoid(eta[..., 0])


@dataclass(frozen=True)
class Categorical(LogitFamily):
    """P(y = c) = exp(eta_c) / sum_d exp(eta_d) with eta_0 = 0: logits relative to the first class.

    A network gives one output a class, of which the first is subtracted from the others.
    """

    name = "categorical"
    support = "labels, or codes 0, 1, ..., C - 1 with every class present"

    def check(self, data: ClusteredData) -> None:
        y = _outcome(data)
        present = torch.unique(y)
        if len(present) < 2:
            raise ValueError(
                f"the outcome {data.outcome_name!r} has a single class: nothing to model"
            )
        if data.classes is None and not torch.equal(present, torch.arange(len(present)).to(y)):
            raise ValueError(
                f"family 'categorical' needs {self.support}, but {data.outcome_name!r} has the "
                f"values {_some(present.tolist(), 6)}: store the classes as strings, or recode them"
            )

    def outside(self, y: Float[Tensor, " rows"], data: ClusteredData) -> Bool[Tensor, " rows"]:
        return torch.zeros_like(y, dtype=torch.bool)

    def columns(self, data: ClusteredData) -> tuple[str, ...]:
        if data.classes is not None:
            return tuple(str(label) for label in data.classes[1:])
        return tuple(str(code) for code in range(1, int(_outcome(data).max()) + 1))

    def center(self, data: ClusteredData) -> Float[Tensor, " columns"]:
        counts = torch.bincount(_outcome(data).long(), minlength=len(self.columns(data)) + 1)
        logs = torch.log(counts.to(torch.float64) + 0.5)
        return logs[1:] - logs[0] - _offset(data).mean()

    def contrasts(self, output: Float[Tensor, "rows outputs"]) -> Float[Tensor, "rows columns"]:
        return output[..., 1:] - output[..., :1]

    def _logits(self, eta: Float[Tensor, "... rows columns"]) -> Tensor:
        return torch.cat([torch.zeros_like(eta[..., :1]), eta], -1)

    def distribution(
        self, eta: Float[Tensor, "... rows columns"], dispersion: Tensor | None, rows: Rows
    ) -> dist.TorchDistribution:
        return dist.Categorical(logits=self._logits(eta))

    def mean(self, eta: Float[Tensor, "... rows columns"], rows: Rows) -> Tensor:
        return torch.softmax(self._logits(eta), -1)
