"""One grouping factor of a program: its covariance matrix, and its clusters' random effects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import cast

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro.poutine.scale_messenger import ScaleMessenger
from torch import Tensor, nn

from armed_pyro._messages import unknown
from armed_pyro.distributions.small_matrices import FEW
from armed_pyro.distributions.whitened import WhitenedNormal
from armed_pyro.priors import Known, ScalePrior
from armed_pyro.random_effects.design import Block, FilterBlock, LinearBlock
from armed_pyro.rows.batch import Membership

__all__ = ["Factor", "factor_named", "weighted"]


# Prior scale of the sds of effects on filters, relative scales and biases.
FILTER_SCALE = 0.3


class Factor(nn.Module):
    r"""Random effects of one grouping factor.

    .. math:: sd \sim p(sd), \quad R_b \sim LKJ(\eta), \quad
              u_k \sim N(0, diag(sd) R diag(sd)), \quad k = 1, \dots, K

    with one correlation matrix :math:`R_b` for each correlated term (and column of the
    predictor). The sites are ``<factor>_sd``, ``<factor>_cor_cholesky`` (numbered if there are
    several), ``<factor>_cor`` and, in a plate over clusters, ``<factor>_effect``.

    Effects are ordered by column of phi, then by column of the predictor; those on filters
    follow, which all columns share.

    Parameters
    ----------
    name : str
        The grouping factor.
    blocks : sequence of Block
        Its terms' columns.
    columns : sequence of str
        Names of the predictor's columns.
    prior, default : ScalePrior, float
        Prior of the sds, and its scale where it has none.
    concentration : float
        eta of the LKJ prior.
    spread : float
        Outcome units per standardised unit.
    """

    unit: Tensor
    prior_scale: Tensor
    to_original: Tensor

    def __init__(
        self,
        name: str,
        blocks: Sequence[Block],
        columns: Sequence[str],
        prior: ScalePrior,
        default: float,
        concentration: float,
        spread: float,
    ) -> None:
        super().__init__()
        self.name = name
        linear = [block for block in blocks if isinstance(block, LinearBlock)]
        filters = [block for block in blocks if isinstance(block, FilterBlock)]
        self._blocks = nn.ModuleList([*linear, *filters])
        self.n_columns = len(columns)
        self.prior = prior
        self.concentration = concentration
        names = [term for block in self.blocks for term in block.names]
        if twice := [term for place, term in enumerate(names) if term in names[:place]]:
            raise ValueError(
                f"two terms of {name!r} have the column {twice[0]!r}: leave it out of one of them"
            )
        multiplied = [
            (term, f"{term}[{column}]" if column else term, default / block.width**0.5)
            for block in linear
            for term in block.names
            for column in columns
        ]  # the variance of phi'u should not grow with the width of a layer
        own = [(term, term, FILTER_SCALE) for block in filters for term in block.names]
        self.terms = tuple(label for _, label, _ in multiplied + own)
        self.n_linear = len(multiplied)
        self.groups = _groups(linear, len(columns))
        if isinstance(prior, Known) and self.groups:
            raise ValueError(
                f"the sds of {name!r} are given as known, but its terms are correlated: write "
                "them as independent, with '||'"
            )
        parts = [
            torch.kron(block.to_original, torch.eye(self.n_columns, dtype=torch.float64)) * spread
            for block in linear
        ]
        matrix = torch.block_diag(*parts, *[block.to_original for block in filters])
        unit = 1 / matrix.diagonal()
        self.register_buffer("to_original", matrix, persistent=False)
        self.register_buffer("unit", unit, persistent=False)
        defaults = torch.tensor([one for *_, one in multiplied + own], dtype=unit.dtype)
        scale = prior.scales([term for term, *_ in multiplied + own], unit, defaults)
        self.register_buffer("prior_scale", scale, persistent=False)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Its terms' columns."""
        return cast("tuple[Block, ...]", tuple(self._blocks))

    @property
    def linear(self) -> tuple[LinearBlock, ...]:
        """Its effects on the linear predictor."""
        return tuple(block for block in self.blocks if isinstance(block, LinearBlock))

    @property
    def filters(self) -> tuple[FilterBlock, ...]:
        """Its effects inside the network."""
        return tuple(block for block in self.blocks if isinstance(block, FilterBlock))

    @property
    def diagonal(self) -> bool:
        """Whether all effects of a cluster are independent given their sds."""
        return not self.groups

    @property
    def effect_site(self) -> str:
        """Name of the random effects' site."""
        return f"{self.name}_effect"

    def cholesky_sites(self) -> tuple[str, ...]:
        """Names of the sites of the correlations' Cholesky factors."""
        site = f"{self.name}_cor_cholesky"
        numbered = tuple(f"{site}_{number}" for number in range(len(self.groups)))
        return (site,) if len(self.groups) == 1 else numbered

    def describe_priors(self) -> dict[str, str]:
        """Prior of every term's sd, in the units of the data, and of the correlations."""
        lines = {
            f"{self.name}_sd[{term}]": self.prior.describe(float(scale / unit))
            for term, scale, unit in zip(self.terms, self.prior_scale, self.unit, strict=True)
        }
        if self.groups:
            lines[f"{self.name}_cor"] = f"LKJ({self.concentration:.4g})"
        return lines

    def forward(self, membership: Membership) -> Float[Tensor, "... clusters terms"]:
        """Sample the hyperparameters, and the random effects of the clusters drawn."""
        latents = {f"{self.name}_sd": self.prior.sample(f"{self.name}_sd", self.prior_scale)}
        for site, group in zip(self.cholesky_sites(), self.groups, strict=True):
            concentration = self.prior_scale.new_tensor(self.concentration)
            latents[site] = pyro.sample(site, dist.LKJCholesky(len(group), concentration))
        if self.groups:
            factor = self.correlation_cholesky(latents)
            pyro.deterministic(f"{self.name}_cor", factor @ factor.mT, event_dim=2)
        scale = self.scale(latents)
        with self.plate(membership), weighted(membership):
            if self.diagonal:
                prior = dist.Normal(torch.zeros_like(scale), scale).to_event(1)
            else:
                zeros = scale.new_zeros(scale.shape[:-1])
                unit = torch.eye(scale.shape[-1], dtype=scale.dtype, device=scale.device)
                prior = WhitenedNormal(scale, zeros, unit)
            return pyro.sample(self.effect_site, prior)

    def plate(self, membership: Membership) -> pyro.plate:
        """The plate over the clusters drawn."""
        return pyro.plate(self.name, len(membership.index), dim=-1)

    def correlation_cholesky(self, latents: Mapping[str, Tensor]) -> Float[Tensor, "... T T"]:
        """Cholesky factor of R, assembled from the correlated terms' factors."""
        given = [latents[site] for site in self.cholesky_sites()]
        if len(given) == 1 and len(self.groups[0]) == len(self.terms):
            return given[0]
        sd = latents[f"{self.name}_sd"]
        full = torch.eye(len(self.terms), dtype=sd.dtype, device=sd.device)
        full = full.expand(*sd.shape[:-1], *full.shape).clone()
        for group, factor in zip(self.groups, given, strict=True):
            index = torch.tensor(group, device=sd.device)
            full[..., index[:, None], index] = factor
        return full

    def scale(
        self, latents: Mapping[str, Tensor]
    ) -> Float[Tensor, "... terms"] | Float[Tensor, "... terms terms"]:
        """L with u = L z: the vector of sds where effects are independent, else a matrix."""
        sd = latents[f"{self.name}_sd"]
        if self.diagonal:
            return sd
        return sd[..., :, None] * self.correlation_cholesky(latents)

    def scale_matrix(self, latents: Mapping[str, Tensor]) -> Float[Tensor, "... terms terms"]:
        """L as a matrix, diagonal or not."""
        scale = self.scale(latents)
        return torch.diag_embed(scale) if self.diagonal else scale

    def log_det_scale(self, latents: Mapping[str, Tensor]) -> Float[Tensor, "..."]:
        """log |L|."""
        scale = self.scale(latents)
        diagonal = scale if self.diagonal else scale.diagonal(dim1=-2, dim2=-1)
        return diagonal.log().sum(-1)

    def sd(self, latents: Mapping[str, Tensor]) -> Float[Tensor, "... terms"]:
        """Standard deviations of the terms."""
        return latents[f"{self.name}_sd"]

    def known(self) -> dict[str, Tensor]:
        """Hyperparameters that are given, not estimated."""
        return {f"{self.name}_sd": self.prior_scale} if isinstance(self.prior, Known) else {}

    def covariance(self, latents: Mapping[str, Tensor]) -> Float[Tensor, "... terms terms"]:
        """D, the covariance matrix of a cluster's effects, in standardised units."""
        scale = self.scale(latents)
        return torch.diag_embed(scale**2) if self.diagonal else scale @ scale.mT

    def extended(
        self, latents: Mapping[str, Tensor], count: int, *, population: bool
    ) -> Float[Tensor, "... count terms"]:
        """Effects of the seen clusters and of new ones, so many in all: `MixedEffects.extend`."""
        seen = latents[self.effect_site]
        new = count - seen.shape[-2]
        noise = seen.new_zeros(*seen.shape[:-2], new, seen.shape[-1])
        if not population and new:
            scale, noise = self.scale(latents), torch.randn_like(noise)
            # A scale has a 1 in the clusters' place.
            noise = scale * noise if self.diagonal else (scale @ noise[..., None])[..., 0]
        return torch.cat([seen, noise], -2)

    def design(
        self, x: Tensor, activations: Mapping[str, Tensor]
    ) -> Float[Tensor, "rows phi_columns"]:
        """phi, the columns of all terms but those on filters."""
        columns = [block.columns(x, activations) for block in self.linear]
        return torch.cat(columns, -1) if columns else x.new_zeros(len(x), 0)

    def contribution(
        self,
        phi: Float[Tensor, "rows phi_columns"],
        membership: Membership,
        effects: Float[Tensor, "... clusters terms"],
    ) -> Float[Tensor, "... rows columns"]:
        """phi_i' u_{g(i)} for every row and column of the predictor."""
        effects = effects[..., : self.n_linear]
        if not self.n_linear:
            return effects.new_zeros(*effects.shape[:-2], len(phi), self.n_columns)
        if phi.shape[-1] > FEW:
            mine = effects[..., membership.position, :].unflatten(-1, (-1, self.n_columns))
            return torch.einsum("nq,...nqp->...np", phi, mine)
        # Term by term: a gather and a sum over a short last dimension are slow.
        by_term = effects.unflatten(-1, (-1, self.n_columns)).unbind(-2)
        terms = zip(phi.unbind(-1), by_term, strict=True)
        return reduce(
            torch.add,
            (one[:, None] * mine.index_select(-2, membership.position) for one, mine in terms),
        )


def factor_named(factors: Sequence[Factor], name: str | None) -> Factor:
    """The factor of this name; the first, if none is named.

    Raises
    ------
    ValueError
        If there is no such factor, or none at all.
    """
    by_name = {factor.name: factor for factor in factors}
    if not by_name:
        raise ValueError("the program has no random effects, so its clusters do not differ")
    if name is not None and name not in by_name:
        raise unknown("grouping factor with random effects", name, by_name)
    return factors[0] if name is None else by_name[name]


def weighted(membership: Membership) -> ScaleMessenger:
    """Handler that gives each cluster's sites the cluster's weight."""
    return ScaleMessenger(1.0 if membership.weight is None else membership.weight)


def _groups(blocks: Sequence[Block], n_columns: int) -> tuple[tuple[int, ...], ...]:
    groups, start = [], 0
    for block in blocks:
        stop = start + len(block.names)
        if block.correlated:
            groups += [
                tuple(range(start * n_columns + column, stop * n_columns, n_columns))
                for column in range(n_columns)
            ]
        start = stop
    return tuple(groups)
