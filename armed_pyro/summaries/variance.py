"""Tables of variance components, fixed effects and random effects on the original scale."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from armed_pyro._messages import INTEGER, check_probability, check_type
from armed_pyro.guides.base import n_draws
from armed_pyro.inference.posterior import Posterior
from armed_pyro.program.linearize import mean_fixed_effects, sensitivities
from armed_pyro.program.model import MixedEffects
from armed_pyro.program.units import (
    Draws,
    _flat,
    original_covariance,
    original_fixed_effects,
    original_parameters,
    original_sd,
    original_variances,
)
from armed_pyro.random_effects.grouping_factor import Factor
from armed_pyro.rows.batch import Rows
from armed_pyro.summaries.predicted_parameters import mean_residual_variance

__all__ = ["coef", "fixed_effects", "random_effects", "variance_components"]

Row = tuple[str, str, str, Tensor]  # factor, term, statistic, draws
Weights = Float[Tensor, "draws 1 fixed_terms"]
# Most rows over which the variances of the fixed and random parts are averaged, and rows times
# draws in one block.
MOST_ROWS, MOST_VALUES = 20_000, 2**20


def variance_components(
    posterior: Posterior, *, draws: int = 4000, prob: float = 0.9, seed: int | None = None
) -> pd.DataFrame:
    r"""Posterior of sds, correlations, variances, shares, ICCs and R2, on the original scale.

    Let :math:`D_m` be the covariance matrix of factor m, with the intercept at x = 0 as in lme4.
    Its variance component, averaged over the rows (Johnson 2014), is
    :math:`\sigma^2_m = mean_i(\phi_i^\top D_m \phi_i)`. For effects on filters, phi is the gradient
    of the predictor in them, a first-order approximation. Then

    .. math::
        ICC_m = \sigma^2_m / (\sum_l \sigma^2_l + \sigma^2_e), \quad
        share_m = \sigma^2_m / (\sigma^2_f + \sum_l \sigma^2_l + \sigma^2_e), \\
        R^2_{marginal} = share_f, \quad R^2_{conditional} = share_f + \sum_m share_m

    where :math:`\sigma^2_f` is the variance of the fixed effects over the rows, to which R2 and ICC
    count the curves of smooth terms, and
    :math:`\sigma^2_e` the residual variance: of y for gaussian outcomes, and on the latent scale
    for all others (:math:`\pi^2 / 3` for logits; Nakagawa, Johnson, Schielzeth 2017). It is the
    mean over the rows, if they have precisions or standard errors, or a parameter has a predictor.

    Parameters
    ----------
    draws, seed : int
        Posterior draws, and their seed; by default that of the fit.
    prob : float
        Probability of the equal-tailed intervals.

    Returns
    -------
    pandas.DataFrame
        Columns factor, term, statistic (sd, variance, cor, icc, share, r2_marginal,
        r2_conditional), mean, median, sd, lower, upper. The residual and the fixed effects appear
        as factors ``Residual`` and ``Fixed``; other parameters of the family have rows of
        ``Residual`` with their names as statistic, such as the ``shape`` of a negative binomial. If
        the predictor has several columns, shares, ICCs and R2 have one row per column, which `term`
        names.

    Examples
    --------
    ``variance_components(fit.posterior).query("statistic == 'icc'")``
    """
    _check(draws, prob)
    model, latents = posterior.model, posterior.hyperparameters(draws, seed=seed)
    rows: list[Row] = []
    for factor in model.factors:
        rows += _factor_rows(factor, latents)
    parameters = original_parameters(model, latents)
    if model.data_facts().weights_kind != "se":
        residual = model.family.residual_rows(parameters)
        rows += [("Residual", "", name, values) for name, values in residual.items()]
    rows += [("Residual", o.name, "sd", original_sd(model, o, latents)) for o in model.others]
    rows += _shares(posterior, latents, parameters)
    return _table(rows, ["factor", "term", "statistic"], prob)


def fixed_effects(
    posterior: Posterior,
    *,
    draws: int = 4000,
    prob: float = 0.9,
    seed: int | None = None,
    exponentiate: bool = False,
) -> pd.DataFrame:
    """Posterior of the latent fixed effects on the original scale.

    Parameters
    ----------
    draws, prob, seed
        As in `variance_components`.
    exponentiate : bool
        Whether to give exp(coefficient) draw by draw: odds ratios of logits, incidence-rate ratios
        of counts, which ``attrs["quantity"]`` names; of the intercept, odds or a rate.

    Returns
    -------
    pandas.DataFrame
        Columns term, mean, median, sd, lower, upper; a network without latent weights and
            clusters' means has no rows. For an outcome with two labels, ``attrs["event"]`` is the
            label whose probability is modelled.

    Raises
    ------
    ValueError
        If exponentials are asked for where the link is the identity.

    Examples
    --------
    ``fit.fixed_effects(exponentiate=True)``
    """
    _check(draws, prob)
    ratio = posterior.model.family.coefficient_ratio
    if exponentiate and not ratio:
        raise ValueError(
            f"the coefficients of family {posterior.model.family.name!r} are differences of the "
            "mean, whose exponentials mean nothing: leave exponentiate= out"
        )
    model, rows = posterior.model, list[tuple[str, Tensor]]()
    if model.has_fixed_effects:
        values = original_fixed_effects(model, posterior.hyperparameters(draws, seed=seed))
        values = values.exp() if exponentiate else values
        rows = list(zip(model.fixed_terms(), values.unbind(1), strict=True))
    table = _table(rows, ["term"], prob)
    table.attrs["quantity"] = ratio if exponentiate else "coefficient"
    if model.event is not None:
        table.attrs["event"] = model.event
    return table


def coef(posterior: Posterior, *, draws: int = 4000, seed: int | None = None) -> pd.Series:
    """Posterior means of the latent fixed effects on the original scale, by term.

    Examples
    --------
    ``fit.coef()["Days"]``
    """
    table = fixed_effects(posterior, draws=draws, seed=seed)
    return table.set_index("term")["mean"].rename("coefficient")


def random_effects(
    posterior: Posterior, *, draws: int = 1000, prob: float = 0.9, seed: int | None = None
) -> pd.DataFrame:
    """Posterior mean, sd and interval of every cluster's random effects, on the original scale.

    The columns are factor, term, cluster, mean, sd, lower, upper. The sd is that of the effect
    given the data. The parameters are those of `variance_components`.

    Examples
    --------
    ``fit.random_effects().query("term == 'Days'")``
    """
    _check(draws, prob)
    latents = posterior.draws(draws, seed=seed)
    levels = posterior.model.data_facts().levels
    tail = (1 - prob) / 2
    columns = ["factor", "term", "cluster", "mean", "sd", "lower", "upper"]
    tables = []
    for factor in posterior.model.clustered_factors:
        effects = latents[factor.effect_site].to(factor.to_original)
        original = (effects @ factor.to_original.mT).cpu().numpy()
        spread = original.std(0, ddof=1) if len(original) > 1 else np.zeros_like(original[0])
        statistics = original.mean(0), spread, *np.quantile(original, [tail, 1 - tail], axis=0)
        # Labels become objects: concatenating integers of one factor with decimals of another would
        # turn the integers into decimals.
        clusters = levels[factor.name].astype(object)
        for place, term in enumerate(factor.terms):
            values = factor.name, term, clusters, *(values[:, place] for values in statistics)
            tables.append(pd.DataFrame(dict(zip(columns, values, strict=True))))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)


def _check(draws: int, prob: float) -> None:
    check_probability(prob)
    check_type(draws, INTEGER, "`draws`")
    if draws < 1:
        raise ValueError(f"`draws` must be at least 1, not {draws}")


def _factor_rows(factor: Factor, latents: Draws) -> Iterator[Row]:
    """Yield sds, variances and correlations."""
    variance = original_variances(factor, latents)
    terms, of_sd = factor.terms, variance
    if factor.smooth:  # one sd of the curve, and not one of each coefficient
        terms, of_sd = factor.sd_names, variance[:, factor.first_of_sd]
    for statistic, values in {"sd": of_sd.sqrt(), "variance": of_sd}.items():
        for term, draws in zip(terms, values.unbind(1), strict=True):
            yield factor.name, term, statistic, draws
    pairs = list(factor.pairs())
    covariance = original_covariance(factor, latents) if pairs else variance[:, None]
    for i, j in pairs:
        name = f"{factor.terms[i]},{factor.terms[j]}"
        product = (variance[:, i] * variance[:, j]).sqrt()
        yield factor.name, name, "cor", covariance[:, i, j] / product
    for group, quantity, values in factor.quantities(latents):
        yield factor.name, ",".join(group.terms), quantity, values.to(torch.float64)


def _shares(
    posterior: Posterior, latents: Draws, parameters: Mapping[str, Tensor]
) -> Iterator[Row]:
    """Yield ICCs, shares of the variance and R2 for every column of the predictor."""
    model, facts = posterior.model, posterior.model.data_facts()
    chosen = np.random.default_rng(0).permutation(posterior.data.n_rows)[:MOST_ROWS]
    rows = model.encode(posterior.data.take(np.sort(chosen))).all()
    n = n_draws(latents) or 1
    with torch.no_grad():
        _, activations = model.run_network(rows)
        point = mean_fixed_effects(model, latents)
        parts: dict[str, Tensor] = {}
        for factor in model.factors:
            phi = sensitivities(model, rows, factor, activations, point).to(torch.float64)
            variance = _mean_variance(factor, phi, latents)
            parts[factor.name] = facts.spreads(variance) ** 2 * variance
        none = rows.x.new_zeros(n, len(facts.columns), dtype=torch.float64)
        totals = sum(parts.values(), none)
        curves = sum((parts[f.name] for f in model.factors if f.smooth), none)
        weights = latents.get("fixed_effect")
        variances = _fixed_variance(model, rows, activations, weights).expand(n, -1)
        means = _means(model, rows, weights, totals) if model.family.needs_mean else none
        means = means[:, : len(facts.outcome_columns)]
        if model.family.predicted:
            residuals = mean_residual_variance(model, rows, weights, totals, parameters, means)
        else:
            columns = [model.family.residual_variance(parameters, mean) for mean in means.unbind(1)]
            residuals = torch.stack([column.expand(n) for column in columns], 1)
    for column, label in enumerate(facts.outcome_columns):
        random = {name: part[:, column] for name, part in parts.items()}
        total_random, variance_fixed = totals[:, column], variances[:, column]
        curved = curves[:, column]
        residual = residuals[:, column]
        if facts.weights_kind in ("precision", "se") and rows.weights is not None:
            residual = residual * (1 / rows.weights).mean()
        total = variance_fixed + total_random + residual
        for factor in model.clustered_factors:
            left = total_random - curved + residual
            yield factor.name, label, "icc", random[factor.name] / left
        for name, part in {"Fixed": variance_fixed, **random, "Residual": residual}.items():
            yield name, label, "share", part / total
        yield "", label, "r2_marginal", (variance_fixed + curved) / total
        yield "", label, "r2_conditional", (variance_fixed + total_random) / total


def _mean_variance(
    factor: Factor, phi: Float[Tensor, "rows terms columns"], latents: Draws
) -> Float[Tensor, "draws columns"]:
    """Mean over the rows of phi' D phi; without the matrix D if effects are independent."""
    if factor.diagonal:
        square = _flat(factor.sd(latents), 1).to(torch.float64).square()
        return square @ phi.square().mean(0)
    moment = torch.einsum("nip,njp->pij", phi, phi) / len(phi)
    covariance = _flat(factor.covariance(latents), 2).to(torch.float64)
    return torch.einsum("pij,dij->dp", moment, covariance)


