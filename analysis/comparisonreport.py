"""A comparison's tables and figure, in files and on the console."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from armed_pyro.analysis import figures
from armed_pyro.analysis.comparison import RANDOMISED, Comparison, ablations

__all__ = ["draw", "write"]

NOTES = """\
[95% interval]: {unit}.
Gain: in AUROC, over the conventional network, paired; * where its interval excludes 0; of
randomised clusters, over the same model with the right ones. Thresholds by Youden's index of the
training rows. Intervals of the other metrics are in comparison.csv."""
WIDTH = 132
FOLDS = "over folds, t corrected for shared training rows (Nadeau, Bengio 2003)"
DATA_SETS = "over data sets drawn apart, each the mean of its folds (paired t)"
SHOWN = {
    "bal. acc.": "balanced accuracy",
    "sens.": "sensitivity",
    "spec.": "specificity",
    "Brier": "brier",
    "ECE": "ece",
}


def write(found: Comparison, out: Path, console: Console, title: str) -> None:
    """Print the tables, and write them and the figure into a folder.

    The files: scores.csv (every fit), comparison.csv (means, intervals, gains), delong.csv,
    ablations.csv, feature_use.csv, predictions.csv, comparison.png.
    """
    out.mkdir(parents=True, exist_ok=True)
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    table, judged = found.table(), ablations(found)
    found.scores.to_csv(out / "scores.csv", index=False)
    found.predictions.to_csv(out / "predictions.csv", index=False)
    found.use.to_csv(out / "feature_use.csv", index=False)
    table.to_csv(out / "comparison.csv", index=False)
    found.delong().to_csv(out / "delong.csv", index=False)
    judged.to_csv(out / "ablations.csv", index=False)
    with plt.rc_context(figures.STYLE):
        figure = draw(table, title)
        figure.savefig(out / "comparison.png")
        plt.close(figure)
    for kind in table["rows"].unique():
        console.print(_metrics(table[table["rows"] == kind], f"{title}; test rows: {kind}"))
    several = len(found.scores["data"].unique()) > 1
    console.print(NOTES.format(unit=DATA_SETS if several else FOLDS), markup=False, soft_wrap=True)
    console.print(_judged(judged))


def draw(table: pd.DataFrame, title: str) -> Figure:
    """AUROC with its interval, and gain over the conventional network, one panel a kind of rows.

    Parameters
    ----------
    table : pandas.DataFrame
        As `Comparison.table` makes it.
    title : str
    """
    own = table[(table["metric"] == "auroc") & (table["rows"] != RANDOMISED)]
    kinds, models = list(own["rows"].unique()), list(own["model"].unique())[::-1]
    figure, axes = plt.subplots(
        2, len(kinds), figsize=(3.6 * len(kinds) + 1.0, 0.6 * len(models) + 1.4), squeeze=False,
        sharey=True,
    )  # fmt: skip
    for column, kind in enumerate(kinds):
        block = own[own["rows"] == kind].set_index("model").reindex(models)
        place = np.arange(len(models))
        for axis, name, label in (
            (axes[0, column], "", "AUROC"),
            (axes[1, column], "gain", "gain in AUROC over conventional"),
        ):
            middle = block[name or "mean"]
            lower, upper = (block[f"{name}_{end}" if name else end] for end in ("lower", "upper"))
            colour = np.where(block.index == "ARMED", figures.ORANGE, figures.BLUE)
            axis.hlines(place, lower, upper, colors=colour, linewidth=1.4)
            axis.scatter(middle, place, c=colour, s=16, zorder=3)
            axis.set_xlabel(label)
            axis.set_yticks(place, models)
            axis.tick_params(axis="y", length=0)
        axes[0, column].set_title(f"{kind} clusters")
        level = block["mean"].get("conventional", np.nan)
        axes[0, column].axvline(level, color=figures.GREY, linewidth=0.7)
        axes[1, column].axvline(0, color=figures.GREY, linewidth=0.7)
    figure.suptitle(f"{title}: means and 95% intervals", fontsize=10)
    return figure


def _metrics(block: pd.DataFrame, title: str) -> Table:
    shown = Table(title=title)
    shown.add_column("model")
    for name in ("AUROC", "gain", *SHOWN):
        shown.add_column(name, justify="right")
    shown.add_column("adversary")
    for model, rows in block.groupby("model", sort=False):
        by = rows.set_index("metric")
        one = by.loc["auroc"]
        auroc = f"{one['mean']:.3f} [{one['lower']:.3f}, {one['upper']:.3f}]"
        low, high = one["gain_lower"], one["gain_upper"]
        gain = f"{one['gain']:+.3f} [{low:+.3f}, {high:+.3f}]{'*' if low > 0 or high < 0 else ' '}"
        means = [f"{by.loc[name, 'mean']:.3f}" for name in SHOWN.values()]
        plain = model == "conventional"
        shown.add_row(str(model), auroc, "" if plain else gain, *means, one["adversary"])
    return shown


def _judged(table: pd.DataFrame) -> Table:
    shown = Table(title="Ablations: differences in AUROC")
    for name in ("ablation", "rows", "difference", "p", "verdict"):
        shown.add_column(name)
    for row in table.itertuples():
        text = f"{row.difference:+.3f} [{row.lower:+.3f}, {row.upper:+.3f}]"
        shown.add_row(row.ablation, row.rows, text, f"{row.p:.3f}", row.verdict)
    return shown
