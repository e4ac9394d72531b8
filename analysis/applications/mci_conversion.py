"""Conversion from mild cognitive impairment to dementia within 24 months, at many sites.

By default on simulated subjects whose site effects are known, without and with confounded probe
features. ``--data ADNIMERGE.csv`` takes ADNI's file. Run with
``python -m armed_pyro.analysis.applications.mci_conversion``; ``--smoke`` takes half a minute.
"""

from __future__ import annotations

import argparse
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from rich.progress import Progress, track
from rich.table import Table
from sklearn.metrics import roc_auc_score

from armed_pyro import Schedule
from armed_pyro.analysis.applications.mci_simulation import TRUE_FEATURES, SubjectsTruth, subjects
from armed_pyro.analysis.applications.mci_subjects import read_adnimerge, subject_folds
from armed_pyro.analysis.rivals.architectures import Dense
from armed_pyro.analysis.rivals.claims import auroc_claims, claim
from armed_pyro.analysis.rivals.comparison import (
    SEEN,
    UNSEEN,
    Comparison,
    Fold,
    Study,
    compare,
    joined,
)
from armed_pyro.analysis.rivals.contenders import NAMES, contenders
from armed_pyro.analysis.rivals.report import write
from armed_pyro.analysis.rivals.rival import Program, Rival, Setting, cluster_shifts
from armed_pyro.analysis.rivals.scores import bounded, resampled
from armed_pyro.analysis.rivals.tuned import Tuned

__all__ = ["CONFOUNDED", "SETTING", "Plan", "claims", "main", "probe_table", "study", "tuned"]

SETTING = Setting(
    "mci",
    "MCI conversion",
    Dense((8, 8)),
    Schedule(steps=1000, batch_size=64, stages=2, net_learning_rate=0.005, patience=3, window=25),
    adversary_weight=0.3,
    fixed_weight=0.1,
)
# Validation rows are of seen sites, where probes do predict: the weight cannot be tuned on them.
CONFOUNDED = replace(SETTING, title="MCI conversion, with probes", adversary_weight=3.0)
QUICK = Schedule(steps=60, batch_size=64, stages=0, net_learning_rate=0.02)
WIDTHS: tuple[tuple[int, ...], ...] = ((8, 8), (16,))
WEIGHTS = (0.3, 1.0)
BEST = "best possible"


@dataclass(frozen=True)
class Plan:
    """What to run on simulated subjects.

    Attributes
    ----------
    data_sets, folds : int
        Data sets drawn apart, and folds of each.
    seed : int
        Of the first data set; the others follow.
    tune : bool
        Whether widths and adversary weights are chosen by validation rows.
    probes : int
        Probe features of the confounded variant; it is left out if there are none.
    n_seen, n_unseen : int
        Subjects.
    """

    data_sets: int
    folds: int
    seed: int
    tune: bool
    probes: int = 1
    n_seen: int = 392
    n_unseen: int = 300

    def draw(self, probes: int) -> Iterator[tuple[int, pd.DataFrame, SubjectsTruth]]:
        """Every data set with its seed and truth."""
        for seed in range(self.seed, self.seed + self.data_sets):
            yield seed, *subjects(self.n_seen, self.n_unseen, probes=probes, seed=seed)


def study(seed: int, *, smoke: bool) -> Study:
    """Simulated subjects, for `armed_pyro.analysis.compare`.

    Examples
    --------
    >>> study(0, smoke=True).name
    'mci_conversion'
    """
    table, _ = subjects(*((200, 100) if smoke else (392, 300)), seed=seed)
    return Study("mci_conversion", SETTING, partial(subject_folds, table))


def tuned(rival: Rival) -> Rival:
    """The model with its width, and its adversary's weight, chosen by validation rows.

    Examples
    --------
    >>> len(tuned(Program("ARMED", SETTING, random=True, adversary=True)).candidates)
    4
    """
    if rival.name == "linear mixed model":
        return rival
    plays = isinstance(rival, Program) and rival.adversary
    settings = [
        replace(rival.setting, architecture=Dense(hidden), adversary_weight=weight)
        for hidden, weight in itertools.product(WIDTHS, WEIGHTS if plays else WEIGHTS[:1])
    ]
    return Tuned(tuple(replace(rival, setting=one) for one in settings))


