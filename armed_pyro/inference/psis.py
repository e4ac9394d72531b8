"""Pareto smoothed importance weights, and resampling by weights."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

__all__ = ["pareto_smooth", "systematic"]

# The tail is the largest fifth of the draws, and a Pareto fit needs five draws in it.
FEWEST = 25
# Draws that the prior of k-hat, a normal distribution around 0.5, is worth.
PULL = 10
# Values of all sets that are fitted at once.
BLOCK = 2**20


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
    n = log_ratios.shape[-1]
    if len(log_ratios) == 0:
        return log_ratios, np.zeros(0)
    if n < FEWEST:
        total = np.logaddexp.reduce(log_ratios, axis=1, keepdims=True)
        return log_ratios - total, np.full(len(log_ratios), np.inf)
    # Equal weights have no tail to fit.
    flat = np.ptp(log_ratios, axis=1) < 1e-10
    safe = np.where(flat[:, None], np.linspace(-1e-3, 0, n), log_ratios)
    size = max(1, BLOCK // (n + _candidates(_tail(n)) * _tail(n)))
    blocks = [_smoothed(safe[i : i + size]) for i in range(0, len(safe), size)]
    log_weights, k_hat = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    # The fit fails if one draw outweighs all others by hundreds of nats.
    failed = np.isnan(log_weights).any(axis=1) | np.isnan(k_hat)
    log_weights = np.where(failed[:, None], np.nan_to_num(safe, nan=-np.inf), log_weights)
    k_hat = np.where(failed, np.inf, k_hat)
    log_weights = np.where(flat[:, None], -np.log(n), log_weights)
    log_weights = log_weights - np.logaddexp.reduce(log_weights, axis=1, keepdims=True)
    return log_weights, np.where(flat, -np.inf, k_hat)


def _tail(draws: int) -> int:
    """Draws in the tail."""
    return int(3 * draws**0.5) if draws > 225 else draws // 5


def _candidates(tail: int) -> int:
    """Values of b = k / sigma among which the fit averages."""
    return 30 + int(tail**0.5)


def _smoothed(
    log_ratios: Float[np.ndarray, "sets draws"],
) -> tuple[Float[np.ndarray, "sets draws"], Float[np.ndarray, " sets"]]:
    """Log-weights up to a constant with a smoothed tail, and k-hat; nan where the fit fails."""
    n = log_ratios.shape[1]
    tail = _tail(n)
    log_weights = log_ratios - log_ratios.max(1, keepdims=True)
    largest = np.argpartition(log_weights, n - tail - 1, axis=1)[:, n - tail - 1 :]
    values = np.take_along_axis(log_weights, largest, 1)
    order = np.argsort(values, axis=1)
    largest, values = (np.take_along_axis(part, order, 1) for part in (largest, values))
    edge = np.exp(values[:, :1])
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        k_hat, sigma = (part[:, None] for part in _fitted(np.exp(values[:, 1:]) - edge))
        probabilities = (np.arange(tail) + 0.5) / tail
        quantiles = np.expm1(-k_hat * np.log1p(-probabilities)) / k_hat
        smoothed = np.log(edge + np.where(sigma > 0, sigma, np.nan) * quantiles)
    # A tail of equal weights is bounded.
    even = values[:, -1] - values[:, 1] < 1e-10
    smoothed = np.where(even[:, None], values[:, 1:], np.minimum(smoothed, 0.0))
    np.put_along_axis(log_weights, largest[:, 1:], smoothed, 1)
    return log_weights, np.where(even, -np.inf, k_hat[:, 0])


def _fitted(
    tails: Float[np.ndarray, "sets tail"],
) -> tuple[Float[np.ndarray, " sets"], Float[np.ndarray, " sets"]]:
    """Shape k and scale sigma of generalised Pareto distributions of tails in ascending order.

    Zhang and Stephens (2009), "A new and efficient estimation method for the generalized Pareto
    distribution", Technometrics 51(3); k is drawn towards 0.5 with the weight of ten draws.
    """
    n, count = tails.shape[1], _candidates(tails.shape[1])
    steps = 1 - np.sqrt(count / (np.arange(1, count + 1) - 0.5))
    quarter = tails[:, int(n / 4 + 0.5) - 1, None]
    b = 1 / tails[:, -1:] + steps / (3 * quarter)
    k = np.log1p(-b[..., None] * tails[:, None]).mean(-1)
    likelihood = n * (np.log(-b / k) - k - 1)
    weights = np.exp(likelihood - np.logaddexp.reduce(likelihood, axis=1, keepdims=True))
    weights = np.where(weights < 10 * np.finfo(float).eps, 0.0, weights)
    mean_b = (np.where(weights > 0, b, 0.0) * weights).sum(1) / weights.sum(1)
    k_hat = np.log1p(-mean_b[:, None] * tails).mean(1)
    return (n * k_hat + PULL * 0.5) / (n + PULL), -k_hat / mean_b


def systematic(
    weights: Float[np.ndarray, " draws"], n: int, uniform: float
) -> Int[np.ndarray, " n"]:
    """Positions of n draws; one of weight w floor(n w) or ceil(n w) times, by a uniform number."""
    edges = (np.arange(n) + uniform) / n
    return np.searchsorted(np.cumsum(weights), edges).clip(max=len(weights) - 1)
