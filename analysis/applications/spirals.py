"""The paper's simulation: two spirals in clusters of different size, and six models compared.

Run with ``python -m armed_pyro.analysis.applications.spirals``; ``--smoke`` takes seconds.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from rich.console import Console
from rich.progress import track
from rich.table import Table

from armed_pyro import ClusteredData, Schedule
from armed_pyro.analysis.rivals.architectures import Dense
from armed_pyro.analysis.rivals.contenders import contenders
from armed_pyro.analysis.rivals.rival import (
    Rival,
    Setting,
    Trained,
    feature_use,
    outcomes,
    shuffled,
)
from armed_pyro.data.simulate import SpiralsTruth, spirals

__all__ = ["PAPER_ACCURACY", "Plan", "Score", "Task", "main", "train_and_score"]

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
# Accuracy that the paper reports for its simulation.
PAPER_ACCURACY: Mapping[str, float] = {
    "conventional": 0.764,
    "cluster input": 0.676,
    "meta-learning": 0.633,
    "domain adversarial": 0.753,
    "ARMED": 0.788,
    "without adversary": 0.793,
}
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
± is the standard error over folds. The gain is over the conventional model, with the
standard error of the folds' differences. All models share the network, the batches, the
steps and the network's learning rate, which is Adam's usual 0.001 or a rate tuned for all
models together on data of other seeds. The paper's figures come from other data. The best
possible rule knows how the rows were drawn. The probe share is the probes' share in the use
of all four features. "x1, x2 first" counts the folds in which both true features are used
more than both probes. With probes, ten epochs at rate 0.001 can be too few to train any
model, and then random effects gain nothing: look at the tuned rate and at convergence."""
RANDOMISED = "cluster randomised"
SHOWN_ACCURACY = {**PAPER_ACCURACY, RANDOMISED: 0.767}
DRAWN = ("conventional", "cluster input", "ARMED")
SURFACE = 60


@dataclass(frozen=True)
class Plan:
    """The simulation to run: size of the data, folds, seed, and pairs of variant and setting."""

    n_clusters: int
    rows: int
    folds: int
    seed: int
    blocks: tuple[tuple[str, Setting], ...]

    def data(self, variant: str) -> tuple[ClusteredData, SpiralsTruth]:
        """Rows and truth of a variant; both variants have the same radii."""
        options: dict[str, float] = dict(VARIANTS[variant])
        return spirals(self.n_clusters, self.rows, seed=self.seed, **options)  # type: ignore[arg-type]

    def tasks(self) -> list[Task]:
        """All fits of the simulation."""
        return [
            Task(self, variant, rival, fold)
            for variant, setting in self.blocks
            for fold in range(self.folds)
            for rival in rivals(setting)
        ]


@dataclass(frozen=True)
class Task:
    """A fit: a model in its setting, on the training rows of a variant's fold."""

    plan: Plan
    variant: str
    rival: Rival
    fold: int

    def run(self) -> tuple[dict[str, str | float], np.ndarray | None]:
        """The fit's row in the results, and its surface if the figure shows this fit."""
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


def rivals(setting: Setting) -> tuple[Rival, ...]:
    """The six models of the paper's simulation, in its order."""
    return contenders(setting, list(PAPER_ACCURACY))


@dataclass(frozen=True)
class Score:
    """Scores of a fit on its test rows.

    Attributes
    ----------
    accuracy : float
        Share of test rows whose class has the higher predicted probability.
    randomised : float
        The same share after the test rows were moved to random clusters.
    use : mapping of str to float
        |d f / d x_j| of the fixed effects f at the mean input, per standard deviation of the
        feature.
    seconds : float
        Duration of the fit.
    steps : int
        Steps taken.
    """

    accuracy: float
    randomised: float
    use: Mapping[str, float]
    seconds: float
    steps: int


def train_and_score(
    rival: Rival, train: ClusteredData, test: ClusteredData, seed: int
) -> tuple[Trained, Score]:
    """Train a model on the training rows and score it on the test rows."""
    factor = rival.setting.factor
    start = time.perf_counter()
    trained = rival.train(train, None, seed)
    seconds = time.perf_counter() - start
    moved = shuffled(test, factor, train.grouping(factor).levels, seed)
    score = Score(
        accuracy=_accuracy(trained, test),
        randomised=_accuracy(trained, moved),
        use=feature_use(trained, train.feature_names),
        seconds=seconds,
        steps=trained.steps,
    )
    return trained, score


