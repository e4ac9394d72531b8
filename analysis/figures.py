"""Figures that several analyses share: cluster effects, cluster curves, predictive checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from scipy.stats import gaussian_kde

__all__ = ["BLUE", "GREY", "ORANGE", "STYLE", "caterpillar", "curves", "horizons", "predictive"]

# Okabe and Ito's colours, which colour-blind readers can tell apart: seen blue, unseen orange.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6F6F6F"
STYLE: dict[str, Any] = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "figure.constrained_layout.use": True,
    "font.size": 8.5,
    "legend.frameon": False,
    "savefig.dpi": 200,
}


def caterpillar(
    effects: xr.DataArray, labels: Sequence[str], *, prob: float = 0.9, named: int = 12
) -> Figure:
    """Posterior means and intervals of the random effects of every cluster, one panel per term.

    Clusters are sorted within each panel. Only the `named` lowest and highest clusters have room
    for their names; those between them are drawn closer together.

    Parameters
    ----------
    effects : xarray.DataArray
        Draws with the dimensions chain, draw, cluster and term; the names of the last two are free.
    labels : sequence of str
        Label of each term's axis.
    prob : float
        Probability of the equal-tailed intervals.
    named : int
        Number of clusters to name at each end.
    """
    draws = effects.stack(sample=("chain", "draw")).transpose("sample", ...)  # noqa: PD013
    names, n = draws.coords[draws.dims[1]].to_numpy(), draws.shape[1]
    named = min(named, n // 2)
    step = np.full(n, 0.16)
    step[: named + 1] = step[n - named :] = 1.0
    place = np.cumsum(step)
    figure, axes = plt.subplots(1, len(labels), figsize=(3.75 * len(labels), 6.8), squeeze=False)
    title = f"Posterior mean and {prob:.0%} interval of each {draws.dims[1]}, sorted"
    figure.suptitle(title, fontsize=9)
    for term, (axis, label) in enumerate(zip(axes[0], labels, strict=True)):
        values = draws.to_numpy()[:, :, term]
        order = np.argsort(values.mean(0))
        tail = (1 - prob) / 2
        lower, upper = np.quantile(values[:, order], [tail, 1 - tail], axis=0)
        ends = np.r_[:named, n - named : n]
        between = np.r_[named : n - named]
        axis.axvline(0, color=GREY, linewidth=0.8)
        means = values.mean(0)[order]
        for group, colour, size in ((between, GREY, 1.0), (ends, BLUE, 3.2)):
            axis.hlines(place[group], lower[group], upper[group], colour, linewidth=0.4 + size / 4)
            axis.plot(means[group], place[group], "o", color=colour, markersize=size)
        axis.set_yticks(place[ends], names[order][ends], fontsize=7)
        axis.set_ylim(place[0] - 1, place[-1] + 1)
        axis.set_xlabel(label)
        axis.tick_params(axis="y", length=0)
        if len(between):
            centre = float(place[between].mean())
            axis.annotate(
                f"{len(between)} others",
                (0, centre),
                (-6, 0),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                ha="right",
                va="center",
                color=GREY,
                fontsize=7,
            )
    return figure


def curves(
    table: pd.DataFrame,
    *,
    x: str,
    outcome: str,
    panel: str,
    labels: tuple[str, str],
    columns: int = 3,
    from_x: float | None = None,
) -> Figure:
    """Predicted curves with predictive bands and the observed points, one panel per cluster.

    Parameters
    ----------
    table : pandas.DataFrame
        One row per point, with the columns named by the other parameters, and mean, lower, upper,
        population (the fixed effects alone), held_out and unseen (booleans). The outcome may be
        missing.
    x, outcome, panel : str
        Columns of the two axes, and of the panels.
    labels : tuple of str
        Labels of the two axes, with units.
    columns : int
        Panels in a row.
    from_x : float, optional
        Beginning of the held-out part of x, which is shaded.
    """
    names = list(dict.fromkeys(table[panel]))
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.5 * columns, 2.3 * rows + 0.5), sharex=True, sharey=True
    )
    for axis in np.ravel(axes)[len(names) :]:
        axis.set_axis_off()
    for axis, name in zip(np.ravel(axes), names, strict=False):
        _curve(axis, table[table[panel] == name], x, outcome)
        axis.set_title(name)
        if from_x is not None:
            axis.axvspan(from_x, table[x].max() + 0.5, color="0.93", zorder=-3, linewidth=0)
    axis.set_xlim(table[x].min() - 0.5, table[x].max() + 0.5)
    figure.supxlabel(labels[0], fontsize=9)
    figure.supylabel(labels[1], fontsize=9)
    handles = [
        Line2D([], [], color=BLUE, label=f"seen {panel}"),
        Line2D([], [], color=ORANGE, label=f"unseen {panel}"),
        Line2D([], [], color=GREY, linestyle="--", label="population curve"),
        Patch(color=GREY, alpha=0.25, linewidth=0, label="90% predictive band"),
        Line2D(
            [], [], color="k", marker="o", linestyle="", markersize=3, label="observed, training"
        ),
        Line2D([], [], marker="o", linestyle="", label="observed, held out", **_OPEN),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=8)
    return figure


_OPEN: dict[str, Any] = {"color": "k", "markerfacecolor": "w", "markersize": 3.2, "mew": 0.6}


def _curve(axis: Axes, rows: pd.DataFrame, x: str, outcome: str) -> None:
    colour = ORANGE if bool(rows["unseen"].iloc[0]) else BLUE
    axis.fill_between(rows[x], rows["lower"], rows["upper"], color=colour, alpha=0.2, linewidth=0)
    axis.plot(rows[x], rows["population"], "--", color=GREY, linewidth=1)
    axis.plot(rows[x], rows["mean"], color=colour, linewidth=1.6)
    held = rows["held_out"].to_numpy(bool)
    axis.plot(rows[x][~held], rows[outcome][~held], "ko", markersize=2, zorder=3)
    axis.plot(rows[x][held], rows[outcome][held], "o", zorder=3, **_OPEN)


def predictive(
    observed: Float[np.ndarray, " rows"],
    replicated: Float[np.ndarray, "draws rows"],
    statistic: tuple[float, Float[np.ndarray, " draws"]],
    labels: tuple[str, str],
) -> Figure:
    """Posterior predictive checks of the outcome's density and of a statistic.

    Parameters
    ----------
    observed, replicated : ndarray
        The outcome, and draws of it from the posterior predictive distribution.
    statistic : tuple
        The statistic of the observed outcome and of each draw.
    labels : tuple of str
        Labels of the axes of outcome and statistic, with units.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.9))
    span = np.ptp(observed)
    grid = np.linspace(observed.min() - 0.25 * span, observed.max() + 0.25 * span, 200)
    for draw in replicated[:50]:
        left.plot(grid, gaussian_kde(draw)(grid), color=BLUE, alpha=0.2, linewidth=0.6)
    left.plot(grid, gaussian_kde(observed)(grid), color="k", linewidth=1.6)
    left.set(xlabel=labels[0], ylabel="density", xlim=(grid[0], grid[-1]), ylim=(0, None))
    value, draws = statistic
    right.hist(draws, bins=30, density=True, color=BLUE, alpha=0.6)
    right.axvline(value, color="k", linewidth=1.6)
    low, high = min(value, draws.min()), max(value, draws.max())
    right.set(xlabel=labels[1], ylabel="density")
    right.set_xlim(low - 0.15 * (high - low), high + 0.15 * (high - low))
    handles = [
        Line2D([], [], color="k", label="observed"),
        Line2D([], [], color=BLUE, label="replicated (posterior predictive)"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2)
    return figure


def horizons(table: pd.DataFrame, *, nominal: float = 0.9, label: str) -> Figure:
    """Coverage and error of forecasts by horizon, one line per model.

    Parameters
    ----------
    table : pandas.DataFrame
        Columns model, horizon, coverage, rmse.
    nominal : float
        Coverage that the intervals claim.
    label : str
        Label of the error's axis, with units.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.9), sharex=True)
    marks = zip((BLUE, GREEN, ORANGE, GREY, "k"), ("o", "s", "^", "v", "D"), strict=True)
    for (name, rows), (colour, mark) in zip(
        table.groupby("model", sort=False), marks, strict=False
    ):
        style: dict[str, Any] = {"color": colour, "marker": mark, "markersize": 4, "linewidth": 1.2}
        left.plot(rows["horizon"], rows["coverage"], label=name, **style)
        right.plot(rows["horizon"], rows["rmse"], **style)
    left.axhline(nominal, color="k", linewidth=0.9, linestyle=":", label=f"nominal {nominal:.0%}")
    left.set(xlabel="years ahead", ylabel=f"coverage of {nominal:.0%} intervals", ylim=(0, 1.02))
    right.set(xlabel="years ahead", ylabel=label, ylim=(0, None))
    figure.legend(loc="outside upper center", ncols=3)
    return figure
