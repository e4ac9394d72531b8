"""ADNIMERGE.csv as ADNI distributes it: who of those with mild cognitive impairment converted."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.compose import ColumnTransformer
from sklearn.feature_selection import VarianceThreshold
from sklearn.impute import MissingIndicator, SimpleImputer
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import OneHotEncoder

from armed_pyro import ClusteredData
from armed_pyro.analysis.rivals.comparison import Fold

__all__ = ["CATEGORIES", "NUMBERS", "Subjects", "encoder", "read_adnimerge", "subject_folds"]

NUMBERS: tuple[str, ...] = (
    "AGE", "PTEDUCAT", "APOE4", "FDG", "AV45", "ABETA", "TAU", "PTAU", "CDRSB", "ADAS11", "ADAS13",
    "MMSE", "RAVLT_immediate", "RAVLT_learning", "RAVLT_forgetting", "RAVLT_perc_forgetting",
    "LDELTOTAL", "TRABSCOR", "FAQ", "Ventricles", "Hippocampus", "WholeBrain", "Entorhinal",
    "Fusiform", "MidTemp", "ICV",
)  # fmt: skip
CATEGORIES: tuple[str, ...] = ("PTGENDER", "PTETHCAT", "PTRACCAT", "PTMARRY")
# One column of each examination that many subjects do not have: the others are missing with it.
EXAMINATIONS: tuple[str, ...] = ("FDG", "AV45", "ABETA", "Hippocampus")
LIMITED: tuple[str, ...] = ("ABETA", "TAU", "PTAU")
MONTHS = 24
DEMENTIA, MCI = "Dementia", "MCI"


@dataclass(frozen=True, eq=False)
class Subjects:
    """One row a subject.

    Attributes
    ----------
    table : pandas.DataFrame
        Index RID; columns SITE, converted (0 or 1), large (whether the site is one of those for
        training), and the features at baseline, some of them missing.
    excluded : mapping of str to int
        Subjects with mild cognitive impairment that are left out, by reason.
    """

    table: pd.DataFrame
    excluded: Mapping[str, int]


def read_adnimerge(path: str | Path, *, sites: int = 20) -> Subjects:
    """Subjects with MCI at baseline, and whether they were demented within 24 months.

    A visit without a diagnosis has that of the visits before and after it, where those agree.
    Converted: demented at a visit up to month 24. Stable: not, and the first diagnosis at month
    24 or later is not dementia either. Others are left out: there is no knowing when, or whether,
    they converted. Values at an assay's limit, "<200" or ">1700", are read as the limit.

    Parameters
    ----------
    path : path
        The file, one row a visit.
    sites : int
        How many of the largest sites (by these subjects) are for training.

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
    """Diagnoses of visits in order, gaps filled where those before and after them agree.

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
    """Subjects' features as columns of numbers; to be fitted to training rows.

    Numbers are imputed by the median, categories by the most frequent; whether an examination is
    missing is a feature, too (FDG and amyloid PET, CSF, MRI). Categories have a column for each
    level but the first, those of fewer than ten subjects a common one. Columns that are the same
    for all subjects are dropped. With ADNI's columns this gives about 37 features: 26 measures,
    about 7 columns of categories, 4 of missing examinations.

    Parameters
    ----------
    table : pandas.DataFrame
        As in `Subjects`; further columns of numbers are features, too.

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
    """Folds of the training sites' subjects within sites, each encoded by its own training rows.

    A fifth of a fold's training rows is for validation. Subjects of the other sites are unseen.

    Parameters
    ----------
    table : pandas.DataFrame
        As in `Subjects`.
    n : int
        Number of folds.
    seed : int
    """
    large = table[table["large"]]
    # Split first, as tables with missing values are no data yet.
    plan = ClusteredData.from_arrays(
        np.zeros((len(large), 1)),
        large["converted"].to_numpy(copy=True),
        {"site": large["SITE"].to_numpy()},
        row_labels=large.index,
    )
    for number, (train, test) in enumerate(plan.folds(n, seed=seed)):
        kept, validation = train.split_rows(0.2, seed=seed)
        fitted = encoder(table).fit(table.loc[kept.row_labels])
        parts = [table.loc[one.row_labels] for one in (kept, validation, test)]
        encoded = [_encoded(fitted, one) for one in (*parts, table[~table["large"]])]
        yield Fold(number, *encoded)


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
    """Months since baseline: "bl" is 0, "m06" is 6; missing for visits of other kinds."""
    code = visits["VISCODE"].astype(str).str.strip().str.lower()
    return pd.to_numeric(code.replace("bl", "m0").str.extract(r"^m(\d+)$")[0])


def _outcomes(visits: pd.DataFrame) -> pd.Series:
    """1 for converted, 0 for stable, missing for neither, by subject."""
    known = visits[visits["diagnosis"].notna() & (visits["month"] > 0)]
    demented = known["diagnosis"].eq(DEMENTIA)
    early = known[demented & (known["month"] <= MONTHS)]["RID"]
    later = known[known["month"] >= MONTHS].groupby("RID")["diagnosis"].first()
    result = pd.Series(0.0, index=later.index[later != DEMENTIA])
    return pd.concat([result, pd.Series(1.0, index=early.unique())]).groupby(level=0).max()


def _numbers(column: pd.Series, path: str | Path) -> pd.Series:
    """Numbers, values beyond an assay's limit as the limit."""
    text = column.astype(str).str.strip().str.lstrip("<>")
    numbers = pd.to_numeric(text, errors="coerce")
    unread = numbers.isna() & column.notna() & ~text.isin(["", "nan", "NA"])
    if unread.any():
        raise ValueError(
            f"{path}: {column.name} of subject {column.index[unread][0]} is "
            f"{column[unread].iloc[0]!r}, not a number, nor a limit such as '<200': correct it"
        )
    return numbers
