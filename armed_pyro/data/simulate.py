"""Simulated data with known truth: the spirals of the ARMED paper, and a panel of wages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float

from armed_pyro.data.clustered import ClusteredData

__all__ = ["SpiralsTruth", "WagesTruth", "check_sizes", "spirals", "wages"]

# Effects of the binary columns on log wages, near those that wage equations of the panel report.
WAGE_GAPS = {"fem": -0.35, "black": -0.15, "union": 0.07, "south": -0.06, "married": 0.05}
# The share of people with a 1 in the first year.
SHARES = {"fem": 0.11, "black": 0.07, "union": 0.36, "south": 0.29, "married": 0.81}
CONSTANT = ("fem", "black")  # the other columns change in some years
CHANGES = 0.03  # share of people whose value of such a column changes in a year
WEEKS_SLOPE = 0.002


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
    _check_sds(sds)
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


@dataclass(frozen=True, eq=False)
class WagesTruth:
    """Parameters from which the panel of wages was drawn.

    `table` holds all columns, the year among them. `coefficients` are the slopes of the columns
    other than ``exper``, whose slopes are `within` and `between`. `mean` is E[lwage | x] of a new
    person, whose mean experience is known, and `effects` are the intercepts of the people.
    """

    table: pd.DataFrame
    within: float
    between: float
    coefficients: Mapping[str, float]
    effects: Float[np.ndarray, " people"]
    mean: Float[np.ndarray, " rows"]
    person_sd: float
    residual_sd: float

    @property
    def new_person_sd(self) -> float:
        """The lowest expected RMSE of predictions for new people."""
        return float(np.hypot(self.person_sd, self.residual_sd))


def wages(
    n_people: int = 595,
    n_years: int = 7,
    *,
    within: float = 0.10,
    between: float = 0.01,
    education: float = 0.06,
    person_sd: float = 0.3,
    residual_sd: float = 0.15,
    seed: int = 0,
) -> tuple[ClusteredData, WagesTruth]:
    r"""A panel of log wages whose slope of experience differs within and between people.

    .. math::
        lwage_{it} &= within \, (exper_{it} - \overline{exper}_i)
            + between \, \overline{exper}_i + z_{it}^\top \gamma + u_i + e_{it} \\
        u_i &\sim N(0, person\_sd^2), \quad e_{it} \sim N(0, residual\_sd^2)

    The structure is that of Cornwell and Rupert's panel: 595 people in 7 years. Experience grows by
    1 in every year; mean experience differs between people with an sd of about 11. The columns z
    are weeks worked, years of education, and binary columns that are constant (``fem``, ``black``)
    or nearly constant (``union``, ``south``, ``married``) within people. Unless the two slopes are
    equal, a person's intercept in a model of ``exper`` alone is correlated with the feature.

    The data have outcome ``lwage`` and grouping factor ``id``. The year is not a feature, as it
    would tell ``exper`` within people from ``exper`` between people; it is in `WagesTruth.table`.

    Parameters
    ----------
    within, between : float
        Slopes of experience within and between people.
    education : float
        Slope of years of education, the return to education.
    person_sd, residual_sd : float
        Standard deviations of the people's intercepts and of the rows.

    Raises
    ------
    ValueError
        If there are fewer than 2 people, fewer than 2 years, or a negative sd.

    References
    ----------
    Cornwell and Rupert (1988), Journal of Applied Econometrics 3(2). Mundlak (1978), Econometrica
    46(1).

    Examples
    --------
    >>> data, truth = wages(50)
    >>> data.n_rows, data.feature_names[:3], truth.within
    (350, ('exper', 'weeks', 'ed'), 0.1)
    """
    check_sizes(n_people, [n_years], least=2)
    _check_sds({"person_sd": person_sd, "residual_sd": residual_sd})
    rng = np.random.default_rng(seed)
    table = _wage_columns(rng, n_people, n_years)
    person = table["id"].to_numpy() - 1
    mean_experience = table.groupby("id")["exper"].transform("mean")
    coefficients = {"weeks": WEEKS_SLOPE, "ed": education, **WAGE_GAPS}
    mean = 5.5 + within * (table["exper"] - mean_experience) + between * mean_experience
    mean += (table[list(coefficients)] * pd.Series(coefficients)).sum(axis=1)
    effects = rng.normal(0.0, person_sd, n_people)
    table["lwage"] = mean + effects[person] + rng.normal(0.0, residual_sd, len(table))
    features = ["exper", *coefficients]
    data = ClusteredData.from_frame(table, outcome="lwage", clusters=["id"], features=features)
    truth = WagesTruth(
        table, within, between, coefficients, effects, mean.to_numpy(), person_sd, residual_sd
    )
    return data, truth


def _wage_columns(rng: np.random.Generator, n_people: int, n_years: int) -> pd.DataFrame:
    """Columns of the panel but the wage, one row per person and year."""
    first = rng.gamma(2.2, 8.0, n_people).clip(1, 44).round()
    # Older people have had less education: the correlation is about -0.2, as in the panel.
    schooling = (13 - 0.06 * (first - 17) + rng.normal(0, 2.6, n_people)).round().clip(4, 17)
    usual_weeks = rng.normal(47.0, 3.0, n_people)
    weeks = usual_weeks[:, None] + rng.normal(0.0, 4.0, (n_people, n_years))
    columns = {
        "id": np.repeat(np.arange(1, n_people + 1), n_years),
        "year": np.tile(np.arange(1, n_years + 1), n_people),
        "exper": (first[:, None] + np.arange(n_years)).ravel(),
        "weeks": weeks.round().clip(5, 52).ravel(),
        "ed": np.repeat(schooling, n_years),
    }
    for name, share in SHARES.items():
        value = rng.random((n_people, 1)) < share
        changed = rng.random((n_people, n_years)) < (0.0 if name in CONSTANT else CHANGES)
        changed[:, 0] = False
        columns[name] = (value ^ (changed.cumsum(1) % 2 == 1)).astype(int).ravel()
    return pd.DataFrame(columns)


def check_sizes(n_clusters: int, sizes: Sequence[int], least: int) -> None:
    """Raise ValueError unless there are two clusters, with at least `least` rows each."""
    if n_clusters < 2 or min(sizes, default=0) < least:
        raise ValueError(
            f"clustered data need at least 2 clusters with at least {least} row(s) each, not "
            f"{n_clusters} with {list(sizes)}"
        )


def _check_sds(sds: Mapping[str, float]) -> None:
    """Raise ValueError for a negative standard deviation."""
    for name, sd in sds.items():
        if sd < 0:
            raise ValueError(f"`{name}` is a standard deviation and must not be negative, not {sd}")