def main(argv: Sequence[str] | None = None) -> None:
    """Compare the models, print tables and claims, and write them with the figures."""
    parser = argparse.ArgumentParser(
        prog="python -m armed_pyro.analysis.applications.mci_conversion", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--data", type=Path, help="ADNIMERGE.csv (default: simulated subjects)")
    parser.add_argument("--models", default=",".join(NAMES), help="a,b,c (default: all)")
    parser.add_argument("--data-sets", type=int, default=10, help="simulated (default: 10)")
    parser.add_argument("--folds", type=int, default=5, help="outer folds (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="of data and fits (default: 0)")
    parser.add_argument("--probes", type=int, default=1, help="confounded features (default: 1)")
    parser.add_argument("--untuned", action="store_true", help="no tuning by validation rows")
    parser.add_argument("--smoke", action="store_true", help="small data and few steps: a trial")
    parser.add_argument("--out", type=Path, default=Path("results/mci_conversion"), metavar="DIR")
    given = parser.parse_args(argv)
    console, models = Console(), given.models.split(",")
    setting, confounded = SETTING, CONFOUNDED
    tune = not given.untuned
    plan = Plan(given.data_sets, given.folds, given.seed, tune, given.probes)
    if given.smoke:
        plan = Plan(min(given.data_sets, 2), 2, given.seed, False, given.probes, 150, 80)
        setting, confounded = (replace(one, schedule=QUICK) for one in (setting, confounded))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            # Few sites, and small ones: the tables show what comes of it.
            warnings.simplefilter("ignore", UserWarning)
            if given.data is not None:
                real(given.data, contenders(setting, models), plan, given.out, console)
            else:
                simulated(contenders(setting, models), plan, given.out, console)
                if plan.probes:
                    probed(contenders(confounded, models), plan, given.out / "probes", console)
    finally:
        torch.set_num_threads(threads)
    console.print(f"Tables and figures are in {given.out}")


def real(path: Path, rivals: Sequence[Rival], plan: Plan, out: Path, console: Console) -> None:
    """ADNI's subjects, in nested cross-validation."""
    found = read_adnimerge(path)
    large = found.table["large"]
    console.print(
        f"{int(large.sum())} subjects at {found.table['SITE'][large].nunique()} sites for "
        f"training, {int((~large).sum())} at others; {found.table['converted'].mean():.0%} "
        f"converted; left out: {dict(found.excluded)}"
    )
    rivals = [tuned(rival) for rival in rivals] if plan.tune else rivals
    folds = subject_folds(found.table, plan.folds, plan.seed)
    fits = track(compare(folds, rivals, data=path.stem), total=plan.folds * len(rivals))
    write(joined([part for *_, part in fits]), out, console, SETTING.title)


def simulated(rivals: Sequence[Rival], plan: Plan, out: Path, console: Console) -> None:
    """Simulated subjects: the comparison, the best possible, and whether intercepts are found."""
    parts: list[Comparison] = []
    known: list[dict[str, str | int | float]] = []
    rivals = [tuned(rival) for rival in rivals] if plan.tune else rivals
    total = plan.data_sets * plan.folds * len(rivals)
    with _bar(total, console) as advance:
        for seed, table, truth in plan.draw(probes=0):
            folds = list(subject_folds(table, plan.folds, seed))
            for rival, fold, trained, part in compare(iter(folds), rivals, data=seed, seed=seed):
                parts.append(part)
                advance()
                if rival.clustered:
                    shift = cluster_shifts(trained, fold.train, "site")
                    cor = float(np.corrcoef(shift, truth.intercept[shift.index])[0, 1])
                    known.append({"data": seed, "fold": fold.number, "model": rival.name,
                                  "correlation": cor, "sd": float(shift.std())})  # fmt: skip
            known += [_best(seed, fold, table, truth) for fold in folds]
            # At once, so that an interrupted run leaves what it has.
            joined(parts).scores.to_csv(_made(out) / "scores.csv", index=False)
    found, recovery = joined(parts), pd.DataFrame(known)
    write(found, out, console, SETTING.title)
    recovery.to_csv(out / "recovery.csv", index=False)
    judged = claims(found, recovery)
    judged.to_csv(out / "claims.csv", index=False)
    _print(judged, "Claims, and what the simulated subjects say of them", console)


def probed(rivals: Sequence[Rival], plan: Plan, out: Path, console: Console) -> None:
    """Simulated subjects with probe features: which models rank a probe above a true feature."""
    chosen, parts = [one for one in rivals if isinstance(one, Program)], []
    with _bar(plan.data_sets * plan.folds * len(chosen), console) as advance:
        for seed, table, _ in plan.draw(plan.probes):
            folds = subject_folds(table, plan.folds, seed)
            for *_, part in compare(folds, chosen, data=seed, seed=seed):
                parts.append(part)
                advance()
            joined(parts).use.to_csv(_made(out) / "feature_use.csv", index=False)
    found = joined(parts)
    write(found, out, console, CONFOUNDED.title)
    table = probe_table(found)
    table.to_csv(out / "probes.csv", index=False)
    _print(table, "Use of features: |gradient at the mean|, per sd", console)


def claims(found: Comparison, recovery: pd.DataFrame) -> pd.DataFrame:
    """What must be true of ARMED on simulated subjects, and whether it is.

    Beside `auroc_claims`, that the mean correlation of intercepts with the true ones is at least
    0.8 over data sets.

    Returns
    -------
    pandas.DataFrame
        Columns claim, mean, lower, upper, holds.
    """
    records = auroc_claims(found).to_dict("records")
    means = recovery.groupby(["model", "data"])[["correlation", "seen", "unseen"]].mean()
    for model in means.index.unique("model"):
        if model != BEST:
            one = resampled(means.loc[model, "correlation"].to_numpy(), 0.0)
            name = f"correlation with true site intercepts at least 0.8: {model}"
            records.append(claim(name, one, 0.8))
    for kind in (SEEN, UNSEEN):
        best = bounded(means.loc[BEST, kind].to_numpy(), 0.0)
        name = f"AUROC, {kind} clusters: best possible"
        records.append(claim(name, best, 0.0) | {"holds": ""})
    return pd.DataFrame(records)


def probe_table(found: Comparison) -> pd.DataFrame:
    """Whether every true feature is used more than every probe.

    Returns
    -------
    pandas.DataFrame
        One row a model: mean use of the least used true feature and of the most used probe, by
        their means over all fits; true_first, whether the former is larger; fits_true_first, the
        share of fits in which that is so; p, of the least used true feature against the most
        used probe, paired by data set.
    """
    true, probes = list(TRUE_FEATURES), [name for name in found.use if name.startswith("probe")]
    records = []
    for model, block in found.use.groupby("model", sort=False):
        mean = block[[*true, *probes]].mean()
        least, most = mean[true].idxmin(), mean[probes].idxmax()
        by_data = block.groupby("data")[[least, most]].mean()
        one = resampled((by_data[least] - by_data[most]).to_numpy(), 0.0)
        first = block[true].min(axis=1) > block[probes].max(axis=1)
        records.append(
            {"model": model, "least used true feature": mean[least], "most used probe": mean[most],
             "difference": one.mean, "lower": one.lower, "upper": one.upper, "p": one.p,
             "true_first": bool(mean[least] > mean[most]), "fits_true_first": first.mean()}
        )  # fmt: skip
    return pd.DataFrame(records)


def _best(
    seed: int, fold: Fold, table: pd.DataFrame, truth: SubjectsTruth
) -> dict[str, str | int | float]:
    """AUROCs of the rule that knows how the rows were drawn, but no unseen site's intercept."""
    row: dict[str, str | int | float] = {"data": seed, "fold": fold.number, "model": BEST}
    y = table["converted"].to_numpy()
    unseen = np.flatnonzero(~table["large"].to_numpy())
    for kind, score, rows in (
        (SEEN, truth.probability, fold.test.row_labels.to_numpy()),
        (UNSEEN, truth.fixed, unseen),
    ):
        row[kind] = float(roc_auc_score(y[rows], score[rows]))
    return row


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _bar(total: int, console: Console) -> Iterator[Callable[[], None]]:
    """A progress bar, and what moves it on by one fit."""
    with Progress(console=console) as bar:
        task = bar.add_task("fits", total=total)
        yield lambda: bar.advance(task)


def _print(table: pd.DataFrame, title: str, console: Console) -> None:
    shown = Table(title=title)
    for name in table:
        shown.add_column(str(name).replace("_", " "))
    for row in table.itertuples(index=False):
        shown.add_row(*(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row))
    console.print(shown)


if __name__ == "__main__":
    main()
