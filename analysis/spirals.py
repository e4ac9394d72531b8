"""The paper's simulation: two spirals in clusters of different size, six models compared.

Run with ``python -m armed_pyro.analysis.spirals``; ``--smoke`` takes seconds.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

from armed_pyro import ClusteredData, Schedule
from armed_pyro.analysis.rivals import RIVALS, Rival, Setting, surface, train_and_score
from armed_pyro.simulate import SpiralsTruth, spirals

__all__ = ["Plan", "Task", "main"]

PAPER = Setting(
    "4 units, 10 epochs",
    width=4,
    schedule=Schedule(steps=2812, batch_size=32, stages=0, net_learning_rate=0.02),
)
CONVERGED = Setting(
    "64 units, converged",
    width=64,
    schedule=Schedule(steps=6000, batch_size=256, stages=3, net_learning_rate=0.005),
)
SMOKE = Setting(
    "smoke",
    width=8,
    schedule=Schedule(steps=120, batch_size=64, stages=0, net_learning_rate=0.05),
)
PLAIN, CONFOUNDED = "spirals", "confounded"
VARIANTS: Mapping[str, Mapping[str, float]] = {
    PLAIN: {},
    CONFOUNDED: {"ratio_sd": 0.2, "probes": 2},
}
RANDOMISED = "cluster randomised"
PAPER_ACCURACY = {rival.name: rival.paper for rival in RIVALS} | {RANDOMISED: 0.767}
SURFACE = 80


@dataclass(frozen=True)
class Plan:
    """What to run: the data's size, the settings, the folds of cross-validation and the seed."""

    n_clusters: int
    rows: int
    folds: int
    settings: tuple[Setting, ...]
    seed: int

    def data(self, variant: str) -> tuple[ClusteredData, SpiralsTruth]:
        """The variant's rows; both variants have the same radii."""
        options: dict[str, float] = dict(VARIANTS[variant])
        return spirals(self.n_clusters, self.rows, seed=self.seed, **options)  # type: ignore[arg-type]

    def tasks(self) -> list[Task]:
        """Every fit."""
        return [
            Task(self, variant, setting, rival, fold)
            for setting in self.settings
            for variant in VARIANTS
            for fold in range(self.folds)
            for rival in RIVALS
        ]


@dataclass(frozen=True)
class Task:
    """One fit: a model, in a setting, on a variant's training rows of one fold."""

    plan: Plan
    variant: str
    setting: Setting
    rival: Rival
    fold: int

    def run(self) -> tuple[dict[str, str | float], np.ndarray | None]:
        """The fit's row of the results, and the surface to draw, if this is a fit to draw."""
        data, truth = self.plan.data(self.variant)
        train, test = list(data.folds(self.plan.folds, seed=self.plan.seed))[self.fold]
        result, score = train_and_score(
            self.rival, self.setting, train, test, seed=1000 * self.plan.seed + self.fold
        )
        use = {f"use_{name}": value for name, value in score.use.items()}
        row = {"variant": self.variant, "setting": self.setting.name, "model": self.rival.name}
        record = {**row, "fold": self.fold, **asdict(score), **use}
        del record["use"]
        drawn = self.fold == 0 and self.variant == PLAIN and self.setting == self.plan.settings[0]
        if not drawn:
            return record, None
        levels = train.grouping("site").levels
        return record, surface(result, self.rival, levels, _extent(truth), SURFACE)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the simulation, print its tables and write them with the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a tiny run, in seconds")
    parser.add_argument("--folds", type=int, help="folds of the cross-validation (default: 10)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="seed of data and fits (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("results/spirals"), help="folder")
    chosen = parser.parse_args(argv)
    if chosen.smoke:
        plan = Plan(4, 150, chosen.folds or 2, (SMOKE,), chosen.seed)
    else:
        plan = Plan(10, 1000, chosen.folds or 10, (PAPER, CONVERGED), chosen.seed)
    chosen.out.mkdir(parents=True, exist_ok=True)
    records, surfaces = [], {}
    tasks = plan.tasks()
    console = Console()
    for task, record, drawing in track(
        _results(tasks, chosen.jobs), "fits", total=len(tasks), console=console
    ):
        records.append(record)
        # Written at once, so that an interrupted run leaves what it has.
        fits = pd.DataFrame(records)
        fits.to_csv(chosen.out / "fits.csv", index=False)
        if drawing is not None:
            surfaces[task.rival.name] = drawing
    fits = fits.sort_values(["setting", "variant", "fold", "model"])
    fits.to_csv(chosen.out / "fits.csv", index=False)
    accuracy, use = accuracy_table(fits, plan), use_table(fits)
    accuracy.to_csv(chosen.out / "accuracy.csv", index=False)
    use.to_csv(chosen.out / "feature_use.csv", index=False)
    settings = asdict(plan) | {
        "variants": {name: dict(options) for name, options in VARIANTS.items()},
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    (chosen.out / "settings.json").write_text(json.dumps(settings, indent=2))
    figure = draw(surfaces, plan)
    figure.savefig(chosen.out / "boundaries.png", dpi=150)
    plt.close(figure)
    _show(accuracy, use, console)
    console.print(f"Tables and figure are in {chosen.out}")


def _results(
    tasks: Sequence[Task], jobs: int
) -> Iterator[tuple[Task, dict[str, str | float], np.ndarray | None]]:
    """Every task with its result, in the order in which they end."""
    if jobs == 1:
        yield from ((task, *task.run()) for task in tasks)
        return
    # A forked process may deadlock in torch's threads; a spawned one starts clean.
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,))
    with pool:
        waiting = {pool.submit(task.run): task for task in tasks}
        for future in as_completed(waiting):
            yield waiting[future], *future.result()


