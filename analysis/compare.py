"""Models compared on one data set: discrimination, calibration, ablations, with intervals.

``python -m armed_pyro.analysis.compare melanoma`` takes an application's stand-in data, or those of
several, by default of all; ``... compare rows.csv --outcome converted --cluster site`` a table of
yours. ``--smoke`` takes seconds.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from armed_pyro import ClusteredData, Schedule, read_table
from armed_pyro.analysis import mci_conversion
from armed_pyro.analysis.architectures import Dense
from armed_pyro.analysis.comparison import Comparison, Study, compare, joined, row_folds
from armed_pyro.analysis.comparisonreport import write
from armed_pyro.analysis.contenders import contenders
from armed_pyro.analysis.imagecontenders import ad_diagnosis_study, melanoma_study
from armed_pyro.analysis.rivals import Setting
from armed_pyro.data.simulate import spirals

__all__ = ["APPLICATIONS", "main", "table_study"]

SCHEDULE = Schedule(
    steps=2000, batch_size=128, stages=2, net_learning_rate=0.005, patience=3, window=50
)
MODES = ("population", "marginal", "membership", "nearest")
QUICK = Schedule(steps=40, batch_size=64, stages=0, net_learning_rate=0.02)


def spirals_study(seed: int, *, smoke: bool) -> Study:
    """The paper's spirals, with as many clusters again unseen.

    Examples
    --------
    ``next(spirals_study(0, smoke=True).folds(2, 0)).train``
    """
    seen, rows = (4, 80) if smoke else (10, 400)
    data, _ = spirals(2 * seen, rows, seed=seed)
    kept, unseen = data.hold_out_clusters("site", labels=list(range(seen, 2 * seen)))
    schedule = replace(SCHEDULE, steps=4000, window=100)
    setting = Setting("spirals", "spirals", Dense((32, 32, 32)), schedule, unseen="membership")
    return Study("spirals", setting, partial(row_folds, kept, unseen))


# Each application's stand-in: seed, and whether a small one is wanted.
APPLICATIONS: Mapping[str, Callable[..., Study]] = {
    "spirals": spirals_study,
    "mci_conversion": mci_conversion.study,
    "ad_diagnosis": ad_diagnosis_study,
    "melanoma": melanoma_study,
}


def table_study(
    path: Path, outcome: str, cluster: str, features: Sequence[str] | None, held: float, seed: int
) -> Study:
    """A table's rows, with a share of the clusters held out as unseen.

    Rows with missing values are left out, with a warning.

    Parameters
    ----------
    path : path
        CSV or Parquet.
    outcome, cluster : str
        Columns; the outcome has two values.
    features : sequence of str, optional
        Columns; by default all others.
    held : float
        Share of the clusters to hold out; 0 for none.
    seed : int

    Raises
    ------
    ValueError
        If the outcome is not binary, or the table cannot be used as asked.

    Examples
    --------
    ``table_study(Path("rows.csv"), "converted", "site", None, held=0.2, seed=0)``
    """
    data = ClusteredData.from_frame(
        read_table(path), outcome=outcome, clusters=[cluster], features=features, missing="drop"
    )
    values = set() if data.outcome is None else set(np.unique(data.outcome.numpy()))
    if values != {0.0, 1.0}:
        raise ValueError(
            f"AUROC and the like are of an outcome with two values, but {outcome!r} has "
            f"{len(values)}: recode it, or name another column with --outcome"
        )
    unseen = None
    if held:
        data, unseen = data.hold_out_clusters(cluster, fraction=held, seed=seed)
    setting = Setting(path.stem, path.stem, Dense((32, 32)), SCHEDULE, factor=cluster)
    return Study(path.stem, setting, partial(row_folds, data, unseen))


def main(argv: Sequence[str] | None = None) -> None:
    """Compare the models, print the tables and write them with the figure."""
    parser = argparse.ArgumentParser(
        prog="python -m armed_pyro.analysis.compare", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    known = ", ".join(APPLICATIONS)
    parser.add_argument("data", nargs="*", help=f"tables, or some of {known} (default: these)")
    parser.add_argument("--outcome", help="a table's column of two values")
    parser.add_argument("--cluster", help="a table's column of clusters")
    parser.add_argument("--features", help="a table's columns, a,b,c (default: all others)")
    parser.add_argument("--held", type=float, default=0.2, help="share of clusters held out")
    parser.add_argument("--models", help="a,b,c (default: all that take such data)")
    parser.add_argument("--mode", choices=MODES, help="of programs in unseen clusters")
    parser.add_argument("--folds", type=int, help="folds, of images data sets (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="of data and fits (default: 0)")
    parser.add_argument("--smoke", action="store_true", help="small data and few steps: a trial")
    parser.add_argument(
        "--out", type=Path, default=Path("results/compare"), help="folder, with one for each DATA"
    )
    given = parser.parse_args(argv)
    names = given.data or list(APPLICATIONS)
    strange = [name for name in names if name not in APPLICATIONS]
    if strange and (given.outcome is None or given.cluster is None):
        parser.error(
            f"{strange[0]} is no application ({known}); of a table, name the columns with "
            "--outcome and --cluster"
        )
    folds = given.folds or (2 if given.smoke else 5)
    console, threads = Console(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name in names:
            study = _study(name, given)
            models = study.models if given.models is None else given.models.split(",")
            found = run(study, models, folds, given.seed)
            write(found, given.out / study.name, console, study.setting.title)
    finally:
        torch.set_num_threads(threads)
    console.print(f"Tables and figures are in {given.out}")


def _study(name: str, given: argparse.Namespace) -> Study:
    """An application's stand-in, or a table, with what the options change of its setting."""
    if name in APPLICATIONS:
        study = APPLICATIONS[name](given.seed, smoke=given.smoke)
    else:
        features = given.features and given.features.split(",")
        study = table_study(
            Path(name), given.outcome, given.cluster, features, given.held, given.seed
        )
    setting = replace(study.setting, schedule=QUICK) if given.smoke else study.setting
    return replace(study, setting=replace(setting, unseen=given.mode or setting.unseen))


def run(study: Study, models: Sequence[str], folds: int, seed: int) -> Comparison:
    """Every model on every fold.

    Examples
    --------
    ``run(spirals_study(0, smoke=True), ["conventional", "ARMED"], folds=2, seed=0).table()``
    """
    rivals = contenders(study.setting, models)
    with warnings.catch_warnings():
        # Small clusters, and unseen ones unlike any seen: the tables show what comes of it.
        warnings.simplefilter("ignore", UserWarning)
        fits = compare(study.folds(folds, seed), rivals, data=study.name, seed=seed)
        parts = [part for *_, part in track(fits, "fits", total=folds * len(rivals))]
    return joined(parts)


if __name__ == "__main__":
    main()
