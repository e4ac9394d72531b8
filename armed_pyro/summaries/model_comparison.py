"""Leave-one-out cross-validation of fits by ArviZ, and their comparison."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr

from armed_pyro.inference.posterior import Posterior
from armed_pyro.summaries.datatree import arviz_api, log_likelihood, to_datatree

__all__ = ["compare_loo", "loo"]

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
            raise ValueError("the log-likelihood of a row is not finite in a draw")
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


def _tilted(values: xr.DataArray) -> xr.DataArray:
    """Add a tiny trend over draws: without it, no tail can be fitted to rows of equal draws.

    It is relative for values of which an absolute trend would be lost to rounding.
    """
    values = values.astype(float)
    trend = xr.DataArray(np.linspace(0, 1, values.sizes["draw"]), dims="draw")
    return values + trend * (1e-6 + 1e-12 * abs(values))