def accuracy_table(fits: pd.DataFrame, plan: Plan) -> pd.DataFrame:
    """Mean accuracy over folds, its standard error, and the gain over the conventional model.

    Returns
    -------
    pandas.DataFrame
        Columns variant, setting, model, accuracy, se, gain, gain_se (of the folds' differences),
        paper. The last two models of each block are the best that any could do.
    """
    randomised = fits[fits.model == "ARMED"].assign(
        model=RANDOMISED, accuracy=lambda frame: frame.randomised
    )
    rows = []
    blocks = pd.concat([fits, randomised]).groupby(["variant", "setting"], sort=False)
    for (variant, setting), block in blocks:
        folds = block.pivot_table(index="fold", columns="model", values="accuracy")
        for model, paper in PAPER_ACCURACY.items():
            gain = folds[model] - folds["conventional"]
            mean, gain_mean = folds[model].mean(), gain.mean()
            paper_shown = paper if variant == PLAIN else np.nan
            rows.append(
                [variant, setting, model, mean, folds[model].sem(), gain_mean, gain.sem(), paper_shown]
            )
    for (variant, setting), _ in blocks:
        data, truth = plan.data(str(variant))
        for known, name in [(False, "best possible, cluster unknown"), (True, "best possible")]:
            right = (truth.probability(data, cluster_known=known) > 0.5) == data.outcome.numpy()
            rows.append([variant, setting, name, right.mean(), np.nan, np.nan, np.nan, np.nan])
    names = ["variant", "setting", "model", "accuracy", "se", "gain", "gain_se", "paper"]
    return pd.DataFrame(rows, columns=names)


def use_table(fits: pd.DataFrame) -> pd.DataFrame:
    """Mean use of each feature, and the share of folds that rank both true ones above the probes.

    Returns
    -------
    pandas.DataFrame
        Columns setting, model, use_x1, use_x2, use_probe1, use_probe2, true_first; the confounded
        variant's.
    """
    probed = fits[fits.variant == CONFOUNDED]
    use = probed.filter(like="use_")
    true = use[["use_x1", "use_x2"]].min(axis=1)
    probes = use[["use_probe1", "use_probe2"]].max(axis=1)
    table = pd.concat([probed[["setting", "model"]], use], axis=1).assign(true_first=true > probes)
    order = [rival.name for rival in RIVALS]
    means = table.groupby(["setting", "model"], sort=False).mean().reset_index()
    return means.sort_values("model", key=lambda names: names.map(order.index), kind="stable")
