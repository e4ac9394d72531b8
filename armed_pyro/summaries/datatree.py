"""Fits as labelled data in ArviZ's schema, on the original scale."""

from __future__ import annotations

import json
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from types import ModuleType
from typing import Any

import numpy as np
import torch
import xarray as xr
from pyro.infer import Predictive
from torch import Tensor

from armed_pyro._messages import unknown
from armed_pyro.data.training_checks import PER_ROW
from armed_pyro.data.xarray_names import label_values, variable_name
from armed_pyro.inference.posterior import Posterior
from armed_pyro.prediction.chunks import predict_chunks
from armed_pyro.prediction.unseen import Marginal
from armed_pyro.program.blocks import BLOCK_VALUES, values_per_row
from armed_pyro.program.model import MixedEffects, log_likelihoods
from armed_pyro.program.names import cluster_columns, tree_names
from armed_pyro.program.units import (
    original_covariance,
    original_fixed_effects,
    original_parameters,
    original_sd,
    original_variances,
)
from armed_pyro.rows.batch import Rows

__all__ = [
    "GROUPS",
    "arviz_api",
    "cell_name",
    "cells",
    "latent_dataset",
    "log_likelihood",
    "to_datatree",
]

Draws = dict[str, Tensor]
Variables = dict[str, tuple[tuple[str, ...], Any]]
ATTRIBUTES = {"inference_library": "armed_pyro", "creation_library": "armed_pyro"}
# Bytes beyond which draws of other outcomes are left out; each draw is as large as the features.
LARGEST_OTHER = 200e6


def arviz_api() -> ModuleType:
    """ArviZ with the API of version 1: ``arviz`` or, in earlier versions, ``arviz.preview``."""
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
    constants: bool = True,
) -> xr.DataTree:
    r"""Posterior, predictive draws, likelihood, prior and data of a fit, on the original scale.

    Let M be the matrix that transforms random effects to the units of the data. ``<factor>_effect``
    is :math:`M u`; ``<factor>_sd`` and ``<factor>_cor`` are the standard deviations and
    correlations of :math:`M D M^\top`, as in `variance_components`.

    Parameters
    ----------
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
        - observed_data, constant_data: outcome; features, clusters, trials, offset and weights, and
          the number of the network that was trained without the row (fold), if rows were held out.
        - sample_stats: objective and evidence lower bound per row for each step of the training,
          whether the step ran compiled, and its seconds (median of its window).
    seed : int, optional
        Seed of the draws, by default that of the fit: the posterior draws are those of
        ``fit.draws(draws, seed=seed)``.
    constants : bool
        Whether to keep what is the same in every draw, such as the ones on the diagonal of
        ``<factor>_cor``, for which ``az.summary`` warns. Without constants, ``<factor>_cor`` has a
        single dimension ``<factor>_pair`` with labels such as ``Intercept,Days``.

    Returns
    -------
    xarray.DataTree
        Labels are numbers, text or timestamps, which NetCDF can hold; other labels become text.
        Classes are codes into the attribute ``classes``; of two, the attribute ``event`` is the
        modelled one. In names, ``/`` becomes ``_``, and a name that is taken is followed by
        ``_``: ``draw``, which the schema reserves, is ``draw_``. The schema's names and those of
        the program come first, then the grouping factors, then what is made of them.

    Raises
    ------
    ValueError
        If there is no such group, or fewer than two draws are asked for.

    Examples
    --------
    ``fit.to_datatree(groups=["posterior", "log_likelihood"])``, for ``arviz.loo``.
    """
    wanted = GROUPS if groups is None else [groups] if isinstance(groups, str) else groups
    for name in wanted:
        if name not in GROUPS:
            raise unknown("group", name, GROUPS)
    if draws < 2:
        raise ValueError(f"`draws` must be at least 2, not {draws}")
    seed = posterior.seed if seed is None else seed
    made = {name: make(posterior, draws, seed) for name, make in GROUPS.items() if name in wanted}
    if not constants:
        latent = ("posterior", "prior")
        made = {k: _random_only(group) if k in latent else group for k, group in made.items()}
    return xr.DataTree.from_dict({name: group for name, group in made.items() if group.data_vars})


