"""Simulated subjects in the shape of ADNI's, with mild cognitive impairment, at many sites."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy.random import Generator

__all__ = ["TRUE_FEATURES", "SubjectsTruth", "subjects"]

# Mean, standard deviation, and correlation with the severity of the disease.
NUMBERS: Mapping[str, tuple[float, float, float]] = {
    "AGE": (73.0, 7.3, 0.1),
    "PTEDUCAT": (16.0, 2.8, -0.1),
    "APOE4": (0.55, 0.65, 0.2),
    "FDG": (6.2, 0.65, -0.4),
    "AV45": (1.2, 0.22, 0.3),
    "ABETA": (960.0, 430.0, -0.3),
    "TAU": (290.0, 130.0, 0.3),
    "PTAU": (28.0, 14.0, 0.3),
    "CDRSB": (1.5, 0.9, 0.4),
    "ADAS11": (10.2, 4.5, 0.5),
    "ADAS13": (16.6, 6.8, 0.5),
    "MMSE": (27.6, 1.8, -0.4),
    "RAVLT_immediate": (35.0, 10.7, -0.4),
    "RAVLT_learning": (4.2, 2.5, -0.3),
    "RAVLT_forgetting": (4.6, 2.5, 0.1),
    "RAVLT_perc_forgetting": (58.0, 32.0, 0.4),
    "LDELTOTAL": (6.3, 3.3, -0.4),
    "TRABSCOR": (110.0, 60.0, 0.4),
    "FAQ": (2.9, 3.9, 0.4),
    "Ventricles": (40000.0, 22000.0, 0.2),
    "Hippocampus": (6800.0, 1100.0, -0.4),
    "WholeBrain": (1030000.0, 105000.0, -0.2),
    "Entorhinal": (3500.0, 740.0, -0.4),
    "Fusiform": (17500.0, 2600.0, -0.3),
    "MidTemp": (19700.0, 2900.0, -0.3),
    "ICV": (1540000.0, 165000.0, 0.0),
}
# Measures that share what severity leaves over, and the square of the loading they share it with.
GROUPS: tuple[tuple[str, ...], ...] = (
    ("ADAS11", "ADAS13", "CDRSB", "MMSE"),
    ("RAVLT_immediate", "RAVLT_learning", "LDELTOTAL"),
    ("TAU", "PTAU"),
    ("Hippocampus", "Entorhinal", "Fusiform", "MidTemp"),
    ("WholeBrain", "ICV", "Ventricles"),
)
SHARED = 0.5
CATEGORIES: Mapping[str, Mapping[str, float]] = {
    "PTGENDER": {"Male": 0.6, "Female": 0.4},
    "PTETHCAT": {"Not Hisp/Latino": 0.94, "Hisp/Latino": 0.06},
    "PTRACCAT": {"White": 0.88, "Black": 0.07, "Asian": 0.05},
    "PTMARRY": {"Married": 0.74, "Widowed": 0.12, "Divorced": 0.09, "Never married": 0.05},
}
# Examinations that some subjects do not have, and their share.
MISSING: Mapping[tuple[str, ...], float] = {
    ("FDG",): 0.25,
    ("AV45",): 0.45,
    ("ABETA", "TAU", "PTAU"): 0.3,
    ("Hippocampus", "Entorhinal", "Fusiform", "MidTemp"): 0.1,
}
# Of complete measures, so that what a model can learn of them is known.
EFFECTS: Mapping[str, float] = {"APOE4": 1.0, "ADAS13": 1.0, "LDELTOTAL": -1.0, "FAQ": 1.0}
TRUE_FEATURES: tuple[str, ...] = tuple(EFFECTS)


@dataclass(frozen=True, eq=False)
class SubjectsTruth:
    """What the subjects were drawn from.

    Attributes
    ----------
    effects : mapping of str to float
        Log odds ratio of conversion, per standard deviation of a feature; 0 for all others.
    intercept : pandas.Series
        Each site's, as log odds.
    probability : Float[ndarray, "rows"]
        P(converted | features, site).
    fixed : Float[ndarray, "rows"]
        Log odds of conversion at a site whose intercept is 0.
    """

    effects: Mapping[str, float]
    intercept: pd.Series
    probability: Float[np.ndarray, " rows"]
    fixed: Float[np.ndarray, " rows"]


def subjects(
    n_seen: int = 392,
    n_unseen: int = 300,
    *,
    site_sd: float = 1.5,
    probes: int = 0,
    probe_sd: float = 0.1,
    seed: int = 0,
) -> tuple[pd.DataFrame, SubjectsTruth]:
    r"""One row a subject: 20 large sites, 34 small ones.

    .. math::
        s_i &\sim N(0, 1), \quad x_{ij} = \mu_j + \sigma_j (\lambda_j s_i + \text{shared} +
            \text{noise}) \\
        b_k &\sim N(0, site\_sd^2), \quad P(y_i = 1) = logit^{-1}(-0.7 + z_i^\top \beta
            + b_{k(i)}) \\
        probe_i &\sim N(logit^{-1}(b_{k(i)}), probe\_sd^2)

    with z the standardised features. A probe tells a site's conversion rate, and nothing else of
    a subject: a model that uses it is confounded, and misled at other sites, where probes are
    drawn from the rate of a random other site.

    Parameters
    ----------
    n_seen, n_unseen : int
        Subjects at the 20 sites for training, and at the 34 others.
    site_sd : float
        Standard deviation of the sites' intercepts, in log odds.
    probes : int
        Number of probe features.
    probe_sd : float
        Their standard deviation within sites.
    seed : int
        Seed of the draws.

    Returns
    -------
    pandas.DataFrame
        Columns SITE, converted (0 or 1), large (whether the site is one of the 20), and the
        features under ADNI's names, some of them missing.
    SubjectsTruth
        Effects and site intercepts.

    Raises
    ------
    ValueError
        If there are too few subjects for the sites, or a standard deviation is negative.

    Examples
    --------
    >>> table, truth = subjects(seed=1)
    >>> table.shape, truth.intercept.shape
    ((692, 33), (54,))
    """
    if n_seen < 100 or n_unseen < 68:
        raise ValueError(
            f"20 large and 34 small sites need at least 100 and 68 subjects, not {n_seen} and "
            f"{n_unseen}"
        )
    if site_sd < 0 or probe_sd < 0:
        raise ValueError(f"standard deviations must not be negative: {site_sd}, {probe_sd}")
    rng = np.random.default_rng(seed)
    site = np.concatenate(
        [_sites(rng, 20, n_seen, least=5), 20 + _sites(rng, 34, n_unseen, least=2)]
    )
    z, n = _standardised(rng, len(site)), len(site)
    intercept = rng.normal(0.0, site_sd, 54)
    fixed = -0.7 + z[list(EFFECTS)].to_numpy() @ np.array(list(EFFECTS.values()))
    chance = _sigmoid(fixed + intercept[site])
    table = pd.DataFrame(
        {"SITE": site + 1, "converted": rng.random(n) < chance, "large": site < 20}
    )
    table["converted"] = table["converted"].astype(float)
    for name, (mean, sd, _) in NUMBERS.items():
        table[name] = mean + sd * z[name]
    for columns, share in MISSING.items():
        table.loc[rng.random(n) < share, list(columns)] = np.nan
    for name, levels in CATEGORIES.items():
        table[name] = rng.choice(list(levels), n, p=list(levels.values()))
    rate = _sigmoid(intercept)
    told = np.where(site < 20, rate[site], rng.permutation(rate)[site])
    for probe in range(probes):
        table[f"probe{probe + 1}"] = told + rng.normal(0.0, probe_sd, n)
    known = pd.Series(intercept, index=np.arange(54) + 1, name="intercept")
    return table, SubjectsTruth(EFFECTS, known, chance, fixed)


def _sites(rng: Generator, n_sites: int, n: int, least: int) -> np.ndarray:
    """A site for every subject, at least so many at each, more at some than at others."""
    share = rng.dirichlet(np.full(n_sites, 5.0))
    rest = rng.choice(n_sites, n - least * n_sites, p=share)
    return np.concatenate([np.repeat(np.arange(n_sites), least), rest])


def _standardised(rng: Generator, n: int) -> pd.DataFrame:
    """Features of mean 0 and variance 1 with the correlations of severity and group."""
    severity = rng.normal(size=n)
    group = {name: place for place, names in enumerate(GROUPS) for name in names}
    common = rng.normal(size=(n, len(GROUPS)))
    columns = {}
    for name, (_, _, loading) in NUMBERS.items():
        rest = rng.normal(size=n)
        if name in group:
            # Impaired scores and small volumes go together, whatever the measure's direction.
            sign = np.sign(loading) or 1.0
            rest = np.sqrt(SHARED) * sign * common[:, group[name]] + np.sqrt(1 - SHARED) * rest
        columns[name] = loading * severity + np.sqrt(1 - loading**2) * rest
    return pd.DataFrame(columns)


def _sigmoid(eta: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-eta))
