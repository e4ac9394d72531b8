"""Score tests of residuals: curves, variances between clusters, spread, and autocorrelation.

All tests read residuals z of several posterior draws, shape "rows draws", that are independent and
standard normal if the program is right. Of every test, the p-value is the median over the draws,
and the effect their mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy
from jaxtyping import Float, Int

from armed_pyro.checks import rank_tests

__all__ = [
    "SPREAD_PER_LOG_SD",
    "Tested",
    "adjusted",
    "between_clusters",
    "curve",
    "curve_basis",
    "curve_by_draw",
    "lag_one",
    "moments",
    "orthonormal",
    "spread_scores",
    "without_curve",
    "without_slopes",
]

# Mean shift of `spread_scores` per unit of log sd: E[2 |z| phi(z) / phi(v(|z|))] for normal z.
SPREAD_PER_LOG_SD = 1.177
# `between_clusters` is most powerful for effects of about this sd, in residual sds.
TYPICAL_SD = 0.3
# The variance of a cluster of this number of rows is half its own, and half that of all clusters.
# Its own alone would make the test lose power in clusters of few rows.
CLUSTER_ROWS = 5
MEAN_ROWS = 100  # the same for the variances of single rows, by the number of all rows

Residuals = Float[np.ndarray, "rows draws"]
Rows = Float[np.ndarray, " rows"]


@dataclass(frozen=True)
class Tested:
    """One test: its subject, effect and p-value.

    Attributes
    ----------
    subject : str
        What was tested, such as the name of a feature.
    effect : float
        Estimated size of the fault.
    p : float
        p-value of its absence.
    """

    subject: str
    effect: float
    p: float


def adjusted(tests: Sequence[Tested]) -> list[Tested]:
    """The tests with Holm's p-values, smallest first.

    Examples
    --------
    >>> [test.p for test in adjusted([Tested("a", 0.1, 0.5), Tested("b", 0.3, 0.01)])]
    [0.02, 0.5]
    """
    p_values = rank_tests.holm(np.array([test.p for test in tests], dtype=float))
    corrected = [
        Tested(test.subject, test.effect, float(p)) for test, p in zip(tests, p_values, strict=True)
    ]
    return sorted(corrected, key=lambda test: (test.p, -abs(test.effect)))


def curve_basis(x: Rows, weight: Rows | None = None) -> Float[np.ndarray, "rows columns"]:
    """x, its square and its cube, and a bend at each tercile; fewer for few distinct values.

    Columns are orthonormal, and orthogonal to a constant. With weights, by which the predictor
    shifts the residuals, they are columns times weights, orthogonal to the weights.

    Examples
    --------
    >>> curve_basis(np.array([0.0, 1.0, 0.0, 1.0])).shape, curve_basis(np.ones(4)).shape
    ((4, 1), (4, 0))
    """
    spread = x.std()
    if not spread > 1e-12 * (1 + abs(x.mean())):
        return np.zeros((len(x), 0))
    x = ((x - x.mean()) / spread).clip(-5, 5)  # a cube of an outlier would be a single row's
    distinct = len(np.unique(x[: 10**4]))
    columns = [x, x**2, x**3, *(np.maximum(x - k, 0) for k in np.quantile(x, [1 / 3, 2 / 3]))]
    columns = columns[: 5 if distinct >= 12 and len(x) >= 100 else max(1, min(3, distinct - 1))]
    weight = np.ones(len(x)) if weight is None else weight
    stacked = np.column_stack(columns)
    return orthonormal(weight[:, None] * (stacked - np.average(stacked, 0, weight**2)))


def orthonormal(columns: Float[np.ndarray, "rows columns"]) -> Float[np.ndarray, "rows rank"]:
    """Orthonormal columns with the same span."""
    length = np.linalg.norm(columns, axis=0)
    u, s, _ = np.linalg.svd(columns[:, length > 0] / length[length > 0], full_matrices=False)
    return np.asarray(u[:, s > 1e-8])


def curve(subject: str, z: Residuals, basis: Float[np.ndarray, "rows columns"]) -> Tested:
    r"""Test of :math:`E[z] = 0` against a curve in the span of orthonormal columns B.

    .. math:: Q = z^\top B (B^\top V B)^{-1} B^\top z \sim \chi^2_m, \qquad
              \text{effect}^2 = \max(0, |B^\top z|^2 - tr(B^\top V B)) / n

    V has the rows' squared residuals, so that a spread that depends on x is not taken for a curve
    (White 1980, Econometrica 48(4)). They are shrunk to their mean, as those of few rows are noise.
    The effect is the curve's sd over the rows, in residual sds.
    """
    return _curve(subject, *_projected(z, basis), *basis.shape)


def curve_by_draw(subject: str, z: Residuals, x: Residuals, weight: Rows | None = None) -> Tested:
    """`curve` with a regressor that differs between the draws, such as the predictor."""
    bases = [curve_basis(column, weight) for column in x.T]
    parts = [_projected(z[:, [d]], basis) for d, basis in enumerate(bases)]
    statistic, excess = (np.concatenate(values) for values in zip(*parts, strict=True))
    return _curve(subject, statistic, excess, len(z), max(1, *(b.shape[1] for b in bases)))


def _projected(
    z: Residuals, basis: Float[np.ndarray, "rows columns"]
) -> tuple[Float[np.ndarray, " draws"], Float[np.ndarray, " draws"]]:
    """Q of every draw, and |B'z|^2 beyond its expectation."""
    if not basis.shape[1]:
        return np.zeros(z.shape[1]), np.zeros(z.shape[1])
    projected = basis.T @ z
    squares, n = (z**2).mean(1), len(z)
    variances = (n * squares + MEAN_ROWS * squares.mean()) / (n + MEAN_ROWS)
    covariance = basis.T @ (variances[:, None] * basis)
    statistic = (projected * np.linalg.solve(covariance, projected)).sum(0)
    return statistic, (projected**2).sum(0) - np.trace(covariance)