def _fixed_variance(
    model: MixedEffects, rows: Rows, activations: Mapping[str, Tensor], weights: Weights | None
) -> Float[Tensor, "draws_or_1 columns"]:
    """Variance of the fixed part over the rows, of the columns that the network gives."""
    if weights is None:
        # An offset, such as a log exposure, is no effect, and must not count as explained variance.
        fixed = model.predictor(replace(rows, offset=None), {}).eta.to(torch.float64)
        return fixed.var(-2)[None]
    facts = model.data_facts()
    inputs = model.fixed_inputs(rows, activations).to(torch.float64)
    columns, common = len(model.network_columns), len(model.common_terms())
    latent = _flat(weights, 1).to(torch.float64)[:, :common]
    by_column = latent.unflatten(-1, (-1, columns))
    if not model.bayesian_head:
        # The network's output is a further regressor, with a coefficient of 1 in its column.
        output = activations[""].reshape(len(rows), -1)
        inputs = torch.cat([inputs, model.family.contrasts(output).to(inputs)], -1)
        ones = torch.eye(columns).to(by_column).expand(len(by_column), -1, -1)
        by_column = torch.cat([by_column, ones], 1)
    # w' Cov(x) w, which avoids an array of every row in every draw.
    centred = inputs - inputs.mean(0)
    covariance = centred.mT @ centred / max(1, len(rows) - 1)
    spreads = facts.spreads(by_column)[:columns]
    return spreads**2 * (by_column * (covariance @ by_column)).sum(-2)


