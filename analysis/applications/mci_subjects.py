"""Subjects with mild cognitive impairment: ADNI's file or simulated ones, encoded in folds."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy.random import Generator
from sklearn.compose import ColumnTransformer
from sklearn.feature_selection import VarianceThreshold
from sklearn.impute import MissingIndicator, SimpleImputer
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import OneHotEncoder

from armed_pyro import ClusteredData
from armed_pyro.analysis.rivals.comparison import Fold

__all__ = [
    "CATEGORIES",
    "NUMBERS",
    "TRUE_FEATURES",
    "Subjects",
    "SubjectsTruth",
    "encoder",
    "read_adnimerge",
    "simulated_subjects",
    "subject_folds",
]

# Mean, standard deviation, and correlation with the severity of the disease, by measure.
MEASURES: Mapping[str, tuple[float, float, float]] = {
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
# Measures that share a second component beside severity, and the share of its variance.
GROUPS: tuple[tuple[str, ...], ...] = (
    ("ADAS11", "ADAS13", "CDRSB", "MMSE"),
    ("RAVLT_immediate", "RAVLT_learning", "LDELTOTAL"),
    ("TAU", "PTAU"),
    ("Hippocampus", "Entorhinal", "Fusiform", "MidTemp"),
    ("WholeBrain", "ICV", "Ventricles"),
)
SHARED = 0.5
# Categories, and how frequent each of their levels is.
LEVELS: Mapping[str, Mapping[str, float]] = {
    "PTGENDER": {"Male": 0.6, "Female": 0.4},
    "PTETHCAT": {"Not Hisp/Latino": 0.94, "Hisp/Latino": 0.06},
    "PTRACCAT": {"White": 0.88, "Black": 0.07, "Asian": 0.05},
    "PTMARRY": {"Married": 0.74, "Widowed": 0.12, "Divorced": 0.09, "Never married": 0.05},
}
# Measures of each examination that some subjects lack, and the share of such subjects.
MISSING: Mapping[tuple[str, ...], float] = {
    ("FDG",): 0.25,
    ("AV45",): 0.45,
    ("ABETA", "TAU", "PTAU"): 0.3,
    ("Hippocampus", "Entorhinal", "Fusiform", "MidTemp"): 0.1,
}
# Log odds ratios per sd, of measures that no subject lacks: their effects can be learned in full.
EFFECTS: Mapping[str, float] = {"APOE4": 1.0, "ADAS13": 1.0, "LDELTOTAL": -1.0, "FAQ": 1.0}
TRUE_FEATURES: tuple[str, ...] = tuple(EFFECTS)
NUMBERS: tuple[str, ...] = tuple(MEASURES)
CATEGORIES: tuple[str, ...] = tuple(LEVELS)
# One measure of each examination that many subjects lack; its other measures are missing with it.
EXAMINATIONS: tuple[str, ...] = tuple(measures[0] for measures in MISSING)
# Measures of assays with limits of detection, such as "<200".
LIMITED: tuple[str, ...] = ("ABETA", "TAU", "PTAU")
MONTHS = 24
DEMENTIA, MCI = "Dementia", "MCI"


@dataclass(frozen=True, eq=False)
class Subjects:
    """Subjects of ADNI's file.

    Attributes
    ----------
    table : pandas.DataFrame
        One row per subject. The index is RID; the columns are SITE, converted (0 or 1), large
        (whether the site is one of those for training), and the features at baseline, which can be
        missing.
    excluded : mapping of str to int
        Number of subjects with mild cognitive impairment that are left out, by reason.
    """

    table: pd.DataFrame
    excluded: Mapping[str, int]


def read_adnimerge(path: str | Path, *, sites: int = 20) -> Subjects:
    """Subjects with MCI at baseline, and whether they had dementia within 24 months.

    A visit without a diagnosis takes that of the visits before and after it, if those agree.
    Subjects with dementia at a visit up to month 24 have converted. Subjects without it are stable
    if their first diagnosis at month 24 or later is not dementia either. All others are left out,
    because it is not known whether they converted in time. A value at an assay's limit, "<200" or
    ">1700", is read as the limit.

    Parameters
    ----------
    path : path
        The file, with one row per visit.
    sites : int
        Number of the sites with most of these subjects that are for training.

    Raises
    ------
    ValueError
        If columns are missing, a value cannot be read, or no subject is left.

    Examples
    --------
    ``read_adnimerge("ADNIMERGE.csv").table["converted"].mean()``
    """
    visits = pd.read_csv(path, low_memory=False, dtype=dict.fromkeys(LIMITED, str))
    visits.columns = visits.columns.str.replace(".", "_")
    needed = ["RID", "SITE", "VISCODE", "DX", "DX_bl", *NUMBERS, *CATEGORIES]
    if missing := [name for name in needed if name not in visits]:
        raise ValueError(
            f"{path} lacks the columns {', '.join(missing)}: is it ADNIMERGE.csv? Its columns are "
            f"{', '.join(visits.columns[:12])}, ..."
        )
    visits = visits.assign(month=_months(visits)).dropna(subset=["month"])
    visits = visits.sort_values(["RID", "month"], kind="stable")
    visits = visits.drop_duplicates(["RID", "month"]).reset_index(drop=True)
    visits["diagnosis"] = filled_diagnoses(visits["RID"], visits["DX"])

    first = visits[visits["month"] == 0].set_index("RID")
    of_screening = first["DX_bl"].isin(["EMCI", "LMCI"])
    impaired = first[first["diagnosis"].fillna("").eq(MCI) | (first["DX"].isna() & of_screening)]
    converted = _outcomes(visits).reindex(impaired.index)
    excluded = {
        f"no diagnosis from month {MONTHS} on, nor dementia before": int(converted.isna().sum()),
    }
    chosen = impaired[converted.notna().to_numpy()]
    if chosen.empty:
        raise ValueError(
            f"{path} has {len(impaired)} subjects with MCI at baseline, and none of them with a "
            f"known diagnosis after {MONTHS} months"
        )
    table = pd.DataFrame({"SITE": chosen["SITE"], "converted": converted[chosen.index]})
    largest = table["SITE"].value_counts().index[:sites]
    table["large"] = table["SITE"].isin(largest)
    for name in NUMBERS:
        table[name] = _numbers(chosen[name], path)
    for name in CATEGORIES:
        table[name] = chosen[name].astype(object).where(chosen[name].ne("Unknown"), np.nan)
    return Subjects(table, excluded)


def filled_diagnoses(subject: pd.Series, diagnosis: pd.Series) -> pd.Series:
    """Diagnoses of visits in order, with gaps filled where the diagnoses around them agree.

    Examples
    --------
    >>> dx = pd.Series(["MCI", None, "MCI", None, "Dementia"])
    >>> filled_diagnoses(pd.Series([1] * 5), dx).isna().tolist()
    [False, False, False, True, False]
    """
    by = diagnosis.groupby(subject)
    before, after = by.ffill(), by.bfill()
    return diagnosis.where(diagnosis.notna(), before.where(before == after))


def encoder(table: pd.DataFrame) -> Pipeline:
    """Encoder of subjects' features as columns of numbers, to be fitted to training rows.

    Missing numbers are replaced by the median, missing categories by the most frequent level.
    Whether an examination is missing (FDG and amyloid PET, CSF, MRI) is a feature too. A category
    has one column per level except the first; levels of fewer than ten subjects share a column.
    Columns that are the same for all subjects are dropped. ADNI's columns give about 37 features:
    26 measures, about 7 columns of categories, and 4 of missing examinations.

    Parameters
    ----------
    table : pandas.DataFrame
        Table as in `Subjects`; additional columns of numbers are features too.

    Examples
    --------
    ``encoder(train).fit(train).transform(test)``
    """
    roles = {"SITE", "converted", "large", *CATEGORIES}
    numbers = [name for name in table if name not in roles]
    categories = make_pipeline(
        SimpleImputer(strategy="most_frequent"),
        OneHotEncoder(
            drop="first",
            handle_unknown="infrequent_if_exist",
            min_frequency=10,
            sparse_output=False,
        ),
    )
    steps = [
        ("numbers", SimpleImputer(strategy="median"), numbers),
        ("missing", MissingIndicator(features="all"), list(EXAMINATIONS)),
        ("categories", categories, list(CATEGORIES)),
    ]
    columns = ColumnTransformer(steps, verbose_feature_names_out=False)
    return make_pipeline(columns, VarianceThreshold()).set_output(transform="pandas")


def subject_folds(table: pd.DataFrame, n: int, seed: int) -> Iterator[Fold]:
    """Folds within sites of the training sites' subjects, each encoded by its training rows alone.

    A fifth of a fold's training rows is for validation. Subjects of the other sites are unseen.

    Parameters
    ----------
    table : pandas.DataFrame
        Table as in `Subjects`.
    n : int
        Number of folds.
    seed : int
        Seed of the folds.
    """
    large = table[table["large"]]
    # The split comes before the encoder, as `ClusteredData` takes no missing values.
    plan = ClusteredData.from_arrays(
        np.zeros((len(large), 1)),
        large["converted"].to_numpy(copy=True),
        {"site": large["SITE"].to_numpy()},
        row_labels=large.index,
    )
    for number, (train, test) in enumerate(plan.folds(n, seed=seed)):
        kept, validation = train.split_rows(0.2, seed=seed)
        fitted = encoder(table).fit(table.loc[kept.row_labels])
        parts = [table.loc[rows.row_labels] for rows in (kept, validation, test)]
        encoded = [_encoded(fitted, part) for part in (*parts, table[~table["large"]])]
        yield Fold(number, *encoded)


@dataclass(frozen=True, eq=False)
class SubjectsTruth:
    """The truth that subjects were drawn from.

    Attributes
    ----------
    effects : mapping of str to float
        Log odds ratio of conversion, per standard deviation of a feature; 0 for other features.
    intercept : pandas.Series
        Intercept of each site, as log odds.
    probability : Float[ndarray, "rows"]
        P(converted | features, site).
    fixed : Float[ndarray, "rows"]
        Log odds of conversion at a site whose intercept is 0.
    """

    effects: Mapping[str, float]
    intercept: pd.Series
    probability: Float[np.ndarray, " rows"]
    fixed: Float[np.ndarray, " rows"]


def simulated_subjects(
    n_seen: int = 392,
    n_unseen: int = 300,
    *,
    site_sd: float = 1.5,
    probes: int = 0,
    probe_sd: float = 0.1,
    seed: int = 0,
) -> tuple[pd.DataFrame, SubjectsTruth]:
    r"""Subjects in the shape of ADNI's, one row per subject, at 20 large and 34 small sites.

    .. math::
        s_i &\sim N(0, 1), \quad x_{ij} = \mu_j + \sigma_j (\lambda_j s_i + \text{shared} +
            \text{noise}) \\
        b_k &\sim N(0, site\_sd^2), \quad P(y_i = 1) = logit^{-1}(-0.7 + z_i^\top \beta
            + b_{k(i)}) \\
        probe_i &\sim N(logit^{-1}(b_{k(i)}), probe\_sd^2)

    with standardised features z. A probe tells the conversion rate of a site, and nothing else
    about a subject. A model that uses it is confounded: at the other sites, where probes follow the
    rate of a random site, they mislead it.

    Parameters
    ----------
    n_seen, n_unseen : int
        Subjects at the 20 sites for training, and at the 34 others.
    site_sd : float
        Standard deviation of the sites' intercepts, in log odds.
    probes : int
        Number of probe features.
    probe_sd : float
        Standard deviation of the probes within sites.
    seed : int
        Seed of the draws.

    Returns
    -------
    pandas.DataFrame
        Columns SITE, converted (0 or 1), large (whether the site is one of the 20), and the
        features under ADNI's names, with missing values.
    SubjectsTruth
        Effects and site intercepts.

    Raises
    ------
    ValueError
        If there are too few subjects for the sites, or a standard deviation is negative.

    Examples
    --------
    >>> table, truth = simulated_subjects(seed=1)
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
    for name, (mean, sd, _) in MEASURES.items():
        table[name] = mean + sd * z[name]
    for columns, share in MISSING.items():
        table.loc[rng.random(n) < share, list(columns)] = np.nan
    for name, levels in LEVELS.items():
        table[name] = rng.choice(list(levels), n, p=list(levels.values()))
    rate = _sigmoid(intercept)
    told = np.where(site < 20, rate[site], rng.permutation(rate)[site])
    for probe in range(probes):
        table[f"probe{probe + 1}"] = told + rng.normal(0.0, probe_sd, n)
    known = pd.Series(intercept, index=np.arange(54) + 1, name="intercept")
    return table, SubjectsTruth(EFFECTS, known, chance, fixed)


