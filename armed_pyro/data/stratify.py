"""Stratified samples of rows: the order that they are taken from, and their size."""

from __future__ import annotations

from typing import cast

import numpy as np
from jaxtyping import Int, Shaped

from armed_pyro._messages import check_probability


def stratified_order(
    clusters: Int[np.ndarray, " rows"],
    outcome: Shaped[np.ndarray, " rows ..."] | None,
    seed: int,
    *,
    categorical: bool,
) -> Int[np.ndarray, " rows"]:
    """Rows in an order whose evenly spaced samples are stratified by cluster and outcome.

    Clusters follow each other in random order. Within a cluster, rows are sorted by an outcome
    that is categorical or has at most ten values. They are then rotated by a random number of
    places; without the rotation, even spacing would favour one end of the outcome.
    (scikit-learn's splitters refuse strata smaller than the number of folds, and clusters are
    often smaller.)
    """
    rng, n = np.random.default_rng([seed, 0]), len(clusters)
    strata = np.zeros(n, dtype=np.int64)
    if outcome is not None and outcome.ndim == 1:
        values, codes = np.unique(outcome, return_inverse=True)
        strata = codes if categorical or len(values) <= 10 else strata
    counts = np.bincount(clusters)
    shuffle = rng.permutation(len(counts))
    cluster, counts = shuffle[clusters], counts[np.argsort(shuffle)]
    order = np.lexsort((rng.permutation(n), strata, cluster))
    place = np.empty(n, dtype=np.int64)
    place[order] = np.arange(n) - (np.cumsum(counts) - counts)[cluster[order]]
    place = (place + rng.integers(counts)[cluster]) % counts[cluster]
    return np.lexsort((place, cluster))


def cluster_folds(
    clusters: Int[np.ndarray, " rows"], n: int, seed: int
) -> Int[np.ndarray, " rows"]:
    """Number of the fold, 0 to n - 1, of every row; all rows of a cluster are in the same fold.

    The folds have as many clusters as each other, to within one, and rows as evenly as clusters of
    these sizes allow: clusters are dealt to the folds in blocks of similar size.
    (scikit-learn's `GroupKFold` balances rows, but is not random before version 1.6.)
    """
    rng = np.random.default_rng([seed, 2])
    counts = np.bincount(clusters)
    by_size = np.lexsort((rng.random(len(counts)), -counts))
    fold = np.empty(len(counts), dtype=np.int64)
    for start in range(0, len(counts), n):
        block = by_size[start : start + n]
        fold[block] = rng.permutation(n)[: len(block)]
    return fold[clusters]


def check_fraction(fraction: float | None) -> float:
    """The fraction, checked to lie strictly between 0 and 1."""
    check_probability(fraction, "fraction")
    return float(cast("float", fraction))
