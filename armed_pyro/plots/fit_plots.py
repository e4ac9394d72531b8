"""`Plots`: pictures of a fit, each a figure of matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, final

import numpy as np
import pandas as pd
import scipy
from jaxtyping import Float

from armed_pyro._messages import check_known
from armed_pyro._optional import extra
from armed_pyro._plotting import ACCENT, FAINT, INK, PLAIN, tidy
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.effects.grid import levels_of, make_grid, variable_kind
from armed_pyro.effects.predictions import predictions
from armed_pyro.inference.posterior import Posterior
from armed_pyro.prediction.cluster_classifier import Classifiers
from armed_pyro.prediction.predict import predict
from armed_pyro.prediction.residuals import fitted, residuals
from armed_pyro.prediction.scores import compare_modes
from armed_pyro.summaries.variance import random_effects, variance_components

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Plots"]

COLORS = (ACCENT, "#c05621", "#2f855a", "#6b46c1", "#b7791f", "#4a5568")
WIDTH = 5.6  # inches
MOST_CLUSTERS = 60  # of a caterpillar, whose labels can still be read
MOST_VALUES = 30  # distinct whole numbers that each get a bar
MOST_FEATURES = 2  # of residuals


@final
@dataclass(frozen=True, eq=False)
class Plots:
    """Pictures of a fit; `Fit.plot`.

    Every method returns a figure of matplotlib, which a notebook shows, and whose ``savefig(path)``
    writes a file. Without matplotlib they raise an ImportError that says how to install it.

    Attributes
    ----------
    posterior : Posterior
        The fit's program, rows and draws.
    classifiers : Classifiers
        The fit's trained classifiers of clusters.

    Examples
    --------
    ``fit.plot.effects("Days").savefig("days.png")``
    """

    posterior: Posterior
    classifiers: Classifiers

    def effects(
        self,
        variable: str,
        *,
        by: str | None = None,
        points: int = 40,
        unseen: Any = "population",
        rest: Any = "mean",
        prob: float = 0.9,
        data: ClusteredData | pd.DataFrame | None = None,
    ) -> Figure:
        """Expected outcome over the range of a number, or at the levels of a category.

        Parameters
        ----------
        variable, by : str
            The variable, and a category with a line for each of its levels.
        points : int
            Number of values of a numeric variable.
        unseen, rest, prob, data
            As in `Fit.predictions`. The other variables are by default at a typical row.

        Raises
        ------
        ValueError
            If a variable is unknown or cannot be recovered from the encoded rows.

        Examples
        --------
        ``fit.plot.effects("Days")``
        """
        grid = make_grid(self.posterior, data)
        number = variable_kind(grid, variable) == "number"
        column = grid.column(variable)
        at: dict[str, Sequence[Any]] = {variable: levels_of(grid, variable)}
        if number:
            column = column.astype(float)
            at = {variable: np.linspace(column.min(), column.max(), points).tolist()}
        elif variable_kind(grid, variable) == "binary":
            at = {variable: [0, 1]}
        if by is not None:
            at[by] = levels_of(grid, by)
        made = predictions(self.posterior, at=at, rest=rest, unseen=unseen, prob=prob, data=data)
        table = made.to_frame()
        with _figure((WIDTH, 3.4)) as figure:
            axes = figure.subplots()
            groups = list(table.groupby(by, sort=False)) if by else [("", table)]
            for place, (name, part) in enumerate(groups):
                shift = 0.0 if number else 0.14 * (place - (len(groups) - 1) / 2)
                _curve(axes, part, variable, COLORS[place % len(COLORS)], str(name), number, shift)
            if number and len(column) <= 5000:
                axes.plot(
                    column,
                    np.zeros(len(column)),
                    "|",
                    color=FAINT,
                    ms=6,
                    clip_on=False,
                    transform=axes.get_xaxis_transform(),
                )
            if not number:
                levels = list(dict.fromkeys(table[variable]))
                axes.set_xticks(range(len(levels)), [str(level) for level in levels])
                axes.margins(x=0.15)
            if by:
                axes.legend(title=by, frameon=False)
            axes.set(xlabel=variable, ylabel=_expected(self.posterior))
            axes.set_title(f"{made.title}; {prob:.0%} intervals", fontsize=8, loc="left", wrap=True)
            return figure

    def caterpillar(self, factor: str | None = None, *, prob: float = 0.9) -> Figure:
        """Random effects of every cluster with intervals, one panel per term, sorted by the first.

        Of more than 60 clusters, every n-th in the sorted order is shown.

        Examples
        --------
        ``fit.plot.caterpillar("Subject")``
        """
        table = random_effects(self.posterior, prob=prob)
        if table.empty:
            raise ValueError("the program has no random effects to show")
        factors = list(dict.fromkeys(table["factor"]))
        chosen = factors[0] if factor is None else factor
        check_known("grouping factor", [chosen], factors)
        table = table[table["factor"] == chosen]
        terms = list(dict.fromkeys(table["term"]))[:4]
        first = table[table["term"] == terms[0]].sort_values("mean")
        step = -(-len(first) // MOST_CLUSTERS)
        shown = first["cluster"].tolist()[::step]
        height = max(2.0, 0.8 + 0.13 * len(shown))
        with _figure((max(WIDTH, 2.2 * len(terms)), height)) as figure:
            panels = figure.subplots(1, len(terms), sharey=True, squeeze=False)[0]
            for axes, term in zip(panels, terms, strict=True):
                part = table[table["term"] == term].set_index("cluster").loc[shown]
                places = np.arange(len(part))
                axes.axvline(0, color=FAINT, lw=0.8)
                axes.hlines(places, part["lower"], part["upper"], color=ACCENT, lw=1)
                axes.plot(part["mean"], places, "o", color=ACCENT, ms=2.5)
                axes.set(xlabel=f"effect on {term}", ylim=(-1, len(part)))
                tidy(axes)
            panels[0].set_yticks(np.arange(len(shown)), [str(name) for name in shown], fontsize=6)
            panels[0].set_ylabel(chosen)
            which = "" if step == 1 else f", every {step}th"
            figure.suptitle(f"Random effects of {chosen}{which}; {prob:.0%} intervals", fontsize=9)
            return figure

    def ppc(self, *, draws: int = 200, prob: float = 0.9) -> Figure:
        """Distribution of the outcome, beside that of outcomes drawn from the fit.

        Bars are the observed rows. The band holds the bars of replicated data with the probability
        `prob` each.

        Examples
        --------
        ``fit.plot.ppc()``
        """
        data = self.posterior.data
        if data.outcome is None or data.outcome.ndim > 1:
            raise ValueError("the outcome is an image, which has no distribution to draw")
        observed = data.outcome.double().numpy()
        made = predict(self.posterior, data, draws=draws, others=False).outcome
        edges, labels = _bins(observed, made, data.classes)
        counts = np.stack([np.histogram(row, edges)[0] for row in made])
        low, high = np.quantile(counts, [(1 - prob) / 2, (1 + prob) / 2], axis=0)
        with _figure((WIDTH, 3.0)) as figure:
            axes = figure.subplots()
            axes.stairs(
                np.histogram(observed, edges)[0],
                edges,
                fill=True,
                color=FAINT,
                alpha=0.6,
                label="observed",
            )
            axes.stairs(
                high,
                edges,
                baseline=low,
                fill=True,
                color=ACCENT,
                alpha=0.3,
                label=f"replicated, {prob:.0%}",
            )
            axes.stairs(counts.mean(0), edges, baseline=None, color=ACCENT, lw=1.2)
            if labels:
                axes.set_xticks(0.5 * (edges[1:] + edges[:-1]), labels)
            axes.set(xlabel=data.outcome_name, ylabel="rows")
            axes.legend(frameon=False)
            return figure

    def residuals(self) -> Figure:
        """Residuals against the normal, fitted values, clusters, and the first features.

        They are quantile residuals, which are standard normal without misfit, whatever the family
        (Dunn and Smyth 1996). Single trials, which any probability fits, have Pearson residuals,
        whose means in tenths of the rows can be read.

        Raises
        ------
        ValueError
            If the outcome has several classes.

        Examples
        --------
        ``fit.plot.residuals()``
        """
        data = self.posterior.data
        single = bool(self.posterior.model.family.no_residuals)
        z = residuals(self.posterior, "pearson" if single else "quantile").to_numpy()
        draw: list[Callable[[Axes], None]] = [] if single else [partial(_quantiles, z=z)]
        expected = np.asarray(fitted(self.posterior), dtype=float)
        draw.append(partial(_against, x=expected, z=z, label=_expected(self.posterior)))
        for factor in self.posterior.model.clustered_factors[:1]:
            draw.append(partial(_by_cluster, data=data, factor=factor.name, z=z))
        for place, name in enumerate(data.feature_names[:MOST_FEATURES]):
            x = data.features[:, place].double().numpy()
            draw.append(partial(_against, x=x, z=z, label=name))
        height = -(-len(draw) // 2)
        with _figure((WIDTH, 2.3 * height)) as figure:
            panels = figure.subplots(height, 2, squeeze=False).ravel()
            for axes, panel in zip(panels, draw, strict=False):
                panel(axes)
            for axes in panels[len(draw) :]:
                axes.set_visible(False)
            return figure

    def variance(self, *, prob: float = 0.9) -> Figure:
        """Standard deviations of the random effects and of the rest, with intervals.

        Examples
        --------
        ``fit.plot.variance()``
        """
        outer = variance_components(self.posterior, prob=prob)
        inner = variance_components(self.posterior, prob=0.5)
        rows = outer["statistic"] == "sd"
        if not rows.any():
            raise ValueError("the program has no standard deviations to show")
        outer, inner = outer[rows].iloc[::-1], inner[rows].iloc[::-1]
        names = [f"{r.factor} {r.term}".strip() for r in outer.itertuples()]
        with _figure((WIDTH, 0.9 + 0.32 * len(outer))) as figure:
            axes = figure.subplots()
            places = np.arange(len(outer))
            axes.hlines(places, outer["lower"], outer["upper"], color=ACCENT, lw=1.2)
            axes.hlines(places, inner["lower"], inner["upper"], color=ACCENT, lw=4, alpha=0.6)
            axes.plot(outer["median"], places, "o", color=INK, ms=4)
            axes.set_yticks(places, names)
            axes.set(
                xlabel=f"standard deviation (median, 50% and {prob:.0%} intervals)",
                xlim=(0, None),
                ylim=(-0.6, len(outer) - 0.4),
            )
            return figure

    def unseen(
        self, data: ClusteredData | pd.DataFrame, *, prob: float = 0.9, **more: Any
    ) -> Figure:
        """Modes for new clusters compared on rows with outcomes: log score and coverage.

        `more` are further arguments of `Fit.compare_modes`.

        Examples
        --------
        ``fit.plot.unseen(held_out)``
        """
        table = compare_modes(
            self.posterior, data, prob=prob, classifiers=self.classifiers, **more
        ).iloc[::-1]
        places = np.arange(len(table))
        with _figure((WIDTH, 1.0 + 0.35 * len(table))) as figure:
            left, right = figure.subplots(1, 2, sharey=True)
            left.errorbar(
                table["elpd_diff"],
                places,
                xerr=table["elpd_diff_se"].fillna(0),
                fmt="o",
                color=ACCENT,
                ms=4,
                lw=1.2,
            )
            left.axvline(0, color=FAINT, lw=0.8)
            left.set_yticks(places, table["mode"])
            left.set(xlabel="log score, less the best's (± s.e.)", ylim=(-0.6, len(table) - 0.4))
            if "coverage" in table:
                right.axvline(prob, color=FAINT, lw=0.8)
                right.plot(table["coverage"], places, "o", color=ACCENT, ms=4)
                right.set(xlabel=f"share of rows in {prob:.0%} intervals", xlim=(-0.03, 1.03))
            else:
                right.set_visible(False)
            for axes in (left, right):
                tidy(axes)
            return figure

    def trace(self) -> Figure:
        """Loss of every step of the training.

        Examples
        --------
        ``fit.plot.trace()``
        """
        loss = np.asarray(self.posterior.history.loss, dtype=float)
        if not len(loss):
            raise ValueError("the fit was not trained, and has no losses to show")
        with _figure((WIDTH, 2.4)) as figure:
            axes = figure.subplots()
            axes.plot(np.arange(1, len(loss) + 1), loss, color=ACCENT, lw=1)
            tail = loss[len(loss) // 5 :]
            if len(tail) > 1 and np.ptp(tail) > 0:
                axes.set_ylim(tail.min() - 0.1 * np.ptp(tail), tail.max() + 0.5 * np.ptp(tail))
            axes.set(xlabel="step", ylabel="loss")
            return figure


@contextmanager
def _figure(size: tuple[float, float]) -> Iterator[Figure]:
    """A new figure in the library's style, whose panels are tidied at the end."""
    mpl = extra("matplotlib", "plotting")
    from matplotlib.figure import Figure

    with mpl.rc_context({**PLAIN, "font.size": 8, "axes.edgecolor": FAINT}):
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        for axes in figure.axes:
            tidy(axes)