def _curve(
    subject: str,
    statistic: Float[np.ndarray, " draws"],
    excess: Float[np.ndarray, " draws"],
    n: int,
    m: int,
) -> Tested:
    p = float(np.median(scipy.stats.chi2.sf(statistic, m)))
    return Tested(subject, float(np.sqrt(max(0.0, excess.mean()) / n)), p)


def between_clusters(
    subject: str, z: Residuals, a: Rows, codes: Int[np.ndarray, " rows"]
) -> Tested | None:
    r"""Score test of :math:`\tau = 0` in :math:`z_i = \tau a_i b_{g(i)} + e_i`, b standard normal.

    .. math:: S = \sum_k \frac{c_k}{s_k} \sum_{i \ne j \in k} a_i z_i a_j z_j, \quad
              s_k = \sum_i a_i^2, \quad c_k = \frac{s_k}{1 + \tau_0^2 s_k}

    Only products of different rows count. Their mean is 0 for any variances :math:`v_i` of
    independent residuals; with squares, a spread that depends on a would look like a slope on a.
    The variance of S is :math:`2 \sum_{i \ne j} (c_k / s_k)^2 a_i^2 a_j^2 v_i v_j`. S is compared
    with a centred chi-square distribution of that variance, with
    :math:`(\sum c_k)^2 / \sum c_k^2` degrees of freedom. The effect is the root of
    :math:`\tau^2 = S / \sum_k c_k (s_k - \sum_i a_i^4 / s_k)`, for a with a mean square of 1.

    Parameters
    ----------
    subject : str
        What is tested.
    z : Float[ndarray, "rows draws"]
        Residuals with mean 0 and a mean square of 1.
    a : Float[ndarray, "rows"]
        Column that the effects of the clusters multiply.
    codes : Int[ndarray, "rows"]
        Cluster of each row.

    Returns
    -------
    Tested or None
        None if fewer than 5 clusters inform the test.

    References
    ----------
    Verbeke and Molenberghs (2003), Biometrics 59(2): score tests for variance components.
    """
    scale = np.sqrt((a**2).mean())
    if not scale > 0:
        return None
    a = a / scale
    sums, s = _cluster_sums(a, codes)
    pairs = s - np.bincount(codes, a**4, len(s)) / np.where(s > 0, s, 1)
    informed = (s > 1e-6 * len(a) / len(s)) & (pairs > 1e-6 * s)
    if informed.sum() < 5:
        return None
    weight = 1 / (1 + TYPICAL_SD**2 * s[informed])  # c_k / s_k
    squares = scipy.sparse.csr_array((a**2, (codes, np.arange(len(codes)))), sums.shape)
    total = weight @ ((sums @ z)[informed] ** 2 - (squares @ z**2)[informed])
    v = _variances(z, a, codes)
    variance = 2 * weight**2 @ ((squares @ v) ** 2 - squares.power(2) @ v**2)[informed]
    c = weight * s[informed]
    df = c.sum() ** 2 / (c**2).sum()
    p = scipy.stats.chi2.sf(df + total * np.sqrt(2 * df / variance), df)
    tau = np.sqrt(max(0.0, total.mean()) / (c @ pairs[informed]))
    return Tested(subject, float(tau), float(np.median(p)))


