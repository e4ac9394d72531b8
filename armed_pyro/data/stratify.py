"""Stratified samples of rows: the order that they are taken from, and their size."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import numpy as np
from jaxtyping import Bool, Int, Shaped

from armed_pyro._messages import check_probability
from armed_pyro.data.grouping import Grouping
from armed_pyro.data.label_matching import places_of


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


def held_rows(
    order: Int[np.ndarray, " rows"], groupings: Iterable[Grouping], fraction: float, seed: int
) -> Bool[np.ndarray, " rows"]:
    """Validation rows, evenly spaced in this order; every cluster keeps a training row.

    ValueError if `fraction` is not between 0 and 1, or leaves no validation rows.
    """
    check_fraction(fraction)
    rng, n = np.random.default_rng([seed, 1]), len(order)
    steps = np.floor(np.arange(n + 1) * fraction + rng.random())
    held = np.zeros(n, dtype=bool)
    held[order] = np.diff(steps) > 0
    for grouping in groupings:
        codes = grouping.codes.numpy()
        emptied = np.bincount(codes[~held], minlength=grouping.n_clusters) == 0
        shuffled = rng.permutation(n)
        _, first = np.unique(codes[shuffled], return_index=True)
        held[shuffled[first[emptied]]] = False
    if not held.any():
        raise ValueError(
            f"A fraction of {fraction} leaves no rows for validation once every cluster keeps "
            "one in training. Raise it, or hold out whole clusters (hold_out_clusters)."
        )
    return held


def held_clusters(
    grouping: Grouping, factor: str, fraction: float | None, labels: Any, seed: int
) -> Bool[np.ndarray, " rows"]:
    """The rows of a random fraction of the clusters, or of those with these labels.

    ValueError if a label is unknown, or either side would have no rows.
    """
    if (fraction is None) == (labels is None):
        raise ValueError(f"Give either fraction or labels; found {fraction} and {labels}.")
    if labels is not None:
        positions = places_of(labels, grouping.levels, factor)
    else:
        n_held = max(1, round(check_fraction(fraction) * grouping.n_clusters))
        positions = np.random.default_rng(seed).permutation(grouping.n_clusters)[:n_held]
    held = np.isin(grouping.codes.numpy(), positions)
    if held.all() or not held.any():
        raise ValueError(
            f"Holding out {len(positions)} of the {grouping.n_clusters} clusters of "
            f"{factor!r} leaves no rows on one side; each needs at least one cluster."
        )
    return held


def check_fraction(fraction: float | None) -> float:
    """The fraction, checked to lie strictly between 0 and 1."""
    check_probability(fraction, "fraction")
    return float(cast("float", fraction))
