"""Pictures of a training and of random effects, drawn from their tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from armed_pyro._plotting import ACCENT, FAINT, INK, tidy
from armed_pyro.engine.schedule import History

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# With more clusters than this, the plot has no room for their names.
MOST_NAMED_CLUSTERS = 60
# Panels of a forest plot, one per term.
MOST_TERMS = 4
# Approximate number of points of a loss curve.
POINTS = 400


def loss_curves(history: History) -> Figure:
    """Training loss, and the validation loss if there is one, over the steps.

    Each point of the training loss is the mean of consecutive steps, in a band of their range.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 2.6), layout="constrained")
    # In two panels, as only the training loss includes the prior: the levels are not comparable.
    panels = figure.subplots(1, 2 if history.validation else 1, squeeze=False)[0]
    width = max(1, len(history.loss) // POINTS)
    blocks = np.asarray(history.loss)[: len(history.loss) // width * width].reshape(-1, width)
    steps = (np.arange(len(blocks)) + 1) * width
    panels[0].fill_between(steps, blocks.min(1), blocks.max(1), color=ACCENT, alpha=0.2, lw=0)
    lines = {"training": (steps, blocks.mean(1))}
    if history.validation:
        lines["validation"] = (np.asarray(history.step), np.asarray(history.validation))
    for axes, (name, (step, loss)) in zip(panels, lines.items(), strict=True):
        axes.plot(step, loss, color=ACCENT, lw=1.2)
        if len(loss):  # the first losses may be so high that they flatten the rest of the curve
            low, high = np.nanquantile(loss, [0, 0.98])
            margin = 0.05 * (high - low or 1)
            axes.set_ylim(low - margin, high + margin)
        axes.set(xlabel="step", ylabel=f"{name} loss per row")
        tidy(axes)
    return figure


def forest(effects: pd.DataFrame) -> Figure:
    """Posterior mean and interval of every cluster, sorted by the first term.

    The table has one factor's rows of `summaries.variance.random_effects`, each term with the
    same clusters in the same order.
    """
    from matplotlib.figure import Figure

    tables = dict(list(effects.groupby("term", sort=False)))
    terms = list(tables)[:MOST_TERMS]
    order = np.argsort(tables[terms[0]]["mean"].to_numpy())
    named = len(order) <= MOST_NAMED_CLUSTERS
    height = 0.9 + (0.17 * len(order) if named else 5.0)
    figure = Figure(figsize=(8.4 if len(terms) > 1 else 5.6, height), layout="constrained")
    panels = figure.subplots(1, len(terms), sharey=True, squeeze=False)[0]
    place = np.arange(len(order))
    for axes, term in zip(panels, terms, strict=True):
        table = tables[term].iloc[order]
        axes.axvline(0, color=FAINT, lw=0.8, zorder=0)
        width = 1.4 if named else 0.5
        axes.hlines(place, table["lower"], table["upper"], color=ACCENT, lw=width, alpha=0.6)
        axes.plot(table["mean"].to_numpy(), place, "o", color=INK, ms=3 if named else 1.2)
        axes.set(title=term, ylim=(-0.8, len(order) - 0.2))
        labels = [str(cluster) for cluster in table["cluster"]] if named else []
        axes.set_yticks(place if named else [], labels)
        tidy(axes)
    if not named:
        panels[0].set_ylabel(f"{len(order):,} clusters, sorted")
    if hidden := len(tables) - len(terms):
        figure.supxlabel(f"and {hidden} more terms", fontsize=9)
    return figure
