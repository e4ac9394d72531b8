"""Latent sites in original units, from draws in standardised units."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from armed_pyro.families.reconstruction import Reconstruction
from armed_pyro.program.model import MixedEffects
from armed_pyro.random_effects.grouping_factor import Factor

Draws = dict[str, Tensor]


def original_covariance(factor: Factor, latents: Draws) -> Float[Tensor, "draws terms terms"]:
    """M D M': the random effects' covariance matrix in original units.

    M, ``factor.to_original``, takes effects from standardised to original units.
    """
    covariance = _flat(factor.covariance(latents), 2).to(torch.float64)
    matrix = factor.to_original.to(covariance)
    return matrix @ covariance @ matrix.mT


def original_variances(factor: Factor, latents: Draws) -> Float[Tensor, "draws terms"]:
    """The diagonal of `original_covariance`, without the matrix if effects are independent."""
    if not factor.diagonal:
        return original_covariance(factor, latents).diagonal(dim1=-2, dim2=-1)
    unit = factor.to_original.diagonal()
    return (_flat(factor.sd(latents), 1).to(torch.float64) * unit.to(torch.float64)).square()


def original_parameters(
    model: MixedEffects, latents: Mapping[str, Tensor]
) -> dict[str, Float[Tensor, " draws"]]:
    """The family's parameters on the outcome's scale, by name; empty for families without any."""
    values = model.family_parameters(latents)
    return {name: _flat(value, 0).to(torch.float64) for name, value in values.items()}


def original_sd(
    model: MixedEffects, other: Reconstruction, latents: Draws
) -> Float[Tensor, " draws"]:
    """Residual sd of a reconstruction, in units of the features as they enter the network."""
    return _flat(latents[other.sd_site], 0).to(torch.float64) * model.data_facts().feature_spread


def original_fixed_effects(model: MixedEffects, latents: Draws) -> Float[Tensor, "draws terms"]:
    """Latent fixed effects in outcome units per unit of the feature.

    The intercept is the predictor at x = 0, and at clusters' means of 0, centre included.
    Coefficients of a deep network's last layer are per unit of its activations.
    """
    facts, between = model.data_facts(), model.data_facts().between
    values = _flat(latents["fixed_effect"], 1).to(torch.float64) * facts.spread
    values = values.unflatten(-1, (-1, len(facts.columns))).clone()
    means = 0 if between is None else len(between.names)
    head = values.shape[1] - means
    # Coefficients that take up a constant: the intercept's, or those of columns that sum to 1.
    constant = list[int]()
    if model.bayesian_head:
        constant = [place for place, k in enumerate(facts.kept) if k in facts.intercept_columns]
        constant = [0] if model.has_intercept else constant
    if facts.linear_names:
        # Beside a network the constant is the network's, and the features stay centred.
        scale = values.new_tensor(facts.feature_scale)[:, None]
        values[:, head - len(facts.linear_names) : head] /= scale
    if between is not None and means:
        values[:, head:] /= values.new_tensor(between.scale)[:, None]
        center = values.new_tensor(between.center)[:, None]
        values[:, constant] -= (values[:, head:] * center).sum(1, keepdim=True)
    if model.linear:
        kept, first = facts.kept, int(model.has_intercept)
        scale = values.new_tensor(facts.feature_scale)[kept, None]
        mean = values.new_tensor(facts.feature_mean)[kept, None]
        values[:, first:head] /= scale
        values[:, constant] -= (values[:, first:head] * mean).sum(1, keepdim=True)
    values[:, constant] += values.new_tensor(facts.center)
    return values.flatten(1)


def _flat(values: Tensor, event_dim: int) -> Tensor:
    """All dimensions of draws flattened into the first, followed by the site's dimensions."""
    return values.reshape(-1, *values.shape[values.dim() - event_dim :])
