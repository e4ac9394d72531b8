"""Conversion from mild cognitive impairment to dementia within 24 months, at many sites.

The subjects are simulated, with known site effects, first without and then with confounded probe
features. ``--data ADNIMERGE.csv`` reads ADNI's file instead. Run with
``python -m armed_pyro.analysis.applications.mci_conversion``; ``--smoke`` takes half a minute.
"""

from __future__ import annotations

import argparse
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from rich.progress import Progress, track
from rich.table import Table
from sklearn.metrics import roc_auc_score

from armed_pyro import Schedule
from armed_pyro.analysis.applications.mci_subjects import (
    TRUE_FEATURES,
    SubjectsTruth,
    read_adnimerge,
    simulated_subjects,
    subject_folds,
)
from armed_pyro.analysis.rivals.architectures import Dense
from armed_pyro.analysis.rivals.comparison import (
    SEEN,
    UNSEEN,
    Comparison,
    Fold,
    auroc_claims,
    claim,
    compare,
    joined,
)
from armed_pyro.analysis.rivals.contenders import NAMES, Program, Tuned, contenders
from armed_pyro.analysis.rivals.report import write
from armed_pyro.analysis.rivals.rival import Rival, Setting, cluster_shifts
from armed_pyro.analysis.rivals.scores import bounded, resampled

__all__ = ["CONFOUNDED", "SETTING", "Plan", "claims", "main", "probe_table", "tuned"]

SETTING = Setting(
    "mci",
    "MCI conversion",
    Dense((8, 8)),
    Schedule(steps=1000, batch_size=64, stages=2, net_learning_rate=0.005, patience=3, window=25),
    adversary_weight=0.3,
    fixed_weight=0.1,
)
# The weight cannot be tuned on validation rows: they are at seen sites, where probes do predict.
CONFOUNDED = replace(SETTING, title="MCI conversion, with probes", adversary_weight=3.0)
QUICK = Schedule(steps=60, batch_size=64, stages=0, net_learning_rate=0.02)
WIDTHS: tuple[tuple[int, ...], ...] = ((8, 8), (16,))
WEIGHTS = (0.3, 1.0)
BEST = "best possible"


@dataclass(frozen=True)
class Plan:
    """Data sets and folds to run on simulated subjects.

    Attributes
    ----------
    data_sets, folds : int
        Number of independent data sets, and of folds in each.
    seed : int
        Seed of the first data set; the others have the seeds that follow.
    tune : bool
        Whether widths and adversary weights are chosen by validation rows.
    probes : int
        Probe features of the confounded variant, which is left out if there are none.
    n_seen, n_unseen : int
        Subjects at the sites for training, and at the others.
    """

    data_sets: int
    folds: int
    seed: int
    tune: bool
    probes: int = 1
    n_seen: int = 392
    n_unseen: int = 300

    def draw(self, probes: int) -> Iterator[tuple[int, pd.DataFrame, SubjectsTruth]]:
        """Each data set with its seed and its truth."""
        for seed in range(self.seed, self.seed + self.data_sets):
            yield seed, *simulated_subjects(self.n_seen, self.n_unseen, probes=probes, seed=seed)


def tuned(rival: Rival) -> Rival:
    """The model with its width, and the weight of its adversary, chosen by validation rows.

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
    return Tuned(tuple(replace(rival, setting=setting) for setting in settings))


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
    options = parser.parse_args(argv)
    console, models = Console(markup=False, emoji=False), options.models.split(",")
    setting, confounded = SETTING, CONFOUNDED
    tune = not options.untuned
    plan = Plan(options.data_sets, options.folds, options.seed, tune, options.probes)
    if options.smoke:
        plan = Plan(min(options.data_sets, 2), 2, options.seed, False, options.probes, 150, 80)
        setting, confounded = (replace(full, schedule=QUICK) for full in (setting, confounded))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            # Sites are few and small, which the fits warn of and the tables show.
            warnings.simplefilter("ignore", UserWarning)
            if options.data is not None:
                real(options.data, contenders(setting, models), plan, options.out, console)
            else:
                simulated(contenders(setting, models), plan, options.out, console)
                if plan.probes:
                    probed(contenders(confounded, models), plan, options.out / "probes", console)
    finally:
        torch.set_num_threads(threads)
    console.print(f"Tables and figures are in {options.out}")


def real(path: Path, rivals: Sequence[Rival], plan: Plan, out: Path, console: Console) -> None:
    """Compare the models on ADNI's subjects, by nested cross-validation."""
    adni = read_adnimerge(path)
    large = adni.table["large"]
    console.print(
        f"{int(large.sum())} subjects at {adni.table['SITE'][large].nunique()} sites for "
        f"training, {int((~large).sum())} at others; {adni.table['converted'].mean():.0%} "
        f"converted; left out: {dict(adni.excluded)}"
    )
    rivals = [tuned(rival) for rival in rivals] if plan.tune else rivals
    folds = subject_folds(adni.table, plan.folds, plan.seed)
    fits = track(compare(folds, rivals, data=path.stem), total=plan.folds * len(rivals))
    write(joined([part for *_, part in fits]), out, console, SETTING.title)


