"""`Factor`: the terms of one grouping factor, and the random effects of its clusters."""

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
from armed_pyro.priors import Priors
from armed_pyro.random_effects.covariance import Covariance, JointCovariance, TermGroup
from armed_pyro.random_effects.design import Block, FilterBlock, LinearBlock
from armed_pyro.rows.batch import Membership

__all__ = ["Factor", "factor_named", "weighted"]


# Prior scale of the sds of effects on filters, relative scales and biases.
FILTER_SCALE = 0.3


class Factor(nn.Module):
    r"""Random effects of one grouping factor.

    .. math:: sd \sim p(sd), \quad R_b \sim p(R_b), \quad
              u_k \sim N(0, diag(sd) R diag(sd)), \quad k = 1, \dots, K

    R has one block :math:`R_b` for each correlated term and column of the predictor; see
    `armed_pyro.random_effects.covariance`. The sites are those of the covariance and, in a plate
    over clusters, ``<factor>_effect``.

    Effects are ordered by column of phi, then by column of the predictor. Effects on filters come
    last; all columns of the predictor share them.

    Parameters
    ----------
    name : str
        The grouping factor.
    blocks : sequence of Block
        One block per term.
    columns : sequence of str
        Names of the predictor's columns.
    priors : Priors
        Priors of the program.
    default : float
        Scale of the sds' prior, if the prior has no scale of its own.
    spread : float
        Outcome units per standardised unit.
    """

    to_original: Tensor

    def __init__(
        self,
        name: str,
        blocks: Sequence[Block],
        columns: Sequence[str],
        priors: Priors,
        default: float,
        spread: float,
    ) -> None:
        super().__init__()
        self.name = name
        linear = [block for block in blocks if isinstance(block, LinearBlock)]
        filters = [block for block in blocks if isinstance(block, FilterBlock)]
        self._blocks = nn.ModuleList([*linear, *filters])
        self.n_columns = len(columns)
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
        ]  # dividing by sqrt(width) keeps the variance of phi'u independent of a layer's width
        inside = [(term, term, FILTER_SCALE) for block in filters for term in block.names]
        self.terms = tuple(label for _, label, _ in multiplied + inside)
        self.n_linear = len(multiplied)
        parts = [
            torch.kron(block.to_original, torch.eye(self.n_columns, dtype=torch.float64)) * spread
            for block in linear
        ]
        matrix = torch.block_diag(*parts, *[block.to_original for block in filters])
        unit = 1 / matrix.diagonal()
        self.register_buffer("to_original", matrix, persistent=False)
        scales = torch.tensor([scale for *_, scale in multiplied + inside], dtype=unit.dtype)
        prior = priors.of(name)
        prior_scale = prior.scales([term for term, *_ in multiplied + inside], unit, scales)
        groups = [
            (group, covariance.with_priors(priors))
            for group, covariance in _groups(name, self.terms, linear, self.n_columns)
        ]
        self.joint_covariance = JointCovariance(name, self.terms, prior, prior_scale, unit, groups)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """One block per term."""
        return cast("tuple[Block, ...]", tuple(self._blocks))

    @property
    def linear(self) -> tuple[LinearBlock, ...]:
        """Blocks of effects on the linear predictor."""
        return tuple(block for block in self.blocks if isinstance(block, LinearBlock))

    @property
    def filters(self) -> tuple[FilterBlock, ...]:
        """Blocks of effects inside the network."""
        return tuple(block for block in self.blocks if isinstance(block, FilterBlock))

    @property
    def diagonal(self) -> bool:
        """Whether all effects of a cluster are independent given their sds."""
        return self.joint_covariance.diagonal

    @property
    def prior_scale(self) -> Float[Tensor, " terms"]:
        """Scales of the sds' priors, in standardised units."""
        return self.joint_covariance.prior_scale

    @property
    def effect_site(self) -> str:
        """Name of the site of the random effects."""
        return f"{self.name}_effect"

    def describe_priors(self) -> dict[str, str]:
        """Priors of the terms' sds and of their correlations, in the units of the data."""
        return self.joint_covariance.describe_priors()

    def forward(self, membership: Membership) -> Float[Tensor, "... clusters terms"]:
        """Sample the hyperparameters, and the random effects of the batch's clusters."""
        latents = self.joint_covariance.sample()
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
        """The plate over the batch's clusters."""
        return pyro.plate(self.name, len(membership.index), dim=-1)

    def scale(
        self, latents: Mapping[str, Tensor]
    ) -> Float[Tensor, "... terms"] | Float[Tensor, "... terms terms"]:
        """L with u = L z: the vector of sds if effects are independent, otherwise a matrix."""
        return self.joint_covariance.scale(latents)

    def scale_matrix(self, latents: Mapping[str, Tensor]) -> Float[Tensor, "... terms terms"]:
        """L as a matrix, even if effects are independent."""
        scale = self.scale(latents)
        return torch.diag_embed(scale) if self.diagonal else scale

    def log_det_scale(self, latents: Mapping[str, Tensor]) -> Float[Tensor, "..."]:
        """log |L|."""
        scale = self.scale(latents)
        diagonal = scale if self.diagonal else scale.diagonal(dim1=-2, dim2=-1)
        return diagonal.log().sum(-1)

    def sd(self, latents: Mapping[str, Tensor]) -> Float[Tensor, "... terms"]:
        """Standard deviations of the terms."""
        return self.joint_covariance.sd(latents)

    def known(self) -> dict[str, Tensor]:
        """Values of the hyperparameters that the priors fix."""
        return self.joint_covariance.known()

    def covariance(self, latents: Mapping[str, Tensor]) -> Float[Tensor, "... terms terms"]:
        """D, the covariance matrix of a cluster's effects, in standardised units."""
        return self.joint_covariance.matrix(latents)

    def extended(
        self, latents: Mapping[str, Tensor], count: int, *, population: bool
    ) -> Float[Tensor, "... count terms"]:
        """Effects of the seen clusters, followed by new clusters up to `count`.

        Effects of new clusters are zero with `population`, and otherwise drawn from their prior;
        see `MixedEffects.extend`.
        """
        seen = latents[self.effect_site]
        new = count - seen.shape[-2]
        noise = seen.new_zeros(*seen.shape[:-2], new, seen.shape[-1])
        if not population and new:
            noise = self.joint_covariance.effects(latents, torch.randn_like(noise))
        return torch.cat([seen, noise], -2)

    def design(
        self, x: Tensor, activations: Mapping[str, Tensor]
    ) -> Float[Tensor, "rows phi_columns"]:
        """phi, the columns of all terms except those on filters."""
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
            by_row = effects[..., membership.position, :].unflatten(-1, (-1, self.n_columns))
            return torch.einsum("nq,...nqp->...np", phi, by_row)
        # Term by term: a gather and a sum over a short last dimension are slow.
        by_term = effects.unflatten(-1, (-1, self.n_columns)).unbind(-2)
        terms = zip(phi.unbind(-1), by_term, strict=True)
        return reduce(
            torch.add,
            (
                column[:, None] * effect.index_select(-2, membership.position)
                for column, effect in terms
            ),
        )


