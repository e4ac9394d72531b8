"""REML for a linear mixed model with random intercepts of several crossed factors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize

__all__ = ["crossed_reml"]


def crossed_reml(
    y: Float[np.ndarray, " rows"],
    x: Float[np.ndarray, "rows features"],
    codes: Sequence[Int[np.ndarray, " rows"]],
) -> Float[np.ndarray, " factors_and_residual"]:
    r"""Sds of each factor's intercepts and of the residual, by restricted maximum likelihood.

    .. math:: d(\lambda) = \log |\Lambda Z^\top Z \Lambda + I| + \log |X^\top V_\lambda^{-1} X|
        + (n - p) \log y^\top P_\lambda y, \quad V_\lambda = I + Z \Lambda^2 Z^\top

    d is minimised over the ratios lambda of the factors' sds to the residual sd. The block of Z'Z
    for the factor with most levels is diagonal, so that factor is eliminated level by level. The
    rest is dense.

    Parameters
    ----------
    y, x : ndarray
        Outcome, and columns of the fixed effects without the intercept.
    codes : sequence of ndarray
        Level of each row, for each factor.

    References
    ----------
    Bates, Maechler, Bolker, Walker (2015), "Fitting linear mixed-effects models using lme4", JSS
    67(1), section 3.4.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> a, b = np.arange(2000) % 100, rng.integers(0, 40, 2000)
    >>> y = rng.normal(0, 1, 100)[a] + rng.normal(0, 2, 40)[b] + rng.normal(0, 0.5, 2000)
    >>> crossed_reml(y, np.zeros((2000, 0)), [a, b]).round(1)
    array([1. , 2.1, 0.5])
    """
    n, sizes = len(y), [int(levels.max()) + 1 for levels in codes]
    order = np.argsort(sizes)[::-1]
    fixed = np.column_stack([np.ones(n), x])
    designs = [sp.csr_matrix((np.ones(n), (np.arange(n), levels))) for levels in codes]
    first, rest = designs[order[0]], sp.hstack([designs[place] for place in order[1:]]).tocsr()
    data = np.column_stack([fixed, y])
    counts = np.asarray(first.sum(0)).ravel()
    between = (first.T @ rest).tocsr()
    within = (rest.T @ rest).toarray()
    first_data, rest_data, cross = first.T @ data, rest.T @ data, data.T @ data
    factor = np.repeat(np.arange(len(order) - 1), [sizes[place] for place in order[1:]])

    def solved(ratios: np.ndarray) -> tuple[float, np.ndarray]:
        """Log-determinant of the random effects' system, and data' V^-1 data."""
        largest, others = ratios[0], ratios[1:][factor]
        pivot = largest**2 * counts + 1
        scaled = sp.diags(largest / np.sqrt(pivot)) @ between @ sp.diags(others)
        schur = others[:, None] * within * others + np.eye(len(others))
        schur -= (scaled.T @ scaled).toarray()
        root = cho_factor(schur, lower=True, overwrite_a=True)
        top = (largest / np.sqrt(pivot))[:, None] * first_data
        bottom = others[:, None] * rest_data - scaled.T @ top
        log_det = np.log(pivot).sum() + 2 * np.log(np.diag(root[0])).sum()
        return float(log_det), cross - top.T @ top - bottom.T @ cho_solve(root, bottom)

    def deviance(log_ratios: np.ndarray) -> float:
        log_det, reduced = solved(np.exp(log_ratios))
        of_fixed = np.linalg.slogdet(reduced[:-1, :-1])[1]
        return float(log_det + of_fixed + (n - fixed.shape[1]) * np.log(_residual(reduced)))

    best = minimize(
        deviance, np.zeros(len(order)) - 0.5, method="L-BFGS-B", bounds=[(-7, 5)] * len(order)
    )
    reduced = solved(np.exp(best.x))[1]
    sigma = float(np.sqrt(_residual(reduced) / (n - fixed.shape[1])))
    sds = np.empty(len(order))
    sds[order] = sigma * np.exp(best.x)
    return np.append(sds, sigma)


def _residual(reduced: np.ndarray) -> float:
    """y' P y, the part of y' V^-1 y that the fixed effects leave."""
    along = np.linalg.solve(reduced[:-1, :-1], reduced[:-1, -1])
    return float(reduced[-1, -1] - reduced[:-1, -1] @ along)