def _random_only(group: xr.Dataset) -> xr.Dataset:
    """The latent quantities that vary over the draws; correlations by pairs of terms.

    A variable that varies in part has missing values in place of its constants.
    """
    variables = {}
    for name, array in group.data_vars.items():
        if array.dims[-1] == f"{array.dims[-2]}_bis":
            array = _by_pair(array)
        varies = array.max(("chain", "draw")) > array.min(("chain", "draw"))
        if varies.any():
            variables[name] = array if varies.all() else array.where(varies)
    return xr.Dataset(variables, attrs=group.attrs)


def _by_pair(correlations: xr.DataArray) -> xr.DataArray:
    """The correlations (chain, draw, pair) that vary, from matrices (chain, draw, term, term)."""
    term = str(correlations.dims[2])
    labels, values = correlations[term].to_numpy(), correlations.to_numpy()
    pairs = [(i, j) for i, j in combinations(range(len(labels)), 2) if np.ptp(values[..., i, j])]
    first, second = np.array(pairs, int).reshape(-1, 2).T
    pair = f"{term.removesuffix('_term')}_pair"
    coords: dict[str, Any] = {k: correlations[k] for k in ("chain", "draw")}
    coords[pair] = [f"{labels[i]},{labels[j]}" for i, j in pairs]
    return xr.DataArray(values[..., first, second], coords, ("chain", "draw", pair))


def _posterior_predictive(posterior: Posterior, draws: int, seed: int) -> xr.Dataset:
    if posterior.model.others:
        with posterior.model.seeded(seed + 1):
            latents = posterior.draws(draws, seed=seed)
            return _by_row(posterior, draws, _replicated(posterior, draws, latents))
    source = Marginal(posterior.draws(draws, seed=seed), seed)
    parts = predict_chunks(posterior, posterior.data, source, draws=draws, seed=seed)
    name = posterior.data.outcome_name
    return _by_row(posterior, draws, ({name: torch.from_numpy(p.outcome)} for p in parts))


def _prior_predictive(posterior: Posterior, draws: int, seed: int) -> xr.Dataset:
    latents = _prior_draws(posterior, draws, seed)
    with posterior.model.seeded(seed + 3):
        return _by_row(posterior, draws, _replicated(posterior, draws, latents))


def _replicated(posterior: Posterior, draws: int, latents: Draws) -> Iterator[Draws]:
    """Draws of the outcomes given these latent sites; other outcomes are left out if too large.

    All outcomes of a row are drawn from the same latent sites.
    """
    model = posterior.model
    values = draws * posterior.data.n_rows * math.prod(model.data_facts().feature_shape)
    others = bool(model.others) and 4 * values <= LARGEST_OTHER
    if model.others and not others:
        warnings.warn(
            f"draws of {', '.join(other.name for other in model.others)} would take "
            f"{4e-9 * values:.1f} GB and are left out: ask for fewer draws, or use "
            "Fit.predict(rows).others, which holds their means and sds",
            UserWarning,
            stacklevel=6,
        )
    for rows in _blocks(posterior, draws, others=others):
        predictor = model.predictor(rows, latents, return_fixed=False, others=others)
        eta = predictor.eta.expand(draws, *predictor.eta.shape[-2:])
        drawn = {posterior.data.outcome_name: model.density(eta, latents, rows).sample()}
        if others:
            densities = model.other_densities(predictor.others, latents, rows)
            drawn |= {other.name: density.sample() for other, density in densities.items()}
        yield drawn


def log_likelihood(
    posterior: Posterior, draws: int, seed: int, *, others: bool = True
) -> xr.Dataset:
    """Log-likelihood of every training row (chain, draw, row), by outcome; see `to_datatree`."""
    latents = posterior.draws(draws, seed=seed)
    blocks = (
        log_likelihoods(posterior.model, rows, latents, others=others)
        for rows in _blocks(posterior, draws, others=others)
    )
    with torch.no_grad():
        return _by_row(posterior, draws, blocks, drawn=False)


def _observed_data(posterior: Posterior, draws: int, seed: int) -> xr.Dataset:
    data, model, variables = posterior.data, posterior.model, Variables()
    if data.outcome is not None:
        outcome = _counts(data.outcome.numpy(), model.family.integer)
        variables[variable_name(data.outcome_name)] = (("row",), outcome)
    features = model.data_facts().scaling.standardise(data.features).numpy()
    for other in model.others:
        variables[variable_name(other.name)] = (("row", *_axes(features.ndim - 1)), features)
    return _dataset(posterior, variables)