def simulated(rivals: Sequence[Rival], plan: Plan, out: Path, console: Console) -> None:
    """Compare the models on simulated subjects, and their intercepts with the known ones."""
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
            # Written after each data set, so that an interrupted run leaves its results.
            joined(parts).scores.to_csv(_made(out) / "scores.csv", index=False)
    comparison, recovery = joined(parts), pd.DataFrame(known)
    write(comparison, out, console, SETTING.title)
    recovery.to_csv(out / "recovery.csv", index=False)
    judged = claims(comparison, recovery)
    judged.to_csv(out / "claims.csv", index=False)
    _print(judged, "Claims, judged by the simulated subjects", console)


def probed(rivals: Sequence[Rival], plan: Plan, out: Path, console: Console) -> None:
    """Compare the programs on simulated subjects with probes, by the features that they use."""
    compared, parts = [rival for rival in rivals if isinstance(rival, Program)], []
    with _bar(plan.data_sets * plan.folds * len(compared), console) as advance:
        for seed, table, _ in plan.draw(plan.probes):
            folds = subject_folds(table, plan.folds, seed)
            for *_, part in compare(folds, compared, data=seed, seed=seed):
                parts.append(part)
                advance()
            joined(parts).use.to_csv(_made(out) / "feature_use.csv", index=False)
    comparison = joined(parts)
    write(comparison, out, console, CONFOUNDED.title)
    table = probe_table(comparison)
    table.to_csv(out / "probes.csv", index=False)
    _print(table, "Use of features: |gradient at the mean|, per sd", console)


def claims(comparison: Comparison, recovery: pd.DataFrame) -> pd.DataFrame:
    """Claims about ARMED on simulated subjects, with their verdicts.

    Beside `auroc_claims`, the claim for each model with clusters is that its intercepts correlate
    with the true ones by at least 0.8, on average over data sets.

    Returns
    -------
    pandas.DataFrame
        Columns claim, mean, lower, upper, holds.
    """
    records = auroc_claims(comparison).to_dict("records")
    means = recovery.groupby(["model", "data"])[["correlation", "seen", "unseen"]].mean()
    for model in means.index.unique("model"):
        if model != BEST:
            correlation = resampled(means.loc[model, "correlation"].to_numpy(), 0.0)
            name = f"correlation with true site intercepts at least 0.8: {model}"
            records.append(claim(name, correlation, 0.8))
    for kind in (SEEN, UNSEEN):
        best = bounded(means.loc[BEST, kind].to_numpy(), 0.0)
        name = f"AUROC, {kind} clusters: best possible"
        records.append(claim(name, best, 0.0) | {"holds": ""})
    return pd.DataFrame(records)


def probe_table(comparison: Comparison) -> pd.DataFrame:
    """Use of the least used true feature beside use of the most used probe.

    Returns
    -------
    pandas.DataFrame
        One row per model: the mean use of the two over all fits; their difference with its interval
        and p-value, paired by data set; true_first, whether the true feature is used more; and
        fits_true_first, the share of fits in which every true feature is used more than every
        probe.
    """
    use, true = comparison.use, list(TRUE_FEATURES)
    probes = [name for name in use if name.startswith("probe")]
    records = []
    for model, block in use.groupby("model", sort=False):
        mean = block[[*true, *probes]].mean()
        least, most = mean[true].idxmin(), mean[probes].idxmax()
        by_data = block.groupby("data")[[least, most]].mean()
        gap = resampled((by_data[least] - by_data[most]).to_numpy(), 0.0)
        first = block[true].min(axis=1) > block[probes].max(axis=1)
        records.append(
            {"model": model, "least used true feature": mean[least], "most used probe": mean[most],
             "difference": gap.mean, "lower": gap.lower, "upper": gap.upper, "p": gap.p,
             "true_first": bool(mean[least] > mean[most]), "fits_true_first": first.mean()}
        )  # fmt: skip
    return pd.DataFrame(records)


def _best(
    seed: int, fold: Fold, table: pd.DataFrame, truth: SubjectsTruth
) -> dict[str, str | int | float]:
    """AUROCs of the rule that knows the truth, except for the intercepts of unseen sites."""
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
    """A progress bar; the yielded function advances it by one fit."""
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
