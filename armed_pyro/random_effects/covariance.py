"""Correlation matrix of a group of a cluster's random effects: one class per kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor

from armed_pyro.priors import Priors

__all__ = ["COVARIANCES", "Correlated", "Covariance", "Independent", "covariance_named"]

# Values of latent sites by name.
Latents = Mapping[str, Tensor]
# One matrix per draw.
Matrix = Float[Tensor, "... terms terms"]


@dataclass(frozen=True)
class TermGroup:
    """Terms of a grouping factor whose effects share one covariance.

    `places` are their positions among all terms of the factor. `number` is that of the group; None
    if the factor has no other.
    """

    factor: str
    places: tuple[int, ...]
    terms: tuple[str, ...]
    number: int | None = None

    def site(self, quantity: str) -> str:
        """Name of the group's site for a quantity, such as ``"site_cor_cholesky_1"``."""
        number = "" if self.number is None else f"_{self.number}"
        return f"{self.factor}_{quantity}{number}"


class Covariance(ABC):
    """Correlation matrix R of a group of effects, whose covariance is diag(sd) R diag(sd).

    The sds are a site of the factor. A kind of covariance defines R, its sites and their priors.
    It is one subclass and one entry in `COVARIANCES`. The subclass is a frozen dataclass, whose
    fields are settings: numbers, texts or `ScalePrior`s, which are saved with a fit.
    """

    name: ClassVar[str]  # in calls and files
    diagonal: ClassVar[bool] = False  # whether R is the identity
    # Whether this kind is every correlation matrix, with its Cholesky factor as its only site. It
    # then contains M D M' for each of its covariances D and every matrix M, and its sites may stand
    # at the features' means or at x = 0.
    any_origin: ClassVar[bool] = False
    # Whether effects of different clusters are independent given the covariance.
    clusters_independent: ClassVar[bool] = True

    @abstractmethod
    def sites(self, group: TermGroup) -> tuple[str, ...]:
        """Names of the latent sites of a group, from `TermGroup.site`."""

    @abstractmethod
    def sample(self, group: TermGroup, like: Tensor) -> dict[str, Tensor]:
        """Sample the latent sites from their priors, in the precision and device of `like`."""

    @abstractmethod
    def cholesky(self, group: TermGroup, latents: Latents) -> Matrix:
        """Lower Cholesky factor of R given the latent sites, for every draw."""

    @abstractmethod
    def describe(self, group: TermGroup) -> dict[str, str]:
        """Priors of the latent sites as text, by name of the quantity."""

    def with_priors(self, priors: Priors) -> Covariance:
        """The same kind, with its unset settings taken from the program's priors."""
        return self

    def starts(self, group: TermGroup) -> dict[str, Tensor]:
        """Initial values of the guide, by site.

        A site without an entry starts at 0 in unconstrained coordinates: the identity for a
        Cholesky factor, 1 for a positive number.
        """
        return {}

    def quantities(self, group: TermGroup, latents: Latents) -> dict[str, Tensor]:
        """Further rows of tables besides sds and correlations: scalars in original units by name.

        They have shape "..." or "... 1".
        """
        return {}

    def __str__(self) -> str:
        fields = vars(self).items()
        settings = ", ".join(f"{name}={value!r}" for name, value in fields if value is not None)
        return f"{self.name}({settings})" if settings else self.name


@dataclass(frozen=True)
class Independent(Covariance):
    """R = I, the independent effects of lme4's ``||``."""

    name = "independent"
    diagonal = True

    def sites(self, group: TermGroup) -> tuple[str, ...]:
        return ()

    def sample(self, group: TermGroup, like: Tensor) -> dict[str, Tensor]:
        return {}

    def cholesky(self, group: TermGroup, latents: Latents) -> Matrix:
        return torch.eye(len(group.terms), dtype=torch.float64)

    def describe(self, group: TermGroup) -> dict[str, str]:
        return {}


@dataclass(frozen=True)
class Correlated(Covariance):
    """R ~ LKJ(concentration), p(R) ~ det(R)^(concentration - 1): the correlated effects of ``|``.

    The concentration None stands for `Priors.cor`.
    """

    name = "correlated"
    any_origin = True

    concentration: float | None = None

    def with_priors(self, priors: Priors) -> Covariance:
        return self if self.concentration is not None else replace(self, concentration=priors.cor)

    def sites(self, group: TermGroup) -> tuple[str, ...]:
        return (group.site("cor_cholesky"),)

    def sample(self, group: TermGroup, like: Tensor) -> dict[str, Tensor]:
        (site,) = self.sites(group)
        prior = dist.LKJCholesky(len(group.terms), like.new_tensor(self._concentration()))
        return {site: pyro.sample(site, prior)}

    def cholesky(self, group: TermGroup, latents: Latents) -> Matrix:
        return latents[self.sites(group)[0]]

    def describe(self, group: TermGroup) -> dict[str, str]:
        return {f"{group.factor}_cor": f"LKJ({self._concentration():.4g})"}

    def _concentration(self) -> float:
        return 1.0 if self.concentration is None else self.concentration


COVARIANCES: dict[str, type[Covariance]] = {kind.name: kind for kind in (Correlated, Independent)}


def covariance_named(name: str | Covariance) -> Covariance:
    """The covariance with this name and default settings; a `Covariance` is returned as it is."""
    if isinstance(name, Covariance):
        return name
    if name not in COVARIANCES:
        kinds = ", ".join(sorted(COVARIANCES))
        raise ValueError(f"unknown covariance {name!r}: choose one of {kinds}")
    return COVARIANCES[name]()
