"""Models compared on the same data: discrimination, calibration, ablations, with intervals.

``python -m armed_pyro.analysis.compare rows.csv --outcome converted --cluster site`` compares them
on a table of yours. ``... compare melanoma`` takes the stand-in data of an application or several;
without a name it takes those of all applications. ``--smoke`` takes seconds.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from armed_pyro import ClusteredData, Schedule, read_table
from armed_pyro.analysis.applications import (
    ad_diagnosis,
    image_sites,
    mci_conversion,
    mci_subjects,
    melanoma,
)
from armed_pyro.analysis.rivals.architectures import Autoencoder, Convolution, Dense
from armed_pyro.analysis.rivals.comparison import (
    Comparison,
    Fold,
    Study,
    compare,
    joined,
    row_folds,
)
from armed_pyro.analysis.rivals.contenders import contenders
from armed_pyro.analysis.rivals.report import write
from armed_pyro.analysis.rivals.rival import Setting
from armed_pyro.data.simulate import spirals

__all__ = ["APPLICATIONS", "main", "table_study"]

SCHEDULE = Schedule(
    steps=2000, batch_size=128, stages=2, net_learning_rate=0.005, patience=3, window=50
)
MODES = ("population", "marginal", "membership", "nearest")
QUICK = Schedule(steps=40, batch_size=64, stages=0, net_learning_rate=0.02)

# Models that take images, and those of them that also train a decoder.
OF_IMAGES = (
    "conventional",
    "domain adversarial",
    "meta-learning",
    "MeNet",
    "LMMNN",
    "ARMED",
    "without adversary",
)
OF_DECODERS = ("conventional", "domain adversarial", "ARMED", "without adversary")
# The digits have 8 x 8 pixels, so 16 x 16 loses no more than 32 x 32. With this grain the AUROC of
# the conventional network is about 0.8, as on the paper's images.
IMAGE_SIZE, GRAIN = 16, 0.5
IMAGE_SCHEDULE = Schedule(
    steps=700, batch_size=128, stages=2, net_learning_rate=0.005, patience=4, window=35
)


def spirals_study(seed: int, *, smoke: bool) -> Study:
    """The paper's spirals, and the same number of clusters that are unseen.

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


def mci_study(seed: int, *, smoke: bool) -> Study:
    """Simulated subjects with mild cognitive impairment; see `mci_conversion`.

    Examples
    --------
    >>> mci_study(0, smoke=True).name
    'mci_conversion'
    """
    sizes = (200, 100) if smoke else (392, 300)
    table, _ = mci_subjects.simulated_subjects(*sizes, seed=seed)
    folds = partial(mci_subjects.subject_folds, table)
    return Study("mci_conversion", mci_conversion.SETTING, folds)


def ad_diagnosis_study(seed: int, *, smoke: bool) -> Study:
    """The stand-in of `ad_diagnosis`, with new sites and images in each fold.

    Examples
    --------
    ``next(ad_diagnosis_study(0, smoke=True).folds(2, 0)).train``
    """
    setting = Setting(
        "ad_diagnosis",
        "AD diagnosis (digits of 12 sites)",
        Convolution((3, 4), 6) if smoke else Convolution((8, 16, 32), 16),
        IMAGE_SCHEDULE,
        # With 48 training rows per site, slopes on the last layer overfit: over three data sets the
        # log loss of seen sites' test rows was 0.59 with slopes and 0.51 without.
        slopes=False,
        adversary_weight=0.03,
    )
    draw = partial(ad_diagnosis.study, size=IMAGE_SIZE, grain=GRAIN)
    return Study("ad_diagnosis", setting, partial(_image_folds, draw, seed, smoke), OF_IMAGES)


def melanoma_study(seed: int, *, smoke: bool) -> Study:
    """The stand-in of `melanoma`, with new batches and images in each fold.

    Examples
    --------
    ``next(melanoma_study(0, smoke=True).folds(2, 0)).train``
    """
    setting = Setting(
        "melanoma",
        "Melanoma cells (digits of 12 batches)",
        Autoencoder((3, 4), 4, 8) if smoke else Autoencoder((8, 16), 16, 16),
        IMAGE_SCHEDULE,
        factor="batch",
        adversary_weight=0.03,
        fixed_weight=0.1,
    )
    draw = partial(melanoma.study, size=IMAGE_SIZE, grain=GRAIN)
    return Study("melanoma", setting, partial(_image_folds, draw, seed, smoke), OF_DECODERS)


