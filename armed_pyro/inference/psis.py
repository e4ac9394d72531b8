"""Pareto smoothed importance weights, and resampling by weights."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

__all__ = ["pareto_smooth", "systematic"]

# The tail is the largest fifth of the draws, and a Pareto fit needs five draws in it.
FEWEST = 25


def pareto_smooth(
    log_ratios: Float[np.ndarray, "sets draws"],
) -> tuple[Float[np.ndarray, "sets draws"], Float[np.ndarray, " sets"]]:
    """Pareto-smoothed, normalised log-weights of several sets of draws, and k-hat of each set.

    A set of fewer than `FEWEST` draws has too short a tail. Its weights are normalised without
    smoothing, and its k-hat is infinite. A set of equal weights has k-hat -infinity.

    References
    ----------
    Vehtari et al. (2024), "Pareto smoothed importance sampling", JMLR 25(72).

    Examples
    --------
    >>> weights, k_hat = pareto_smooth(np.zeros((1, 100)))
    >>> np.exp(weights[0, 0]).round(3).item(), k_hat.item() < 0.5
    (0.01, True)
    """
    from arviz_stats.base import array_stats  # type: ignore[attr-defined]

    if len(log_ratios) == 0:
        return log_ratios, np.zeros(0)
    if log_ratios.shape[1] < FEWEST:
        total = np.logaddexp.reduce(log_ratios, axis=1, keepdims=True)
        return log_ratios - total, np.full(len(log_ratios), np.inf)
    # Equal weights have no tail to fit.
    flat = np.ptp(log_ratios, axis=1) < 1e-10
    safe = np.where(flat[:, None], np.linspace(-1e-3, 0, log_ratios.shape[1]), log_ratios)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_weights, k_hat = array_stats.psislw(-safe, axis=-1)
    # The fit fails if one draw outweighs all others by hundreds of nats.
    failed = np.isnan(log_weights).any(axis=1) | np.isnan(k_hat)
    log_weights = np.where(failed[:, None], np.nan_to_num(safe, nan=-np.inf), log_weights)
    k_hat = np.where(failed, np.inf, k_hat)
    log_weights = np.where(flat[:, None], -np.log(log_ratios.shape[1]), log_weights)
    log_weights = log_weights - np.logaddexp.reduce(log_weights, axis=1, keepdims=True)
    return log_weights, np.where(flat, -np.inf, k_hat)


def systematic(
    weights: Float[np.ndarray, " draws"], n: int, uniform: float
) -> Int[np.ndarray, " n"]:
    """Positions of n draws; one of weight w floor(n w) or ceil(n w) times, by a uniform number."""
    edges = (np.arange(n) + uniform) / n
    return np.searchsorted(np.cumsum(weights), edges).clip(max=len(weights) - 1)
