"""Fits as labelled data in ArviZ's schema, on the original scale."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import torch
import xarray as xr
from pyro.infer import Predictive
from torch import Tensor

from armed_pyro._messages import unknown
from armed_pyro.data.xarray_names import label_values, variable_name
from armed_pyro.inference.posterior import Posterior
from armed_pyro.prediction.chunks import predict_chunks
from armed_pyro.prediction.unseen import Marginal
from armed_pyro.program.blocks import BLOCK_VALUES, values_per_row
from armed_pyro.program.model import MixedEffects, log_likelihoods
from armed_pyro.program.units import (
    original_covariance,
    original_fixed_effects,
    original_parameters,
    original_sd,
)
from armed_pyro.rows.batch import Rows

__all__ = ["GROUPS", "arviz_api", "latent_dataset", "log_likelihood", "to_datatree"]


Draws = dict[str, Tensor]
Variables = dict[str, tuple[tuple[str, ...], Any]]
ATTRIBUTES = {"inference_library": "armed_pyro", "creation_library": "armed_pyro"}
# Bytes beyond which draws of other outcomes are left out; each draw is as large as the features.
LARGEST_OTHER = 200e6


def arviz_api() -> ModuleType:
    """ArviZ with the API of version 1: ``arviz`` or, in earlier versions, ``arviz.preview``.

    Examples
    --------
    >>> hasattr(arviz_api(), "plot_ppc_dist")
    True
    """
    import arviz  # slow to import, and rarely needed

    if int(arviz.__version__.partition(".")[0]) >= 1:
        return arviz
    import arviz.preview

    return arviz.preview


def to_datatree(
    posterior: Posterior,
    *,
    draws: int = 1000,
    groups: Sequence[str] | None = None,
    seed: int | None = None,
) -> xr.DataTree:
    r"""Posterior, predictive draws, likelihood, prior and data of a fit, on the original scale.

    Let M be the matrix that transforms random effects to the units of the data. ``<factor>_effect``
    is :math:`M u`; ``<factor>_sd`` and ``<factor>_cor`` are the standard deviations and
    correlations of :math:`M D M^\top`, as in `variance_components`.

    Parameters
    ----------
    posterior : Posterior
        The fitted program.
    draws : int
        Draws of the posterior and of the prior, as one chain.
    groups : sequence of str, optional
        Names of the groups, by default all:

        - posterior: ``<factor>_effect`` (factor, term), ``<factor>_sd`` (term), ``<factor>_cor``
          (term, term_bis; only if some terms are correlated; zero for independent terms), the
          family's parameters (``residual_sd``, ``shape``), ``<other outcome>_sd``,
          ``fixed_effect`` (fixed_term). Absent if nothing is latent.
        - posterior_predictive, log_likelihood: every outcome of the training rows, under its name,
          given the same draws. Log-likelihoods include the weights of rows and outcomes.
        - prior, prior_predictive: draws of the program without its data. Weights of a network that
          are not latent keep their trained values.
        - observed_data, constant_data: outcome; features, clusters, trials, offset and weights.
        - sample_stats: objective and evidence lower bound per row for each step of the training,
          whether the step ran compiled, and its seconds (median of its window).
    seed : int, optional
        Seed of the draws; by default that of the fit. The posterior draws are those of
        ``fit.draws(draws, seed=seed)``.

    Returns
    -------
    xarray.DataTree
        Labels are numbers, text or timestamps, which NetCDF can hold; other labels become text.
        Classes are codes into the attribute ``classes``. In names, ``/`` becomes ``_``, and a name
        that the schema reserves, such as ``draw``, is followed by ``_``.

    Raises
    ------
    ValueError
        If there is no such group, or fewer than two draws are asked for.

    Examples
    --------
    ``fit.to_datatree(groups=["posterior", "log_likelihood"])``, for ``arviz.loo``.
    """
    wanted = list(GROUPS) if groups is None else [groups] if isinstance(groups, str) else groups
    for name in wanted:
        if name not in GROUPS:
            raise unknown("group", name, GROUPS)
    if draws < 2:
        raise ValueError(f"`draws` must be at least 2, not {draws}")
    seed = posterior.seed if seed is None else seed
    made = {name: make(posterior, draws, seed) for name, make in GROUPS.items() if name in wanted}
    return xr.DataTree.from_dict({name: group for name, group in made.items() if group.data_vars})


# --- the groups -------------------------------------------------------------------------------


def _posterior_predictive(posterior: Posterior, draws: int, seed: int) -> xr.Dataset:
    if posterior.model.others:
        with posterior.model.seeded(seed + 1):
            return _replicated(posterior, draws, posterior.draws(draws, seed=seed))
    source = Marginal(posterior.draws(draws, seed=seed), seed)
    chunks = [
        part.outcome
        for part in predict_chunks(posterior, posterior.data, source, draws=draws, seed=seed)
    ]
    return _by_row(
        posterior, draws, {posterior.data.outcome_name: chunks}, posterior.model.family.integer
    )


def _prior_predictive(posterior: Posterior, draws: int, seed: int) -> xr.Dataset:
    latents = _prior_draws(posterior, draws, seed)
    with posterior.model.seeded(seed + 3):
        return _replicated(posterior, draws, latents)


def _replicated(posterior: Posterior, draws: int, latents: Draws) -> xr.Dataset:
    """Draws of the outcomes given these latent sites; other outcomes are left out if too large.

    All outcomes of a row are drawn from the same latent sites.
    """
    model, blocks = posterior.model, dict[str, list[np.ndarray]]()
    values = draws * posterior.data.n_rows * math.prod(model.data_facts().feature_shape)
    others = bool(model.others) and 4 * values <= LARGEST_OTHER
    if model.others and not others:
        warnings.warn(
            f"draws of {', '.join(other.name for other in model.others)} would take "
            f"{4e-9 * values:.1f} GB and are left out: ask for fewer draws, or use "
            "Fit.predict(rows).others, which holds their means and sds",
            UserWarning,
            stacklevel=5,
        )
    for rows in _blocks(posterior, draws, others=others):
        predictor = model.predictor(rows, latents, return_fixed=False, others=others)
        eta = predictor.eta.expand(draws, *predictor.eta.shape[-2:])
        drawn = {posterior.data.outcome_name: model.density(eta, latents, rows).sample()}
        if others:
            densities = model.other_densities(predictor.others, latents, rows)
            drawn |= {other.name: density.sample() for other, density in densities.items()}
        for name, sample in drawn.items():
            blocks.setdefault(name, []).append(sample.cpu().numpy())
    return _by_row(
        posterior, draws, blocks, model.family.integer, posterior.data.features.dim() - 1
    )


def log_likelihood(
    posterior: Posterior, draws: int, seed: int, *, others: bool = True
) -> xr.Dataset:
    """Log-likelihood of every training row (chain, draw, row), by outcome; see `to_datatree`.

    Parameters
    ----------
    posterior : Posterior
        The fitted program.
    draws, seed : int
        Number and seed of the posterior draws.
    others : bool
        Whether to include outcomes other than the family's.

    Examples
    --------
    ``log_likelihood(fit.posterior, 1000, seed=0)["y"]``
    """
    model, latents = posterior.model, posterior.draws(draws, seed=seed)
    blocks = dict[str, list[np.ndarray]]()
    with torch.no_grad():
        for rows in _blocks(posterior, draws, others=others):
            for name, values in log_likelihoods(model, rows, latents, others=others).items():
                blocks.setdefault(name, []).append(values.cpu().numpy())
    return _by_row(posterior, draws, blocks, whole=False)


def _observed_data(posterior: Posterior, draws: int, seed: int) -> xr.Dataset:
    variables: Variables = {}
    if posterior.data.outcome is not None:
        outcome = _counts(posterior.data.outcome.numpy(), posterior.model.family.integer)
        variables[variable_name(posterior.data.outcome_name)] = (("row",), outcome)
    features = posterior.model.data_facts().scaling.standardise(posterior.data.features).numpy()
    for other in posterior.model.others:
        variables[variable_name(other.name)] = (("row", *_axes(features.ndim - 1)), features)
    return _dataset(posterior, variables)


def _constant_data(posterior: Posterior, draws: int, seed: int) -> xr.Dataset:
    data, coords = posterior.data, {}
    variables: Variables = {}
    if data.n_features:
        dims = _axes(data.features.dim() - 1)
        if data.feature_names:
            dims, coords = ("feature",), {"feature": list(data.feature_names)}
        variables["features"] = (("row", *dims), data.features.numpy())
    for name, grouping in data.groupings.items():
        labels = label_values(grouping.levels)[grouping.codes.numpy()]
        variables[variable_name(name)] = (("row",), labels)
    roles = {"trials": data.trials, "offset": data.offset, "weights": data.weights}
    for name, values in roles.items():
        if values is not None:
            variables[name] = (("row",), values.numpy())
    return _dataset(posterior, variables, **coords)


def _sample_stats(posterior: Posterior, draws: int, seed: int) -> xr.Dataset:
    traces = {"loss": posterior.history.loss, "elbo": posterior.history.elbo}
    variables = {name: ("step", np.asarray(values, float)) for name, values in traces.items()}
    schedule = json.dumps(posterior.schedule.to_json())
    settings = {"seed": posterior.seed, "stopped": posterior.stopped, "schedule": schedule}
    settings["draws_by"] = "guide" if posterior.refined is None else posterior.refined.method
    settings["particles"] = posterior.history.particles
    steps = np.arange(1, len(posterior.history.loss) + 1)
    window = np.searchsorted(posterior.history.step, steps)
    for name, values in (
        ("compiled", posterior.history.compiled),
        ("seconds", posterior.history.seconds),
    ):
        if values:
            variables[name] = ("step", np.append(values, values[-1])[window])
    return xr.Dataset(variables, {"step": steps}, ATTRIBUTES | settings)


Maker = Callable[["Posterior", int, int], xr.Dataset]
GROUPS: Mapping[str, Maker] = {
    "posterior": lambda posterior, n, seed: latent_dataset(
        posterior.model, posterior.draws(n, seed=seed), n
    ),
    "posterior_predictive": _posterior_predictive,
    "log_likelihood": log_likelihood,
    "prior": lambda posterior, n, seed: latent_dataset(
        posterior.model, _prior_draws(posterior, n, seed), n
    ),
    "prior_predictive": _prior_predictive,
    "observed_data": _observed_data,
    "constant_data": _constant_data,
    "sample_stats": _sample_stats,
}


# --- parts of groups --------------------------------------------------------------------------


def _prior_draws(posterior: Posterior, draws: int, seed: int) -> Draws:
    """Draws of all latent sites from the prior, in the shapes of the guide's draws."""
    model = posterior.model
    # A single row is enough: latent sites cover all clusters and do not depend on the rows.
    rows = replace(next(model.encode(posterior.data).chunks(1)), y=None)
    with model.seeded(seed + 2):
        sites = Predictive(model, num_samples=draws, parallel=True)(rows)
    sites.pop(model.data_facts().outcome_name)
    return sites