def _image_folds(
    draw: Callable[[int, bool], image_sites.Study], start: int, smoke: bool, n: int, seed: int
) -> Iterator[Fold]:
    """Folds that are data sets of their own, with the seeds from `start` on."""
    for number in range(n):
        images = draw(start + number, smoke)
        kept, validation = images.train.split_rows(0.2, seed=seed)
        yield Fold(number, kept, validation, images.validation, images.unseen, start + number)


# Study of each application's stand-in, for a seed and whether to be small.
APPLICATIONS: Mapping[str, Callable[..., Study]] = {
    "spirals": spirals_study,
    "mci_conversion": mci_study,
    "ad_diagnosis": ad_diagnosis_study,
    "melanoma": melanoma_study,
}


def table_study(
    path: Path, outcome: str, cluster: str, features: Sequence[str] | None, held: float, seed: int
) -> Study:
    """The rows of a table, with a share of the clusters held out as unseen.

    Rows with missing values are left out, with a warning.

    Parameters
    ----------
    path : path
        CSV or Parquet file.
    outcome, cluster : str
        Columns of the outcome, which has two values, and of the clusters.
    features : sequence of str, optional
        Columns of the features; all other columns by default.
    held : float
        Share of the clusters to hold out; 0 for none.
    seed : int
        Seed of the clusters that are held out.

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
            f"the comparison takes an outcome with two values, but {outcome!r} has {len(values)}: "
            "recode it, or name another column with --outcome"
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
    parser.add_argument("--outcome", help="a table's column with two values")
    parser.add_argument("--cluster", help="a table's column of clusters")
    parser.add_argument("--features", help="columns a,b,c of a table (default: all others)")
    parser.add_argument(
        "--held", type=float, default=0.2, help="share of a table's clusters to hold out"
    )
    parser.add_argument("--models", help="a,b,c (default: all that take such data)")
    parser.add_argument("--mode", choices=MODES, help="mode of programs in unseen clusters")
    parser.add_argument("--folds", type=int, help="folds; for images, data sets (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="seed of data and fits (default: 0)")
    parser.add_argument("--smoke", action="store_true", help="small data and few steps: a trial")
    parser.add_argument(
        "--out", type=Path, default=Path("results/compare"), help="folder, with one for each DATA"
    )
    options = parser.parse_args(argv)
    names = options.data or list(APPLICATIONS)
    tables = [name for name in names if name not in APPLICATIONS]
    if tables and (options.outcome is None or options.cluster is None):
        parser.error(
            f"{tables[0]} is not an application ({known}); for a table, name its columns with "
            "--outcome and --cluster"
        )
    folds = options.folds or (2 if options.smoke else 5)
    console, threads = Console(markup=False, emoji=False), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name in names:
            study = _study(name, options)
            models = study.models if options.models is None else options.models.split(",")
            comparison = run(study, models, folds, options.seed)
            write(comparison, options.out / study.name, console, study.setting.title)
    finally:
        torch.set_num_threads(threads)
    console.print(f"Tables and figures are in {options.out}")


def _study(name: str, options: argparse.Namespace) -> Study:
    """The study of an application's stand-in or of a table, with the options applied."""
    if name in APPLICATIONS:
        study = APPLICATIONS[name](options.seed, smoke=options.smoke)
    else:
        features = options.features and options.features.split(",")
        study = table_study(
            Path(name), options.outcome, options.cluster, features, options.held, options.seed
        )
    setting = replace(study.setting, schedule=QUICK) if options.smoke else study.setting
    return replace(study, setting=replace(setting, unseen=options.mode or setting.unseen))


def run(study: Study, models: Sequence[str], folds: int, seed: int) -> Comparison:
    """Train and score every model on every fold.

    Examples
    --------
    ``run(spirals_study(0, smoke=True), ["conventional", "ARMED"], folds=2, seed=0).table()``
    """
    rivals = contenders(study.setting, models)
    with warnings.catch_warnings():
        # Clusters are small, or unlike any seen cluster, which the fits warn of.
        warnings.simplefilter("ignore", UserWarning)
        fits = compare(study.folds(folds, seed), rivals, data=study.name, seed=seed)
        parts = [part for *_, part in track(fits, "fits", total=folds * len(rivals))]
    return joined(parts)


if __name__ == "__main__":
    main()
