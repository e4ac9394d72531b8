"""The paper's simulation: two spirals in clusters of different size, six models compared.

Run with ``python -m armed_pyro.analysis.spirals``; ``--smoke`` takes seconds.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
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
from armed_pyro.analysis.architectures import Dense
from armed_pyro.analysis.rivals import Rival, Setting, outcomes
from armed_pyro.analysis.spiralscores import PAPER_ACCURACY, rivals, surface, train_and_score
from armed_pyro.data.simulate import SpiralsTruth, spirals
from armed_pyro.explain.boundaries import draw_panel

__all__ = ["Plan", "Task", "main"]

# Ten epochs of 9,000 rows in batches of 32.
EPOCHS = Schedule(steps=2812, batch_size=32, stages=0, net_learning_rate=0.001)
PAPER = Setting("paper", "4 units, 10 epochs, rate 0.001", Dense((4, 4, 4)), EPOCHS)
TUNED = replace(
    PAPER,
    name="tuned",
    title="4 units, 10 epochs, rate 0.02",
    schedule=replace(EPOCHS, net_learning_rate=0.02),
)
CONVERGED = Setting(
    "converged",
    "64 units, converged",
    Dense((64, 64, 64)),
    Schedule(steps=4000, batch_size=256, stages=3, net_learning_rate=0.005),
)
SMOKE = Setting(
    "smoke",
    "8 units, 80 steps",
    Dense((8, 8, 8)),
    Schedule(steps=80, batch_size=64, stages=0, net_learning_rate=0.05),
)
PLAIN, CONFOUNDED = "spirals", "confounded"
VARIANTS: Mapping[str, Mapping[str, float]] = {
    PLAIN: {},
    CONFOUNDED: {"ratio_sd": 0.3, "probes": 2},
}
BLOCKS = (
    (PLAIN, PAPER),
    (PLAIN, TUNED),
    (PLAIN, CONVERGED),
    (CONFOUNDED, PAPER),
    (CONFOUNDED, TUNED),
    (CONFOUNDED, CONVERGED),
)
NOTES = """\
± standard error over folds; gain: over the conventional model, with the standard
error of the folds' differences. All models share network, batches, steps and the
network's learning rate: Adam's usual 0.001, or one tuned for all of them together
on data of other seeds. The paper's figures come from its own data. Best possible:
the rule that knows how the rows were drawn. Probe share: of all four features'
use. x1, x2 first: folds in which both true features are used more than both probes.
With probes, ten epochs at rate 0.001 can be too few to train any model, and then
random effects gain nothing: compare the tuned rate, and convergence."""
RANDOMISED = "cluster randomised"
SHOWN_ACCURACY = {**PAPER_ACCURACY, RANDOMISED: 0.767}
DRAWN = ("conventional", "cluster input", "ARMED")
SURFACE = 60


@dataclass(frozen=True)
class Plan:
    """What to run: the data's size, folds, seed, and blocks of a variant and a setting."""

    n_clusters: int
    rows: int
    folds: int
    seed: int
    blocks: tuple[tuple[str, Setting], ...]

    def data(self, variant: str) -> tuple[ClusteredData, SpiralsTruth]:
        """The variant's rows; both variants have the same radii."""
        options: dict[str, float] = dict(VARIANTS[variant])
        return spirals(self.n_clusters, self.rows, seed=self.seed, **options)  # type: ignore[arg-type]

    def tasks(self) -> list[Task]:
        """Every fit."""
        return [
            Task(self, variant, rival, fold)
            for variant, setting in self.blocks
            for fold in range(self.folds)
            for rival in rivals(setting)
        ]