def _expected(posterior: Posterior) -> str:
    """What the expected outcome is, as the label of an axis."""
    model, outcome = posterior.model, posterior.model.data_facts().outcome_name
    if model.event is not None:
        return f"P({outcome} = {model.event})"
    return f"{'probability of' if model.family.is_probability else 'expected'} {outcome}"


def _curve(
    axes: Axes,
    table: pd.DataFrame,
    variable: str,
    color: str,
    label: str,
    number: bool,
    shift: float,
) -> None:
    """A line with a band, or points with intervals, by class if there are several."""
    if "class" in table:
        for place, (name, part) in enumerate(table.groupby("class", sort=False)):
            shade, text = COLORS[place % len(COLORS)], f"{label} {name}".strip()
            _curve(axes, part.drop(columns="class"), variable, shade, text, number, shift)
        axes.legend(frameon=False)
        return
    if number:
        x = table[variable].astype(float)
        axes.fill_between(x, table["lower"], table["upper"], color=color, alpha=0.2, lw=0)
        axes.plot(x, table["mean"], color=color, lw=1.5, label=label or None)
        return
    places = np.arange(len(table)) + shift
    axes.vlines(places, table["lower"], table["upper"], color=color, lw=1.5)
    axes.plot(places, table["mean"], "o", color=color, ms=4, label=label or None)


