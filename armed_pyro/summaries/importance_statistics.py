"""Statistics by importance weights: leave-one-out, and sensitivity to the priors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from torch import Tensor

from armed_pyro.guides.base import n_draws
from armed_pyro.inference.nested_weights import log_prior
from armed_pyro.inference.posterior import Posterior
from armed_pyro.inference.psis import pareto_smooth
from armed_pyro.summaries.datatree import (
    cell_name,
    cells,
    latent_dataset,
    log_likelihood,
)

__all__ = ["leave_one_out", "prior_sensitivity"]

# Posterior draws, and rows that are left out.
DRAWS, MOST_LEFT_OUT = 1000, 1000
# Powers to which the priors are raised.
POWERS = (0.8, 1.25)


def leave_one_out(posterior: Posterior) -> dict[str, float]:
    r"""elpd_loo, elpd_loo_se, p_loo and elpd_loo_bad, by Pareto-smoothed importance sampling.

    elpd_loo_bad is the number of rows with k-hat above 0.7. If there are more than 1,000 rows, a
    random sample of m = 1,000 out of N is left out. The other rows are estimated by a difference
    estimator from their log predictive density,

    .. math:: \widehat{elpd} = \sum_i lpd_i + \frac{N}{m} \sum_{i \in S} (elpd_i - lpd_i)

    and the standard error includes the sampling error (Magnusson et al. 2020, "Leave-one-out
    cross-validation for Bayesian model comparison in large data", AISTATS, equations 7 to 9). Empty
    if nothing is latent.
    """
    latents = posterior.draws(DRAWS)
    draws = n_draws(latents)
    if not draws:
        return {}
    # Only the family's outcome is left out: reconstructed features are also inputs.
    by_row = log_likelihood(posterior, DRAWS, posterior.seed, others=False)
    (values,) = (array.to_numpy()[0].astype(float).T for array in by_row.values())
    n = len(values)
    if not np.isfinite(values).all():
        names = ("elpd_loo", "elpd_loo_se", "p_loo")
        return {**dict.fromkeys(names, math.nan), "elpd_loo_bad": float(n)}
    chosen = np.random.default_rng(posterior.seed).permutation(n)[:MOST_LEFT_OUT]
    weights, k_hat = pareto_smooth(-values[chosen])
    elpd = np.logaddexp.reduce(weights + values[chosen], axis=1)
    lpd = np.logaddexp.reduce(values, axis=1) - math.log(draws)
    difference, m = elpd - lpd[chosen], len(chosen)
    moved = n * float(difference.mean())
    total = float(lpd.sum()) + moved
    sampling = n * (n - m) / m * float(difference.var(ddof=1)) if m < n else 0.0
    squares = float((lpd**2).sum()) + n * float((elpd**2 - lpd[chosen] ** 2).mean())
    variance = squares - (total**2 - sampling) / n
    return {
        "elpd_loo": total,
        "elpd_loo_se": math.sqrt(max(0.0, variance) + sampling),
        "p_loo": -moved,
        "elpd_loo_bad": float((k_hat > 0.7).sum()) * n / m,
    }


def prior_sensitivity(posterior: Posterior, latents: Mapping[str, Tensor]) -> dict[str, float]:
    """Power-scaling sensitivity of every reported quantity to the priors of all hyperparameters.

    The sensitivity is the cumulative Jensen-Shannon distance that the posterior of a quantity, such
    as ``site_sd[Intercept]``, moves per log2 unit of the power, if all priors are raised to a power
    near 1 (Kallioinen et al. 2024, Statistics and Computing 34(57)). Values above 0.05 are
    noticeable. Empty if no prior can be scaled.
    """
    n = n_draws(latents)
    if not n:
        return {}
    effects = {factor.effect_site for factor in posterior.model.factors}
    hyperparameters = {name: value for name, value in latents.items() if name not in effects}
    labelled = latent_dataset(posterior.model, hyperparameters, n)
    if not labelled.data_vars:
        return {}
    values = log_prior(posterior.model, latents).double().cpu().numpy()[None]
    if np.ptp(values) == 0:  # all hyperparameters are known: no prior to scale
        return {}
    scaled = [np.exp(pareto_smooth((power - 1) * values)[0][0]) for power in POWERS]
    sensitivity: dict[str, float] = {}
    for name, array in labelled.data_vars.items():
        for labels, value in cells(array.isel(chain=0)):
            one_term = str(name).endswith("_cor") and len(set(labels)) == 1
            moved = _moved(value, scaled)
            if np.isfinite(moved) and not one_term:
                sensitivity[cell_name(name, labels)] = moved
    return sensitivity


def _moved(
    draws: Float[np.ndarray, " draws"], scaled: Sequence[Float[np.ndarray, " draws"]]
) -> float:
    """Distance per log2 unit of `POWERS`, to which the weights belong; nan for a constant."""
    slopes = [
        max(_distance(draws, weights), _distance(-draws, weights)) / abs(math.log2(power))
        for power, weights in zip(POWERS, scaled, strict=True)
    ]
    return sum(slopes) / len(slopes)


def _distance(draws: Float[np.ndarray, " draws"], weights: Float[np.ndarray, " draws"]) -> float:
    r"""Cumulative Jensen-Shannon distance of a sample and of the weighted sample.

    .. math:: \Big(\frac{CJS(P \| Q) + CJS(Q \| P)}{\int P + \int Q}\Big)^{1/2}, \quad
        CJS(P \| Q) = \int P \log_2 \frac{2 P}{P + Q} + \frac{1}{2 \log 2} \int (Q - P)

    with P and Q as the two distribution functions (Nguyen and Vreeken 2015, ECML PKDD).
    """
    order = np.argsort(draws)
    steps = np.diff(draws[order])
    p = np.linspace(1 / len(draws), 1 - 1 / len(draws), len(draws) - 1)
    q = np.cumsum(weights[order] / weights.sum())[:-1]
    middle = np.log2(0.5 * (p + q))
    logs = [np.log2(cdf, out=np.zeros_like(cdf), where=cdf > 0) for cdf in (p, q)]
    gap = 0.5 / math.log(2) * float(steps @ (q - p))
    one_way = float(steps @ (p * (logs[0] - middle))) + gap
    other = float(steps @ (q * (logs[1] - middle))) - gap
    bound = float(steps @ (p + q))
    return math.sqrt((max(0.0, one_way) + max(0.0, other)) / bound) if bound > 0 else math.nan
