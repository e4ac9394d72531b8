"""Sums over all rows from which `CrossedGuide` makes its joint conditional."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from armed_pyro.guides.pseudo_observations import newton_excess
from armed_pyro.program.linearize import curvature, mean_draws
from armed_pyro.program.model import MixedEffects
from armed_pyro.random_effects.design import by_column
from armed_pyro.random_effects.grouping_factor import Factor
from armed_pyro.rows.batch import Rows
from armed_pyro.rows.source import RowSource

__all__ = ["RowSums", "row_sums"]


# Rows whose curvature is computed at once.
BLOCK_ROWS = 2**16

Latents = Mapping[str, Tensor]


@dataclass(frozen=True)
class RowSums:
    r"""Z'WZ, Z'(r + W eta) and Z'WX of several factors, with W and r of `curvature`.

    eta = Z u + X beta is the predictor's linear part at the means of u and beta. Factors are in
    the order of `factors`; clusters and terms of a factor are its first dimensions.

    Attributes
    ----------
    factors : sequence of Factor
        The factor with most effects, then the others.
    sizes : sequence of (int, int)
        Clusters and terms of each factor.
    within : Float[Tensor, "clusters terms terms"]
        Z'WZ of the first factor, whose other entries are zero.
    cells : mapping of (int, int) to Float[Tensor, "pairs_of_clusters terms terms"]
        Z_a'WZ_b of every pair of factors a <= b but (0, 0), by pair of clusters: cluster i of a
        and j of b are at i * (clusters of b) + j.
    pulls : sequence of Float[Tensor, "clusters terms"]
        Z'(r + W eta) of each factor.
    slopes : sequence of Float[Tensor, "clusters terms fixed"]
        Z'WX of each factor.
    gradients : sequence of Float[Tensor, "clusters terms"]
        Z'r of each factor.
    """

    factors: Sequence[Factor]
    sizes: Sequence[tuple[int, int]]
    within: Float[Tensor, "clusters terms terms"]
    cells: Mapping[tuple[int, int], Float[Tensor, "pairs terms_a terms_b"]]
    pulls: Sequence[Float[Tensor, "clusters terms"]]
    slopes: Sequence[Float[Tensor, "clusters terms fixed"]]
    gradients: Sequence[Float[Tensor, "clusters terms"]]

    @classmethod
    def zeros(
        cls, factors: Sequence[Factor], sizes: Sequence[tuple[int, int]], fixed: int, like: Tensor
    ) -> RowSums:
        """Sums over no rows, in the precision and on the device of `like`."""
        k, t = sizes[0]
        pairs = itertools.combinations_with_replacement(range(len(factors)), 2)
        return cls(
            factors,
            sizes,
            like.new_zeros(k, t, t),
            {
                (a, b): like.new_zeros(sizes[a][0] * sizes[b][0], sizes[a][1], sizes[b][1])
                for a, b in pairs
                if (a, b) != (0, 0)
            },
            [like.new_zeros(k, t) for k, t in sizes],
            [like.new_zeros(k, t, fixed) for k, t in sizes],
            [like.new_zeros(k, t) for k, t in sizes],
        )

    def add(
        self,
        model: MixedEffects,
        means: Latents,
        rows: Rows,
        weight: Float[Tensor, "rows columns"],
        residual: Float[Tensor, "rows columns"],
        activations: Mapping[str, Tensor],
    ) -> None:
        """Add a block of rows, in place."""
        positions = [rows.memberships[factor.name].position for factor in self.factors]
        columns = weight.shape[-1]
        phi = [factor.design(rows.x, activations) for factor in self.factors]
        z = [by_column(design, columns) for design in phi]
        response = residual
        for factor, design in zip(self.factors, phi, strict=True):
            if factor.effect_site in means:
                membership, effects = rows.memberships[factor.name], means[factor.effect_site]
                response = response + weight * factor.contribution(design, membership, effects)
        weighted = [design * weight[:, None, :] for design in z]
        self.within.index_add_(0, positions[0], weighted[0] @ z[0].mT)
        for (a, b), cell in self.cells.items():
            place = positions[a] * self.sizes[b][0] + positions[b]
            cell.index_add_(0, place, weighted[a] @ z[b].mT)
        if model.bayesian_head:
            x = by_column(model.head_inputs(activations), columns)
            response = response + weight * (x * means["fixed_effect"][:, None]).sum(1)
            for position, design, slope in zip(positions, weighted, self.slopes, strict=True):
                slope.index_add_(0, position, design @ x.mT)
        parts = zip(positions, z, self.pulls, self.gradients, strict=True)
        for position, design, pull, gradient in parts:
            pull.index_add_(0, position, (design * response[:, None, :]).sum(-1))
            gradient.index_add_(0, position, (design * residual[:, None, :]).sum(-1))

    def totals(self, source: RowSource) -> RowSums:
        """The sums over the rows of all processes."""
        return RowSums(
            self.factors,
            self.sizes,
            source.total(self.within),
            {pair: source.total(cell) for pair, cell in self.cells.items()},
            [source.total(pull) for pull in self.pulls],
            [source.total(slope) for slope in self.slopes],
            [source.total(gradient) for gradient in self.gradients],
        )

    def shortened(self, latents: Latents, means: Latents) -> list[Tensor]:
        """`pulls`, so that a Newton step from the means moves no effect too far.

        All clusters share one fraction: shortening parts of a joint step would change its
        direction.
        """
        precisions = [self.within]
        precisions += [self.cells[a, a][:: k + 1] for a, (k, _) in enumerate(self.sizes) if a]
        steps = [
            newton_excess(factor, latents, means.get(factor.effect_site), precision, gradient)
            for factor, precision, gradient in zip(
                self.factors, precisions, self.gradients, strict=True
            )
        ]
        largest = max(float(excess.max()) for _, excess in steps)
        return [
            pull - largest * gradient for pull, (gradient, _) in zip(self.pulls, steps, strict=True)
        ]

    def write_blocks(
        self,
        between: Float[Tensor, "clusters terms effects"],
        rest: Float[Tensor, "effects effects"],
    ) -> None:
        """Write Z_1'WZ_2 into `between` and Z_2'WZ_2 into `rest`, Z_2 being all other factors.

        In place, because `between` is the guide's largest tensor.
        """
        starts = [0, 0, *itertools.accumulate(k * t for k, t in self.sizes[1:])]
        for (a, b), cell in self.cells.items():
            (k_a, t_a), (k_b, t_b) = self.sizes[a], self.sizes[b]
            block = cell.reshape(k_a, k_b, t_a, t_b).permute(0, 2, 1, 3)
            effects_b = slice(starts[b], starts[b] + k_b * t_b)
            if a == 0:
                between[..., effects_b] = block.reshape(k_a, t_a, k_b * t_b)
            else:
                block = block.reshape(k_a * t_a, k_b * t_b)
                effects_a = slice(starts[a], starts[a] + k_a * t_a)
                rest[effects_a, effects_b] = block
                rest[effects_b, effects_a] = block.mT


def row_sums(
    model: MixedEffects,
    factors: Sequence[Factor],
    sizes: Sequence[tuple[int, int]],
    latents: Latents,
    source: RowSource,
) -> RowSums:
    """The sums over all rows at these latent sites, a point or draws.

    For families that are not quadratic, `pulls` are those of a Newton step that is short enough.
    """
    means = mean_draws(model, latents)
    fixed = len(model.fixed_terms()) if model.bayesian_head else 0
    sums = RowSums.zeros(factors, sizes, fixed, model.reference())
    for rows, weight, residual, activations in curvature(model, source, latents, BLOCK_ROWS):
        sums.add(model, means, rows, weight, residual, activations)
    sums = sums.totals(source)
    if model.family.is_quadratic:
        return sums
    return replace(sums, pulls=sums.shortened(latents, means))
