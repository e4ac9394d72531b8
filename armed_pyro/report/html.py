"""The results of a fit as one HTML page with tables and plots."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

import jinja2
import numpy as np
import pandas as pd

from armed_pyro._optional import extra
from armed_pyro._plotting import ACCENT, FAINT, INK, PLAIN, tidy
from armed_pyro.engine.schedule import History
from armed_pyro.report.cells import as_text
from armed_pyro.report.results import Results
from armed_pyro.report.text import (
    adversaries,
    fresh_probes,
    how_training_ended,
    of_event,
    outcome_labels,
    priors,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATE = "page.html.jinja"
# With more clusters than this, the plot has no room for their names.
MOST_NAMED_CLUSTERS = 60
# Panels of a forest plot, one per term.
MOST_TERMS = 4
# Approximate number of points of a loss curve.
POINTS = 400


@dataclass(frozen=True)
class Remark:
    """A sentence and its mood, which is the CSS class "good" or "bad"."""

    mood: str
    text: str


def page(
    results: Results,
    random_effects: pd.DataFrame,
    *,
    title: str = "",
    evaluation: pd.DataFrame | None = None,
) -> str:
    """The results of a fit as one self-contained HTML page with tables and plots.

    The table of random effects has columns factor, term, cluster, mean, lower, upper, at the
    probability of the results; see `summaries.variance.random_effects`. The evaluation is a table
    of `prediction.scores.evaluate`. Matplotlib must be installed.
    """
    mpl = extra("matplotlib", "a report")
    with mpl.rc_context({**PLAIN, "svg.hashsalt": "armed_pyro", "axes.edgecolor": FAINT}):
        loss = _image(loss_curves(results.posterior.history), "Loss over the training steps")
        forests = {
            str(factor): _image(forest(table), f"Random effects of {factor} with intervals")
            for factor, table in random_effects.groupby("factor", sort=False)
        }
    components = results.variance_components
    is_spread = ~components.statistic.isin(["icc", "share", "r2_marginal", "r2_conditional"])
    figures = results.verdicts.figures.items()
    source = (files("armed_pyro.report") / TEMPLATE).read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.tests["text_column"] = pd.api.types.is_string_dtype
    environment.filters["as_text"] = as_text
    return environment.from_string(source).render(
        title=title or "Mixed-effects fit",
        prob=f"{results.prob:.0%}",
        program=_program(results),
        convergence=_convergence(results),
        loss=loss,
        verdicts=_verdicts(results),
        checks=_checks(results.verdicts.checks),
        figures={name: f"{value:.4g}" for name, value in figures if value is not None},
        spreads=components[is_spread],
        shares=components[~is_spread],
        fixed_effects=results.fixed_effects,
        event=of_event(results.posterior.model),
        forests=forests,
        evaluation=evaluation,
        priors=priors(results.posterior.model),
    )


def _program(results: Results) -> dict[str, str]:
    model, facts = results.posterior.model, results.posterior.model.data_facts()
    layers = [module for module in model.net.modules() if not list(module.children())]
    lines = {
        "Outcome": f"{facts.outcome_name} ({model.family})",
        **outcome_labels(model),
        "Features": ", ".join(facts.feature_names) or "none",
        "Network": " → ".join(map(str, layers)),
        "Random effects": " + ".join(map(str, model.terms)) or "none",
        "Adversary": "; ".join(adversaries(results.posterior)),
        "Fresh probe": "; ".join(fresh_probes(results.posterior)),
        "Rows": f"{facts.n_rows:,}",
        "Clusters": ", ".join(f"{len(level):,} of {name}" for name, level in facts.levels.items()),
        "Seed": str(results.posterior.seed),
    }
    return {name: line for name, line in lines.items() if line}


def _convergence(results: Results) -> Remark:
    text = how_training_ended(results.posterior)
    return Remark("good" if results.posterior.converged else "bad", text[0].upper() + text[1:])


def _verdicts(results: Results) -> list[Remark]:
    return [
        Remark("good" if found.word == "pass" else "bad", f"{part.capitalize()}: {found.sentence}")
        for part, found in results.verdicts.conclusions.items()
    ]


def _checks(checks: pd.DataFrame) -> pd.DataFrame:
    shown = checks[["part", "verdict", "name", "reason", "effect", "threshold", "p", "advice"]]
    return shown if shown["advice"].any() else shown.drop(columns="advice")


def _image(figure: Figure, alt: str) -> dict[str, str]:
    """A plot as base64 SVG, and the words that stand for it."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return {"svg": base64.b64encode(file.getvalue()).decode(), "alt": alt}


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
