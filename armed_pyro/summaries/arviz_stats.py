"""Statistics of fits by ArviZ: leave-one-out cross-validation and sensitivity to the priors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping

import numpy as np
import xarray as xr
from torch import Tensor

from armed_pyro.inference.nested_weights import log_prior
from armed_pyro.inference.posterior import Posterior
from armed_pyro.summaries.datatree import arviz_api, latent_dataset, log_likelihood, to_datatree

__all__ = ["leave_one_out", "prior_sensitivity"]


# Rows that are left out, at most; beyond it a random sample of them stands for all.
MOST_LEFT_OUT = 4000


def leave_one_out(posterior: Posterior) -> dict[str, float]:
    """Leave-one-out cross-validation of the rows by Pareto-smoothed importance sampling.

    If there are more than 4,000 rows, a random sample of 4,000 is left out. The other rows are
    estimated by a difference estimator from their log predictive density, and the standard error
    includes the sampling error.

    Returns
    -------
    dict of str to float
        elpd_loo, elpd_loo_se, p_loo, and elpd_loo_bad, the number of rows with k-hat above 0.7.
        Empty if nothing is latent.

    Examples
    --------
    ``leave_one_out(fit.posterior)["elpd_loo"]``

    References
    ----------
    Magnusson et al. (2020), "Leave-one-out cross-validation for Bayesian model comparison in
    large data", AISTATS.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of high k-hats, which are counted below
        tree = to_datatree(posterior, groups=["posterior"])
        if "posterior" not in tree:
            return {}
        # Only the family's outcome is left out: reconstructed features are also inputs.
        draws = tree["posterior"].sizes["draw"]
        by_row = log_likelihood(posterior, draws, posterior.seed, others=False)
        tree["log_likelihood"] = xr.DataTree(by_row.map(_tilted))
        n = len(posterior.data)
        if n <= MOST_LEFT_OUT:
            result, error = arviz_api().loo(tree, pointwise=True), 0.0
        else:
            result = arviz_api().loo_subsample(
                tree, MOST_LEFT_OUT, pointwise=True, seed=posterior.seed
            )
            error = float(result.subsampling_se)
    share = min(1.0, MOST_LEFT_OUT / n)
    return {
        "elpd_loo": float(result.elpd),
        "elpd_loo_se": float(np.hypot(result.se, error)),
        "p_loo": float(result.p),
        "elpd_loo_bad": float((result.pareto_k > 0.7).sum()) / share,
    }


def _tilted(values: xr.DataArray) -> xr.DataArray:
    """Add a tiny trend over draws: without it, no tail can be fitted to rows of equal draws."""
    values = values.astype(float)
    return values + xr.DataArray(np.linspace(0, 1e-6, values.sizes["draw"]), dims="draw")


def prior_sensitivity(posterior: Posterior, latents: Mapping[str, Tensor]) -> dict[str, float]:
    """Power-scaling sensitivity of every reported quantity to the priors of all hyperparameters.

    The sensitivity is the cumulative Jensen-Shannon distance that the posterior of a quantity
    moves, per log2 unit of the power, if all priors are raised to a power near 1. Values above 0.05
    are noticeable.

    Parameters
    ----------
    posterior : Posterior
        The fitted program.
    latents : mapping of str to Tensor
        Posterior draws.

    Returns
    -------
    dict of str to float
        Sensitivity by quantity, such as ``site_sd[Intercept]``. Empty if no prior can be scaled.

    Examples
    --------
    ``prior_sensitivity(fit.posterior, fit.draws())["site_sd[Intercept]"]``

    References
    ----------
    Kallioinen et al. (2024), Statistics and Computing 34(57).
    """
    n = max([0, *(value.shape[0] for value in latents.values() if value.dim() > 1)])
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
        for labels, value in _cells(array):
            one_term = str(name).endswith("_cor") and len(set(labels)) == 1
            if np.isfinite(value) and not one_term:
                label = f"[{','.join(labels)}]" if labels else ""
                sensitivity[f"{name}{label}"] = value
    return sensitivity


def _cells(array: xr.DataArray) -> Iterator[tuple[tuple[str, ...], float]]:
    """Yield every value with its labels."""
    for place in np.ndindex(array.shape):
        labels = (array[dim].to_numpy()[i] for dim, i in zip(array.dims, place, strict=True))
        yield tuple(map(str, labels)), float(array.to_numpy()[place])
