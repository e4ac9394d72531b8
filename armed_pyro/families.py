"""Outcome models: link, dispersion, density and mean of y given the linear predictor."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from armed_pyro.data import ClusteredData
from armed_pyro.densities import LogitBinomial, LogNegativeBinomial, LogPoisson
from armed_pyro.priors import Priors
from armed_pyro.rows import Rows

__all__ = ["FAMILIES", "Family", "family_named"]


@dataclass(frozen=True)
class Family(ABC):
    """Density of an outcome given its linear predictor eta, on the outcome's original scale.

    The predictor has shape "... rows columns": one column, or one for each class but the first
    for categorical outcomes. The dispersion, where a family has one, is a latent site in
    standardised units and has shape "..." or "... 1".
    """

    name: ClassVar[str]
    dispersion_name: ClassVar[str | None] = None
    integer: ClassVar[bool] = False
    support: ClassVar[str]

    @abstractmethod
    def outside(self, y: Float[Tensor, " rows"], data: ClusteredData) -> Bool[Tensor, " rows"]:
        """Which outcomes lie outside the family's support."""

    @abstractmethod
    def center(self, data: ClusteredData) -> Float[Tensor, " columns"]:
        """Predictor of the mean outcome without offset: the network's output counts from it."""

    @abstractmethod
    def distribution(
        self, eta: Float[Tensor, "... rows columns"], dispersion: Tensor | None, rows: Rows
    ) -> dist.TorchDistribution:
        """p(y | eta), with batch shape "... rows"."""

    @abstractmethod
    def mean(
        self, eta: Float[Tensor, "... rows columns"], rows: Rows
    ) -> Float[Tensor, "... rows"] | Float[Tensor, "... rows classes"]:
        """E[y | eta]; the probability of every class for categorical outcomes."""

    @abstractmethod
    def residual_variance(
        self, dispersion: Float[Tensor, " draws"] | None, mean: Float[Tensor, " draws"]
    ) -> Float[Tensor, " draws"]:
        """Variance of an observation on the scale of eta (Nakagawa, Johnson, Schielzeth 2017).

        Parameters
        ----------
        dispersion : Float[Tensor, "draws"] or None
            Dispersion on the original scale.
        mean : Float[Tensor, "draws"]
            Mean outcome, which the observation variance of counts depends on.
        """

    def check(self, data: ClusteredData) -> None:
        """Raise ValueError if the outcome does not suit the family, naming the rows."""
        if data.outcome is None:
            raise ValueError(f"the outcome {data.outcome_name!r} is missing from the data")
        if data.classes is not None and len(data.classes) != 2:
            raise ValueError(
                f"the outcome {data.outcome_name!r} has {len(data.classes)} labels "
                f"({_some(data.classes)}), but family {self.name!r} needs {self.support}; "
                "use family 'categorical' for labels"
            )
        bad = self.outside(data.outcome, data)
        if bad.any():
            rows = data.row_labels[bad.numpy()]
            values = data.outcome[bad][:3].tolist()
            raise ValueError(
                f"family {self.name!r} needs {self.support}, but the outcome "
                f"{data.outcome_name!r} is outside that range in {int(bad.sum())} row(s), e.g. "
                f"row(s) {_some(rows)} with {_some(values)}: correct the rows or choose another "
                "family"
            )

    def columns(self, data: ClusteredData) -> tuple[str, ...]:
        """Names of the predictor's columns; one nameless column unless outcomes have classes."""
        return ("",)

    def spread(self, data: ClusteredData) -> float:
        """Predictor units per standardised unit: sd(y) for gaussian outcomes, otherwise 1."""
        return 1.0

    def effect_scale(self) -> float:
        """Default scale of the priors of random effects' sds, in standardised units."""
        return 2.5

    def contrasts(self, output: Float[Tensor, "rows outputs"]) -> Float[Tensor, "rows columns"]:
        """The network's output as columns of the predictor."""
        return output

    def dispersion(self, priors: Priors, unit: Float[Tensor, " 1"]) -> Tensor | None:
        """Sample the dispersion's latent site; None for a family without one.

        Parameters
        ----------
        unit : Float[Tensor, "1"]
            Standardised units per unit of the outcome, in the program's precision.
        """
        return None

    def original_dispersion(self, dispersion: Tensor, spread: float) -> Tensor:
        """The latent dispersion on the outcome's scale."""
        return dispersion

    def precision(self, dispersion: Tensor | None) -> Tensor | None:
        """1 / Var(y | eta) in standardised units where it does not depend on eta, or None."""
        return None


def _some(values: Any, most: int = 3) -> str:
    shown = ", ".join(str(value) for value in list(values)[:most])
    return shown + (", ..." if len(values) > most else "")


def _outcome(data: ClusteredData) -> Tensor:
    if data.outcome is None:
        raise ValueError(f"the outcome {data.outcome_name!r} is missing from the data")
    return data.outcome


def _known(dispersion: Tensor | None, family: Family) -> Tensor:
    if dispersion is None:
        raise ValueError(f"family {family.name!r} needs its {family.dispersion_name}")
    return dispersion


def _offset(data: ClusteredData) -> Tensor:
    return torch.zeros(()) if data.offset is None else data.offset


