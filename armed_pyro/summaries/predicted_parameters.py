"""Averages over the rows of parameters that have predictors."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from armed_pyro.families.distributional import Distributional
from armed_pyro.families.family import Parameters
from armed_pyro.program.model import MixedEffects
from armed_pyro.rows.batch import Rows

__all__ = ["mean_residual_variance"]

# Rows, points of the random effects, and values in a block over which parameters are averaged.
MOST_ROWS, POINTS, MOST_VALUES = 500, 32, 2**22


@torch.no_grad()
def mean_residual_variance(
    model: MixedEffects,
    rows: Rows,
    weights: Float[Tensor, "draws 1 fixed_terms"] | None,
    random: Float[Tensor, "draws columns"],
    parameters: Parameters,
    means: Float[Tensor, "draws outcome_columns"],
) -> Float[Tensor, "draws outcome_columns"]:
    """Residual variance, averaged over at most `MOST_ROWS` rows and over new clusters.

    `random` are the variances of the random part of every column of the predictor, `means` those of
    `Family.marginal_mean`.
    """
    family = model.family
    assert isinstance(family, Distributional)  # for mypy: the caller asks
    first = means.shape[-1]
    step = max(1, len(rows) // MOST_ROWS)
    sobol = torch.quasirandom.SobolEngine(random.shape[-1] - first, scramble=True, seed=0)
    normal = torch.special.ndtri(sobol.draw(POINTS, dtype=torch.float64)).to(random)
    size = max(1, MOST_VALUES // (MOST_ROWS * POINTS * random.shape[-1]))
    parts = []
    for start in range(0, len(random), size):
        block = slice(start, start + size)
        latents = {} if weights is None else {"fixed_effect": weights[block]}
        eta = model.predictor(rows, latents).eta.to(random)[..., ::step, :]
        sd = random[block].sqrt()
        eta = eta.expand(len(sd), *eta.shape[-2:])
        # draws points rows columns
        shift = sd[:, None, first:] * normal
        moved = torch.cat(
            [
                eta[:, None, :, :first].expand(-1, POINTS, -1, -1),
                eta[:, None, :, first:] + shift[:, :, None],
            ],
            -1,
        )
        shared = {name: value[block, None, None] for name, value in parameters.items()}
        _, values = family.inside(moved, shared)
        columns = [
            family.residual_variance(values, mean[:, None, None])
            .expand(moved.shape[:-1])
            .mean((1, 2))
            for mean in means[block].unbind(-1)
        ]
        parts.append(torch.stack(columns, -1))
    return torch.cat(parts)