def _variances(z: Residuals, a: Rows, codes: Int[np.ndarray, " rows"]) -> Rows:
    """Variance of each row: its mean in deciles of a, times its cluster's ratio, shrunk to 1."""
    squares = (z**2).mean(1)
    decile = np.searchsorted(np.quantile(a, np.arange(0.1, 1, 0.1)), a)
    variances = (np.bincount(decile, squares) / np.bincount(decile).clip(min=1))[decile]
    ratio = np.bincount(codes, squares / variances.clip(min=1e-12)) + CLUSTER_ROWS
    return np.asarray(variances * (ratio / (np.bincount(codes) + CLUSTER_ROWS))[codes])


def without_curve(z: Residuals, basis: Float[np.ndarray, "rows columns"]) -> Residuals:
    """Residuals without their projection on these columns, which need not be orthogonal."""
    q = orthonormal(basis)
    return np.asarray(z - q @ (q.T @ z))


def without_slopes(z: Residuals, a: Rows, codes: Int[np.ndarray, " rows"]) -> Residuals:
    """Residuals without a slope on a, fitted in every cluster by least squares."""
    sums, s = _cluster_sums(a, codes)
    return np.asarray(z - a[:, None] * ((sums @ z) / np.where(s, s, 1)[:, None])[codes])


def _cluster_sums(
    a: Rows, codes: Int[np.ndarray, " rows"]
) -> tuple[scipy.sparse.csr_array, Float[np.ndarray, " clusters"]]:
    """The matrix that sums a z by cluster, and the clusters' sums of a^2."""
    count = int(codes.max()) + 1
    sums = scipy.sparse.csr_array((a, (codes, np.arange(len(codes)))), (count, len(codes)))
    return sums, np.bincount(codes, a**2, count)


def spread_scores(z: Residuals) -> Residuals:
    r"""v = :math:`\Phi^{-1}(2 \Phi(|z|) - 1)`: standard normal if z is, and larger for a larger sd.

    Tests of the spread by v hold exactly, and do not depend on single rows as tests by z^2 do.

    Examples
    --------
    >>> spread_scores(np.array([[0.6745]])).round(3).tolist()
    [[0.0]]
    """
    outside = 2 * scipy.special.ndtr(-np.abs(z))  # P(|Z| > |z|)
    return np.asarray(-scipy.special.ndtri(outside.clip(1e-16, 1 - 1e-15)))


def lag_one(
    subject: str, z: Residuals, codes: Int[np.ndarray, " rows"], order: Rows
) -> Tested | None:
    r"""Correlation of neighbours within clusters, :math:`r = \sum z_i z_{i-1} / m \sim N(0, 1/m)`.

    z are the normal scores of the residuals' ranks, so that heavy tails or a spread that differs
    between rows are not taken for a correlation.

    The residuals of a posterior draw contain the uncertainty of the clusters' effects; therefore r
    has no bias from estimated intercepts, as the correlation of fitted residuals has.

    Returns
    -------
    Tested or None
        None if fewer than 20 pairs of neighbours exist.
    """
    sort = np.lexsort((order, codes))
    first, second = sort[:-1], sort[1:]
    same = codes[first] == codes[second]
    if same.sum() < 20:
        return None
    first, second = first[same], second[same]
    z = scipy.special.ndtri((scipy.stats.rankdata(z, axis=0) - 0.5) / len(z))
    products = np.einsum("nd,nd->d", z[first], z[second])
    p = 2 * scipy.stats.norm.sf(np.abs(products) / np.sqrt(len(first)))
    size = np.sqrt((z[first] ** 2).mean(0) * (z[second] ** 2).mean(0))
    return Tested(subject, float((products / len(first) / size).mean()), float(np.median(p)))


def moments(z: Residuals) -> tuple[Tested, Tested]:
    """Skewness and excess kurtosis of the residuals, with D'Agostino's and Anscombe's tests."""
    skew, tails = scipy.stats.skewtest(z), scipy.stats.kurtosistest(z)
    return (
        Tested("skewness", float(scipy.stats.skew(z).mean()), float(np.median(skew.pvalue))),
        Tested("tails", float(scipy.stats.kurtosis(z).mean()), float(np.median(tails.pvalue))),
    )
