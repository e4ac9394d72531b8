"""Families whose mean has a choice of links."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from armed_pyro._messages import check_known
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.families.family import Draws, Eta, Family, Parameters, outcome_of
from armed_pyro.families.links import Link, MeanLink
from armed_pyro.rows.batch import Rows

__all__ = ["LinkedFamily", "MeanFamily"]


@dataclass(frozen=True)
class LinkedFamily(Family, ABC):
    """A family whose mean mu is that of a link, chosen by its name.

    `links` has the links by name; the first is the default. A family defines Var[y] in
    `mean_variance`, and the Fisher information of mu in `mean_information`, unless it is
    1 / Var[y], as in exponential families.
    """

    link: str
    links: ClassVar[Mapping[str, Link]]

    def __post_init__(self) -> None:
        check_known(f"link of family {self.name!r}", [self.link], self.links)

    def __str__(self) -> str:
        return self.name if self.link == next(iter(self.links)) else f"{self.name}({self.link})"

    @property
    def coefficient_ratio(self) -> str:  # type: ignore[override]
        """Meaning of exp(coefficient); empty if the link gives it none."""
        return self._link.ratio

    @property
    def _link(self) -> Link:
        return self.links[self.link]

    def center(self, data: ClusteredData) -> Float[Tensor, " columns"]:
        return self._link.center(outcome_of(data), data.offset).reshape(1)

    def spread(self, data: ClusteredData) -> float:
        return self._link.spread(outcome_of(data))

    def effect_scale(self) -> float:
        return self._link.effect_scale

    def mean(self, eta: Eta, rows: Rows) -> Tensor:
        return self._link.inverse(eta[..., 0])

    @abstractmethod
    def mean_variance(self, mean: Tensor, parameters: Parameters) -> Tensor:
        """Var[y] at the mean mu."""

    def mean_information(self, mean: Tensor, parameters: Parameters) -> Tensor:
        """Fisher information of the mean mu."""
        return 1 / self.mean_variance(mean, parameters)

    def information(self, eta: Eta, parameters: Parameters, rows: Rows) -> Tensor:
        """(d mu / d eta)^2 times the information of mu."""
        column = eta[..., 0]
        tiny = torch.finfo(eta.dtype).tiny ** 0.5
        mean = self._link.inverse(column).clamp(min=tiny)
        value = self._link.derivative(column) ** 2 * self.mean_information(mean, parameters)
        return value[..., None]

    def marginal_mean(
        self, eta: Float[Tensor, "draws rows columns"], variance: Float[Tensor, "draws columns"]
    ) -> Float[Tensor, "draws columns"]:
        """Mean over the rows, and over normal random effects."""
        return self._link.marginal_mean(eta[..., 0], variance[:, 0])[:, None]

    def residual_variance(self, parameters: Parameters, mean: Draws) -> Draws:
        return self._link.latent_variance(mean, self.mean_variance(mean, parameters))


@dataclass(frozen=True)
class MeanFamily(LinkedFamily, ABC):
    """A family with a positive mean."""

    needs_mean = True

    def log_mean(self, eta: Eta) -> Float[Tensor, "... rows"]:
        """log mu."""
        link = self._link
        assert isinstance(link, MeanLink)  # for mypy: `links` of a `MeanFamily` are
        return link.log_inverse(eta[..., 0])
