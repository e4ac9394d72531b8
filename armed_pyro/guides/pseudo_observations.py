"""Pseudo-observations: each cluster's likelihood of its random effects, as one normal density."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from armed_pyro.guides.row_sums import ClusterSums, effects_part, fixed_part, newton_excess
from armed_pyro.program.linearize import curvature, mean_draws, reconstruction_slopes, sensitivities
from armed_pyro.program.model import MixedEffects
from armed_pyro.program.predictor import modulates
from armed_pyro.random_effects.design import LayerBlock
from armed_pyro.random_effects.grouping_factor import Factor
from armed_pyro.rows.batch import Membership, Rows
from armed_pyro.rows.source import RowSource

__all__ = ["PseudoObservations", "has_full_precision", "observe"]


# Up to this many terms a cluster's effects get a full precision matrix, beyond it a diagonal one:
# the matrix costs O(clusters x terms^2) memory.
FULL_TERMS = 16

# A GPU's library decomposes at most this many matrices in one call.
MOST_AT_ONCE = 2**13
# Elements of designs, features and draws in a block of rows.
BLOCK_VALUES = 2**21


def has_full_precision(factor: Factor) -> bool:
    """Whether a cluster's effects get a full precision matrix; a smooth term has one cluster."""
    return len(factor.terms) <= FULL_TERMS or factor.smooth


class PseudoObservations(nn.Module):
    r"""For each cluster, one observation of its random effects with a precision.

    .. math:: m_k - G_k \beta \sim N(u_k, (\tau A_k)^{-1}), \quad A_k = R_k C_k C_k^\top R_k^\top

    with tau the residual precision. R_k is set from the rows, without gradients, and C_k starts
    at the identity. The trained C_k, m_k and G_k are therefore of order 1, whether a cluster has
    two rows or ten thousand.

    `base` and `root` are R_k and C_k, "clusters terms terms", or their diagonals unless `full`
    (for 2 to 16 terms). `location` is m_k, and `cross` is G_k, None without latent fixed effects.
    `observe` sets `conjugate` ones (of at most 16 terms) at every refresh, others at the start.
    """

    base: Tensor
    root: nn.Parameter
    location: nn.Parameter
    cross: nn.Parameter | None

    def __init__(self, factor: Factor, n_clusters: int, n_fixed: int, like: Tensor) -> None:
        super().__init__()
        terms = len(factor.terms)
        self.conjugate, self.n_fixed = has_full_precision(factor), n_fixed
        self.full = terms > 1 and self.conjugate
        shape = (n_clusters, terms, terms) if self.full else (n_clusters, terms)
        self.register_buffer("base", clusters_last(like.new_zeros(shape)))
        self.root = nn.Parameter(clusters_last(self._unit().expand(shape)))
        self.location = nn.Parameter(clusters_last(like.new_zeros(n_clusters, terms)))
        # Without G_k, the sds of latent fixed effects would be far too small.
        cross = clusters_last(like.new_zeros(n_clusters, terms, n_fixed))
        self.cross = nn.Parameter(cross) if n_fixed else None

    def forward(
        self,
        membership: Membership,
        fixed: Float[Tensor, "... 1 n_fixed"] | None,
        *,
        detach: bool = False,
    ) -> tuple[Tensor, Tensor, Float[Tensor, "... clusters terms"]]:
        """R_k, C_k (or their diagonals) and m_k - G_k beta of the clusters drawn.

        With `detach`, C_k, m_k and G_k get no gradients.
        """
        # Gathering all clusters in order would copy them, and the gather's gradient is slow.
        index = slice(None) if membership.complete else membership.index
        location, cross, trained = self.location[index], self.cross, self.root[index]
        if detach:
            location, trained = location.detach(), trained.detach()
        if cross is not None and fixed is not None:
            slope = cross.detach()[index] if detach else cross[index]
            fixed = fixed.squeeze(-2) if fixed.dim() > 1 else fixed
            location = location - (fixed @ slope.flatten(0, 1).mT).unflatten(-1, slope.shape[:2])
        return self.base[index], trained, location

    def narrowed(self, factor: Factor, clusters: int) -> PseudoObservations:
        """New pseudo-observations of the same kind for this number of clusters, at their start."""
        return PseudoObservations(factor, clusters, self.n_fixed, self.location)

    def _unit(self) -> Tensor:
        """C_k at the start, or its diagonal."""
        ones = self.base.new_ones(self.base.shape[-1])
        return ones.diag() if self.full else ones

    @torch.no_grad()
    def start(
        self,
        precision: Tensor,
        pull: Float[Tensor, "clusters terms"],
        cross: Float[Tensor, "clusters terms n_fixed"],
    ) -> None:
        """Set A_k or its diagonal, A_k m_k and A_k G_k, in place, and C_k to the identity."""
        self.root.copy_(self._unit().expand(self.root.shape))
        if self.full:
            pieces = [torch.linalg.eigh(piece) for piece in precision.split(MOST_AT_ONCE)]
            values, vectors = (torch.cat(parts) for parts in zip(*pieces, strict=True))
            # Directions about which the rows say nothing get the location 0. Of a slope without an
            # intercept on x far from zero they say little: the limit is that of rounding.
            rounding = min(1e-8, 16 * torch.finfo(values.dtype).eps)
            observed = values > rounding * values.amax(-1, keepdim=True).clamp(min=1e-8)
            inverse = torch.where(observed, values, torch.inf).reciprocal()
            solve = (vectors * inverse[..., None, :]) @ vectors.mT
            self.base.copy_(vectors * values.clamp(min=1e-12).sqrt()[..., None, :])
            self.location.copy_((solve @ pull[..., None])[..., 0])
            if self.cross is not None:
                self.cross.copy_(solve @ cross)
            return
        # Units of a wide layer are correlated: without the division by their number, each of them
        # would explain on its own what they explain together.
        inverse = 1 / (precision.clamp(min=1e-12) * precision.shape[-1])
        self.base.copy_(precision.clamp(min=1e-12).sqrt())
        self.location.copy_(inverse * pull)
        if self.cross is not None:
            self.cross.copy_(inverse[..., None] * cross)


