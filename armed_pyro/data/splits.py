"""Orders of rows whose evenly spaced samples are stratified."""

from __future__ import annotations

import numpy as np
from torch import Tensor


def check_fraction(fraction: float | None) -> float:
    """The fraction, if it is one strictly between 0 and 1."""
    if fraction is None or not 0 < fraction < 1:
        raise ValueError(f"fraction must lie between 0 and 1, found {fraction}.")
    return fraction


def stratified_order(
    clusters: Tensor, outcome: Tensor | None, seed: int, *, categorical: bool
) -> np.ndarray:
    """Rows in an order whose evenly spaced samples are stratified by cluster and outcome.

    Clusters follow each other in random order. Within one, rows are sorted by outcome (if it is
    categorical or has at most ten values) and then rotated by a random number of places, or even
    spacing would favour one end of the outcome. (scikit-learn's splitters refuse strata smaller
    than the folds, as clusters often are.)

    Parameters
    ----------
    clusters : Int64[Tensor, "rows"]
    outcome : Float64[Tensor, "rows"], or of another shape and then disregarded, or None

    Returns
    -------
    Int64[ndarray, "rows"], positions of rows
    """
    rng = np.random.default_rng([seed, 0])
    n = len(clusters)
    strata = np.zeros(n, dtype=np.int64)
    if outcome is not None and outcome.ndim == 1:
        values, codes = np.unique(outcome.numpy(), return_inverse=True)
        strata = codes if categorical or len(values) <= 10 else strata
    counts = np.bincount(clusters.numpy())
    shuffle = rng.permutation(len(counts))
    cluster, counts = shuffle[clusters.numpy()], counts[np.argsort(shuffle)]
    order = np.lexsort((rng.permutation(n), strata, cluster))
    place = np.empty(n, dtype=np.int64)
    place[order] = np.arange(n) - (np.cumsum(counts) - counts)[cluster[order]]
    place = (place + rng.integers(counts)[cluster]) % counts[cluster]
    return np.lexsort((place, cluster))
