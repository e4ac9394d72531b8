"""Pseudo-observations of random effects: what the rows of a cluster say about them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from armed_pyro.program.linearize import curvature, mean_draws, reconstruction_slopes, sensitivities
from armed_pyro.program.model import MixedEffects
from armed_pyro.program.predictor import modulates
from armed_pyro.random_effects.design import LayerBlock, by_column
from armed_pyro.random_effects.grouping_factor import Factor
from armed_pyro.rows.batch import Membership
from armed_pyro.rows.source import RowSource

__all__ = ["FULL_TERMS", "PseudoObservations", "observe", "overshoot"]


# Up to this many terms a cluster's effects get a full precision matrix, beyond it a diagonal one:
# the matrix costs O(clusters x terms^2) memory.
FULL_TERMS = 16
# Units of the link by which one step may move a cluster's effects.
LONGEST_STEP = 3.0
# Matrices whose eigenvalues a GPU's library finds in one call.
MOST_AT_ONCE = 2**13


class PseudoObservations(nn.Module):
    r"""For each cluster, one observation of its random effects with a precision.

    .. math:: m_k - G_k \beta \sim N(u_k, (\tau A_k)^{-1}), \quad A_k = R_k C_k C_k^\top R_k^\top

    R_k is set once from the rows and C_k starts at the identity, so that what is trained (C_k,
    m_k and G_k) is of order 1 whether a cluster has two rows or ten thousand.

    Parameters
    ----------
    factor : Factor
        The grouping factor.
    n_clusters, n_fixed : int
        Clusters, and latent fixed effects beta.
    like : Tensor
        A tensor of the wanted precision and device.
    """

    base: Tensor
    root: nn.Parameter
    location: nn.Parameter
    cross: nn.Parameter | None

    def __init__(self, factor: Factor, n_clusters: int, n_fixed: int, like: Tensor) -> None:
        super().__init__()
        terms = len(factor.terms)
        # Set by conjugate-computation steps; the precision of a single term is a number anyway.
        self.conjugate = terms <= FULL_TERMS
        self.full = terms > 1 and self.conjugate
        shape = (n_clusters, terms, terms) if self.full else (n_clusters, terms)
        unit = torch.eye(terms) if self.full else torch.ones(terms)
        self.register_buffer("base", clusters_last(like.new_zeros(shape)))
        self.root = nn.Parameter(clusters_last(unit.to(like).expand(shape)))
        self.location = nn.Parameter(clusters_last(like.new_zeros(n_clusters, terms)))
        # Without the coupling to latent fixed effects, their sd would be far too small.
        cross = clusters_last(like.new_zeros(n_clusters, terms, n_fixed))
        self.cross = nn.Parameter(cross) if n_fixed else None

    def forward(
        self,
        membership: Membership,
        fixed: Float[Tensor, "... 1 n_fixed"] | None,
        *,
        held: bool = False,
    ) -> tuple[Tensor, Tensor, Float[Tensor, "... clusters terms"]]:
        """R_k, C_k (or their diagonals) and m_k - G_k beta of the clusters drawn.

        Parameters
        ----------
        membership : Membership
            Which they are.
        fixed : Float[Tensor, "... 1 n_fixed"] or None
            beta.
        held : bool
            Whether what is trained here gets no gradients.
        """
        # To gather all in order would be a copy, and its gradient a slow one.
        index = slice(None) if membership.complete else membership.index
        location, cross, trained = self.location[index], self.cross, self.root[index]
        if held:
            location, trained = location.detach(), trained.detach()
        if cross is not None and fixed is not None:
            slope = cross.detach()[index] if held else cross[index]
            fixed = fixed.squeeze(-2) if fixed.dim() > 1 else fixed
            location = location - (fixed @ slope.flatten(0, 1).mT).unflatten(-1, slope.shape[:2])
        return self.base[index], trained, location

    def narrowed(self, factor: Factor, clusters: int) -> PseudoObservations:
        """Room for the pseudo-observations of so many clusters."""
        fixed = 0 if self.cross is None else self.cross.shape[-1]
        return PseudoObservations(factor, clusters, fixed, self.location)

    @torch.no_grad()
    def start(self, precision: Tensor, pull: Tensor, cross: Tensor | None) -> None:
        """Set A_k, A_k m_k and A_k G_k to these sums over rows."""
        unit = torch.eye(self.base.shape[-1]) if self.full else torch.ones(self.base.shape[-1])
        self.root.copy_(unit.to(self.root).expand(self.root.shape))
        if self.full:
            found = [torch.linalg.eigh(some) for some in precision.split(MOST_AT_ONCE)]
            values, vectors = (torch.cat(parts) for parts in zip(*found, strict=True))
            known = values > 1e-8 * values.amax(-1, keepdim=True).clamp(min=1e-8)
            inverse = torch.where(known, values, torch.inf).reciprocal()
            solve = (vectors * inverse[..., None, :]) @ vectors.mT
            self.base.copy_(vectors * values.clamp(min=1e-12).sqrt()[..., None, :])
            self.location.copy_((solve @ pull[..., None])[..., 0])
            if self.cross is not None and cross is not None:
                self.cross.copy_(solve @ cross)
            return
        # Wide layers are correlated: each unit alone would explain what all explain together.
        inverse = 1 / (precision.clamp(min=1e-12) * precision.shape[-1])
        self.base.copy_(precision.clamp(min=1e-12).sqrt())
        self.location.copy_(inverse * pull)
        if self.cross is not None and cross is not None:
            self.cross.copy_(inverse[..., None] * cross)


def clusters_last(values: Float[Tensor, "clusters ..."]) -> Float[Tensor, "clusters ..."]:
    """A copy in which one number of all clusters is in one piece of memory."""
    return values.movedim(0, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 0)


def overshoot(
    factor: Factor,
    latents: Mapping[str, Tensor],
    effects: Float[Tensor, "clusters terms"] | None,
    precision: Tensor,
    push: Float[Tensor, "clusters terms"],
) -> tuple[Float[Tensor, "clusters terms"], Float[Tensor, "clusters 1"]]:
    """Gradient of likelihood and prior by the effects, and the share of it that is too much.

    Newton's step overshoots where a count is far larger than expected; it is to move a cluster's
    effects by no more than a few units of the link. At the mode there is no gradient, so that
    its shortening makes no difference in the end.

    Parameters
    ----------
    factor : Factor
        The grouping factor.
    latents : mapping of str to Tensor
        Hyperparameters, a point or draws.
    effects : Float[Tensor, "clusters terms"] or None
        Where the effects are; None for zeros.
    precision, push : Tensor
        Curvature of the log-likelihood, or its diagonal, and its slope.
    """
    terms = push.shape[-1]
    effects = torch.zeros_like(push) if effects is None else effects
    # At the geometric mean of the sds: their arithmetic one is that of the largest draws.
    sds = factor.sd(latents).reshape(-1, terms)
    sd = sds.log().mean(0).exp()
    if precision.dim() == 3:
        scales = factor.scale_matrix(latents).reshape(-1, terms, terms) / sds[..., None]
        root = sd[:, None] * scales.mean(0)
        prior = torch.linalg.inv(root @ root.mT + 1e-4 * torch.diag(sd**2))
        gradient = push - effects @ prior
        step = torch.linalg.solve(precision + prior, gradient)
    else:
        prior = sd**-2
        gradient = push - effects * prior
        step = gradient / (precision * terms + prior)
    length = step.abs().amax(-1, keepdim=True)
    return gradient, (1 - LONGEST_STEP / length.clamp(min=LONGEST_STEP)).nan_to_num(0.0)


def observe(
    model: MixedEffects,
    pseudo: Sequence[PseudoObservations],
    latents: Mapping[str, Tensor],
    source: RowSource,
) -> None:
    r"""Set pseudo-observations from the slope and curvature of the rows' log-likelihood.

    A_k, A_k m_k and A_k G_k become Z'WZ, Z'(r + W (Z u + X beta)) and Z'WX over the cluster's
    rows, with W and r of `curvature` and u, beta at their means: one step of penalised
    quasi-likelihood given a single point, of conjugate-computation variational inference given
    draws (Khan and Lin 2017). Exact at once for gaussian outcomes with linear fixed effects. For
    effects on filters Z is the predictor's gradient at the effects' means: a Gauss-Newton step,
    to which the other outcomes add (`armed_pyro.program.linearize.reconstruction_slopes`).

    Parameters
    ----------
    model : MixedEffects
        The bound program.
    pseudo : sequence of PseudoObservations
        Those of each of the program's factors; diagonal ones are set only while at zero.
    latents : mapping of str to Tensor
        Hyperparameters, with random effects or without (zeros), a point or draws.
    source : RowSource
        All training rows.
    """
    quadratic = model.family.is_quadratic
    sums = [
        _sums(factor, one, quadratic and not factor.filters)
        for factor, one in zip(model.factors, pseudo, strict=True)
    ]
    means = mean_draws(model, latents)
    where = latents
    if modulates(model):
        # Gradient and slope of a predictor that is not linear have to be taken at one point.
        where = {name: one.mean(0, True) if one.dim() > 1 else one for name, one in latents.items()}
        where |= means
    widest = max(len(factor.terms) ** 2 for factor in model.factors)
    draws = max([1, *(len(one) for one in where.values() if one.dim() > 1)])
    size = max(1, 2**21 // max(widest, math.prod(source.row_shape), draws))
    for rows, weight, residual, activations in curvature(model, source, where, size):
        columns = weight.shape[-1]
        x = by_column(model.head_inputs(activations), columns) if model.bayesian_head else None
        linear = 0.0 if x is None else (x * means["fixed_effect"][:, None]).sum(1)
        for factor, (precision, pull, cross, push) in zip(model.factors, sums, strict=True):
            membership = rows.memberships[factor.name]
            z = sensitivities(model, rows, factor, activations, means)
            weighted = z * weight[:, None, :]
            response = residual + weight * linear
            if factor.effect_site in means:
                mine = means[factor.effect_site][membership.position]
                response = response + weight * torch.einsum("ntc,nt->nc", z, mine)
            square = weighted @ z.mT if precision.dim() == 3 else (weighted * z).sum(-1)
            precision.index_add_(0, membership.position, square)
            pull.index_add_(0, membership.position, (z * response[:, None, :]).sum(-1))
            if push is not None:
                push.index_add_(0, membership.position, (z * residual[:, None, :]).sum(-1))
            if cross is not None and x is not None:
                cross.index_add_(0, membership.position, weighted @ x.mT)
        for factor, slope, roots in reconstruction_slopes(model, rows, where):
            position = rows.memberships[factor.name].position
            precision, pull, _, push = sums[model.factors.index(factor)]
            square = roots.mT @ roots if precision.dim() == 3 else (roots**2).sum(1)
            response = slope
            if factor.effect_site in means:
                mine = means[factor.effect_site][position]
                response = slope + (roots.mT @ (roots @ mine[..., None]))[..., 0]
            precision.index_add_(0, position, square)
            pull.index_add_(0, position, response)
            if push is not None:
                push.index_add_(0, position, slope)
    for factor, one, (precision, pull, cross, push) in zip(
        model.factors, pseudo, sums, strict=True
    ):
        precision, pull = source.total(precision), source.total(pull)
        cross, push = (part if part is None else source.total(part) for part in (cross, push))
        if one.conjugate or not one.base.any():
            if not one.conjugate:
                precision = precision + _floor(factor, one)
            if push is not None:
                effects = means.get(factor.effect_site)
                gradient, excess = overshoot(factor, latents, effects, precision, push)
                pull = pull - excess * gradient
            one.start(precision, pull, cross)


def _sums(
    factor: Factor, pseudo: PseudoObservations, quadratic: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    # Row-major, as sums over the rows of a cluster are written there.
    precision = pseudo.base.new_zeros(pseudo.base.shape)
    cross = None if pseudo.cross is None else pseudo.base.new_zeros(pseudo.cross.shape)
    pull = pseudo.base.new_zeros(pseudo.location.shape)
    return precision, pull, cross, None if quadratic else torch.zeros_like(pull)


def _floor(factor: Factor, pseudo: PseudoObservations) -> Float[Tensor, " terms"]:
    # A unit that is silent now may wake up in training: let its precision be trained too.
    inside = [isinstance(block, LayerBlock) for block in factor.linear for _ in block.names]
    floor = torch.ones_like(pseudo.location[0])
    floor[: factor.n_linear] = torch.tensor(inside).repeat_interleave(factor.n_columns).to(floor)
    return floor