def _encoded(fitted: Pipeline, table: pd.DataFrame) -> ClusteredData:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found unknown categories")
        x = fitted.transform(table)
    return ClusteredData.from_arrays(
        x.to_numpy(float, copy=True),
        table["converted"].to_numpy(copy=True),
        {"site": table["SITE"].to_numpy()},
        feature_names=list(x.columns),
        outcome_name="converted",
        row_labels=table.index,
    )


def _months(visits: pd.DataFrame) -> pd.Series:
    """Months since baseline ("bl" is 0, "m06" is 6), missing for visits of other kinds."""
    code = visits["VISCODE"].astype(str).str.strip().str.lower()
    return pd.to_numeric(code.replace("bl", "m0").str.extract(r"^m(\d+)$")[0])


def _outcomes(visits: pd.DataFrame) -> pd.Series:
    """1 for converted and 0 for stable subjects; subjects who are neither are absent."""
    known = visits[visits["diagnosis"].notna() & (visits["month"] > 0)]
    demented = known["diagnosis"].eq(DEMENTIA)
    early = known[demented & (known["month"] <= MONTHS)]["RID"]
    later = known[known["month"] >= MONTHS].groupby("RID")["diagnosis"].first()
    result = pd.Series(0.0, index=later.index[later != DEMENTIA])
    return pd.concat([result, pd.Series(1.0, index=early.unique())]).groupby(level=0).max()