def latent_dataset(model: MixedEffects, latents: Draws, draws: int) -> xr.Dataset:
    """Draws of every latent site with labelled dimensions, on the original scale.

    Parameters
    ----------
    model : MixedEffects
        The bound program.
    latents : dict of str to Tensor
        Draws; random effects may be missing.
    draws : int
        Number of draws; a site with a single draw is repeated.

    Examples
    --------
    ``latent_dataset(fit.model, fit.draws(100), 100)["site_sd"]``
    """
    variables: Variables = {}
    coords: dict[str, Any] = {}

    def add(name: str, dims: tuple[str, ...], values: Tensor) -> None:
        # A quantity that is known in advance has a single draw.
        shape = (1, draws, *values.shape[1:])
        array = np.broadcast_to(values.cpu().numpy(), shape)
        variables[name] = (("chain", "draw", *dims), np.ascontiguousarray(array))

    for factor in model.factors:
        base = factor.name.replace("/", "_")
        name, term = variable_name(base), f"{base}_term"
        coords |= {term: list(factor.terms)}
        if factor.effect_site in latents:
            coords |= {name: label_values(model.data_facts().levels[factor.name])}
            effects = latents[factor.effect_site].to(torch.float64)
            matrix = factor.to_original.to(effects)
            add(f"{base}_effect", (name, term), effects @ matrix.mT)
        covariance = original_covariance(factor, latents)
        variance = covariance.diagonal(dim1=-2, dim2=-1)
        add(f"{base}_sd", (term,), variance.sqrt())
        if not factor.diagonal:
            product = variance[..., :, None] * variance[..., None, :]
            coords[f"{term}_bis"] = list(factor.terms)
            add(f"{base}_cor", (term, f"{term}_bis"), covariance / product.sqrt())
        for group, quantity, values in factor.joint_covariance.quantities(latents):
            add(group.site(quantity).replace("/", "_"), (), values.to(torch.float64))
    for parameter, values in original_parameters(model, latents).items():
        add(parameter, (), values)
    for other in model.others:
        add(other.sd_site, (), original_sd(model, other, latents))
    if model.bayesian_head:
        coords["fixed_term"] = list(model.fixed_terms())
        add("fixed_effect", ("fixed_term",), original_fixed_effects(model, latents))
    coords = {"chain": [0], "draw": np.arange(draws), **coords} if variables else {}
    return xr.Dataset(variables, coords, ATTRIBUTES)


