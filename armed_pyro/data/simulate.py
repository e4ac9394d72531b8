"""Simulated data with known truth: the paper's spirals, and linear mixed models of any family."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.random import Generator

from armed_pyro.data.clustered import ClusteredData

__all__ = ["MixedModelTruth", "SpiralsTruth", "mixed_model", "spirals"]


@dataclass(frozen=True, eq=False)
class SpiralsTruth:
    """What the spirals were drawn from.

    Attributes
    ----------
    radius : Float[ndarray, "clusters"]
        Radius of each cluster's spirals at the end of their turn.
    ratio : Float[ndarray, "clusters"]
        Share of each cluster's rows that are of class 1.
    noise, probe_sd : float
        Standard deviations of the coordinates and of the probes.
    """

    radius: Float[np.ndarray, " clusters"]
    ratio: Float[np.ndarray, " clusters"]
    noise: float
    probe_sd: float

    def probability(
        self, data: ClusteredData, *, cluster_known: bool
    ) -> Float[np.ndarray, " rows"]:
        r"""P(y = 1 | x, cluster), or P(y = 1 | x) where the cluster is not known.

        .. math:: P(y = 1 | x) \propto \sum_k P(k | probes) \, p_k \, p(x_1, x_2 | r_k, y = 1)

        over equally frequent clusters. No classifier of these rows can expect to be more accurate
        than the one that names the class with the higher probability.

        Parameters
        ----------
        data : ClusteredData
            Rows that `spirals` returned with this truth.
        cluster_known : bool
            Whether P(k | probes) is replaced by the row's own cluster.
        """
        x, probes = np.split(data.features.numpy(), [2], axis=1)
        apart = ((probes[:, None] - self.ratio[:, None]) ** 2).sum(-1)
        weight = np.exp(-0.5 * (apart - apart.min(1, keepdims=True)) / self.probe_sd**2)
        if cluster_known:
            weight = np.eye(len(self.ratio))[data.grouping("site").labels()]
        turn = (np.arange(300) + 0.5) / 300 * 2 * np.pi
        joint = np.zeros((2, len(x)))
        for k, (radius, ratio) in enumerate(zip(self.radius, self.ratio, strict=True)):
            for label, share in enumerate([1 - ratio, ratio]):
                apart = ((x[:, None] - _spiral(radius, turn, label)) ** 2).sum(-1)
                density = np.exp(-0.5 * apart / self.noise**2).mean(1)
                joint[label] += weight[:, k] * share * density
        # A row far from every arm has no density left: either class is as good.
        return (joint[1] + 1e-300) / (joint.sum(0) + 2e-300)


def spirals(
    n_clusters: int = 10,
    rows: int = 1000,
    *,
    radius_sd: float = 0.3,
    noise: float = 0.1,
    ratio_sd: float = 0.0,
    probes: int = 0,
    probe_sd: float = 0.2,
    seed: int = 0,
) -> tuple[ClusteredData, SpiralsTruth]:
    r"""Two interleaved Archimedean spirals in every cluster, larger in some than in others.

    .. math::
        r_k &\sim N(1, radius\_sd^2), \quad
            p_k \sim N(0.5, ratio\_sd^2) \text{ clipped to } [0.1, 0.9] \\
        t_i &\sim U(0, 2 \pi), \quad P(y_i = 1) = p_k, \quad
            \rho_i = r_k \, t_i / 2 \pi \\
        x_i &\sim N\big(\rho_i (\cos(t_i + \pi y_i), \sin(t_i + \pi y_i)), noise^2 I\big), \quad
            probe_i \sim N(p_k, probe\_sd^2)

    so that a cluster of radius 1 fills the square from -1 to 1. With `ratio_sd`, the cluster
    confounds: a probe tells how frequent class 1 is in a row's cluster, and nothing else.

    Parameters
    ----------
    n_clusters, rows : int
        Clusters, and rows in each. Exactly the share :math:`p_k` of them (rounded) is of class 1.
    radius_sd, noise, ratio_sd, probe_sd : float
        Standard deviations.
    probes : int
        Number of probe features.
    seed : int
        Seed of the draws.

    Returns
    -------
    ClusteredData
        Features x1, x2, probe1, ...; outcome ``label`` (0 or 1); grouping factor ``site``.
    SpiralsTruth
        The clusters' radii and class ratios.

    Raises
    ------
    ValueError
        If there are fewer than 2 clusters or than 10 rows in each, or a negative sd.

    References
    ----------
    Nguyen, Treacher, Montillo (2023), IEEE TPAMI 45(7), section 4.1.

    Examples
    --------
    >>> data, truth = spirals(3, 50, ratio_sd=0.2, probes=1)
    >>> data.feature_names, truth.radius.shape
    (('x1', 'x2', 'probe1'), (3,))
    """
    _check_sizes(n_clusters, [rows], least=10)
    sds = {"radius_sd": radius_sd, "noise": noise, "ratio_sd": ratio_sd, "probe_sd": probe_sd}
    for name, sd in sds.items():
        if sd < 0:
            raise ValueError(f"`{name}` is a standard deviation and must not be negative, not {sd}")
    rng = np.random.default_rng(seed)
    radius = rng.normal(1.0, radius_sd, n_clusters)
    ratio = rng.normal(0.5, ratio_sd, n_clusters).clip(0.1, 0.9)
    site = np.repeat(np.arange(n_clusters), rows)
    label = np.arange(rows) < np.round(ratio * rows)[:, None]
    turn = rng.uniform(0.0, 2 * np.pi, n_clusters * rows)
    x = _spiral(radius[site], turn, label.ravel())
    x += rng.normal(0.0, noise, x.shape)
    probe = ratio[site][:, None] + rng.normal(0.0, probe_sd, (len(site), probes))
    data = ClusteredData.from_arrays(
        np.hstack([x, probe]),
        label.ravel().astype(float),
        {"site": site},
        feature_names=["x1", "x2", *(f"probe{i + 1}" for i in range(probes))],
        outcome_name="label",
    )
    return data, SpiralsTruth(radius, ratio, noise, probe_sd)


def _spiral(
    radius: float | np.ndarray, turn: np.ndarray, label: int | np.ndarray
) -> Float[np.ndarray, "turns 2"]:
    """Points of an arm of the spiral; that of class 1 is rotated by half a turn."""
    angle = turn + np.pi * label
    return (radius * turn / (2 * np.pi) * np.array([np.cos(angle), np.sin(angle)])).T


@dataclass(frozen=True, eq=False)
class MixedModelTruth:
    """What the rows of a mixed model were drawn from, on the original scale.

    Terms are ordered as the program orders them: by column of phi (intercept, x0, x1, ...), then,
    for categorical outcomes, by column of the predictor.

    Attributes
    ----------
    coefficients : Float[ndarray, "fixed columns"]
        Fixed effects, the intercept first.
    sd : Float[ndarray, "terms"]
        Standard deviations of the random effects.
    cor : Float[ndarray, "terms terms"]
        Their correlations.
    effects : Float[ndarray, "clusters terms"]
        The random effects drawn.
    eta : Float[ndarray, "rows columns"]
        The linear predictor drawn.
    dispersion : float
        Residual sd (gaussian) or shape (negative binomial); without meaning for the others.
    """

    coefficients: Float[np.ndarray, "fixed columns"]
    sd: Float[np.ndarray, " terms"]
    cor: Float[np.ndarray, "terms terms"]
    effects: Float[np.ndarray, "clusters terms"]
    eta: Float[np.ndarray, "rows columns"]
    dispersion: float


def mixed_model(
    family: str = "gaussian",
    n_clusters: int = 20,
    rows: int | Sequence[int] = 20,
    *,
    sd: Sequence[float] = (1.0,),
    cor: float | Float[np.ndarray, "terms terms"] = 0.0,
    coefficients: Sequence[float] | Float[np.ndarray, "fixed columns"] = (0.0, 1.0),
    dispersion: float = 1.0,
    trials: int = 10,
    seed: int = 0,
) -> tuple[ClusteredData, MixedModelTruth]:
    r"""Rows of a linear mixed model, with random intercept and slopes.

    .. math::
        x_i &\sim N(0, I), \quad u_k \sim N(0, diag(sd) R \, diag(sd)) \\
        \eta_i &= (1, x_i)^\top \beta + (1, x_{i0}, x_{i1}, \dots)^\top u_{k(i)}, \quad
            y_i \sim Family(\eta_i, dispersion)

    Parameters
    ----------
    family : str
        gaussian, bernoulli, binomial, categorical, poisson or negative_binomial, with the
        library's links.
    n_clusters : int
        Clusters.
    rows : int or sequence of int
        Rows in each cluster.
    sd : sequence of float
        Standard deviations of the random intercept and of the slopes on x0, x1, ...
    cor : float or Float[ndarray, "terms terms"]
        Correlation of every two random effects, or their correlation matrix.
    coefficients : sequence of float, or Float[ndarray, "fixed columns"]
        Fixed intercept and coefficients of x0, x1, ...; a matrix for categorical outcomes, with a
        column for each class but the first. There each column has random effects of its own,
        independent of the others'.
    dispersion : float
        Residual sd (gaussian) or shape (negative binomial).
    trials : int
        Trials of each row (binomial).
    seed : int
        Seed of the draws.

    Returns
    -------
    ClusteredData
        Features x0, x1, ...; outcome ``y``; grouping factor ``site``.
    MixedModelTruth
        Parameters and random effects.

    Raises
    ------
    ValueError
        If sizes do not match, an sd is negative, the correlations are not a correlation matrix,
        or the family is not known.

    Examples
    --------
    >>> data, truth = mixed_model("poisson", 5, 10, sd=[0.5, 0.2], cor=0.3)
    >>> data.n_rows, truth.effects.shape
    (50, (5, 2))
    """
    sizes = [rows] * n_clusters if isinstance(rows, int) else list(rows)
    _check_sizes(n_clusters, sizes, least=1)
    scale, beta = np.asarray(sd, dtype=float), np.asarray(coefficients, dtype=float)
    beta = beta if beta.ndim == 2 else beta[:, None]
    if family not in _SAMPLERS:
        raise ValueError(f"unknown family {family!r}: choose one of {', '.join(sorted(_SAMPLERS))}")
    if len(sizes) != n_clusters:
        raise ValueError(f"`rows` has {len(sizes)} sizes for {n_clusters} clusters: give one each")
    if not 1 <= len(scale) <= len(beta) or (scale < 0).any():
        raise ValueError(
            f"`sd` must be non-negative numbers for the intercept and at most the "
            f"{len(beta) - 1} feature(s) that have coefficients, not {scale.tolist()}"
        )
    if beta.shape[1] > 1 and family != "categorical":
        raise ValueError(f"family {family!r} has one predictor: give `coefficients` as a list")
    one_column = _correlations(cor, len(scale))
    columns = beta.shape[1]
    sds = np.repeat(scale, columns)
    correlations = np.kron(one_column, np.eye(columns))

    rng = np.random.default_rng(seed)
    site = np.repeat(np.arange(n_clusters), sizes)
    x = np.column_stack([np.ones(len(site)), rng.normal(size=(len(site), len(beta) - 1))])
    white = rng.normal(size=(n_clusters, len(sds)))
    effects = white @ np.linalg.cholesky(correlations).T * sds
    mine = effects[site].reshape(len(site), len(scale), columns)
    eta = x @ beta + (x[:, : len(scale), None] * mine).sum(1)
    data = ClusteredData.from_arrays(
        x[:, 1:],
        _SAMPLERS[family](rng, eta, dispersion, trials).astype(float),
        {"site": site},
        outcome_name="y",
        classes=range(columns + 1) if family == "categorical" else None,
        trials=np.full(len(site), trials) if family == "binomial" else None,
    )
    return data, MixedModelTruth(beta, sds, correlations, effects, eta, dispersion)


def _check_sizes(n_clusters: int, sizes: Sequence[int], least: int) -> None:
    if n_clusters < 2 or min(sizes, default=0) < least:
        raise ValueError(
            f"clustered data need at least 2 clusters with at least {least} row(s) each, not "
            f"{n_clusters} with {list(sizes)}"
        )


def _correlations(cor: float | np.ndarray, n: int) -> np.ndarray:
    matrix = np.asarray(cor, dtype=float)
    if matrix.ndim == 0:
        matrix = np.full((n, n), float(matrix)) + (1 - float(matrix)) * np.eye(n)
    fine = matrix.shape == (n, n) and np.allclose(matrix, matrix.T)
    if not fine or not np.allclose(np.diag(matrix), 1) or np.linalg.eigvalsh(matrix).min() <= 0:
        raise ValueError(
            f"`cor` must be one correlation, or a positive definite {n} x {n} correlation matrix, "
            f"not {np.asarray(cor).tolist()}"
        )
    return matrix


def _sigmoid(eta: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-eta))


def _classes(rng: Generator, eta: np.ndarray) -> np.ndarray:
    # The largest of logits plus Gumbel noise is a draw from their softmax.
    logits = np.hstack([np.zeros_like(eta[:, :1]), eta])
    return (logits + rng.gumbel(size=logits.shape)).argmax(1)


# Written without the library's families, so that tests compare two independent statements.
_SAMPLERS: Mapping[str, Callable[[Generator, np.ndarray, float, int], np.ndarray]] = {
    "gaussian": lambda rng, eta, sd, trials: rng.normal(eta[:, 0], sd),
    "bernoulli": lambda rng, eta, _, trials: rng.binomial(1, _sigmoid(eta[:, 0])),
    "binomial": lambda rng, eta, _, trials: rng.binomial(trials, _sigmoid(eta[:, 0])),
    "categorical": lambda rng, eta, _, trials: _classes(rng, eta),
    "poisson": lambda rng, eta, _, trials: rng.poisson(np.exp(eta[:, 0])),
    "negative_binomial": lambda rng, eta, shape, trials: rng.negative_binomial(
        shape, shape / (shape + np.exp(eta[:, 0]))
    ),
}
