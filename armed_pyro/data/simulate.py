"""Simulated spirals with known truth, as in the ARMED paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from armed_pyro.data.clustered import ClusteredData


@dataclass(frozen=True, eq=False)
class SpiralsTruth:
    """Parameters from which the spirals were drawn.

    These are the radius of each cluster's spirals at the end of their turn, the share of each
    cluster's rows that are of class 1 (`ratio`), and the standard deviations of the coordinates
    (`noise`) and of the probes.
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

        The sum is over equally frequent clusters; a known cluster replaces P(k | probes). The class
        with the higher probability gives the highest expected accuracy that any classifier of these
        rows, which `spirals` returned with this truth, can reach.
        """
        x, probes = np.split(data.features.numpy(), [2], axis=1)
        distance = ((probes[:, None] - self.ratio[:, None]) ** 2).sum(-1)
        weight = np.exp(-0.5 * (distance - distance.min(1, keepdims=True)) / self.probe_sd**2)
        if cluster_known:
            weight = np.eye(len(self.ratio))[data.grouping("site").labels()]
        turn = (np.arange(300) + 0.5) / 300 * 2 * np.pi
        joint = np.zeros((2, len(x)))
        for k, (radius, ratio) in enumerate(zip(self.radius, self.ratio, strict=True)):
            for label, share in enumerate([1 - ratio, ratio]):
                distance = ((x[:, None] - _spiral(radius, turn, label)) ** 2).sum(-1)
                density = np.exp(-0.5 * distance / self.noise**2).mean(1)
                joint[label] += weight[:, k] * share * density
        # The density of a row far from both arms underflows to 0: its probability is then 1/2.
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
    r"""Two interleaved Archimedean spirals in every cluster, of a radius that varies by cluster.

    .. math::
        r_k &\sim N(1, radius\_sd^2), \quad
            p_k \sim N(0.5, ratio\_sd^2) \text{ clipped to } [0.1, 0.9] \\
        t_i &\sim U(0, 2 \pi), \quad P(y_i = 1) = p_k, \quad
            \rho_i = r_k \, t_i / 2 \pi \\
        x_i &\sim N\big(\rho_i (\cos(t_i + \pi y_i), \sin(t_i + \pi y_i)), noise^2 I\big), \quad
            probe_i \sim N(p_k, probe\_sd^2)

    Each cluster has `rows` rows; a share :math:`p_k` of them, rounded to whole rows, is of class 1.
    A cluster of radius 1 fills the square from -1 to 1. With `ratio_sd` above 0 the cluster
    confounds: a probe depends on the frequency of class 1 in the row's cluster, and on nothing
    else. The data have features x1, x2, probe1, ...; outcome ``label`` (0 or 1); grouping factor
    ``site``.

    Raises
    ------
    ValueError
        If there are fewer than 2 clusters, fewer than 10 rows in each, or a negative sd.

    References
    ----------
    Nguyen, Treacher, Montillo (2023), IEEE TPAMI 45(7), section 4.1.

    Examples
    --------
    >>> data, truth = spirals(3, 50, ratio_sd=0.2, probes=1)
    >>> data.feature_names, truth.radius.shape
    (('x1', 'x2', 'probe1'), (3,))
    """
    check_sizes(n_clusters, [rows], least=10)
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
    """Points of one arm of the spiral; the arm of class 1 is rotated by half a turn."""
    angle = turn + np.pi * label
    return (radius * turn / (2 * np.pi) * np.array([np.cos(angle), np.sin(angle)])).T


def check_sizes(n_clusters: int, sizes: Sequence[int], least: int) -> None:
    """Raise ValueError unless there are two clusters, with at least `least` rows each."""
    if n_clusters < 2 or min(sizes, default=0) < least:
        raise ValueError(
            f"clustered data need at least 2 clusters with at least {least} row(s) each, not "
            f"{n_clusters} with {list(sizes)}"
        )
