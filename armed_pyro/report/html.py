"""The results of a fit as one HTML page with tables and plots."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import jinja2
import pandas as pd

from armed_pyro._optional import extra
from armed_pyro._plotting import FAINT, PLAIN
from armed_pyro.report.plots import forest, loss_curves
from armed_pyro.report.results import Results
from armed_pyro.report.text import priors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["page"]

TEMPLATE = "page.html.jinja"


@dataclass(frozen=True)
class Cell:
    """One cell of a table; text is aligned left, numbers right."""

    text: str
    is_text: bool


@dataclass(frozen=True)
class Table:
    """The cells of a table."""

    head: tuple[Cell, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class Image:
    """A plot as base64 SVG, and the words that stand for it."""

    svg: str
    alt: str


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

    Parameters
    ----------
    results : Results
        The tables and the verdict of the fit.
    random_effects : pandas.DataFrame
        Table with columns factor, term, cluster, mean, lower, upper, at the probability of
        `results`; see `armed_pyro.summaries.random_effects`.
    title : str
        Heading of the page.
    evaluation : pandas.DataFrame, optional
        Table of `armed_pyro.prediction.evaluation.evaluate`.

    Raises
    ------
    ImportError
        If matplotlib is not installed.

    Examples
    --------
    ``page(fit.results(), random_effects(fit.posterior))``
    """
    mpl = extra("matplotlib", "a report")
    with mpl.rc_context({**PLAIN, "svg.hashsalt": "armed_pyro", "axes.edgecolor": FAINT}):
        loss = _image(loss_curves(results.posterior.history), "Loss over the training steps")
        forests = {
            str(factor): _image(forest(table), f"Random effects of {factor} with intervals")
            for factor, table in random_effects.groupby("factor", sort=False)
        }
    components = results.variance_components
    is_spread = components.statistic.isin(["sd", "variance", "cor"])
    figures = results.verdicts.figures.items()
    return _template().render(
        title=title or "Mixed-effects fit",
        prob=f"{results.prob:.0%}",
        program=_program(results),
        convergence=_convergence(results),
        loss=loss,
        verdicts=_verdicts(results),
        checks=_checks(results.verdicts.checks),
        figures={name: f"{value:.4g}" for name, value in figures if value is not None},
        spreads=_table(components[is_spread]),
        shares=_table(components[~is_spread]),
        fixed_effects=_table(results.fixed_effects),
        forests=forests,
        evaluation=None if evaluation is None else _table(evaluation),
        priors=priors(results.posterior.model),
    )


def _template() -> jinja2.Template:
    """The page's template; it escapes every value that is filled in."""
    source = (files("armed_pyro.report") / TEMPLATE).read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(source)


def _program(results: Results) -> dict[str, str]:
    model, facts = results.posterior.model, results.posterior.model.data_facts()
    layers = [module for module in model.net.modules() if not list(module.children())]
    adversaries = [
        f"{adversary.factor}, on {', '.join(adversary.taps)}, weight {adversary.weight:g}"
        for adversary in model.adversaries
    ]
    lines = {
        "Outcome": f"{facts.outcome_name} ({model.family})",
        "Features": ", ".join(facts.feature_names) or "none",
        "Network": " → ".join(map(str, layers)),
        "Random effects": " + ".join(map(str, model.terms)) or "none",
        "Adversary": "; ".join(adversaries),
        "Rows": f"{facts.n_rows:,}",
        "Clusters": ", ".join(f"{len(level):,} of {name}" for name, level in facts.levels.items()),
        "Seed": str(results.posterior.seed),
    }
    return {name: line for name, line in lines.items() if line}


def _convergence(results: Results) -> Remark:
    meaning = {
        "converged": ("good", "Converged: the evidence lower bound has stopped improving"),
        "validation": ("good", "Converged: the validation loss has stopped improving"),
        "steps": ("bad", "Not converged: the steps ran out; allow more"),
        "diverged": ("bad", "Diverged: these are the last good parameters"),
    }
    mood, text = meaning[results.posterior.stopped]
    return Remark(mood, f"{text} ({len(results.posterior.history.loss):,} steps).")


def _verdicts(results: Results) -> list[Remark]:
    return [
        Remark("good" if found.word == "pass" else "bad", f"{part.capitalize()}: {found.sentence}")
        for part, found in results.verdicts.conclusions.items()
    ]


def _checks(checks: pd.DataFrame) -> Table:
    shown = checks[["part", "verdict", "name", "reason", "effect", "threshold", "p", "advice"]]
    return _table(shown if shown["advice"].any() else shown.drop(columns="advice"))


def _table(frame: pd.DataFrame) -> Table:
    head = (Cell(str(name), pd.api.types.is_string_dtype(frame[name])) for name in frame)
    rows = (tuple(map(_cell, row)) for row in frame.itertuples(index=False))
    return Table(tuple(head), tuple(rows))


def _cell(value: Any) -> Cell:
    if isinstance(value, str):
        return Cell(value, is_text=True)
    return Cell("" if pd.isna(value) else f"{value:.4g}", is_text=False)


def _image(figure: Figure, alt: str) -> Image:
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return Image(base64.b64encode(file.getvalue()).decode(), alt)
