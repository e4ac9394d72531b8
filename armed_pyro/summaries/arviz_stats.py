"""ArviZ's statistics of fits: Pareto smoothing, leave-one-out, sensitivity to the priors."""

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


# Rows that are left out one by one.
MOST_LEFT_OUT = 4000


def leave_one_out(posterior: Posterior) -> dict[str, float]:
    """PSIS-LOO of the rows: elpd_loo, elpd_loo_se, p_loo and the rows with k-hat above 0.7.

    Of more than 4,000 rows so many are left out, drawn at random, and the rest is estimated by
    how they differ from their log predictive density; the standard error covers that.

    References
    ----------
    Magnusson et al. (2020), "Leave-one-out cross-validation for Bayesian model comparison in
    large data", AISTATS.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of rows with a high k-hat, which are counted below
        tree = to_datatree(posterior, groups=["posterior"])
        if "posterior" not in tree:
            return {}
        # Of the family's outcome: a row's features are no outcome to be left out.
        own = log_likelihood(
            posterior, tree["posterior"].sizes["draw"], posterior.seed, others=False
        )
        tree["log_likelihood"] = xr.DataTree(own.map(_tilted))
        n = len(posterior.data)
        if n <= MOST_LEFT_OUT:
            found, error = arviz_api().loo(tree, pointwise=True), 0.0
        else:
            found = arviz_api().loo_subsample(
                tree, MOST_LEFT_OUT, pointwise=True, seed=posterior.seed
            )
            error = float(found.subsampling_se)
    share = min(1.0, MOST_LEFT_OUT / n)
    return {
        "elpd_loo": float(found.elpd),
        "elpd_loo_se": float(np.hypot(found.se, error)),
        "p_loo": float(found.p),
        "elpd_loo_bad": float((found.pareto_k > 0.7).sum()) / share,
    }


def _tilted(values: xr.DataArray) -> xr.DataArray:
    """Rows whose draws are all the same, or few again and again, get a tail that can be fitted."""
    values = values.astype(float)
    return values + xr.DataArray(np.linspace(0, 1e-6, values.sizes["draw"]), dims="draw")


def prior_sensitivity(posterior: Posterior, latents: Mapping[str, Tensor]) -> dict[str, float]:
    """Power-scaling sensitivity to the priors of all hyperparameters, by quantity reported.

    How far the posterior of a quantity moves (its cumulative Jensen-Shannon distance a log2 unit)
    when the priors are raised to a power near 1; 0.05 is noticeable.

    References
    ----------
    Kallioinen et al. (2024), Statistics and Computing 34(57).
    """
    n = max([0, *(value.shape[0] for value in latents.values() if value.dim() > 1)])
    if not n:
        return {}
    effects = {factor.effect_site for factor in posterior.model.factors}
    some = {name: value for name, value in latents.items() if name not in effects}
    labelled = latent_dataset(posterior.model, some, n)
    if not labelled.data_vars:
        return {}
    values = log_prior(posterior.model, latents).double().cpu().numpy()[None]
    if np.ptp(values) == 0:  # every sd is known: there is no prior to scale
        return {}
    prior = xr.Dataset({"prior": (("chain", "draw"), values)})
    tree = xr.DataTree.from_dict({"posterior": labelled, "log_prior": prior})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from arviz_stats import psense  # type: ignore[attr-defined]

        found = psense(tree, group="prior", alphas=(0.8, 1.25))
    found = found.dataset if isinstance(found, xr.DataTree) else found
    sensitivity: dict[str, float] = {}
    for name, array in found.data_vars.items():
        for labels, value in _cells(array):
            one_term = str(name).endswith("_cor") and len(set(labels)) == 1
            if np.isfinite(value) and not one_term:
                label = f"[{','.join(labels)}]" if labels else ""
                sensitivity[f"{name}{label}"] = value
    return sensitivity


def _cells(array: xr.DataArray) -> Iterator[tuple[tuple[str, ...], float]]:
    for place in np.ndindex(array.shape):
        labels = (array[dim].to_numpy()[i] for dim, i in zip(array.dims, place, strict=True))
        yield tuple(map(str, labels)), float(array.to_numpy()[place])
