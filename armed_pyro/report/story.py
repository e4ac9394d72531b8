"""The story of a fit for its readers: question, trust, effects, clusters, fit, methods."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from armed_pyro._optional import extra
from armed_pyro._plotting import FAINT, PLAIN
from armed_pyro.report.content import (
    Block,
    Bullets,
    Gallery,
    Heading,
    Mood,
    Pairs,
    Paragraph,
    Picture,
    Pictures,
    Report,
    Section,
    Table,
)
from armed_pyro.report.figures import forest, loss_curves
from armed_pyro.report.results import Results
from armed_pyro.report.text import (
    adversaries,
    described,
    fresh_probes,
    how_training_ended,
    of_event,
    outcome_labels,
    priors,
)
from armed_pyro.report.words import (
    explained_sentences,
    formula,
    methods,
    question,
    references,
    spread_sentences,
    versions,
)

__all__ = ["report"]

MOODS: Mapping[str, Mood] = {"pass": "good", "warn": "warn", "fail": "bad"}
SHARES = ("icc", "share", "r2_marginal", "r2_conditional")
# Coefficients beyond these, such as those of a network's last layer, are left to the saved tables.
MOST_COEFFICIENTS = 60


def report(
    results: Results,
    random_effects: pd.DataFrame,
    *,
    title: str = "",
    evaluation: pd.DataFrame | None = None,
    pictures: Pictures | None = None,
) -> Report:
    """The report of a fit; matplotlib must be installed.

    The table of random effects has columns factor, term, cluster, mean, lower, upper, at the
    probability of the results; see `summaries.variance.random_effects`. The evaluation is a table
    of `prediction.scores.evaluate`.
    """
    mpl = extra("matplotlib", "a report")
    drawn = Pictures() if pictures is None else pictures
    with mpl.rc_context({**PLAIN, "axes.edgecolor": FAINT}):
        sections = (
            _question(results),
            _trust(results),
            _says(results, drawn),
            _clusters(results, random_effects),
            _fits(results, drawn, evaluation),
            _checks(results),
            _training(results),
            _methods(results),
        )
    return Report(
        title or "Mixed-effects fit",
        described(results.posterior),
        tuple(section for section in sections if section.blocks),
    )


def _question(results: Results) -> Section:
    model, facts = results.posterior.model, results.posterior.model.data_facts()
    layers = [module for module in model.net.modules() if not list(module.children())]
    lines = {
        "Formula": formula(model),
        "Parameters": "; ".join(model.parameter_texts()),
        "Outcome": f"{facts.outcome_name} ({model.family})",
        **outcome_labels(model),
        "Features": ", ".join(facts.feature_names) or "none",
        "Network": "" if model.linear else " → ".join(map(str, layers)),
        "Adversary": "; ".join(adversaries(results.posterior)),
        "Fresh probe": "; ".join(fresh_probes(results.posterior)),
        "Rows": f"{facts.n_rows:,}",
        "Clusters": ", ".join(f"{len(level):,} of {name}" for name, level in facts.levels.items()),
    }
    shown = {name: line for name, line in lines.items() if line}
    return Section("The question", (*map(Paragraph, question(results)), Pairs(shown)))


def _trust(results: Results) -> Section:
    """The two verdicts with their advice, and what was not checked."""
    blocks: list[Block] = []
    checks = results.verdicts.checks
    for part, conclusion in results.verdicts.conclusions.items():
        text = f"{part.capitalize()}: {conclusion.sentence}"
        blocks.append(Paragraph(text, MOODS.get(conclusion.word, "")))
        wrong = checks[(checks["part"] == part) & checks["verdict"].isin(["fail", "warn", "note"])]
        advice = tuple(dict.fromkeys(filter(None, wrong["advice"])))
        blocks += [Bullets(advice)] if advice else []
    missing = checks[checks["verdict"] == "not checked"]
    if len(missing):
        blocks.append(Heading("Not checked"))
        named = zip(missing["name"], missing["reason"], strict=True)
        blocks.append(Bullets(tuple(f"{name}: {reason}" for name, reason in named)))
    return Section("Can it be trusted, and does it fit?", tuple(blocks))


def _says(results: Results, drawn: Pictures) -> Section:
    """The main effects as pictures, and the coefficients."""
    interval, model = f"{results.prob:.0%} equal-tailed intervals", results.posterior.model
    blocks: list[Block] = []
    if drawn.effects:
        text = "Expected outcome over each variable, for a typical row and the average cluster."
        blocks += [Paragraph(text), Gallery(drawn.effects)]
        if not model.linear:
            text = "Intervals, where there are any, are conditional on the network's weights."
            blocks.append(Paragraph(text, "small"))
    if "effects" in drawn.notes:
        blocks.append(Paragraph(drawn.notes["effects"], "small"))
    table, hidden = results.fixed_effects, len(results.fixed_effects) - MOST_COEFFICIENTS
    blocks.append(Heading(f"Fixed effects{of_event(model)} ({interval})"))
    if table.empty:
        text = "The fixed effects are a network's weights, without uncertainty of their own."
        return Section("What the model says", (*blocks, Paragraph(text)))
    blocks.append(Table(table.head(MOST_COEFFICIENTS)))
    if hidden > 0:
        blocks.append(Paragraph(f"{hidden} more are in fixed_effects.csv.", "small"))
    ratio = model.family.coefficient_ratio
    if ratio and model.linear:
        blocks.append(Heading(f"The same as {ratio}s ({interval})"))
        blocks.append(Table(_ratios(table.head(MOST_COEFFICIENTS), ratio)))
    return Section("What the model says", tuple(blocks))


def _ratios(table: pd.DataFrame, ratio: str) -> pd.DataFrame:
    """Exponentials of posterior quantiles, which are the quantiles of the exponentials."""
    slopes = table[table["term"] != "Intercept"]
    numbers = {name: np.exp(slopes[name]) for name in ("median", "lower", "upper")}
    return pd.DataFrame({"term": slopes["term"], **numbers}).rename(columns={"median": ratio})


def _clusters(results: Results, random_effects: pd.DataFrame) -> Section:
    """Variance components in sentences, tables, and the effects of every cluster."""
    interval = f"{results.prob:.0%} equal-tailed intervals"
    table = results.variance_components
    blocks: list[Block] = []
    sentences = (*spread_sentences(results), *explained_sentences(results))
    blocks += [Paragraph(" ".join(sentences))] if sentences else []
    blocks += [
        Heading(f"Variance components ({interval})"),
        Table(table[~table["statistic"].isin(SHARES)]),
        Heading("Shares of the variance"),
        Table(table[table["statistic"].isin(SHARES)]),
    ]
    for factor, effects in random_effects.groupby("factor", sort=False):
        terms = effects["term"].nunique()
        alt = f"Random effects of {factor} with intervals"
        blocks.append(Heading(str(factor)))
        blocks.append(Gallery((Picture(forest(effects), alt, wide=terms > 1),)))
    return Section(f"How clusters differ (posterior, {results.prob:.0%} intervals)", tuple(blocks))


def _fits(results: Results, drawn: Pictures, evaluation: pd.DataFrame | None) -> Section:
    """Predictive and residual plots, and scores on held-out rows."""
    blocks: list[Block] = [Gallery(drawn.fit)] if drawn.fit else []
    if "fit" in drawn.notes:
        blocks.append(Paragraph(drawn.notes["fit"], "small"))
    if evaluation is not None:
        blocks += [Heading("Predictions of held-out rows"), Table(evaluation)]
    return Section("Does the model reproduce the data?", tuple(blocks))


def _checks(results: Results) -> Section:
    """All checks as tables, and numbers without a verdict."""
    blocks: list[Block] = []
    columns = ["name", "verdict", "reason", "effect", "threshold", "p", "advice"]
    for part, checks in results.verdicts.checks.groupby("part", sort=True):
        shown = checks[columns]
        shown = shown if shown["advice"].any() else shown.drop(columns="advice")
        blocks.append(Heading(str(part).capitalize()))
        blocks.append(Table(shown, sentences=("name", "reason", "advice")))
    figures = results.verdicts.figures.items()
    numbers = {name: f"{value:.4g}" for name, value in figures if value is not None}
    blocks += [Heading("Without a verdict"), Pairs(numbers)] if numbers else []
    return Section("All checks", tuple(blocks))


def _training(results: Results) -> Section:
    """How the training ended, its loss, and the priors."""
    ended = how_training_ended(results.posterior)
    mood = Paragraph(ended[0].upper() + ended[1:], "good" if results.posterior.converged else "bad")
    loss = Picture(loss_curves(results.posterior.history), "Loss over the training steps")
    lines = Pairs(priors(results.posterior.model))
    return Section("Convergence and priors", (mood, Gallery((loss,)), Heading("Priors"), lines))


def _methods(results: Results) -> Section:
    """Text and references for a paper, versions and seed."""
    facts = {"Software": versions(), "Seed": str(results.posterior.seed)}
    return Section(
        "Methods, for a paper",
        (
            *map(Paragraph, methods(results)),
            Heading("References"),
            Bullets(references(results.posterior)),
            Pairs(facts),
        ),
    )
