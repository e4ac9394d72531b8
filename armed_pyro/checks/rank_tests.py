"""Tests of uniform ranks: chi-square, simultaneous bands of the ECDF, coverage and bias."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import scipy
from jaxtyping import Float, Int

__all__ = ["bias", "bin_band", "bin_edges", "chi_square", "coverage", "ecdf", "holm", "rank"]

MOST_BINS = 20
MOST_POINTS = 100  # points at which an ECDF is compared with the diagonal
NULL_SETS = 20_000  # simulated sets of uniform ranks behind the ECDF's p-values
NULL_BLOCK = 2_000  # sets that are simulated at once

Ranks = Int[np.ndarray, " simulations"]


def rank(
    truth: Float[np.ndarray, " quantities"],
    draws: Float[np.ndarray, "draws quantities"],
    rng: np.random.Generator,
) -> Int[np.ndarray, " quantities"]:
    """Number of draws below the truth, 0 to L; ties are broken at random.

    >>> draws = np.array([[1.0], [2.0], [3.0]])
    >>> rank(np.array([2.5]), draws, np.random.default_rng(0))
    array([2])
    """
    below, equal = (draws < truth).sum(0), (draws == truth).sum(0)
    return below + rng.integers(equal, endpoint=True)


def bin_edges(n: int, draws: int) -> Int[np.ndarray, " edges"]:
    """First rank of each bin, and L + 1: at most 20 bins, with about ten ranks or more each."""
    count = max(2, min(MOST_BINS, draws + 1, n // 10))
    return np.linspace(0, draws + 1, count + 1).round().astype(int)


def chi_square(ranks: Ranks, draws: int) -> float:
    r"""P-value of :math:`\sum_b (O_b - E_b)^2 / E_b` over bins of ranks.

    >>> round(chi_square(np.arange(100), draws=99), 3)
    1.0
    """
    edges = bin_edges(len(ranks), draws)
    expected = np.diff(edges) * len(ranks) / (draws + 1)
    return float(scipy.stats.chisquare(np.histogram(ranks, edges)[0], expected).pvalue)


def bin_band(n: int, draws: int, prob: float) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest counts of n uniform ranks per bin, jointly with probability `prob`.

    These are binomial quantiles with tails of (1 - prob) / bins together (Bonferroni).
    """
    edges = bin_edges(n, draws)
    share = np.diff(edges) / (draws + 1)
    tail = (1 - prob) / len(share) / 2
    return scipy.stats.binom.ppf(tail, n, share), scipy.stats.binom.ppf(1 - tail, n, share)


def ecdf(ranks: Ranks, draws: int) -> float:
    r"""P-value of the ECDF's largest deviation from the ECDF of uniform ranks.

    .. math:: \gamma = 2 \min_j \min\{P(X_j \le O_j), P(X_j \ge O_j)\}, \quad
              X_j \sim Binomial(n, j / (L + 1)),

    Here :math:`O_j` is the number of ranks below j, so that :math:`\gamma` is the smallest
    pointwise p-value. Its null distribution is simulated by 20,000 sets of n uniform ranks. A
    p-value of at most :math:`\alpha` means that the ECDF leaves its simultaneous band of
    probability :math:`1 - \alpha`. Source: Säilynoja, Bürkner, Vehtari (2022), Statistics and
    Computing 32, algorithm 1.

    >>> ranks = np.arange(100)
    >>> ecdf(ranks, draws=99) > 0.9, ecdf(ranks // 2, draws=99) < 0.001
    (True, True)
    """
    below = np.sort(ranks).searchsorted(_points(draws))
    gamma, null = _gamma(below, len(ranks), draws), _null(len(ranks), draws)
    return float((1 + null.searchsorted(gamma, "right")) / (1 + len(null)))


def _points(draws: int) -> Int[np.ndarray, " points"]:
    """Ranks j at which the ECDF is compared."""
    return np.unique(np.linspace(1, draws, min(draws, MOST_POINTS)).round().astype(int))


@lru_cache(maxsize=8)
def _tails(n: int, draws: int) -> Float[np.ndarray, "points counts"]:
    """Smaller of P(X <= count) and P(X >= count) for every point and count from 0 to n."""
    share = _points(draws)[:, None] / (draws + 1)
    counts = np.arange(n + 1)
    return np.minimum(
        scipy.stats.binom.cdf(counts, n, share), scipy.stats.binom.sf(counts - 1, n, share)
    )


def _gamma(below: Int[np.ndarray, "... points"], n: int, draws: int) -> Float[np.ndarray, "..."]:
    tails = _tails(n, draws)
    return 2 * tails[np.arange(len(tails)), below].min(-1)


@lru_cache(maxsize=8)
def _null(n: int, draws: int) -> Float[np.ndarray, " sets"]:
    """Gamma of sets of n uniform ranks, sorted."""
    rng = np.random.default_rng(0)
    share = np.diff(_points(draws), prepend=0, append=draws + 1) / (draws + 1)
    blocks = [
        _gamma(rng.multinomial(n, share, NULL_BLOCK)[:, :-1].cumsum(1), n, draws)
        for _ in range(NULL_SETS // NULL_BLOCK)
    ]
    return np.sort(np.concatenate(blocks))


def coverage(ranks: Ranks, draws: int, prob: float) -> tuple[float, float]:
    r"""Share of truths in the central interval of the posterior, and its standard error.

    A rank r represents the interval from r / (L + 1) to (r + 1) / (L + 1), and counts with the
    fraction of it that lies in the central interval. Uniform ranks then give `prob` for any number
    of draws. The Monte Carlo standard error under uniform ranks is
    :math:`\sqrt{prob (1 - prob) / n}`.

    >>> round(coverage(np.arange(10), draws=9, prob=0.5)[0], 3)
    0.5
    """
    low, high = (draws + 1) * (1 - prob) / 2, (draws + 1) * (1 + prob) / 2
    inside = np.minimum(ranks + 1, high) - np.maximum(ranks, low)
    error = np.sqrt(prob * (1 - prob) / len(ranks))
    return float(inside.clip(0, 1).mean()), float(error)


def bias(ranks: Ranks, draws: int) -> float:
    r"""Z-score of the mean rank, :math:`(\bar r - L/2) / \sqrt{((L+1)^2 - 1) / (12 n)}`.

    It is positive if truths tend to lie above the draws, so that the posterior is too low.

    >>> bias(np.arange(100), draws=99)
    0.0
    """
    error = np.sqrt(((draws + 1) ** 2 - 1) / 12 / len(ranks))
    return float((ranks.mean() - draws / 2) / error)


def holm(p_values: Float[np.ndarray, " tests"]) -> Float[np.ndarray, " tests"]:
    """Holm's adjusted p-values: compared with alpha, any false alarm has probability <= alpha.

    They are valid for tests with any dependence (Holm 1979).

    >>> holm(np.array([0.01, 0.04, 0.03]))
    array([0.03, 0.06, 0.06])
    """
    order = np.argsort(p_values)
    steps = np.arange(len(p_values), 0, -1) * p_values[order]
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.maximum.accumulate(steps).clip(max=1)
    return adjusted