def _numbers(column: pd.Series, path: str | Path) -> pd.Series:
    """A column as numbers, with values beyond an assay's limit set to the limit."""
    text = column.astype(str).str.strip().str.lstrip("<>")
    numbers = pd.to_numeric(text, errors="coerce")
    unread = numbers.isna() & column.notna() & ~text.isin(["", "nan", "NA"])
    if unread.any():
        raise ValueError(
            f"{path}: {column.name} of subject {column.index[unread][0]} is "
            f"{column[unread].iloc[0]!r}, not a number, nor a limit such as '<200': correct it"
        )
    return numbers


def _sites(rng: Generator, n_sites: int, n: int, least: int) -> np.ndarray:
    """A site for every subject: `least` at each, and the rest in unequal shares."""
    share = rng.dirichlet(np.full(n_sites, 5.0))
    rest = rng.choice(n_sites, n - least * n_sites, p=share)
    return np.concatenate([np.repeat(np.arange(n_sites), least), rest])


def _standardised(rng: Generator, n: int) -> pd.DataFrame:
    """Features with mean 0 and variance 1, correlated by severity and within groups."""
    severity = rng.normal(size=n)
    group = {name: place for place, names in enumerate(GROUPS) for name in names}
    common = rng.normal(size=(n, len(GROUPS)))
    columns = {}
    for name, (_, _, loading) in MEASURES.items():
        rest = rng.normal(size=n)
        if name in group:
            # The sign makes impaired scores and small volumes go together.
            sign = np.sign(loading) or 1.0
            rest = np.sqrt(SHARED) * sign * common[:, group[name]] + np.sqrt(1 - SHARED) * rest
        columns[name] = loading * severity + np.sqrt(1 - loading**2) * rest
    return pd.DataFrame(columns)


def _sigmoid(eta: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-eta))
