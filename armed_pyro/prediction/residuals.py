"""Fitted values and residuals of the training rows, given the effects of their clusters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np
import pandas as pd
import scipy
import torch
from jaxtyping import Float
from torch import Tensor

from armed_pyro._messages import check_known
from armed_pyro.guides.base import n_draws
from armed_pyro.inference.posterior import Posterior
from armed_pyro.prediction.chunks import check_settings
from armed_pyro.program.blocks import BLOCK_VALUES, values_per_row
from armed_pyro.rows.batch import Rows

__all__ = ["fitted", "residuals"]

Kind = Literal["response", "pearson", "quantile"]
KINDS: Mapping[str, str] = {
    "response": "y - E[y]",
    "pearson": "(y - E[y]) / sd(y)",
    "quantile": "randomised quantile residuals on the normal scale",
}
# Draws of the distribution function, each of which needs arrays of all rows.
MOST_QUANTILES = 200
Latents = dict[str, Tensor]


def fitted(
    posterior: Posterior, *, draws: int = 1000, seed: int | None = None
) -> pd.Series | pd.DataFrame:
    """Posterior mean of E[y | x, cluster] of every training row; one column per class.

    Parameters
    ----------
    draws, seed : int
        Posterior draws, and their seed; by default that of the fit.

    Raises
    ------
    ValueError
        If the fit was kept without its rows.

    Examples
    --------
    ``fit.fitted().head()``
    """
    model, data = posterior.model, posterior.data
    parts = [
        model.expected(eta, latents, rows).mean(0).double().cpu().numpy()
        for rows, eta, latents in _blocks(posterior, draws, seed)
    ]
    values = np.concatenate(parts)
    if values.ndim == 1:
        return pd.Series(values, index=data.row_labels, name="fitted")
    known = model.family.class_labels(data.classes)
    classes = range(values.shape[1]) if known is None else known
    return pd.DataFrame(values, index=data.row_labels, columns=list(classes))


def residuals(
    posterior: Posterior,
    kind: Kind = "response",
    *,
    draws: int = 1000,
    seed: int | None = None,
) -> pd.Series:
    r"""Residuals of the training rows, given the effects of their clusters.

    With :math:`\mu_i` the posterior mean of E[y] and V the posterior mean of Var(y),

    .. math:: response_i = y_i - \mu_i, \quad pearson_i = (y_i - \mu_i) / \sqrt{V_i}, \quad
        quantile_i = \Phi^{-1}\left(\tfrac{1}{D} \sum_d F(y_i \mid \theta_d)\right)

    For whole numbers, F is drawn at random between its values at y - 1 and y. Each row helped to
    fit its own prediction, so residuals are slightly too small: `Fit.diagnostics` tests with
    residuals of single draws, which are not.

    Parameters
    ----------
    kind : {"response", "pearson", "quantile"}
        The residuals.
    draws, seed : int
        Posterior draws, and their seed; by default that of the fit. Quantile residuals use at most
        200 draws.

    Raises
    ------
    ValueError
        If there is no such kind, the outcome has several classes, the family has no variance or
        distribution function, or outcomes are censored and the kind is not "quantile".

    References
    ----------
    Dunn and Smyth (1996), "Randomized quantile residuals", JCGS 5(3).

    Examples
    --------
    ``fit.residuals("quantile")``
    """
    check_known("kind of residuals", [kind], KINDS)
    model, data = posterior.model, posterior.data
    family = model.family
    if family.multiclass:
        raise ValueError("the outcome has several classes, which have no order and no residuals")
    if kind != "quantile" and family.is_censored:
        raise ValueError(
            f"outcomes are censored, so that {KINDS[kind]} is unknown: choose 'quantile'"
        )
    if kind == "quantile":
        if family.no_residuals:
            raise ValueError(
                f"family {family.name!r} has no quantile residuals, because {family.no_residuals}; "
                "choose 'response' or 'pearson'"
            )
        draws = min(draws, MOST_QUANTILES)
    rng = np.random.default_rng(posterior.seed if seed is None else seed)
    parts = []
    for rows, eta, latents in _blocks(posterior, draws, seed):
        if kind == "quantile":
            parts.append(_quantiles(posterior, rows, eta, latents, rng))
            continue
        residual = rows.outcome() - model.average(eta, latents, rows).mean(0)
        if kind == "pearson":
            try:
                variance = model.density(eta, latents, rows).variance
            except NotImplementedError as error:
                message = f"family {family.name!r} has no variance: choose 'response'"
                raise ValueError(message) from error
            residual = residual / variance.mean(0).sqrt()
        parts.append(residual.double().cpu().numpy())
    return pd.Series(np.concatenate(parts), index=data.row_labels, name=f"{kind} residual")


def _blocks(
    posterior: Posterior, draws: int, seed: int | None
) -> Iterator[tuple[Rows, Float[Tensor, "draws rows columns"], Latents]]:
    """Blocks of the training rows, with their predictor and the draws behind it."""
    check_settings(draws, 0.5)
    model = posterior.model
    if not posterior.data.n_rows:
        raise ValueError("the fit was kept without its training rows, which have the residuals")
    latents = posterior.draws(draws, seed=seed)
    n = n_draws(latents) or draws
    size = max(1, BLOCK_VALUES // (n * values_per_row(model)))
    for rows in model.encode(posterior.data).chunks(size):
        with torch.no_grad():
            eta = model.predictor(rows, latents, return_fixed=False).eta
        yield rows, eta.expand(n, *eta.shape[-2:]), latents


def _quantiles(
    posterior: Posterior,
    rows: Rows,
    eta: Float[Tensor, "draws rows columns"],
    latents: Latents,
    rng: np.random.Generator,
) -> Float[np.ndarray, " rows"]:
    """Normal quantiles of the distribution function at the outcomes, averaged over the draws."""
    model, y = posterior.model, rows.outcome().double()
    family = model.family
    share, total = rng.uniform(size=len(y)), np.zeros(len(y))
    for predictor, parameters in model.by_draw(eta, latents, rows):
        ends = family.cdf_range(y, predictor, parameters, rows)
        if ends is None:
            raise ValueError(
                f"family {family.name!r} has no distribution function (Family.cdf): choose "
                "'response' or 'pearson'"
            )
        lower, upper = ends
        total += (lower + share * (upper - lower)) / len(eta)
    return np.asarray(scipy.special.ndtri(total))
