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
from armed_pyro.report.text import adversaries, how_training_ended, priors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["page"]

TEMPLATE = "page.html.jinja"


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
    probability of the results; see `armed_pyro.summaries.random_effects`. The evaluation is a table
    of `armed_pyro.prediction.evaluation.evaluate`. Matplotlib must be installed.
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
    figures = results.verdict.figures.items()
    source = (files("armed_pyro.report") / TEMPLATE).read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.tests["text_column"] = pd.api.types.is_string_dtype
    environment.filters["cell"] = _cell
    return environment.from_string(source).render(
        title=title or "Mixed-effects fit",
        prob=f"{results.prob:.0%}",
        program=_program(results),
        convergence=_convergence(results),
        loss=loss,
        verdict=_verdict(results),
        checks=_checks(results.verdict.checks),
        figures={name: f"{value:.4g}" for name, value in figures if value is not None},
        spreads=components[is_spread],
        shares=components[~is_spread],
        fixed_effects=results.fixed_effects,
        forests=forests,
        evaluation=evaluation,
        priors=priors(results.posterior.model),
    )


def _program(results: Results) -> dict[str, str]:
    model, facts = results.posterior.model, results.posterior.model.data_facts()
    layers = [module for module in model.net.modules() if not list(module.children())]
    lines = {
        "Outcome": f"{facts.outcome_name} ({model.family})",
        "Features": ", ".join(facts.feature_names) or "none",
        "Network": " → ".join(map(str, layers)),
        "Random effects": " + ".join(map(str, model.terms)) or "none",
        "Adversary": "; ".join(adversaries(model)),
        "Rows": f"{facts.n_rows:,}",
        "Clusters": ", ".join(f"{len(level):,} of {name}" for name, level in facts.levels.items()),
        "Seed": str(results.posterior.seed),
    }
    return {name: line for name, line in lines.items() if line}


def _convergence(results: Results) -> Remark:
    text = how_training_ended(results.posterior)
    return Remark("good" if results.posterior.converged else "bad", text[0].upper() + text[1:])


def _verdict(results: Results) -> Remark:
    verdict = results.verdict.verdict
    return Remark("good" if verdict == "pass" else "bad", verdict.upper())


def _checks(checks: pd.DataFrame) -> pd.DataFrame:
    shown = checks[["verdict", "name", "reason", "advice"]]
    return shown if shown["advice"].any() else shown.drop(columns="advice")


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "" if pd.isna(value) else f"{value:.4g}"


def _image(figure: Figure, alt: str) -> dict[str, str]:
    """A plot as base64 SVG, and the words that stand for it."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return {"svg": base64.b64encode(file.getvalue()).decode(), "alt": alt}
