r"""Linear regression with a random intercept, in closed form.

.. math:: y_i = x_i^\top \beta + u_{g(i)} + e_i, \quad u_g \sim N(0, \tau^2), \quad
    e_i \sim N(0, \sigma^2 / w_i)

All quantities are sums over the rows of clusters. The restricted likelihood of
:math:`\lambda = \tau^2 / \sigma^2` costs O(clusters), and a fit without one cluster costs one
solve.

References
----------
Harville (1977), JASA 72(358): restricted likelihood. Mundlak (1978), Econometrica 46(1).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy
from jaxtyping import Float, Int

__all__ = ["InterceptRegression"]

Rows = Float[np.ndarray, " rows"]
Design = Float[np.ndarray, "rows columns"]

# Range of log lambda that is searched.
SMALLEST, LARGEST = -12.0, 12.0


@dataclass(frozen=True, eq=False)
class InterceptRegression:
    """The fit of y on linearly independent columns, by restricted maximum likelihood.

    >>> group = np.repeat(np.arange(3), 2)
    >>> y = np.array([0.0, 0.2, 1.0, 1.2, 2.0, 2.2])
    >>> InterceptRegression.of(y, np.ones((6, 1)), group).estimate.round(3).tolist()
    [1.1]
    """

    y: Rows
    x: Design
    codes: Int[np.ndarray, " rows"]
    weight: Rows
    ratio: float  # lambda

    @classmethod
    def of(
        cls,
        y: Rows,
        x: Design,
        codes: Int[np.ndarray, " rows"],
        weight: Rows | None = None,
    ) -> InterceptRegression:
        """The fit with the ratio of variances that maximises the restricted likelihood."""
        weight = np.ones(len(y)) if weight is None else weight / weight.mean()
        start = cls(y, x, codes, weight, 1.0)

        def loss(log_ratio: float) -> float:
            return -cls(y, x, codes, weight, float(np.exp(log_ratio))).evidence(start)

        best = scipy.optimize.minimize_scalar(loss, bounds=(SMALLEST, LARGEST), method="bounded")
        return cls(y, x, codes, weight, float(np.exp(best.x)))

    @cached_property
    def _sums(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Z'WZ of Z = (X, y), and by cluster the sums of w and of w z."""
        z = np.column_stack([self.x, self.y])
        weighted = self.weight[:, None] * z
        by_cluster = np.column_stack([np.bincount(self.codes, column) for column in weighted.T])
        return z.T @ weighted, np.bincount(self.codes, self.weight), by_cluster

    def _reduced(self, sums: tuple[np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray:
        """Z' V^-1 Z in units of sigma^2."""
        total, size, by_cluster = sums
        shrunk = self.ratio / (1 + self.ratio * size)
        return np.asarray(total - (shrunk[:, None] * by_cluster).T @ by_cluster)

    def evidence(self, like: InterceptRegression) -> float:
        """The restricted log-likelihood, up to a constant, from the sums of another ratio."""
        reduced, size = self._reduced(like._sums), like._sums[1]
        _, logdet = np.linalg.slogdet(reduced[:-1, :-1])
        rest = max(self._rest(reduced), np.finfo(float).tiny)
        freedom = len(self.y) - self.x.shape[1]
        return float(-(freedom * np.log(rest) + np.log1p(self.ratio * size).sum() + logdet) / 2)

    @staticmethod
    def _rest(reduced: np.ndarray) -> float:
        """Sum of squares that the columns leave."""
        fitted = np.linalg.solve(reduced[:-1, :-1], reduced[:-1, -1])
        return float(reduced[-1, -1] - fitted @ reduced[:-1, -1])

    @cached_property
    def estimate(self) -> Float[np.ndarray, " columns"]:
        """Generalised least squares."""
        reduced = self._reduced(self._sums)
        return np.asarray(np.linalg.solve(reduced[:-1, :-1], reduced[:-1, -1]))

    @cached_property
    def variance(self) -> float:
        """sigma^2, for rows of the mean weight."""
        rest = self._rest(self._reduced(self._sums))
        return max(0.0, rest) / (len(self.y) - self.x.shape[1])

    @property
    def intercept_sd(self) -> float:
        """tau."""
        return float(np.sqrt(self.ratio * self.variance))

    @cached_property
    def covariance(self) -> Float[np.ndarray, "columns columns"]:
        """Covariance of the estimate."""
        return np.asarray(self.variance * np.linalg.inv(self._reduced(self._sums)[:-1, :-1]))

    def wald(self, places: Int[np.ndarray, " tested"], freedom: int) -> float:
        """p-value of zero coefficients in these places, by F with these degrees of freedom."""
        if not len(places):
            return 1.0
        values, covariance = self.estimate[places], self.covariance[np.ix_(places, places)]
        statistic = float(values @ np.linalg.solve(covariance, values)) / len(places)
        return float(scipy.stats.f.sf(statistic, len(places), max(freedom, 1)))

    def left_out(self) -> Rows:
        """x'beta of each row, with beta from the rows of all other clusters.

        Variances are those of all rows.
        """
        _, size, by_cluster = self._sums
        reduced, p = self._reduced(self._sums), self.x.shape[1]
        shrunk = self.ratio / (1 + self.ratio * size)
        order = np.argsort(self.codes, kind="stable")
        starts = np.concatenate([[0], np.cumsum(np.bincount(self.codes))])
        fitted = np.empty(len(self.y))
        for k in range(len(size)):
            rows = order[starts[k] : starts[k + 1]]
            z = np.column_stack([self.x[rows], self.y[rows]])
            part = z.T @ (self.weight[rows, None] * z)
            part -= shrunk[k] * np.outer(by_cluster[k], by_cluster[k])
            rest = reduced - part
            # A cluster that alone determines a column leaves a singular matrix.
            beta = np.linalg.lstsq(rest[:p, :p], rest[:p, p], rcond=None)[0]
            fitted[rows] = self.x[rows] @ beta
        return fitted
