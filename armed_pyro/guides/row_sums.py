"""Sums over the rows of each cluster, from which guides make their conditionals."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from armed_pyro.program.linearize import curvature, mean_draws, sensitivities
from armed_pyro.program.model import MixedEffects
from armed_pyro.random_effects.covariance import Latents
from armed_pyro.random_effects.grouping_factor import Factor
from armed_pyro.rows.batch import Rows
from armed_pyro.rows.source import RowSource

__all__ = ["ClusterSums", "effects_part", "fixed_part", "joint_sums", "newton_excess"]


# Rows whose curvature is computed at once for several factors together.
BLOCK_ROWS = 2**16
# Units of the link by which one Newton step may move a cluster's effects.
LONGEST_STEP = 3.0

# Z'WZ of each cluster, or its diagonal.
Precision = Float[Tensor, "clusters terms terms"] | Float[Tensor, "clusters terms"]
Effects = Float[Tensor, "clusters terms"]
ByColumn = Float[Tensor, "rows terms columns"]
Columns = Float[Tensor, "rows columns"]


@dataclass(frozen=True)
class ClusterSums:
    r"""Z'WZ, Z'(r + W eta), Z'WX and Z'r of each cluster of a factor, W and r of `curvature`.

    eta = Z u + X beta, with the means of u and beta, is the predictor's part that the guide takes
    for linear. `slope`, Z'r, is None where no Newton step is too long.
    """

    precision: Precision
    pull: Effects
    cross: Float[Tensor, "clusters terms n_fixed"]
    slope: Effects | None

    @classmethod
    def zeros(cls, like: Tensor, shape: Sequence[int], n_fixed: int, *, exact: bool) -> ClusterSums:
        """Sums over no rows, with a precision of this shape; `exact` if no step is too long."""
        precision, pull = like.new_zeros(shape), like.new_zeros(shape[:2])
        slope = None if exact else torch.zeros_like(pull)
        return cls(precision, pull, like.new_zeros(*shape[:2], n_fixed), slope)

    def add(
        self,
        position: Int[Tensor, " rows"],
        z: ByColumn,
        weight: Columns,
        response: Columns,
        residual: Columns,
        x: ByColumn | None,
    ) -> None:
        """Add a block of rows, in place; their response is r + W eta."""
        weighted = z * weight[:, None, :]
        square = weighted @ z.mT if self.precision.dim() == 3 else (weighted * z).sum(-1)
        self.precision.index_add_(0, position, square)
        self.pull.index_add_(0, position, (z * response[:, None, :]).sum(-1))
        if self.slope is not None:
            self.slope.index_add_(0, position, (z * residual[:, None, :]).sum(-1))
        if x is not None:
            self.cross.index_add_(0, position, weighted @ x.mT)

    def total(self, source: RowSource) -> ClusterSums:
        """The sums over the rows of all processes."""
        cross = source.total(self.cross)
        slope = None if self.slope is None else source.total(self.slope)
        return ClusterSums(source.total(self.precision), source.total(self.pull), cross, slope)


def fixed_part(
    model: MixedEffects,
    means: Latents,
    weight: Columns,
    residual: Columns,
    rows: Rows,
    activations: Mapping[str, Tensor],
) -> tuple[ByColumn | None, Columns]:
    """X, or None without latent fixed effects, and r + W X beta."""
    if not model.has_fixed_effects:
        return None, residual
    x = model.fixed_design(rows, activations)
    return x, residual + weight * (x * means["fixed_effect"][:, None]).sum(1)


def effects_part(
    factor: Factor, means: Latents, rows: Rows, z: ByColumn, weight: Columns
) -> Columns | float:
    """W Z u, or 0 without effects."""
    if factor.effect_site not in means:
        return 0.0
    effects = means[factor.effect_site][rows.memberships[factor.name].position]
    return weight * torch.einsum("ntc,nt->nc", z, effects)


def joint_sums(
    model: MixedEffects, factors: Sequence[Factor], latents: Latents, source: RowSource
) -> tuple[list[ClusterSums], dict[tuple[int, int], Float[Tensor, "clusters terms effects"]]]:
    """Sums of each factor, and Z_a'WZ_b of all pairs a < b of factors.

    eta contains the effects of all factors; `latents` are a point or draws. For families that are
    not quadratic, `pull` is that of a Newton step that moves no effect too far.
    """
    like, means = model.reference(), mean_draws(model, latents)
    fixed = len(model.fixed_terms()) if model.has_fixed_effects else 0
    quadratic, levels = model.family.is_quadratic, model.data_facts().levels
    sizes = [(len(levels[factor.name]), len(factor.terms)) for factor in factors]
    sums = [ClusterSums.zeros(like, (k, t, t), fixed, exact=quadratic) for k, t in sizes]
    cells = {
        (a, b): like.new_zeros(sizes[a][0] * sizes[b][0], sizes[a][1], sizes[b][1])
        for a, b in itertools.combinations(range(len(factors)), 2)
    }
    for rows, weight, residual, activations in curvature(model, source, latents, BLOCK_ROWS):
        positions = [rows.memberships[factor.name].position for factor in factors]
        z = [sensitivities(model, rows, factor, activations, means) for factor in factors]
        x, response = fixed_part(model, means, weight, residual, rows, activations)
        for factor, design in zip(factors, z, strict=True):
            response = response + effects_part(factor, means, rows, design, weight)
        for part, position, design in zip(sums, positions, z, strict=True):
            part.add(position, design, weight, response, residual, x)
        for (a, b), cell in cells.items():
            place = positions[a] * sizes[b][0] + positions[b]
            cell.index_add_(0, place, (z[a] * weight[:, None, :]) @ z[b].mT)
    blocks = {
        (a, b): source.total(cell)
        .unflatten(0, (sizes[a][0], sizes[b][0]))
        .transpose(1, 2)
        .flatten(2)
        for (a, b), cell in cells.items()
    }
    sums = [part.total(source) for part in sums]
    steps = [
        newton_excess(factor, latents, means.get(factor.effect_site), part.precision, part.slope)
        for factor, part in zip(factors, sums, strict=True)
        if part.slope is not None
    ]
    if steps:
        # All clusters share one fraction: shortening parts of a joint step would change its
        # direction.
        most = max(float(excess.max()) for _, excess in steps)
        sums = [
            replace(part, pull=part.pull - most * gradient)
            for part, (gradient, _) in zip(sums, steps, strict=True)
        ]
    return sums, blocks


def newton_excess(
    factor: Factor, latents: Latents, effects: Effects | None, precision: Precision, slope: Effects
) -> tuple[Effects, Float[Tensor, "clusters 1"]]:
    """Gradient of the log-posterior in the effects, and the fraction by which a step is too long.

    A full Newton step overshoots where a count is far larger than expected. It may move a
    cluster's effects by at most `LONGEST_STEP` units of the link: the fraction is
    1 - `LONGEST_STEP` / length of the step, or 0. Shortening leaves the mode where it is, because
    the gradient is zero there. The log-likelihood has the derivative `slope` and minus the second
    derivative `precision` at these effects (None for zeros).
    """
    terms = slope.shape[-1]
    effects = torch.zeros_like(slope) if effects is None else effects
    # The sds' geometric mean over draws: the arithmetic mean follows the largest draws.
    sds = factor.effect_sd(latents).reshape(-1, terms)
    sd = sds.log().mean(0).exp()
    if precision.dim() == 3:
        scales = factor.scale_matrix(latents).reshape(-1, terms, terms) / sds[..., None]
        root = sd[:, None] * scales.mean(0)
        prior = torch.linalg.inv(root @ root.mT + 1e-4 * torch.diag(sd**2))
        gradient = slope - effects @ prior
        step = torch.linalg.solve(precision + prior, gradient)
    else:
        prior = sd**-2
        gradient = slope - effects * prior
        step = gradient / (precision * terms + prior)
    length = step.abs().amax(-1, keepdim=True)
    return gradient, (1 - LONGEST_STEP / length.clamp(min=LONGEST_STEP)).nan_to_num(0.0)