def clusters_last(values: Float[Tensor, "clusters ..."]) -> Float[Tensor, "clusters ..."]:
    """A copy in which each element of all clusters is contiguous in memory."""
    return values.movedim(0, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 0)


def observe(
    model: MixedEffects,
    pseudo: Sequence[PseudoObservations],
    latents: Mapping[str, Tensor],
    source: RowSource,
) -> None:
    r"""Set pseudo-observations from the slope and curvature of the rows' log-likelihood.

    A_k, A_k m_k and A_k G_k become Z'WZ, Z'(r + W (Z u + X beta)) and Z'WX over the cluster's
    rows, with W and r of `curvature` and u, beta at their means. At a point this is a step of
    penalised quasi-likelihood; with draws, one of conjugate-computation variational inference
    (Khan and Lin 2017). For gaussian outcomes with linear fixed effects a single step is exact.
    For effects on filters Z is the predictor's gradient at the effects' means, which makes it a
    Gauss-Newton step, and the other outcomes add to it
    (`armed_pyro.program.linearize.reconstruction_slopes`).

    `pseudo` has one entry per factor; those that are not `conjugate` are set only while they are
    zero. Without random effects in `latents`, they are zero.
    """
    quadratic = model.family.is_quadratic
    sums = [
        ClusterSums.zeros(
            target.base, target.base.shape, target.n_fixed, exact=quadratic and not factor.filters
        )
        for factor, target in zip(model.factors, pseudo, strict=True)
    ]
    means = mean_draws(model, latents)
    point = latents
    if modulates(model):
        # A nonlinear predictor needs its gradient and the likelihood's slope at the same point.
        point = {
            name: value.mean(0, True) if value.dim() > 1 else value
            for name, value in latents.items()
        }
        point |= means
    widest = max(len(factor.terms) ** 2 for factor in model.factors)
    draws = max([1, *(len(value) for value in point.values() if value.dim() > 1)])
    size = max(1, BLOCK_VALUES // max(widest, math.prod(source.row_shape), draws))
    for rows, weight, residual, activations in curvature(model, source, point, size):
        x, fixed = fixed_part(model, means, weight, residual, rows, activations)
        for factor, part in zip(model.factors, sums, strict=True):
            z = sensitivities(model, rows, factor, activations, means)
            response = fixed + effects_part(factor, means, rows, z, weight)
            position = rows.memberships[factor.name].position
            part.add(position, z, weight, response, residual, x)
        _add_reconstructions(model, sums, means, rows, point)
    for factor, target, part in zip(model.factors, pseudo, sums, strict=True):
        total = part.total(source)
        if target.conjugate or not target.base.any():
            precision, pull = total.precision, total.pull
            if not target.conjugate:
                precision = precision + _floor(factor, target)
            if total.slope is not None:
                effects = means.get(factor.effect_site)
                gradient, excess = newton_excess(factor, latents, effects, precision, total.slope)
                pull = pull - excess * gradient
            target.start(precision, pull, total.cross)


def _add_reconstructions(
    model: MixedEffects,
    sums: Sequence[ClusterSums],
    means: Mapping[str, Tensor],
    rows: Rows,
    point: Mapping[str, Tensor],
) -> None:
    """Add what the other outcomes say of effects inside the network, in place."""
    for factor, slope, roots in reconstruction_slopes(model, rows, point):
        position, part = rows.memberships[factor.name].position, sums[model.factors.index(factor)]
        square = roots.mT @ roots if part.precision.dim() == 3 else (roots**2).sum(1)
        response = slope
        if factor.effect_site in means:
            effects = means[factor.effect_site][position]
            response = slope + (roots.mT @ (roots @ effects[..., None]))[..., 0]
        part.precision.index_add_(0, position, square)
        part.pull.index_add_(0, position, response)
        if part.slope is not None:
            part.slope.index_add_(0, position, slope)


def _floor(factor: Factor, pseudo: PseudoObservations) -> Float[Tensor, " terms"]:
    """Precision added to each term: 1 for units of a layer and for filters, 0 for inputs.

    A unit that is silent now may become active in training, but its trained precision could not
    grow from a base of zero.
    """
    in_layer = [
        isinstance(block, LayerBlock)
        for block in factor.linear
        for _ in range(len(block.names) * factor.width_of(block))
    ]
    floor = torch.ones_like(pseudo.location[0])
    floor[: factor.n_linear] = torch.tensor(in_layer).to(floor)
    return floor