def _constant_data(posterior: Posterior, draws: int, seed: int) -> xr.Dataset:
    data, variables = posterior.data, Variables()
    coords: dict[str, list[str]] = {}
    if data.n_features:
        dims = _axes(data.features.dim() - 1)
        if data.feature_names:
            dims, coords["feature"] = ("feature",), list(data.feature_names)
        variables["features"] = (("row", *dims), data.features.numpy())
    names = cluster_columns(posterior.model, data.groupings)
    for name, grouping in data.groupings.items():
        labels = label_values(grouping.levels)[grouping.codes.numpy()]
        variables[names[name]] = (("row",), labels)
    if data.slopes is not None:
        variables["slopes"] = (("row", "slope_column"), data.slopes.numpy())
        coords["slope_column"] = list(data.slope_names)
    for name in (*PER_ROW, "fold"):
        if (values := getattr(data, name)) is not None:
            variables[name] = (("row",), values.numpy())
    return _dataset(posterior, variables, **coords)


def _sample_stats(posterior: Posterior, draws: int, seed: int) -> xr.Dataset:
    history, steps = posterior.history, np.arange(1, len(posterior.history.loss) + 1)
    window = np.searchsorted(history.step, steps)
    traces = {"loss": history.loss, "elbo": history.elbo}
    variables = {name: ("step", np.asarray(values, float)) for name, values in traces.items()}
    by_window: dict[str, Any] = {"compiled": history.compiled, "seconds": history.seconds}
    for name, values in by_window.items():
        if values:
            variables[name] = ("step", np.append(values, values[-1])[window])
    settings = {
        "seed": posterior.seed,
        "stopped": posterior.stopped,
        "schedule": json.dumps(posterior.schedule.to_json()),
        "draws_by": "guide" if posterior.refined is None else posterior.refined.method,
        "particles": history.particles,
    }
    return xr.Dataset(variables, {"step": steps}, ATTRIBUTES | settings)


Maker = Callable[[Posterior, int, int], xr.Dataset]
GROUPS: Mapping[str, Maker] = {
    "posterior": lambda fitted, n, seed: latent_dataset(
        fitted.model, fitted.draws(n, seed=seed), n
    ),
    "posterior_predictive": _posterior_predictive,
    "log_likelihood": log_likelihood,
    "prior": lambda fitted, n, seed: latent_dataset(fitted.model, _prior_draws(fitted, n, seed), n),
    "prior_predictive": _prior_predictive,
    "observed_data": _observed_data,
    "constant_data": _constant_data,
    "sample_stats": _sample_stats,
}


def _prior_draws(posterior: Posterior, draws: int, seed: int) -> Draws:
    """Draws of all latent sites from the prior, in the shapes of the guide's draws."""
    model = posterior.model
    # A single row is enough: latent sites cover all clusters and do not depend on the rows.
    rows = replace(next(model.encode(posterior.data).chunks(1)), y=None)
    with model.seeded(seed + 2):
        sites = Predictive(model, num_samples=draws, parallel=True)(rows)
    sites.pop(model.data_facts().outcome_name)
    return sites


def cells(array: xr.DataArray) -> Iterator[tuple[tuple[Any, ...], np.ndarray]]:
    """The labels of every cell, and its value: one number, or an array of chains and draws."""
    lead = [dim for dim in ("chain", "draw") if dim in array.dims]
    dims = [dim for dim in array.dims if dim not in lead]
    values = array.transpose(*lead, *dims).to_numpy()
    axes = [array[dim].to_numpy() for dim in dims]
    for place in np.ndindex(values.shape[len(lead) :]):
        labels = tuple(axis[i] for axis, i in zip(axes, place, strict=True))
        yield labels, np.asarray(values[(..., *place)])


def cell_name(variable: object, labels: tuple[Any, ...]) -> str:
    """Name of a cell, such as ``site_sd[Intercept]``."""
    return f"{variable}[{','.join(map(str, labels))}]" if labels else str(variable)