def _by_row(
    posterior: Posterior,
    draws: int,
    blocks: Mapping[str, Sequence[np.ndarray]],
    whole: bool,
    inner: int = 0,
) -> xr.Dataset:
    """Draws of quantities of each row, from blocks "... rows" of consecutive rows.

    Blocks of other outcomes have `inner` further dimensions.
    """
    variables: Variables = {}
    for name, parts in blocks.items():
        axes, integer = (0, whole) if name == posterior.data.outcome_name else (inner, False)
        full = [
            np.broadcast_to(part, (draws, *part.shape[part.ndim - 1 - axes :])) for part in parts
        ]
        values = _counts(np.concatenate(full, 1), integer)
        variables[variable_name(name)] = (("chain", "draw", "row", *_axes(axes)), values[None])
    return _dataset(posterior, variables, chain=[0], draw=np.arange(draws))


def _axes(count: int) -> tuple[str, ...]:
    """Names of the dimensions of a row's values."""
    return tuple(f"axis_{i}" for i in range(1, count + 1))


def _dataset(posterior: Posterior, variables: Variables, **coords: Any) -> xr.Dataset:
    """Variables of the training rows, with their labels."""
    coords["row"] = label_values(posterior.data.row_labels)
    dataset = xr.Dataset(variables, coords, ATTRIBUTES)
    outcome = variable_name(posterior.data.outcome_name)
    if posterior.data.classes is not None and outcome in dataset:
        dataset[outcome].attrs["classes"] = [str(label) for label in posterior.data.classes]
    return dataset


def _counts(values: np.ndarray, whole: bool) -> np.ndarray:
    """Whole numbers as integers, by which ArviZ chooses its plots; floats if beyond 2**53."""
    return values.astype(np.int64) if whole and bool((np.abs(values) < 2**53).all()) else values


def _blocks(posterior: Posterior, draws: int, *, others: bool = False) -> Iterator[Rows]:
    """The training rows in blocks whose arrays take about 100 MB."""
    size = BLOCK_VALUES // (draws * values_per_row(posterior.model, others=others))
    return posterior.model.encode(posterior.data).chunks(max(1, size))
