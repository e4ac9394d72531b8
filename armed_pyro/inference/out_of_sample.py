"""How well a fit predicts rows that its network was not trained on, and what it claims."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import numpy as np
import pyro.distributions as dist
import torch
from jaxtyping import Float, Int
from torch import Tensor

from armed_pyro.inference.posterior import Posterior
from armed_pyro.inference.psis import pareto_smooth
from armed_pyro.program.predictor import modulates
from armed_pyro.rows.batch import Rows
from armed_pyro.rows.in_memory import HeldRows

__all__ = ["out_of_sample"]

# Posterior draws and rows that are scored; fewer if the network runs once per draw.
DRAWS, MOST_ROWS = 400, 4000
FEW_DRAWS, FEW_ROWS = 50, 500
# Outcomes drawn per row for the log score that the fit claims.
REPLICATES = 8
TAIL = 0.05  # outside each end of a 90% interval

Draws = Mapping[str, Tensor]


def out_of_sample(
    posterior: Posterior, rows: HeldRows, *, settled_on: bool
) -> dict[str, float | None]:
    r"""Log score and coverage of 90% intervals of rows that the network was not trained on.

    .. math:: p(y_i \mid y_{-i}) \approx \sum_s w_{is} \, p(y_i \mid u_s, \theta_s)

    If the posterior was `settled_on` the rows, the weights w_is leave row i out by Pareto-smoothed
    importance sampling: effects of its cluster come from the cluster's other rows. Otherwise
    weights are equal, and effects of new clusters are drawn from N(0, D).

    Returns
    -------
    dict
        ``rows``; ``score``, the mean of :math:`\log p(y_i)`; ``claimed``, its expectation if
        outcomes were drawn from the predictions (None if outcomes are censored); ``coverage``, the
        share of outcomes in their intervals (None for classes); and the standard errors
        ``excess_se`` (of claimed - score) and ``coverage_se``, by independent clusters of the
        largest factor.
    """
    model = posterior.model
    few = modulates(model)
    most, n = (FEW_ROWS, FEW_DRAWS) if few else (MOST_ROWS, DRAWS)
    rng = np.random.default_rng([posterior.seed, 19])
    if len(rows) > most:
        chosen = np.sort(rng.permutation(len(rows))[:most])
        rows = rows.take(torch.from_numpy(chosen).to(rows.x.device))
    counts = {name: len(counted) for name, counted in rows.counts.items()}
    latents = posterior.draws(n)
    with model.seeded(posterior.seed + 19):
        latents = model.extend(latents, counts, population=False)
        batch = rows.all()
        predictor = model.predictor(batch, latents, return_fixed=False)
        eta = predictor.eta.expand(n, *predictor.eta.shape[-2:])
        density = model.density(eta, latents, batch)
        by_draw = density.log_prob(batch.outcome()).expand(n, -1)
        log_weights = np.full((len(batch), n), -np.log(n))
        if settled_on:
            frequencies = model.frequencies(batch)
            left_out = by_draw if frequencies is None else frequencies * by_draw
            log_weights = pareto_smooth(-left_out.T.double().cpu().numpy())[0]
        score = _mixture(by_draw, log_weights)
        claimed = None
        if batch.censoring is None:  # replicates would have to be censored as well
            claimed = _claimed(density, log_weights, rng)
        inside = _inside(posterior, eta, latents, batch, log_weights, rng)
    codes = _clusters(posterior, rows)
    result: dict[str, float | None] = {
        "rows": len(batch),
        "score": float(score.mean()),
        "claimed": None if claimed is None else float(claimed.mean()),
        "excess_se": None if claimed is None else _standard_error(claimed - score, codes),
        "coverage": None if inside is None else float(inside.mean()),
        "coverage_se": None if inside is None else _standard_error(inside, codes),
    }
    return result


def _mixture(by_draw: Tensor, log_weights: np.ndarray) -> Float[np.ndarray, " rows"]:
    """log of the weighted mean over draws."""
    values = by_draw.T.double().cpu().numpy() + log_weights
    return cast("np.ndarray", np.logaddexp.reduce(values, 1))


def _claimed(
    density: dist.TorchDistribution,
    log_weights: Float[np.ndarray, "rows draws"],
    rng: np.random.Generator,
) -> Float[np.ndarray, " rows"]:
    """The mean log score of outcomes drawn from the predictions."""
    scores = list[np.ndarray]()
    for _ in range(REPLICATES):
        drawn = _replicate(density.sample(), log_weights, rng)
        scores.append(_mixture(density.log_prob(drawn), log_weights))
    return cast("np.ndarray", np.mean(scores, 0))


def _replicate(
    drawn: Tensor, log_weights: Float[np.ndarray, "rows draws"], rng: np.random.Generator
) -> Tensor:
    """An outcome of every row, of the draw that its weights choose at random."""
    edges = np.exp(log_weights).cumsum(1)
    at = (edges < rng.random(len(edges))[:, None] * edges[:, -1:]).sum(1)
    row = torch.arange(drawn.shape[1], device=drawn.device)
    return drawn[torch.from_numpy(at).to(drawn.device), row]


def _inside(
    posterior: Posterior,
    eta: Tensor,
    latents: Draws,
    rows: Rows,
    log_weights: Float[np.ndarray, "rows draws"],
    rng: np.random.Generator,
) -> Float[np.ndarray, " rows"] | None:
    """1 where the outcome is in its 90% interval; None if the family's outcomes have no order.

    Of whole numbers, the distribution function is drawn at random between its two values.
    """
    model, family = posterior.model, posterior.model.family
    if family.no_residuals:
        return None
    y, total = rows.outcome().double(), np.zeros(len(rows))
    uniform = rng.uniform(size=len(rows))
    draws = zip(model.by_draw(eta, latents, rows), np.exp(log_weights).T, strict=True)
    for (predictor, parameters), weight in draws:
        ends = family.cdf_range(y, predictor, parameters, rows)
        if ends is None:
            return None
        lower, upper = ends
        total += weight * (lower + uniform * (upper - lower))
    return ((total > TAIL) & (total < 1 - TAIL)).astype(float)


def _clusters(posterior: Posterior, rows: HeldRows) -> Int[np.ndarray, " rows"]:
    """Cluster of every row in the largest factor; without factors, every row is one."""
    factor = posterior.model.largest_factor()
    return np.arange(len(rows)) if factor is None else rows.codes[factor].cpu().numpy()


def _standard_error(values: np.ndarray, codes: Int[np.ndarray, " rows"]) -> float:
    """Standard error of the mean of values that are dependent within clusters."""
    present, places = np.unique(codes, return_inverse=True)
    sums = np.bincount(places, values - values.mean(), len(present))
    inflation = len(present) / max(1, len(present) - 1)
    by_cluster = float(np.sqrt(inflation * (sums**2).sum()) / len(values))
    # Few clusters may agree by chance.
    return max(by_cluster, float(values.std() / np.sqrt(len(values))))
