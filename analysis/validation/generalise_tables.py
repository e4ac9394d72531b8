"""Tables of `generalise`: simulated, of statsmodels and scikit-learn, of files, and stand-ins."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.datasets import load_diabetes
from statsmodels.datasets import elnino, grunfeld

from armed_pyro import ClusteredData, read_table
from armed_pyro.analysis.applications import ad_diagnosis, fertility, melanoma
from armed_pyro.analysis.applications.image_sites import Study, digit_study
from armed_pyro.analysis.applications.mci_subjects import encoder, simulated_subjects
from armed_pyro.analysis.rivals.learners import Task
from armed_pyro.data.simulate import spirals, wages

__all__ = ["TABLES", "Table", "load"]

PIXELS = 8  # height and width of the digits' images, which the learners take as 64 features
SMALL_ROWS = 240  # of a trial


@dataclass(frozen=True, eq=False)
class Table:
    """Rows with outcomes, the factor whose clusters are held out, and the outcome's family.

    `floor` is the error on rows of new clusters that not even the truth is free of, if it is known.
    """

    data: ClusteredData
    task: Task
    floor: float | None = None


Maker = Callable[[Path | None], Table]


def load(name: str, folder: Path | None, *, small: bool = False) -> Table | None:
    """The table with this name; None if it is a file that the folder does not have.

    Parameters
    ----------
    folder : path or None
        The folder of files such as ``sleepstudy.csv``.
    small : bool
        Whether to keep few rows, of few clusters, for a trial.
    """
    if name in FILES and (folder is None or not (folder / FILES[name]).exists()):
        return None
    table = TABLES[name](folder)
    return replace(table, data=_few(table)) if small else table


def _few(table: Table) -> ClusteredData:
    """At most `SMALL_ROWS` rows of whole clusters, but those of at least 8 clusters."""
    codes = table.data.grouping(table.task.factor).codes.numpy()
    order = np.random.default_rng(0).permutation(codes.max() + 1)
    kept = np.isin(codes, order[:8])
    for last in range(9, len(order) + 1):
        more = np.isin(codes, order[:last])
        if more.sum() > SMALL_ROWS:
            break
        kept = more
    chosen = np.flatnonzero(kept)
    if len(chosen) > 2 * SMALL_ROWS:  # few clusters of many rows
        chosen = np.sort(np.random.default_rng(0).permutation(chosen)[: 2 * SMALL_ROWS])
    return _common_columns(table.data.take(chosen), table.task)


def _common_columns(data: ClusteredData, task: Task) -> ClusteredData:
    """The rows without columns that are constant outside a quarter of the clusters.

    Such columns would be constant in a split's training rows.
    """
    codes = data.grouping(task.factor).codes.numpy()
    usual = data.features.median(dim=0).values
    differs = pd.DataFrame((data.features != usual).numpy()).groupby(codes).any()
    kept = np.flatnonzero(differs.mean() >= 1 / 4)
    return replace(
        data,
        features=data.features[:, kept],
        schema=None,
        feature_names=tuple(data.feature_names[column] for column in kept),
        sources=tuple(data.sources[column] for column in kept),
        continuous=tuple(data.continuous[column] for column in kept),
    )


def _of_frame(
    frame: pd.DataFrame, outcome: str, factor: str, features: list[str], family: str = "gaussian"
) -> Table:
    data = ClusteredData.from_frame(frame, outcome=outcome, clusters=[factor], features=features)
    return Table(data, Task(factor, family))


def _wages(folder: Path | None) -> Table:
    person_sd, residual_sd = 0.3, 0.15
    data, _ = wages(person_sd=person_sd, residual_sd=residual_sd)
    return Table(data, Task("id", "gaussian"), floor=math.hypot(person_sd, residual_sd))


def _fertility(folder: Path | None) -> Table:
    # Every third year: the panel has 10,000 rows, and neighbouring years are nearly equal.
    frame = fertility.load()
    frame = frame[frame["year"] % 3 == 0].reset_index(drop=True)
    return _of_frame(frame, "fertility", "country", ["decade"])


def _grunfeld(folder: Path | None) -> Table:
    frame = grunfeld.load_pandas().data
    for name in ("invest", "value", "capital"):
        frame[f"log_{name}"] = np.log(frame[name])
    frame["firm"] = [str(name) for name in frame["firm"]]
    return _of_frame(frame, "log_invest", "firm", ["log_value", "log_capital"])


def _elnino(folder: Path | None) -> Table:
    wide = elnino.load_pandas().data
    frame = wide.melt("YEAR", var_name="month", value_name="temperature").dropna()
    angle = 2 * np.pi * pd.factorize(frame["month"])[0] / 12
    for k in (1, 2):
        frame[f"sin{k}"], frame[f"cos{k}"] = np.sin(k * angle), np.cos(k * angle)
    frame["year"] = frame["YEAR"].astype(int)
    features = ["sin1", "cos1", "sin2", "cos2"]
    return _of_frame(frame.reset_index(drop=True), "temperature", "year", features)


def _diabetes(folder: Path | None) -> Table:
    frame = load_diabetes(as_frame=True, scaled=False).frame
    frame["ages"] = frame["age"].astype(int) // 2  # people of two years of birth
    features = [name for name in frame if name not in ("target", "ages")]
    return _of_frame(frame, "target", "ages", features)


def _digits(folder: Path | None) -> Table:
    """Sites that confound: one class is more frequent at one site than at another."""
    sites = {"seen": 8, "unseen": 8, "rows": 100, "shift": 1.5, "light": 0.3}
    return _images(digit_study((5, 6, 7, 8, 9), size=PIXELS, **sites, seed=1))


def _images(study: Study) -> Table:
    parts = [study.train, study.validation, study.unseen]
    pixels = torch.cat([part.features.flatten(1) for part in parts]).double()
    labels = np.concatenate([part.outcome for part in parts if part.outcome is not None])
    sites = np.concatenate([part.grouping(study.factor).labels() for part in parts])
    data = ClusteredData.from_arrays(pixels, labels, {study.factor: sites}, outcome_name="label")
    return Table(data, Task(study.factor, "bernoulli"))


def _ad_diagnosis(folder: Path | None) -> Table:
    return _images(ad_diagnosis.study(size=PIXELS))


def _melanoma(folder: Path | None) -> Table:
    return _images(melanoma.study(size=PIXELS))


def _mci(folder: Path | None) -> Table:
    subjects, _ = simulated_subjects(392, 300)
    # The encoder uses no outcome, so that it may see all rows.
    x = encoder(subjects).fit_transform(subjects)
    sites = {"site": subjects["SITE"].to_numpy()}
    y = subjects["converted"].to_numpy(dtype=float, copy=True)
    data = ClusteredData.from_arrays(np.array(x, dtype=float), y, sites, outcome_name="converted")
    return Table(data, Task("site", "bernoulli"))


def _spirals(folder: Path | None) -> Table:
    return Table(spirals(16, 100)[0], Task("site", "bernoulli"))


def _file(name: str, outcome: str, factor: str, features: list[str], family: str) -> Maker:
    def make(folder: Path | None) -> Table:
        if folder is None:
            raise ValueError(f"the table {name} is a file: say in which folder, by --data FOLDER")
        return _of_frame(read_table(folder / name), outcome, factor, features, family)

    return make


FILES: Mapping[str, str] = {
    "sleepstudy": "sleepstudy.csv",
    "ovary": "ovary.csv",
    "owls": "owls.csv",
}
OWLS = ["FoodTreatment", "SexParent", "ArrivalTime", "logBroodSize"]
TABLES: Mapping[str, Maker] = {
    "wages": _wages,
    "grunfeld": _grunfeld,
    "fertility": _fertility,
    "elnino": _elnino,
    "diabetes": _diabetes,
    "digits": _digits,
    "sleepstudy": _file("sleepstudy.csv", "Reaction", "Subject", ["Days"], "gaussian"),
    "ovary": _file("ovary.csv", "follicles", "Mare", ["Time", "s", "c"], "gaussian"),
    "owls": _file("owls.csv", "SiblingNegotiation", "Nest", OWLS, "negative_binomial"),
    "mci": _mci,
    "ad_diagnosis": _ad_diagnosis,
    "melanoma": _melanoma,
    "spirals": _spirals,
}
