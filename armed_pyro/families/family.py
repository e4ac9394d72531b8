"""Outcome models: link, dispersion, density and mean of y given the linear predictor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.priors import Priors
from armed_pyro.rows.batch import Rows

__all__ = ["Family"]


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