def factor_named(factors: Sequence[Factor], name: str | None) -> Factor:
    """The factor with this name; the first factor if the name is None.

    Raises
    ------
    ValueError
        If there is no such factor, or the program has no factor.
    """
    by_name = {factor.name: factor for factor in factors}
    if not by_name:
        raise ValueError("the program has no random effects, so its clusters do not differ")
    if name is not None and name not in by_name:
        raise unknown("grouping factor with random effects", name, by_name)
    return factors[0] if name is None else by_name[name]


def weighted(membership: Membership) -> ScaleMessenger:
    """Handler that multiplies the log-density of each cluster's sites by the cluster's weight."""
    return ScaleMessenger(1.0 if membership.weight is None else membership.weight)


def _groups(
    factor: str, terms: Sequence[str], blocks: Sequence[LinearBlock], n_columns: int
) -> list[tuple[TermGroup, Covariance]]:
    """Groups of correlated terms: one per correlated block and column of the predictor."""
    places, start = list[tuple[tuple[int, ...], Covariance]](), 0
    for block in blocks:
        stop = start + len(block.names)
        if not block.covariance.diagonal:
            places += [
                (tuple(range(start * n_columns + c, stop * n_columns, n_columns)), block.covariance)
                for c in range(n_columns)
            ]
        start = stop
    return [
        (
            TermGroup(
                factor,
                group,
                tuple(terms[place] for place in group),
                number if len(places) > 1 else None,
            ),
            covariance,
        )
        for number, (group, covariance) in enumerate(places)
    ]
