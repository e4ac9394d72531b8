"""Covariance of a cluster's random effects: one class per kind."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import ClassVar

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor, nn

from armed_pyro.priors import Known, Priors, ScalePrior

__all__ = [
    "COVARIANCES",
    "Correlated",
    "Covariance",
    "Independent",
    "JointCovariance",
    "TermGroup",
    "covariance_named",
]

# Initial sd of the guide, in standardised units, for a factor with at most two terms. A factor with
# more terms, such as those of a layer's units, starts with the same sum of variances.
START_SD = 0.5


@dataclass(frozen=True)
class TermGroup:
    """Terms of a grouping factor whose effects share one covariance.

    Attributes
    ----------
    factor : str
        The grouping factor.
    places : tuple of int
        Positions of the terms among all terms of the factor.
    terms : tuple of str
        Names of the terms.
    number : int or None
        Number of the group; None if the factor has no other group.
    """

    factor: str
    places: tuple[int, ...]
    terms: tuple[str, ...]
    number: int | None = None

    def site(self, quantity: str) -> str:
        """Name of the group's site for a quantity.

        Examples
        --------
        >>> TermGroup("site", (0, 1), ("Intercept", "age"), 1).site("cor_cholesky")
        'site_cor_cholesky_1'
        """
        number = "" if self.number is None else f"_{self.number}"
        return f"{self.factor}_{quantity}{number}"


class Covariance(ABC):
    r"""Correlation matrix R of a group of effects, whose covariance is diag(sd) R diag(sd).

    The sds are a site of the factor. A kind of covariance defines R, its sites and their priors.
    It is one subclass and one entry in `COVARIANCES`. The subclass is a frozen dataclass, whose
    fields are settings: numbers, texts or `ScalePrior`s, which are saved with a fit.

    Attributes
    ----------
    name : str
        Name of the kind, in calls and files.
    diagonal : bool
        Whether R is the identity.
    any_origin : bool
        Whether this kind contains M D M' for each of its covariances D and every matrix M.
        Features are then centred, which does not change the model and makes inference easier.
    clusters_independent : bool
        Whether effects of different clusters are independent given the covariance.

    Examples
    --------
    >>> covariance_named("independent").diagonal
    True
    """

    name: ClassVar[str]
    diagonal: ClassVar[bool] = False
    any_origin: ClassVar[bool] = False
    clusters_independent: ClassVar[bool] = True

    @abstractmethod
    def sites(self, group: TermGroup) -> tuple[str, ...]:
        """Names of the latent sites of a group, from `TermGroup.site`."""

    @abstractmethod
    def sample(self, group: TermGroup, like: Tensor) -> dict[str, Tensor]:
        """Sample the latent sites from their priors.

        Parameters
        ----------
        group : TermGroup
            The effects.
        like : Tensor
            A tensor with the program's precision and device.

        Returns
        -------
        dict of str to Tensor
            The sampled values, by site.
        """

    @abstractmethod
    def cholesky(
        self, group: TermGroup, latents: Mapping[str, Tensor]
    ) -> Float[Tensor, "... terms terms"]:
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

    def quantities(self, group: TermGroup, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Further rows of tables besides sds and correlations, in original units.

        Returns
        -------
        dict of str to Tensor
            Scalars by name, shape "..." or "... 1"; by default none.
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

    def cholesky(
        self, group: TermGroup, latents: Mapping[str, Tensor]
    ) -> Float[Tensor, "... terms terms"]:
        return torch.eye(len(group.terms), dtype=torch.float64)

    def describe(self, group: TermGroup) -> dict[str, str]:
        return {}


@dataclass(frozen=True)
class Correlated(Covariance):
    """R ~ LKJ(concentration), p(R) ~ det(R)^(concentration - 1): the correlated effects of ``|``.

    Attributes
    ----------
    concentration : float or None
        Concentration of the LKJ prior; None stands for `Priors.cor`.
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

    def cholesky(
        self, group: TermGroup, latents: Mapping[str, Tensor]
    ) -> Float[Tensor, "... terms terms"]:
        return latents[self.sites(group)[0]]

    def describe(self, group: TermGroup) -> dict[str, str]:
        return {f"{group.factor}_cor": f"LKJ({self._concentration():.4g})"}

    def _concentration(self) -> float:
        return 1.0 if self.concentration is None else self.concentration


