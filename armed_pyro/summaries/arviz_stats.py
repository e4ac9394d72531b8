"""Statistics of fits by ArviZ: leave-one-out cross-validation and sensitivity to the priors."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor

from armed_pyro.guides.base import n_draws
from armed_pyro.inference.nested_weights import log_prior
from armed_pyro.inference.posterior import Posterior
from armed_pyro.summaries.datatree import (
    arviz_api,
    cell_name,
    cells,
    latent_dataset,
    log_likelihood,
    to_datatree,
)

__all__ = ["compare_loo", "leave_one_out", "loo", "prior_sensitivity"]

MOST_LEFT_OUT = 4000


def loo(posterior: Posterior) -> Any:
    """ELPD of rows left out one at a time, by Pareto-smoothed importance sampling.

    If there are more than 4,000 rows, a random sample of 4,000 is left out. The other rows are
    estimated by a difference estimator from their log predictive density.

    Returns
    -------
    arviz_stats.ELPDData
        With ``elpd``, ``se``, ``p``, and by row ``elpd_i`` and ``pareto_k``. A row with a Pareto k
        above 0.7 is estimated poorly.

    Raises
    ------
    ValueError
        If nothing is latent, or log-likelihoods are not finite.

    References
    ----------
    Vehtari, Gelman, Gabry (2017), "Practical Bayesian model evaluation using leave-one-out
    cross-validation and WAIC", Statistics and Computing 27(5). Magnusson et al. (2020),
    "Leave-one-out cross-validation for Bayesian model comparison in large data", AISTATS.

    Examples
    --------
    ``fit.loo().elpd``
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of high k-hats, which are in the result
        tree = to_datatree(posterior, groups=["posterior"])
        if "posterior" not in tree:
            raise ValueError("the program has no latent site, so that no row can be left out")
        # Only the family's outcome is left out: reconstructed features are also inputs.
        draws = tree["posterior"].sizes["draw"]
        by_row = log_likelihood(posterior, draws, posterior.seed, others=False)
        tree["log_likelihood"] = xr.DataTree(by_row.map(_tilted))
        if not all(np.isfinite(values).all() for values in by_row.values()):
            raise NonFiniteError("the log-likelihood of a row is not finite in a draw")
        if len(posterior.data) <= MOST_LEFT_OUT:
            return arviz_api().loo(tree, pointwise=True)
        return arviz_api().loo_subsample(tree, MOST_LEFT_OUT, pointwise=True, seed=posterior.seed)


def compare_loo(posteriors: Mapping[str, Posterior]) -> pd.DataFrame:
    """ArviZ's comparison of fits to the same outcomes by `loo`: elpd, differences, weights.

    ValueError if there are fewer than two fits, or their outcomes differ.
    """
    if len(posteriors) < 2:
        raise ValueError("a comparison needs at least two fits")
    outcomes = {name: posterior.data.outcome for name, posterior in posteriors.items()}
    (first, expected), *others = outcomes.items()
    for name, outcome in others:
        if expected is None or outcome is None or not torch.equal(expected, outcome):
            raise ValueError(
                f"{first!r} and {name!r} have different outcomes: only fits to the same rows, in "
                "the same order, can be compared"
            )
    return arviz_api().compare({name: loo(posterior) for name, posterior in posteriors.items()})


class NonFiniteError(ValueError):
    """Log-likelihoods are not finite."""


def leave_one_out(posterior: Posterior) -> dict[str, float]:
    """elpd_loo, elpd_loo_se, p_loo and elpd_loo_bad, of `loo`.

    elpd_loo_bad is the number of rows with k-hat above 0.7. The standard error includes the
    sampling error where rows are sampled. Empty if nothing is latent.
    """
    if not posterior.hyperparameters(2):
        return {}
    n = len(posterior.data)
    try:
        result = loo(posterior)
    except NonFiniteError:
        names = ("elpd_loo", "elpd_loo_se", "p_loo")
        return {**dict.fromkeys(names, math.nan), "elpd_loo_bad": float(n)}
    error = float(result.subsampling_se) if n > MOST_LEFT_OUT else 0.0
    share = min(1.0, MOST_LEFT_OUT / n)
    return {
        "elpd_loo": float(result.elpd),
        "elpd_loo_se": float(np.hypot(result.se, error)),
        "p_loo": float(result.p),
        "elpd_loo_bad": float((result.pareto_k > 0.7).sum()) / share,
    }


def _tilted(values: xr.DataArray) -> xr.DataArray:
    """Add a tiny trend over draws: without it, no tail can be fitted to rows of equal draws.

    It is relative for values of which an absolute trend would be lost to rounding.
    """
    values = values.astype(float)
    trend = xr.DataArray(np.linspace(0, 1, values.sizes["draw"]), dims="draw")
    return values + trend * (1e-6 + 1e-12 * abs(values))


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
    prior = xr.Dataset({"prior": (("chain", "draw"), values)})
    tree = xr.DataTree.from_dict({"posterior": labelled, "log_prior": prior})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from arviz_stats import psense  # type: ignore[attr-defined]

        result = psense(tree, group="prior", alphas=(0.8, 1.25))
    result = result.dataset if isinstance(result, xr.DataTree) else result
    sensitivity: dict[str, float] = {}
    for name, array in result.data_vars.items():
        for labels, value in cells(array):
            one_term = str(name).endswith("_cor") and len(set(labels)) == 1
            if np.isfinite(value) and not one_term:
                sensitivity[cell_name(name, labels)] = float(value)
    return sensitivity