def _logit(probability: Tensor, data: ClusteredData) -> Tensor:
    return (torch.logit(probability.clamp(0.001, 0.999)) - _offset(data).mean()).reshape(1)


@dataclass(frozen=True)
class Gaussian(Family):
    """y ~ N(eta, residual_sd^2), identity link."""

    name = "gaussian"
    dispersion_name = "residual_sd"
    support = "finite numbers"

    def outside(self, y: Float[Tensor, " rows"], data: ClusteredData) -> Bool[Tensor, " rows"]:
        return ~torch.isfinite(y)

    def center(self, data: ClusteredData) -> Float[Tensor, " columns"]:
        return (_outcome(data) - _offset(data)).mean().reshape(1)

    def spread(self, data: ClusteredData) -> float:
        spread = float((_outcome(data) - _offset(data)).std())
        if spread == 0:
            raise ValueError(f"the outcome {data.outcome_name!r} is the same in every row")
        return spread

    def effect_scale(self) -> float:
        return 1.0

    def dispersion(self, priors: Priors, unit: Float[Tensor, " 1"]) -> Tensor | None:
        prior = priors.residual_sd
        scale = prior.scales([""], unit, self.effect_scale())
        return prior.sample("residual_sd", scale[0])

    def original_dispersion(self, dispersion: Tensor, spread: float) -> Tensor:
        return dispersion * spread

    def precision(self, dispersion: Tensor | None) -> Tensor | None:
        return None if dispersion is None else dispersion**-2

    def distribution(
        self, eta: Float[Tensor, "... rows columns"], dispersion: Tensor | None, rows: Rows
    ) -> dist.TorchDistribution:
        return dist.Normal(eta[..., 0], _known(dispersion, self))

    def mean(self, eta: Float[Tensor, "... rows columns"], rows: Rows) -> Tensor:
        return eta[..., 0]

    def residual_variance(
        self, dispersion: Float[Tensor, " draws"] | None, mean: Float[Tensor, " draws"]
    ) -> Float[Tensor, " draws"]:
        return _known(dispersion, self) ** 2


class LogitFamily(Family, ABC):
    """Families with logit link: on the latent scale a standard logistic residual."""

    integer = True

    def residual_variance(
        self, dispersion: Float[Tensor, " draws"] | None, mean: Float[Tensor, " draws"]
    ) -> Float[Tensor, " draws"]:
        return torch.full_like(mean, math.pi**2 / 3)


class CountFamily(Family, ABC):
    """Families of counts with log link, E[y] = exp(eta)."""

    integer = True
    support = "whole numbers from 0 up"

    def outside(self, y: Float[Tensor, " rows"], data: ClusteredData) -> Bool[Tensor, " rows"]:
        return (y < 0) | (y != y.round())

    def center(self, data: ClusteredData) -> Float[Tensor, " columns"]:
        rate = _outcome(data).mean() / _offset(data).exp().mean()
        return torch.log(rate.clamp(min=1e-3)).reshape(1)

    def mean(self, eta: Float[Tensor, "... rows columns"], rows: Rows) -> Tensor:
        return torch.exp(eta[..., 0])


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


@dataclass(frozen=True)
class Poisson(CountFamily):
    """y ~ Poisson(exp(eta)), log link."""

    name = "poisson"

    def distribution(
        self, eta: Float[Tensor, "... rows columns"], dispersion: Tensor | None, rows: Rows
    ) -> dist.TorchDistribution:
        return LogPoisson(eta[..., 0])

    def residual_variance(
        self, dispersion: Float[Tensor, " draws"] | None, mean: Float[Tensor, " draws"]
    ) -> Float[Tensor, " draws"]:
        return torch.log1p(1 / mean)


@dataclass(frozen=True)
class NegativeBinomial(CountFamily):
    """E[y] = mu = exp(eta), Var[y] = mu + mu^2 / shape, log link."""

    name = "negative_binomial"
    dispersion_name = "shape"

    def dispersion(self, priors: Priors, unit: Float[Tensor, " 1"]) -> Tensor | None:
        # brms' default prior of the shape.
        prior = dist.InverseGamma(unit.new_tensor(0.4), unit.new_tensor(0.3))
        return pyro.sample("shape", prior)

    def distribution(
        self, eta: Float[Tensor, "... rows columns"], dispersion: Tensor | None, rows: Rows
    ) -> dist.TorchDistribution:
        return LogNegativeBinomial(eta[..., 0], _known(dispersion, self))

    def residual_variance(
        self, dispersion: Float[Tensor, " draws"] | None, mean: Float[Tensor, " draws"]
    ) -> Float[Tensor, " draws"]:
        return torch.log1p(1 / mean + 1 / _known(dispersion, self))


FAMILIES: dict[str, type[Family]] = {
    family.name: family
    for family in (Gaussian, Bernoulli, Binomial, Categorical, Poisson, NegativeBinomial)
}


def family_named(name: str | Family) -> Family:
    """The family with this name.

    Raises
    ------
    ValueError
        If there is no such family.

    Examples
    --------
    >>> family_named("poisson").name
    'poisson'
    """
    if isinstance(name, Family):
        return name
    if name not in FAMILIES:
        raise ValueError(f"unknown family {name!r}: choose one of {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name]()