def _means(
    model: MixedEffects, rows: Rows, weights: Weights | None, random: Float[Tensor, "draws columns"]
) -> Float[Tensor, "draws columns"]:
    """Mean outcome over the rows, and over random effects whose variances are `random`."""
    size = max(1, MOST_VALUES // max(1, len(rows) * random.shape[-1]))
    means = []
    for start in range(0, len(random), size):
        variances = random[start : start + size]
        latents = {} if weights is None else {"fixed_effect": weights[start : start + size]}
        fixed = model.predictor(rows, latents).eta.to(torch.float64)
        fixed = fixed if fixed.dim() == 3 else fixed.expand(len(variances), *fixed.shape)
        means.append(model.family.marginal_mean(fixed, variances))
    return torch.cat(means)


def _table(
    rows: Sequence[tuple[*tuple[str, ...], Tensor]], names: list[str], prob: float
) -> pd.DataFrame:
    """Labels and summaries of draws, one row per quantity."""
    check_probability(prob)
    tail = (1 - prob) / 2
    records = []
    for *labels, values in rows:
        draws = values.cpu().numpy()
        lower, median, upper = np.quantile(draws, [tail, 0.5, 1 - tail])
        spread = draws.std(ddof=1) if len(draws) > 1 else 0.0
        records.append([*labels, draws.mean(), median, spread, lower, upper])
    table = pd.DataFrame(records, columns=[*names, "mean", "median", "sd", "lower", "upper"])
    table.attrs["prob"] = prob
    return table
