"""The order of rows from which stratified samples are taken."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from armed_pyro.data.clustered import ClusteredData


def stratified_order(data: ClusteredData, by: str | None, seed: int) -> np.ndarray:
    """Rows in an order whose evenly spaced samples are stratified by cluster and outcome.

    Clusters follow each other in random order. Within a cluster, rows are sorted by an outcome
    that is categorical or has at most ten values. They are then rotated by a random number of
    places; without the rotation, even spacing would favour one end of the outcome.
    (scikit-learn's splitters refuse strata smaller than the number of folds, and clusters are
    often smaller.)
    """
    factor = by or next(iter(data.groupings), None)
    rng, n = np.random.default_rng([seed, 0]), data.n_rows
    clusters = strata = np.zeros(n, dtype=np.int64)
    if factor is not None:
        clusters = data.grouping(factor).codes.numpy()
    if data.outcome is not None and data.outcome.ndim == 1:
        values, codes = np.unique(data.outcome.numpy(), return_inverse=True)
        strata = codes if data.classes is not None or len(values) <= 10 else strata
    counts = np.bincount(clusters)
    shuffle = rng.permutation(len(counts))
    cluster, counts = shuffle[clusters], counts[np.argsort(shuffle)]
    order = np.lexsort((rng.permutation(n), strata, cluster))
    place = np.empty(n, dtype=np.int64)
    place[order] = np.arange(n) - (np.cumsum(counts) - counts)[cluster[order]]
    place = (place + rng.integers(counts)[cluster]) % counts[cluster]
    return np.lexsort((place, cluster))
