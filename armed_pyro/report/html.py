"""A fit as one HTML page with tables and plots."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from armed_pyro._optional import extra
from armed_pyro.random_effects.grouping_factor import Factor
from armed_pyro.report import text as summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

from armed_pyro._plotting import ACCENT, FAINT, INK, _clean

if TYPE_CHECKING:
    from armed_pyro.fitting import Fit

__all__ = ["page"]


MOST_CLUSTERS = 60  # whose names fit beside a plot
MOST_TERMS = 4


def page(
    fit: Fit, *, title: str = "", prob: float = 0.9, evaluation: pd.DataFrame | None = None
) -> str:
    """A fit's results as one self-contained HTML page with tables and plots.

    Parameters
    ----------
    fit : Fit
        The fit.
    title : str
        Heading of the page.
    prob : float
        Probability of the equal-tailed intervals.
    evaluation : pandas.DataFrame, optional
        Table that `evaluate` made.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    """
    mpl = extra("matplotlib", "a report")
    components = fit.variance_components(prob=prob)
    spreads = components.statistic.isin(["sd", "variance", "cor"])
    fixed = fit.fixed_effects(prob=prob)
    latents = fit.draws(1000)
    style = {"svg.hashsalt": "armed_pyro", "font.size": 9, "axes.edgecolor": FAINT}
    with mpl.rc_context(style):
        loss = _image(_loss_curve(fit), "Loss over the training steps")
        forests = []
        for factor in fit.model.factors:
            effects = latents[factor.effect_site].to(factor.to_original)
            original = (effects @ factor.to_original.mT).cpu().numpy()
            figure = _forest(fit, factor, original, prob)
            alt = f"Random effects of {factor.name} with intervals"
            forests.append(f"<h3>{html.escape(factor.name)}</h3>{_image(figure, alt)}")
    sections = {
        "Program and data": _pairs(_program(fit)),
        "Convergence": f"{_badge(fit)}{loss}",
        "Can it be trusted?": _verdict(fit),
        f"Variance components ({prob:.0%} equal-tailed intervals)": (
            _table(components[spreads])
            + "<h3>Shares of the variance</h3>"
            + _table(components[~spreads])
        ),
        f"Fixed effects ({prob:.0%} equal-tailed intervals)": (
            _table(fixed)
            if len(fixed)
            else "<p>Weights of a network, without uncertainty of their own.</p>"
        ),
        f"Random effects (posterior mean, {prob:.0%} interval)": "".join(forests),
        "Predictions of held-out rows": "" if evaluation is None else _table(evaluation),
        "Priors": _pairs(summary.priors(fit.model)),
    }
    body = "".join(f"<section><h2>{k}</h2>{v}</section>" for k, v in sections.items() if v)
    return _PAGE.substitute(title=html.escape(title or "Mixed-effects fit"), body=body)


def _program(fit: Fit) -> dict[str, str]:
    model, facts = fit.model, fit.model.data_facts()
    adversaries = [
        f"{game.factor}, on {', '.join(game.taps)}, weight {game.weight:g}"
        for game in model.adversaries
    ]
    lines = {
        "Outcome": f"{facts.outcome_name} ({model.family.name})",
        "Features": ", ".join(facts.feature_names) or "none",
        "Network": " → ".join(str(layer) for layer in _layers(model.net)),
        "Random effects": " + ".join(map(str, model.terms)) or "none",
        "Adversary": "; ".join(adversaries),
        "Rows": f"{facts.n_rows:,}",
        "Clusters": ", ".join(f"{len(one):,} of {name}" for name, one in facts.levels.items()),
        "Seed": str(fit.seed),
    }
    return {name: line for name, line in lines.items() if line}


def _layers(net: Any) -> list[Any]:
    return [one for one in net.modules() if not list(one.children())]


def _badge(fit: Fit) -> str:
    meaning = {
        "converged": ("good", "Converged: the evidence lower bound has stopped improving"),
        "validation": ("good", "Converged: the validation loss has stopped improving"),
        "steps": ("bad", "Not converged: the steps ran out; allow more"),
        "diverged": ("bad", "Diverged: these are the last good parameters"),
    }
    kind, text = meaning[fit.stopped]
    return f'<p class="{kind}">{text} ({len(fit.history.loss):,} steps).</p>'


def _verdict(fit: Fit) -> str:
    found = fit.diagnostics()
    kind = "good" if found.verdict == "pass" else "bad"
    checks = found.to_frame()[["verdict", "name", "reason", "advice"]]
    if not checks["advice"].any():
        checks = checks.drop(columns="advice")
    figures = {k: f"{v:.4g}" for k, v in found.figures.items() if v is not None}
    verdict = f'<p class="{kind}">{found.verdict.upper()}</p>'
    return f'{verdict}<div class="checks">{_table(checks)}</div>{_pairs(figures)}'


def _loss_curve(fit: Fit) -> Figure:
    from matplotlib.figure import Figure

    history = fit.history
    figure = Figure(figsize=(8.4, 2.6), layout="constrained")
    # Side by side: the training loss has the prior in it, so the two levels do not compare.
    panels = figure.subplots(1, 2 if history.validation else 1, squeeze=False)[0]
    width = max(1, len(history.loss) // 400)  # so many steps a point
    blocks = np.asarray(history.loss)[: len(history.loss) // width * width].reshape(-1, width)
    steps = (np.arange(len(blocks)) + 1) * width
    panels[0].fill_between(steps, blocks.min(1), blocks.max(1), color=ACCENT, alpha=0.2, lw=0)
    lines = {"training": (steps, blocks.mean(1))}
    if history.validation:
        lines["validation"] = (np.asarray(history.step), np.asarray(history.validation))
    for axes, (name, (step, loss)) in zip(panels, lines.items(), strict=True):
        axes.plot(step, loss, color=ACCENT, lw=1.2)
        if len(loss):  # the first steps may lie far above the rest, and would flatten it
            low, high = np.nanquantile(loss, [0, 0.98])
            margin = 0.05 * (high - low or 1)
            axes.set_ylim(low - margin, high + margin)
        axes.set(xlabel="step", ylabel=f"{name} loss per row")
        _clean(axes)
    return figure


def _forest(fit: Fit, factor: Factor, effects: np.ndarray, prob: float) -> Figure:
    """Posterior mean and interval of every cluster, sorted by the first term."""
    from matplotlib.figure import Figure

    tail = (1 - prob) / 2
    lower, upper = np.quantile(effects, [tail, 1 - tail], axis=0)
    mean = effects.mean(0)
    order, terms = np.argsort(mean[:, 0]), factor.terms[:MOST_TERMS]
    labels = fit.model.data_facts().levels[factor.name][order]
    few = len(order) <= MOST_CLUSTERS
    height = 0.9 + (0.17 * len(order) if few else 5.0)
    figure = Figure(figsize=(8.4 if len(terms) > 1 else 5.6, height), layout="constrained")
    panels = figure.subplots(1, len(terms), sharey=True, squeeze=False)[0]
    place = np.arange(len(order))
    for number, (axes, term) in enumerate(zip(panels, terms, strict=True)):
        low, high, centre = (one[order, number] for one in (lower, upper, mean))
        axes.axvline(0, color=FAINT, lw=0.8, zorder=0)
        axes.hlines(place, low, high, color=ACCENT, lw=1.4 if few else 0.5, alpha=0.6)
        axes.plot(centre, place, "o", color=INK, ms=3 if few else 1.2)
        axes.set(title=term, ylim=(-0.8, len(order) - 0.2))
        axes.set_yticks(place if few else [], [str(label) for label in labels] if few else [])
        _clean(axes)
    if not few:
        panels[0].set_ylabel(f"{len(order):,} clusters, sorted")
    if hidden := len(factor.terms) - len(terms):
        figure.supxlabel(f"and {hidden} more terms", fontsize=9)
    return figure


def _image(figure: Figure, alt: str) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    code = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/svg+xml;base64,{code}">'


def _pairs(lines: Mapping[str, str]) -> str:
    rows = (f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in lines.items())
    return f"<dl>{''.join(rows)}</dl>"


def _table(frame: pd.DataFrame) -> str:
    def cell(value: Any) -> str:
        if isinstance(value, str):
            return f'<td class="text">{html.escape(value)}</td>'
        return "<td></td>" if pd.isna(value) else f"<td>{value:.4g}</td>"

    head = "".join(
        f"<th{' class=text' if pd.api.types.is_string_dtype(frame[name]) else ''}>{name}</th>"
        for name in frame
    )
    rows = (f"<tr>{''.join(map(cell, row))}</tr>" for row in frame.itertuples(index=False))
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; margin: 2rem auto;
       max-width: 52rem; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem;
     border-bottom: 1px solid #e2e8f0; } h3 { font-size: 1rem; margin-bottom: .3rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .2rem .8rem .2rem 0; text-align: right; white-space: nowrap; }
th { border-bottom: 1px solid #a0aec0; }
.text { text-align: left; }
.checks td { white-space: normal; vertical-align: top; }
tr:nth-child(even) td { background: #f7fafc; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; }
dt { color: #52606d; } dd { margin: 0; overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; }
p.good { color: #276749; } p.bad { color: #c53030; font-weight: 600; }
</style>
</head>
<body>
<h1>$title</h1>
$body
</body>
</html>
""")
