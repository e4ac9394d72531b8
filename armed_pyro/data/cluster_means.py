r"""Means of columns in clusters, shrunk to the grand mean: the units of within and between.

.. math:: m_g = \mu + r_g (\bar x_g - \mu), \quad
    r_g = \frac{n_g}{n_g + \sigma_w^2 / \sigma_b^2}

is the expectation of the mean of cluster g given its :math:`n_g` rows, if means are normal with
mean mu and variance :math:`\sigma_b^2`, and rows have the variance :math:`\sigma_w^2` around them.
With :math:`x - m_g` and :math:`m_g` as regressors, coefficients are therefore slopes of the
deviation from, and of, the true mean; slopes of plain means of few rows are biased to the slope
within clusters. Moments of a one-way analysis of variance estimate both variances from the training
rows.
Columns that are constant within clusters have :math:`r_g = 1`.

``between(x | g)`` is :math:`m_g` and ``within(x | g)`` is :math:`x - m_g`. The difference of their
coefficients is the coefficient of ``between(x | g)`` beside x itself. A fitted model has the means
of its training rows. In a table to predict, a cluster seen in training keeps that mean, with which
its random effect was estimated. The mean of a new cluster is that of its rows in the table; no
outcome is needed. With one row of reliability 1/2 it lies halfway between the row and the grand
mean. A new cluster with labelled rows (the mode "adapt") keeps the mean of those rows.

``between(x | a/b)`` is ``between(x | a) + between(x | a:b)``, and ``within(x | a/b)`` is
``within(x | a:b)``. Of a categorical column, or ``factor(x)``, there is one column for each level
but the first. Rows count as often as their frequency weight.

References
----------
Lüdtke et al. (2008), Psychological Methods 13(3): the multilevel latent covariate model. Searle,
Casella and McCulloch (1992), "Variance Components", section 3.6: moments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from armed_pyro.data.grouping import Grouping, index_from_json, index_to_json
from armed_pyro.data.label_matching import match_labels

__all__ = ["ClusterMeans", "ClusterSums", "added"]

Columns = Float[np.ndarray, " columns"]
ByCluster = Float[np.ndarray, "clusters columns"]

# A variance below this share of a column's mean square is a rounding error.
ROUNDING = 1e-12


@dataclass(frozen=True, eq=False)
class ClusterSums:
    """Numbers of rows, sums and sums of squares of columns by cluster, around an `origin`.

    >>> x, site = np.array([[1.0], [3.0], [5.0]]), Grouping.from_labels(["a", "a", "b"])
    >>> ClusterSums.of(x, site).total.tolist()
    [[2.0], [4.0]]
    """

    levels: pd.Index
    count: Float[np.ndarray, " clusters"]
    total: ByCluster
    square: ByCluster
    origin: Columns

    @classmethod
    def of(
        cls,
        values: Float[np.ndarray, "rows columns"],
        grouping: Grouping,
        weights: Float[np.ndarray, " rows"] | None = None,
        origin: Columns | None = None,
    ) -> ClusterSums:
        """The sums over these rows; a row of weight w counts as w rows.

        The origin is by default the first row, so that a column far from 0 loses no digits.
        """
        origin = values[0].copy() if origin is None else origin
        codes, n = grouping.codes.numpy(), grouping.n_clusters
        weights = np.ones(len(values)) if weights is None else weights
        count = np.bincount(codes, weights, n)
        total, square = (np.zeros((n, values.shape[1])) for _ in range(2))
        for place, column in enumerate((values - origin).T):
            total[:, place] = np.bincount(codes, weights * column, n)
            square[:, place] = np.bincount(codes, weights * column**2, n)
        return cls(grouping.levels, count, total, square, origin)

    def plus(self, other: ClusterSums) -> ClusterSums:
        """The sums over the rows of both, which have the same origin."""
        width = self.total.shape[1]
        tables = [
            pd.DataFrame(np.column_stack([s.count, s.total, s.square]), s.levels)
            for s in (self, other)
        ]
        joined = pd.concat(tables).groupby(level=0, sort=False).sum()
        count, total, square = np.split(joined.to_numpy(), [1, 1 + width], axis=1)
        return ClusterSums(joined.index, count[:, 0], total, square, self.origin)

    def moments(self) -> tuple[Columns, Columns]:
        """Variances within and between clusters; 0 where their estimate is negative."""
        n, groups = self.count.sum(), int((self.count > 0).sum())
        filled = np.where(self.count > 0, self.count, 1)[:, None]
        inside = (self.square - self.total**2 / filled).sum(0).clip(0)
        among = (self.total**2 / filled).sum(0) - self.total.sum(0) ** 2 / n
        floor = ROUNDING * (self.square.sum(0) / n + self.origin**2)
        within = np.where(n > groups, inside / max(n - groups, 1), 0.0)
        within = np.where(within > floor, within, 0.0)
        if groups < 2:
            return within, np.zeros_like(within)
        size = (n - (self.count**2).sum() / n) / (groups - 1)
        between = (among / (groups - 1) - within) / size
        return within, np.where(between > floor, between, 0.0)


def added(
    sums: Mapping[str, ClusterSums], more: Mapping[str, ClusterSums]
) -> dict[str, ClusterSums]:
    """By factor, the sums over the rows of both; the first may be empty."""
    return {name: sums[name].plus(part) if sums else part for name, part in more.items()}


@dataclass(frozen=True, eq=False)
class ClusterMeans:
    r"""Shrunk means :math:`m_g` of columns by cluster, and what shrinks the mean of a new cluster.

    A new cluster's mean is :math:`m_g` of its rows in the table that is encoded. With one row and a
    reliability of 1/2 it lies halfway between that row and the grand mean.

    Attributes
    ----------
    columns : tuple of str
        Names of the columns.
    levels : pd.Index
        Clusters with a mean.
    means : Float[ndarray, "clusters columns"]
        Their shrunk means.
    grand, within, between : Float[ndarray, "columns"]
        mu, and the variances within and between clusters.

    Examples
    --------
    >>> x, site = np.array([[0.0], [2.0], [4.0], [6.0]]), Grouping.from_labels(["a", "a", "b", "b"])
    >>> means = ClusterMeans.of(("x",), ClusterSums.of(x, site))
    >>> means.means.round(2).tolist(), means.reliability(np.array([2.0])).round(2).tolist()
    ([[1.25], [4.75]], [[0.88]])
    """

    columns: tuple[str, ...]
    levels: pd.Index
    means: ByCluster
    grand: Columns
    within: Columns
    between: Columns

    @classmethod
    def of(cls, columns: Sequence[str], sums: ClusterSums) -> ClusterMeans:
        """Means of the clusters of a training table, with the moments of that table."""
        within, between = sums.moments()
        filled = np.where(sums.count > 0, sums.count, 1)[:, None]
        means = sums.total / filled
        # Each cluster's mean varies around mu by the sum of both variances.
        precision = 1 / np.where(between + within > 0, between + within / filled, 1)
        precision = precision * (sums.count > 0)[:, None]
        grand = (precision * means).sum(0) / precision.sum(0) + sums.origin
        nothing = cls(tuple(columns), sums.levels[:0], means[:0], grand, within, between)
        return nothing.extended(sums)

    def reliability(self, count: Float[np.ndarray, " clusters"]) -> ByCluster:
        """The share of a mean's variance that is between clusters, for these numbers of rows."""
        between = np.broadcast_to(self.between, (len(count), len(self.between)))
        rows = np.where(count > 0, count, 1)[:, None]
        whole = between + self.within / rows
        return np.divide(between, whole, out=np.zeros_like(whole), where=whole > 0)

    def extended(self, sums: ClusterSums) -> ClusterMeans:
        """With the means of further clusters; known clusters keep theirs."""
        known = match_labels(sums.levels, self.levels, "clusters with means") >= 0
        count = sums.count[~known]
        means = sums.total[~known] / np.where(count > 0, count, 1)[:, None] + sums.origin
        shrunk = self.grand + self.reliability(count) * (means - self.grand)
        levels = self.levels.append(sums.levels[~known]) if len(self.levels) else sums.levels
        return replace(self, levels=levels, means=np.concatenate([self.means, shrunk]))

    def at(
        self,
        values: Float[np.ndarray, "rows columns"],
        grouping: Grouping,
        weights: Float[np.ndarray, " rows"] | None = None,
    ) -> Float[np.ndarray, "rows columns"]:
        """Each row's m_g; the mean of a cluster that has none is that of its rows here."""
        whole = self
        if (match_labels(grouping.levels, self.levels, "clusters with means") < 0).any():
            whole = self.extended(ClusterSums.of(values, grouping, weights))
        places = match_labels(grouping.levels, whole.levels, "clusters with means")
        return np.asarray(whole.means[places[grouping.codes.numpy()]])

    def extends(self, other: ClusterMeans) -> bool:
        """Whether these are the other means, possibly with those of further clusters."""
        known = len(other.levels)
        return (
            self.columns == other.columns
            and self.levels[:known].equals(other.levels)
            and np.array_equal(self.means[:known], other.means)
            and np.array_equal(self.grand, other.grand)
        )

    def to_json(self) -> dict[str, Any]:
        """The means in JSON's types; `from_json` reads them back."""
        arrays = {name: getattr(self, name).tolist() for name in ARRAYS}
        return {**arrays, "columns": list(self.columns), "levels": index_to_json(self.levels)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> ClusterMeans:
        """Read means that `to_json` wrote."""
        columns, levels = tuple(content["columns"]), index_from_json(content["levels"])
        arrays = {name: np.asarray(content[name], dtype=float) for name in ARRAYS}
        arrays["means"] = arrays["means"].reshape(len(levels), len(columns))
        return cls(columns=columns, levels=levels, **arrays)


ARRAYS = ("means", "grand", "within", "between")
