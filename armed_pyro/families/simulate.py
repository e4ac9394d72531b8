"""Simulated rows of linear mixed models of any family, with known truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.data.simulate import check_sizes
from armed_pyro.families.registry import family_named

__all__ = ["MixedModelTruth", "mixed_model"]


@dataclass(frozen=True, eq=False)
class MixedModelTruth:
    """Parameters from which the rows of a mixed model were drawn, on the original scale.

    Terms have the program's order: by column of phi (intercept, x0, x1, ...), then, for
    categorical outcomes, by column of the predictor.

    """

    coefficients: Float[np.ndarray, "fixed columns"]  # the intercept first
    sd: Float[np.ndarray, " terms"]  # of the random effects
    cor: Float[np.ndarray, "terms terms"]
    effects: Float[np.ndarray, "clusters terms"]
    eta: Float[np.ndarray, "rows columns"]
    dispersion: float | Mapping[str, float]  # the family's parameters, if it has any


def mixed_model(
    family: str = "gaussian",
    n_clusters: int = 20,
    rows: int | Sequence[int] = 20,
    *,
    sd: Sequence[float] = (1.0,),
    cor: float | Float[np.ndarray, "terms terms"] = 0.0,
    coefficients: Sequence[float] | Float[np.ndarray, "fixed columns"] = (0.0, 1.0),
    dispersion: float | Mapping[str, float] = 1.0,
    trials: int = 10,
    seed: int = 0,
) -> tuple[ClusteredData, MixedModelTruth]:
    r"""Rows of a linear mixed model, with random intercept and slopes.

    .. math::
        x_i &\sim N(0, I), \quad u_k \sim N(0, diag(sd) R \, diag(sd)) \\
        \eta_i &= (1, x_i)^\top \beta + (1, x_{i0}, x_{i1}, \dots)^\top u_{k(i)}, \quad
            y_i \sim Family(\eta_i, parameters)

    The data have features x0, x1, ..., the outcome ``y``, drawn by `Family.simulate`, and the
    grouping factor ``site``.

    Parameters
    ----------
    rows : int or sequence of int
        Number of rows in each cluster.
    sd : sequence of float
        Standard deviations of the random intercept and of the slopes on x0, x1, ...
    cor : float or Float[ndarray, "terms terms"]
        Correlation of every pair of random effects, or their correlation matrix.
    coefficients : sequence of float, or Float[ndarray, "fixed columns"]
        Fixed intercept and coefficients of x0, x1, ...; for categorical outcomes a matrix with one
        column for each class but the first. Random effects of different columns are independent.
    dispersion : float or mapping of str to float
        Values of the family's parameters by name, such as the residual sd (gaussian) or the shape
        (negative binomial). A single number is the value of every parameter.
    trials : int
        Trials of each row, where the family needs them.

    Raises
    ------
    ValueError
        If sizes do not match, an sd is negative, the family is unknown, or R is no correlation
        matrix.

    Examples
    --------
    >>> data, truth = mixed_model("poisson", 5, 10, sd=[0.5, 0.2], cor=0.3)
    >>> data.n_rows, truth.effects.shape
    (50, (5, 2))
    """
    sizes = [rows] * n_clusters if isinstance(rows, int) else list(rows)
    check_sizes(n_clusters, sizes, least=1)
    scale, beta = np.asarray(sd, dtype=float), np.asarray(coefficients, dtype=float)
    beta = beta if beta.ndim == 2 else beta[:, None]
    outcome = family_named(family)
    if len(sizes) != n_clusters:
        raise ValueError(f"`rows` has {len(sizes)} sizes for {n_clusters} clusters: give one each")
    if not 1 <= len(scale) <= len(beta) or (scale < 0).any():
        raise ValueError(
            f"`sd` must be non-negative numbers for the intercept and at most the "
            f"{len(beta) - 1} feature(s) that have coefficients, not {scale.tolist()}"
        )
    if beta.shape[1] > 1 and not outcome.multiclass:
        raise ValueError(f"family {family!r} has one predictor: give `coefficients` as a list")
    columns = beta.shape[1]
    sds = np.repeat(scale, columns)
    correlations = np.kron(_correlations(cor, len(scale)), np.eye(columns))

    rng = np.random.default_rng(seed)
    site = np.repeat(np.arange(n_clusters), sizes)
    x = np.column_stack([np.ones(len(site)), rng.normal(size=(len(site), len(beta) - 1))])
    white = rng.normal(size=(n_clusters, len(sds)))
    effects = white @ np.linalg.cholesky(correlations).T * sds
    row_effects = effects[site].reshape(len(site), len(scale), columns)
    eta = x @ beta + (x[:, : len(scale), None] * row_effects).sum(1)
    parameters = dispersion
    if not isinstance(parameters, Mapping):
        size = parameters
        parameters = {one.name: one.simulated(size) for one in outcome.parameters}
    data = ClusteredData.from_arrays(
        x[:, 1:],
        outcome.simulate(rng, eta, parameters, trials).astype(float),
        {"site": site},
        outcome_name="y",
        classes=range(columns + 1) if outcome.multiclass else None,
        trials=np.full(len(site), trials) if outcome.needs_trials else None,
    )
    return data, MixedModelTruth(beta, sds, correlations, effects, eta, dispersion)


def _correlations(cor: float | np.ndarray, n: int) -> np.ndarray:
    matrix = np.asarray(cor, dtype=float)
    if matrix.ndim == 0:
        matrix = np.full((n, n), float(matrix)) + (1 - float(matrix)) * np.eye(n)
    symmetric = matrix.shape == (n, n) and np.allclose(matrix, matrix.T)
    correlations = symmetric and np.allclose(np.diag(matrix), 1)
    if not correlations or np.linalg.eigvalsh(matrix).min() <= 0:
        raise ValueError(
            f"`cor` must be one correlation, or a positive definite {n} x {n} correlation matrix, "
            f"not {np.asarray(cor).tolist()}"
        )
    return matrix