@dataclass(frozen=True)
class Task:
    """One fit: a model in its setting, on a variant's training rows of one fold."""

    plan: Plan
    variant: str
    rival: Rival
    fold: int

    def run(self) -> tuple[dict[str, str | float], np.ndarray | None]:
        """The fit's row of the results, and the surface to draw, if this is a fit to draw."""
        data, truth = self.plan.data(self.variant)
        train, test = list(data.folds(self.plan.folds, seed=self.plan.seed))[self.fold]
        trained, score = train_and_score(
            self.rival, train, test, seed=1000 * self.plan.seed + self.fold
        )
        use = {f"use_{name}": value for name, value in score.use.items()}
        setting = self.rival.setting.name
        row = {"variant": self.variant, "setting": setting, "model": self.rival.name}
        record = {**row, "fold": self.fold, **asdict(score), **use}
        del record["use"]
        if self.fold > 0 or self.variant != PLAIN or self.rival.name not in DRAWN:
            return record, None
        levels = train.grouping("site").levels
        return record, surface(trained, levels, _extent(truth), SURFACE)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the simulation, print its tables and write them with the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a tiny run, in seconds")
    parser.add_argument("--folds", type=int, help="folds of the cross-validation (default: 10)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="seed of data and fits (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("results/spirals"), help="folder")
    chosen = parser.parse_args(argv)
    if chosen.smoke:
        blocks = ((PLAIN, SMOKE), (CONFOUNDED, SMOKE))
        plan = Plan(4, 150, chosen.folds or 2, chosen.seed, blocks)
    else:
        plan = Plan(10, 1000, chosen.folds or 10, chosen.seed, BLOCKS)
    chosen.out.mkdir(parents=True, exist_ok=True)
    console, tasks = Console(), plan.tasks()
    records: dict[int, dict[str, str | float]] = {}
    surfaces: dict[str, dict[str, np.ndarray]] = {}
    results = _results(tasks, chosen.jobs)
    for place, record, drawing in track(results, "fits", total=len(tasks), console=console):
        records[place] = record
        # Written at once, so that an interrupted run leaves what it has.
        _in_order(records).to_csv(chosen.out / "fits.csv", index=False)
        if drawing is not None:
            task = tasks[place]
            surfaces.setdefault(task.rival.setting.name, {})[task.rival.name] = drawing
    fits = _in_order(records)
    accuracy, use = accuracy_table(fits, plan), use_table(fits)
    accuracy.to_csv(chosen.out / "accuracy.csv", index=False)
    use.to_csv(chosen.out / "feature_use.csv", index=False)
    settings = asdict(plan) | {
        "variants": {name: dict(options) for name, options in VARIANTS.items()},
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    (chosen.out / "settings.json").write_text(json.dumps(settings, indent=2))
    for variant, setting in plan.blocks:
        if variant == PLAIN:
            figure = draw(surfaces[setting.name], plan, setting)
            figure.savefig(chosen.out / f"boundaries_{setting.name}.png", dpi=150)
            plt.close(figure)
    _show(accuracy, use, plan, console)
    console.print(f"Tables and figure are in {chosen.out}")


def draw(surfaces: Mapping[str, np.ndarray], plan: Plan, setting: Setting) -> Figure:
    """Decision boundaries of three models in clusters from the smallest spirals to the largest."""
    data, truth = plan.data(PLAIN)
    _, test = next(iter(data.folds(plan.folds, seed=plan.seed)))
    count = min(5, plan.n_clusters)
    shown = np.argsort(truth.radius)[np.linspace(0, plan.n_clusters - 1, count).astype(int)]
    extent = _extent(truth)
    figure, axes = plt.subplots(
        len(DRAWN),
        count,
        figsize=(1.6 + 1.9 * count, 6.6),
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    image = None
    for row, name in zip(axes, DRAWN, strict=True):
        for axis, cluster in zip(row, shown, strict=True):
            chance = surfaces[name][cluster]
            inside = test.grouping("site").labels() == cluster
            x, label = test.features[inside].numpy(), outcomes(test)[inside]
            line = np.linspace(-extent, extent, SURFACE)
            image = draw_panel(axis, chance, (line, line), (x, label))
            axis.set(xticks=[-1, 0, 1], yticks=[-1, 0, 1], aspect="equal")
        row[0].set_ylabel(name, fontsize=11)
    for axis, cluster in zip(axes[0], shown, strict=True):
        axis.set_title(f"cluster {cluster}, radius {truth.radius[cluster]:.2f}", fontsize=10)
    if image is not None:
        figure.colorbar(image, ax=axes, shrink=0.5, label="P(class 1)", pad=0.01)
    figure.suptitle(
        f"Decision boundaries by cluster, and the test rows of fold 1 ({setting.title})"
    )
    return figure


def _show(accuracy: pd.DataFrame, use: pd.DataFrame, plan: Plan, console: Console) -> None:
    """Print both tables."""
    for variant in VARIANTS:
        block = accuracy[accuracy.variant == variant]
        table = Table(title=f"Accuracy in {plan.folds}-fold cross-validation: {variant}")
        table.add_column("model")
        for one, setting in plan.blocks:
            if one == variant:
                table.add_column(setting.title, justify="right", max_width=15)
                table.add_column("gain", justify="right")
        if variant == PLAIN:
            table.add_column("paper", justify="right")
        for model, rows in block.groupby("model", sort=False):
            cells = [str(model)]
            for one in rows.itertuples():
                cells += [_with_error(one.accuracy, one.se), _with_error(one.gain, one.gain_se)]
            if variant == PLAIN:
                cells.append(_with_error(rows.paper.iloc[0], np.nan))
            table.add_row(*cells)
        console.print(table)
    table = Table(title="Confounded: |gradient of the fixed effects| at the mean input")
    names = [name for name in use.columns if name.startswith("use_")]
    for column in ["model", "setting", *(name.removeprefix("use_") for name in names)]:
        table.add_column(column)
    table.add_column("probe share", justify="right")
    table.add_column("x1, x2 first", justify="right")
    for one in use.to_dict("records"):
        cells = [f"{one[name]:.2f}" for name in names]
        cells.append(_with_error(one["probe_share"], one["probe_share_se"]))
        table.add_row(one["model"], one["setting"], *cells, f"{one['true_first']:.0%}")
    console.print(table)
    console.print(NOTES, soft_wrap=True)


def _in_order(records: Mapping[int, Mapping[str, str | float]]) -> pd.DataFrame:
    return pd.DataFrame([records[place] for place in sorted(records)])


def _with_error(value: float, error: float) -> str:
    if np.isnan(value):
        return ""
    return f"{value:.3f}" if np.isnan(error) else f"{value:.3f} ± {error:.3f}"


def _extent(truth: SpiralsTruth) -> float:
    """Half the side of a square that holds every cluster's spirals."""
    return float(1.1 * np.abs(truth.radius).max())


def _results(
    tasks: Sequence[Task], jobs: int
) -> Iterator[tuple[int, dict[str, str | float], np.ndarray | None]]:
    """Every task's place and result, in the order in which they end."""
    if jobs == 1:
        yield from ((place, *task.run()) for place, task in enumerate(tasks))
        return
    # A forked process may deadlock in torch's threads; a spawned one starts clean.
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,))
    with pool:
        waiting = {pool.submit(task.run): place for place, task in enumerate(tasks)}
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
        for model, paper in SHOWN_ACCURACY.items():
            gain = folds[model] - folds["conventional"]
            mean, gain_mean = folds[model].mean(), gain.mean()
            paper_shown = paper if variant == PLAIN else np.nan
            rows.append(
                [
                    variant,
                    setting,
                    model,
                    mean,
                    folds[model].sem(),
                    gain_mean,
                    gain.sem(),
                    paper_shown,
                ]
            )
    for (variant, setting), _ in blocks:
        data, truth = plan.data(str(variant))
        for known, name in [(False, "best possible, cluster unknown"), (True, "best possible")]:
            right = (truth.probability(data, cluster_known=known) > 0.5) == outcomes(data)
            rows.append([variant, setting, name, right.mean(), np.nan, np.nan, np.nan, np.nan])
    names = ["variant", "setting", "model", "accuracy", "se", "gain", "gain_se", "paper"]
    return pd.DataFrame(rows, columns=names)


def use_table(fits: pd.DataFrame) -> pd.DataFrame:
    """Mean use of each feature in the confounded variant, and how much of it goes to the probes.

    Returns
    -------
    pandas.DataFrame
        Columns setting, model, use_x1, use_x2, use_probe1, use_probe2; probe_share, the probes'
        share of the four, with its standard error probe_share_se; true_first, the share of folds
        in which both true features come before both probes.
    """
    probed = fits[fits.variant == CONFOUNDED]
    use = probed.filter(like="use_")
    true, probes = use[["use_x1", "use_x2"]], use[["use_probe1", "use_probe2"]]
    table = pd.concat([probed[["setting", "model"]], use], axis=1).assign(
        probe_share=probes.sum(axis=1) / use.sum(axis=1),
        true_first=true.min(axis=1) > probes.max(axis=1),
    )
    blocks = table.groupby(["setting", "model"], sort=False)
    means = blocks.mean().assign(probe_share_se=blocks.probe_share.sem()).reset_index()
    order = list(PAPER_ACCURACY)
    return means.sort_values("model", key=lambda names: names.map(order.index), kind="stable")


if __name__ == "__main__":
    main()
