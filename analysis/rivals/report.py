"""Tables and figure of a comparison, in files and on the console."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from armed_pyro.analysis import figures
from armed_pyro.analysis.rivals.comparison import (
    RANDOMISED,
    Comparison,
    ablations,
    auroc_claims,
)
from armed_pyro.analysis.rivals.scores import IMAGE_METRICS

__all__ = ["draw", "write"]

NOTES = """\
[95% interval]: {unit}. Intervals of means are symmetric on the logit scale for proportions and on
the log scale for errors. Gain, or difference: paired, from the conventional network; for randomised
clusters, from the same model with the right ones; * if its interval excludes 0. Thresholds maximise
Youden's index on the training rows. Intervals of the other metrics are in comparison.csv."""
WIDTH = 132
FOLDS = "over folds, t corrected for shared training rows (Nadeau, Bengio 2003)"
DATA_SETS = "over data sets drawn independently, each by the mean of its folds (paired t)"
SHOWN = {
    "bal. acc.": "balanced accuracy",
    "sens.": "sensitivity",
    "spec.": "specificity",
    "Brier": "brier",
    "ECE": "ece",
}
# Metrics in the figure, if they were scored.
DRAWN = {"auroc": "AUROC", "image mse": "image MSE"}


def write(comparison: Comparison, out: Path, console: Console, title: str) -> None:
    """Print the tables, and write them and the figure into a folder.

    The files are scores.csv (every fit), comparison.csv (means, intervals, gains), delong.csv,
    ablations.csv, claims.csv, feature_use.csv, predictions.csv and comparison.png.
    """
    out.mkdir(parents=True, exist_ok=True)
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    table, judged = comparison.table(), ablations(comparison)
    claimed = auroc_claims(comparison)
    comparison.scores.to_csv(out / "scores.csv", index=False)
    comparison.predictions.to_csv(out / "predictions.csv", index=False)
    comparison.use.to_csv(out / "feature_use.csv", index=False)
    table.to_csv(out / "comparison.csv", index=False)
    comparison.delong().to_csv(out / "delong.csv", index=False)
    judged.to_csv(out / "ablations.csv", index=False)
    claimed.to_csv(out / "claims.csv", index=False)
    with plt.rc_context(figures.STYLE):
        figure = draw(table, title)
        figure.savefig(out / "comparison.png")
        plt.close(figure)
    for kind in table["rows"].unique():
        block, name = table[table["rows"] == kind], f"{title}; test rows: {kind}"
        console.print(_metrics(block, name))
        if "image mse" in comparison.metrics:
            console.print(_images(block, f"{name}: images rebuilt"))
    several = len(comparison.scores["data"].unique()) > 1
    console.print(NOTES.format(unit=DATA_SETS if several else FOLDS), soft_wrap=True)
    console.print(_judged(judged, "Ablations: differences in AUROC"))
    if len(claimed):
        console.print(_judged(claimed, "Claims"))


def draw(table: pd.DataFrame, title: str) -> Figure:
    """AUROC and error of images with intervals, and gains over the conventional network.

    Parameters
    ----------
    table : pandas.DataFrame
        Table that `Comparison.table` gives.
    title : str
    """
    table = table[table["rows"] != RANDOMISED]
    metrics = [name for name in DRAWN if name in set(table["metric"])]
    kinds, models = list(table["rows"].unique()), list(table["model"].unique())[::-1]
    figure, axes = plt.subplots(
        2 * len(metrics), len(kinds), squeeze=False, sharey=True,
        figsize=(3.6 * len(kinds) + 1.0, len(metrics) * (0.6 * len(models) + 1.2) + 0.2),
    )  # fmt: skip
    for above, metric in enumerate(metrics):
        for column, kind in enumerate(kinds):
            block = table[(table["rows"] == kind) & (table["metric"] == metric)]
            _panels(axes[2 * above : 2 * above + 2, column], block, models, DRAWN[metric])
    for axis, kind in zip(axes[0], kinds, strict=True):
        axis.set_title(f"{kind} clusters")
    figure.suptitle(f"{title}: means and 95% intervals", fontsize=10)
    return figure


def _panels(axes: np.ndarray, block: pd.DataFrame, models: list[str], name: str) -> None:
    """One metric for one kind of rows, with means above and gains below."""
    rows = block.set_index("model").reindex(models)
    place = np.arange(len(models))
    colour = np.where(rows.index == "ARMED", figures.ORANGE, figures.BLUE)
    level = rows["mean"].get("conventional", np.nan)
    for axis, middle, prefix, label, line in (
        (axes[0], "mean", "", name, level),
        (axes[1], "gain", "gain_", f"{name}: difference from conventional", 0.0),
    ):
        axis.axvline(line, color=figures.GREY, linewidth=0.7)
        axis.hlines(
            place, rows[f"{prefix}lower"], rows[f"{prefix}upper"], colors=colour, linewidth=1.4
        )
        axis.scatter(rows[middle], place, c=colour, s=16, zorder=3)
        axis.set_xlabel(label)
        axis.set_yticks(place, models)
        axis.set_ylim(-0.6, len(models) - 0.4)
        axis.tick_params(axis="y", length=0)


def _metrics(block: pd.DataFrame, title: str) -> Table:
    shown = Table(title=title)
    shown.add_column("model")
    for name in ("AUROC", "gain", *SHOWN):
        shown.add_column(name, justify="right")
    shown.add_column("adversary")
    for model, rows in block.groupby("model", sort=False):
        by = rows.set_index("metric")
        means = [f"{by.loc[name, 'mean']:.3f}" for name in SHOWN.values()]
        auroc = by.loc["auroc"]
        shown.add_row(str(model), *_interval(auroc, 3), *means, auroc["adversary"])
    return shown


def _images(block: pd.DataFrame, title: str) -> Table:
    """Error of the rebuilt images, and how far the latents separate the clusters."""
    shown = Table(title=title)
    shown.add_column("model")
    for name in ("MSE", "difference", *(name.title() for name in list(IMAGE_METRICS)[1:])):
        shown.add_column(name, justify="right")
    for model, rows in block.groupby("model", sort=False):
        by = rows.set_index("metric")
        mse, *indices = (by.loc[name] for name in IMAGE_METRICS)
        means = [_interval(index, 1)[0] for index in indices]
        shown.add_row(str(model), *_interval(mse, 4), *means)
    return shown


def _interval(row: pd.Series, digits: int) -> tuple[str, str]:
    """Mean and gain in a row of the table, with intervals; the reference model has no gain."""
    mean = f"{row['mean']:.{digits}f} [{row['lower']:.{digits}f}, {row['upper']:.{digits}f}]"
    if row["model"] == "conventional":
        return mean, ""
    low, high = row["gain_lower"], row["gain_upper"]
    sure = "*" if low > 0 or high < 0 else " "
    return mean, f"{row['gain']:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]{sure}"


def _judged(table: pd.DataFrame, title: str) -> Table:
    """Differences with their verdicts."""
    shown = Table(title=title)
    named = table.rename(columns={"mean": "difference", "holds": "verdict"})
    columns = [name for name in named if name not in ("lower", "upper")]
    for name in columns:
        shown.add_column(name)
    for row in named.to_dict("records"):
        interval = f"{row['difference']:+.3f} [{row['lower']:+.3f}, {row['upper']:+.3f}]"
        texts = {"difference": interval} | ({"p": f"{row['p']:.3f}"} if "p" in row else {})
        shown.add_row(*(texts.get(name, str(row[name])) for name in columns))
    return shown
