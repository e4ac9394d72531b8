"""Orders of rows whose evenly spaced samples are stratified."""

from __future__ import annotations

import numpy as np
from torch import Tensor


def check_fraction(fraction: float | None) -> float:
    """The fraction, checked to lie strictly between 0 and 1.

    Raises
    ------
    ValueError
        If it does not.
    """
    if fraction is None or not 0 < fraction < 1:
        raise ValueError(f"fraction must lie between 0 and 1, found {fraction}.")
    return fraction


def stratified_order(
    clusters: Tensor, outcome: Tensor | None, seed: int, *, categorical: bool
) -> np.ndarray:
    """Rows in an order whose evenly spaced samples are stratified by cluster and outcome.

    Clusters follow each other in random order. Within a cluster, rows are sorted by an outcome
    that is categorical or has at most ten values. They are then rotated by a random number of
    places; without the rotation, even spacing would favour one end of the outcome. (scikit-learn's
    splitters refuse strata smaller than the number of folds, and clusters are often smaller.)

    Parameters
    ----------
    clusters : Int64[Tensor, "rows"]
        Cluster of each row.
    outcome : Float64[Tensor, "rows"] or None
        Outcomes to stratify by. Tensors of any other shape are ignored.
    seed : int
        Seed of the orders and rotations.
    categorical : bool
        Whether outcomes are codes of classes.

    Returns
    -------
    Int64[ndarray, "rows"]
        Positions of rows.
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