def _bins(
    observed: Float[np.ndarray, " rows"],
    made: Float[np.ndarray, "draws rows"],
    classes: tuple[Any, ...] | None,
) -> tuple[np.ndarray, list[str]]:
    """Edges of the bars, and the labels of classes."""
    if classes is not None:
        return np.arange(len(classes) + 1) - 0.5, [str(label) for label in classes]
    low, high = np.quantile(np.concatenate([observed, made.ravel()]), [0.001, 0.999])
    low, high = min(low, observed.min()), max(high, observed.max())
    whole = bool((observed % 1 == 0).all())
    if whole and high - low < MOST_VALUES:
        return np.arange(np.floor(low), np.ceil(high) + 2) - 0.5, []
    return np.linspace(low, high, MOST_VALUES), []


def _quantiles(axes: Axes, z: np.ndarray) -> None:
    """Sorted residuals against normal quantiles."""
    normal = scipy.special.ndtri((np.arange(len(z)) + 0.5) / len(z))
    ends = normal[[0, -1]]
    axes.plot(ends, ends, color=FAINT, lw=1)
    axes.plot(normal, np.sort(z), ".", color=ACCENT, ms=3)
    axes.set(xlabel="normal quantile", ylabel="residual")


def _against(axes: Axes, x: np.ndarray, z: np.ndarray, label: str) -> None:
    """Residuals against a number, with their means in tenths of the rows."""
    axes.axhline(0, color=FAINT, lw=0.8)
    axes.plot(x, z, ".", color=ACCENT, ms=3, alpha=0.4)
    edges = np.unique(np.quantile(x, np.linspace(0, 1, 11)))
    if len(edges) > 2:
        bins = np.clip(np.digitize(x, edges[1:-1]), 0, len(edges) - 2)
        parts = [bins == place for place in range(len(edges) - 1)]
        middle = [(x[part].mean(), z[part].mean()) for part in parts if part.any()]
        axes.plot(*zip(*middle, strict=True), color=COLORS[1], lw=1.5)
    axes.set(xlabel=label, ylabel="residual")


def _by_cluster(axes: Axes, data: ClusteredData, factor: str, z: np.ndarray) -> None:
    """Mean residual of every cluster, with the range of two standard errors around zero."""
    grouping = data.grouping(factor)
    codes, counts = grouping.codes.numpy(), grouping.counts.numpy()
    means = np.bincount(codes, weights=z, minlength=len(counts)) / counts
    order = np.argsort(means)
    places = np.arange(len(means))
    half = 2 / np.sqrt(counts[order])
    axes.fill_between(places, -half, half, color=FAINT, alpha=0.3, lw=0, step="mid")
    axes.plot(places, means[order], ".", color=ACCENT, ms=4)
    axes.set(xlabel=f"{len(means)} clusters of {factor}, sorted", ylabel="mean residual")