COVARIANCES: dict[str, type[Covariance]] = {kind.name: kind for kind in (Correlated, Independent)}


def covariance_named(name: str | Covariance) -> Covariance:
    """The covariance with this name and default settings; a `Covariance` is returned as it is.

    Raises
    ------
    ValueError
        If there is no such covariance.

    Examples
    --------
    >>> covariance_named("correlated")
    Correlated(concentration=None)
    """
    if isinstance(name, Covariance):
        return name
    if name not in COVARIANCES:
        known = ", ".join(sorted(COVARIANCES))
        raise ValueError(f"unknown covariance {name!r}: choose one of {known}")
    return COVARIANCES[name]()


class JointCovariance(nn.Module):
    r"""D = diag(sd) R diag(sd), the covariance of all effects of a cluster of one factor.

    R has one block for each group of terms and is the identity elsewhere. The sites are
    ``<factor>_sd``, the sites of the groups and, unless all effects are independent,
    ``<factor>_cor``.

    Parameters
    ----------
    factor : str
        The grouping factor.
    terms : sequence of str
        Names of all terms of the factor.
    prior : ScalePrior
        Prior of the sds.
    prior_scale : Float[Tensor, "terms"]
        Scales of the prior, in standardised units.
    unit : Float[Tensor, "terms"]
        Standardised units per original unit of each term.
    groups : sequence of (TermGroup, Covariance)
        Groups of correlated terms with their kinds of covariance.

    Raises
    ------
    ValueError
        If sds are known but their terms are correlated, or if a covariance makes clusters depend
        on each other.
    """

    unit: Tensor
    prior_scale: Tensor

    def __init__(
        self,
        factor: str,
        terms: Sequence[str],
        prior: ScalePrior,
        prior_scale: Float[Tensor, " terms"],
        unit: Float[Tensor, " terms"],
        groups: Sequence[tuple[TermGroup, Covariance]],
    ) -> None:
        super().__init__()
        self.factor, self.terms, self.prior = factor, tuple(terms), prior
        self.groups = tuple(groups)
        self.register_buffer("unit", unit, persistent=False)
        self.register_buffer("prior_scale", prior_scale, persistent=False)
        if isinstance(prior, Known) and self.groups:
            raise ValueError(
                f"the sds of {factor!r} are given as known, but its terms are correlated: write "
                "them as independent, with '||'"
            )
        for _, covariance in self.groups:
            if not covariance.clusters_independent:
                raise ValueError(
                    f"the covariance {covariance.name!r} of {factor!r} makes its clusters depend "
                    "on each other, for which there is no guide yet"
                )

    @property
    def sd_site(self) -> str:
        """Name of the site of the sds."""
        return f"{self.factor}_sd"

    @property
    def diagonal(self) -> bool:
        """Whether all effects of a cluster are independent given their sds."""
        return not self.groups

    def sites(self) -> tuple[str, ...]:
        """Names of all sites, and of the site that correlated effects would have."""
        of_groups = [site for group, kind in self.groups for site in kind.sites(group)]
        return (self.sd_site, f"{self.factor}_cor", *of_groups)

    def sample(self) -> dict[str, Tensor]:
        """Sample the sds and the sites of the groups."""
        latents = {self.sd_site: self.prior.sample(self.sd_site, self.prior_scale)}
        for group, covariance in self.groups:
            latents |= covariance.sample(group, self.prior_scale)
        if not self.diagonal:
            root = self.correlation_cholesky(latents)
            pyro.deterministic(f"{self.factor}_cor", root @ root.mT, event_dim=2)
        return latents

    def known(self) -> dict[str, Tensor]:
        """Values of the sites that the priors fix."""
        return {self.sd_site: self.prior_scale} if isinstance(self.prior, Known) else {}

    def starts(self) -> dict[str, Tensor]:
        """Initial values of the guide, by site; see `Covariance.starts`."""
        size = len(self.terms)
        sd = START_SD / math.sqrt(max(1, size / 2))
        values = {self.sd_site: torch.full((size,), sd, dtype=torch.float64)}
        for group, covariance in self.groups:
            values |= covariance.starts(group)
        return values

    def describe_priors(self) -> dict[str, str]:
        """Priors as text: of the terms' sds, in the units of the data, and of the groups' sites."""
        lines = {
            f"{self.sd_site}[{term}]": self.prior.describe(float(scale / unit))
            for term, scale, unit in zip(self.terms, self.prior_scale, self.unit, strict=True)
        }
        for group, covariance in self.groups:
            lines |= covariance.describe(group)
        return lines

    def sd(self, latents: Mapping[str, Tensor]) -> Float[Tensor, "... terms"]:
        """Standard deviations of the terms."""
        return latents[self.sd_site]

    def correlation_cholesky(
        self, latents: Mapping[str, Tensor]
    ) -> Float[Tensor, "... terms terms"]:
        """Cholesky factor of R, assembled from the groups' factors."""
        if len(self.groups) == 1 and len(self.groups[0][0].terms) == len(self.terms):
            group, covariance = self.groups[0]
            return covariance.cholesky(group, latents)
        sd = self.sd(latents)
        full = torch.eye(len(self.terms), dtype=sd.dtype, device=sd.device)
        full = full.expand(*sd.shape[:-1], *full.shape).clone()
        for group, covariance in self.groups:
            index = torch.tensor(group.places, device=sd.device)
            full[..., index[:, None], index] = covariance.cholesky(group, latents)
        return full

    def scale(
        self, latents: Mapping[str, Tensor]
    ) -> Float[Tensor, "... terms"] | Float[Tensor, "... terms terms"]:
        """L with u = L z: the vector of sds if effects are independent, otherwise a matrix."""
        sd = self.sd(latents)
        return sd if self.diagonal else sd[..., :, None] * self.correlation_cholesky(latents)

    def matrix(self, latents: Mapping[str, Tensor]) -> Float[Tensor, "... terms terms"]:
        """D, in standardised units."""
        scale = self.scale(latents)
        return torch.diag_embed(scale**2) if self.diagonal else scale @ scale.mT

    def effects(
        self, latents: Mapping[str, Tensor], noise: Float[Tensor, "... clusters terms"]
    ) -> Float[Tensor, "... clusters terms"]:
        """u = L z for standard normal noise z, with the same draws as the latent sites."""
        scale = self.scale(latents)  # draws come with size 1 in the dimension of the clusters
        if self.diagonal:
            return scale * noise
        return noise @ (scale.squeeze(-3) if scale.dim() > 2 else scale).mT

    def pairs(self) -> Iterator[tuple[int, int]]:
        """Positions of every pair of correlated terms."""
        for group, _ in self.groups:
            yield from combinations(group.places, 2)

    def correlations(self, latents: Mapping[str, Tensor]) -> dict[str, Float[Tensor, " draws"]]:
        """Correlation of every pair of terms of a group, in standardised units."""
        values = {}
        for group, covariance in self.groups:
            root = covariance.cholesky(group, latents)
            root = root.reshape(-1, *root.shape[-2:])
            for i, j in combinations(range(len(group.terms)), 2):
                name = f"{self.factor}_cor[{group.terms[i]},{group.terms[j]}]"
                values[name] = (root[:, i] * root[:, j]).sum(-1)
        return values

    def quantities(
        self, latents: Mapping[str, Tensor]
    ) -> Iterator[tuple[TermGroup, str, Float[Tensor, " draws"]]]:
        """Further rows of tables, by group and name; see `Covariance.quantities`."""
        for group, covariance in self.groups:
            for name, values in covariance.quantities(group, latents).items():
                yield group, name, values.reshape(-1)