def latent_dataset(model: MixedEffects, latents: Draws, draws: int) -> xr.Dataset:
    """Draws of every latent site with labelled dimensions, on the original scale.

    Random effects may be missing from `latents`. A quantity that is known in advance has a single
    draw, which is repeated.
    """
    variables, coords = Variables(), dict[str, Any]()

    def add(name: str, dims: tuple[str, ...], values: Tensor) -> None:
        shape = (1, draws, *values.shape[1:])
        array = np.broadcast_to(values.cpu().numpy(), shape)
        variables[name] = (("chain", "draw", *dims), np.ascontiguousarray(array))

    named = tree_names(model)
    for factor in model.factors:
        names = named[factor.name]
        name, term, term_bis = names.cluster, names.term, names.term_bis
        coords |= {term: list(factor.terms)}
        if factor.effect_site in latents:
            coords |= {name: label_values(model.data_facts().levels[factor.name])}
            effects = latents[factor.effect_site].to(torch.float64)
            matrix = factor.to_original.to(effects)
            add(names.effect, (name, term), effects @ matrix.mT)
        variance = original_variances(factor, latents)
        if factor.smooth:  # one sd per curve, and not per coefficient
            curve = f"{term}_curve"
            coords[curve] = list(factor.sd_names)
            add(names.sd, (curve,), variance[..., factor.first_of_sd].sqrt())
        else:
            add(names.sd, (term,), variance.sqrt())
        if factor.groups:
            covariance = original_covariance(factor, latents)
            product = variance[..., :, None] * variance[..., None, :]
            coords[term_bis] = list(factor.terms)
            add(names.cor, (term, term_bis), covariance / product.sqrt())
        for group, quantity, values in factor.quantities(latents):
            add(group.site(quantity).replace("/", "_"), (), values.to(torch.float64))
    parameters = original_parameters(model, latents)
    for parameter, values in parameters.items():
        add(parameter, (), values)
    for quantity, labelled in model.family.labelled(parameters).items():
        coords[labelled.dim] = list(labelled.labels)
        add(quantity, (labelled.dim,), labelled.values)
    for other in model.others:
        add(other.sd_site, (), original_sd(model, other, latents))
    if model.has_fixed_effects:
        coords["fixed_term"] = list(model.fixed_terms())
        add("fixed_effect", ("fixed_term",), original_fixed_effects(model, latents))
    coords = {"chain": [0], "draw": np.arange(draws), **coords} if variables else {}
    return xr.Dataset(variables, coords, ATTRIBUTES)


def _by_row(
    posterior: Posterior, draws: int, blocks: Iterable[Mapping[str, Tensor]], *, drawn: bool = True
) -> xr.Dataset:
    """Draws of a quantity of each row, from blocks "... rows" of consecutive rows, by outcome.

    If the quantity is a draw of the outcome, other outcomes have the dimensions of the features,
    and outcomes of some families are integers.
    """
    variables, by_name = Variables(), defaultdict[str, list[np.ndarray]](list)
    for block in blocks:
        for name, values in block.items():
            main = name == posterior.data.outcome_name
            inner = posterior.data.features.dim() if drawn and not main else 1
            shape = (draws, *values.shape[-inner:])
            by_name[name].append(np.broadcast_to(values.cpu().numpy(), shape))
    for name, parts in by_name.items():
        integer = drawn and name == posterior.data.outcome_name and posterior.model.family.integer
        array = _counts(np.concatenate(parts, 1), integer)
        dims = ("chain", "draw", "row", *_axes(array.ndim - 2))
        variables[variable_name(name)] = (dims, array[None])
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
        classes = [str(label) for label in posterior.data.classes]
        dataset[outcome].attrs["classes"] = classes
        if posterior.model.event is not None:
            dataset[outcome].attrs["event"] = str(posterior.model.event)
    return dataset


def _counts(values: np.ndarray, whole: bool) -> np.ndarray:
    """Whole numbers as integers, by which ArviZ chooses its plots; floats if beyond 2**53."""
    return values.astype(np.int64) if whole and bool((np.abs(values) < 2**53).all()) else values


def _blocks(posterior: Posterior, draws: int, *, others: bool = False) -> Iterator[Rows]:
    """The training rows in blocks whose arrays take about 100 MB."""
    size = BLOCK_VALUES // (draws * values_per_row(posterior.model, others=others))
    return posterior.model.encode(posterior.data).chunks(max(1, size))