def surface(
    trained: Trained, levels: pd.Index, extent: float, size: int
) -> Float[np.ndarray, "clusters size size"]:
    """P(class 1) on a square grid of (x1, x2) from -extent to extent, in each cluster."""
    line = np.linspace(-extent, extent, size)
    grid = np.stack(np.meshgrid(line, line), -1).reshape(-1, 2)
    rows = ClusteredData.from_arrays(
        np.tile(grid, (len(levels), 1)),
        None,
        {"site": np.repeat(levels.to_numpy(), len(grid))},
        feature_names=["x1", "x2"],
    )
    return trained.predict(rows).reshape(len(levels), size, size)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the simulation, print its tables and write them with the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a tiny run, in seconds")
    parser.add_argument("--folds", type=int, help="folds of the cross-validation (default: 10)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="seed of data and fits (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("results/spirals"), help="folder")
    options = parser.parse_args(argv)
    out: Path = options.out
    if options.smoke:
        blocks = ((PLAIN, SMOKE), (CONFOUNDED, SMOKE))
        plan = Plan(4, 150, options.folds or 2, options.seed, blocks)
    else:
        plan = Plan(10, 1000, options.folds or 10, options.seed, BLOCKS)
    out.mkdir(parents=True, exist_ok=True)
    console, tasks = Console(markup=False, emoji=False), plan.tasks()
    records: dict[int, dict[str, str | float]] = {}
    surfaces: dict[str, dict[str, np.ndarray]] = {}
    results = _results(tasks, options.jobs)
    for place, record, drawing in track(results, "fits", total=len(tasks), console=console):
        records[place] = record
        # Written after each fit, so that an interrupted run leaves its results.
        _in_order(records).to_csv(out / "fits.csv", index=False)
        if drawing is not None:
            task = tasks[place]
            surfaces.setdefault(task.rival.setting.name, {})[task.rival.name] = drawing
    fits = _in_order(records)
    accuracy, use = accuracy_table(fits, plan), use_table(fits)
    accuracy.to_csv(out / "accuracy.csv", index=False)
    use.to_csv(out / "feature_use.csv", index=False)
    settings = asdict(plan) | {
        "variants": {name: dict(variant) for name, variant in VARIANTS.items()},
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    (out / "settings.json").write_text(json.dumps(settings, indent=2))
    for variant, setting in plan.blocks:
        if variant == PLAIN:
            figure = draw(surfaces[setting.name], plan, setting)
            figure.savefig(out / f"boundaries_{setting.name}.png", dpi=150)
            plt.close(figure)
    _show(accuracy, use, plan, console)
    console.print(f"Tables and figure are in {out}")


def draw(surfaces: Mapping[str, np.ndarray], plan: Plan, setting: Setting) -> Figure:
    """Decision boundaries of three models, in clusters from the smallest spirals to the largest."""
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
            image = _panel(axis, chance, extent, x, label)
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


def _panel(
    axis: Axes, chance: np.ndarray, extent: float, x: np.ndarray, label: np.ndarray
) -> AxesImage:
    """P(class 1) as colours, its boundary as a line, and rows as points coloured by class."""
    image = axis.imshow(
        chance, extent=(-extent, extent, -extent, extent), origin="lower", aspect="auto",
        alpha=0.55, cmap="RdBu_r", vmin=0.0, vmax=1.0,
    )  # fmt: skip
    line = np.linspace(-extent, extent, len(chance))
    if chance.min() < 0.5 < chance.max():
        axis.contour(line, line, chance, levels=[0.5], colors="black", linewidths=1.2)
    colours = np.where(label > 0.5, "#b2182b", "#2166ac")
    axis.scatter(x[:, 0], x[:, 1], s=7, c=colours, edgecolors="white", linewidths=0.25)
    axis.set(xlim=(-extent, extent), ylim=(-extent, extent))
    axis.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axis.tick_params(length=0, labelsize=8)
    return image


def _show(accuracy: pd.DataFrame, use: pd.DataFrame, plan: Plan, console: Console) -> None:
    """Print both tables."""
    for variant in VARIANTS:
        block = accuracy[accuracy.variant == variant]
        table = Table(title=f"Accuracy in {plan.folds}-fold cross-validation: {variant}")
        table.add_column("model")
        for shown, setting in plan.blocks:
            if shown == variant:
                table.add_column(setting.title, justify="right", max_width=15)
                table.add_column("gain", justify="right")
        if variant == PLAIN:
            table.add_column("paper", justify="right")
        for model, rows in block.groupby("model", sort=False):
            cells = [str(model)]
            for row in rows.itertuples():
                cells += [_with_error(row.accuracy, row.se), _with_error(row.gain, row.gain_se)]
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
    for row in use.to_dict("records"):
        cells = [f"{row[name]:.2f}" for name in names]
        cells.append(_with_error(row["probe_share"], row["probe_share_se"]))
        table.add_row(row["model"], row["setting"], *cells, f"{row['true_first']:.0%}")
    console.print(table)
    console.print(NOTES, soft_wrap=True)


def _in_order(records: Mapping[int, Mapping[str, str | float]]) -> pd.DataFrame:
    return pd.DataFrame([records[place] for place in sorted(records)])


def _with_error(value: float, error: float) -> str:
    if np.isnan(value):
        return ""
    return f"{value:.3f}" if np.isnan(error) else f"{value:.3f} ± {error:.3f}"


def _extent(truth: SpiralsTruth) -> float:
    """Half the side of a square that holds the spirals of all clusters."""
    return float(1.1 * np.abs(truth.radius).max())


def _results(
    tasks: Sequence[Task], jobs: int
) -> Iterator[tuple[int, dict[str, str | float], np.ndarray | None]]:
    """Place and result of each task, in the order in which they end."""
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
        paper. Each block ends with two rows for the best possible rule.
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
    """Mean use of each feature in the confounded variant, and the probes' share in it.

    Returns
    -------
    pandas.DataFrame
        Columns setting, model, use_x1, use_x2, use_probe1, use_probe2; probe_share, the probes'
        share in the use of all four, and its standard error probe_share_se; true_first, the share
        of folds in which both true features are used more than both probes.
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


def _accuracy(trained: Trained, test: ClusteredData) -> float:
    return float(((trained.predict(test) > 0.5) == outcomes(test)).mean())


if __name__ == "__main__":
    main()
