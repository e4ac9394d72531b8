"""The summary of a fit in text: program, data, variance components, fixed effects, verdict."""

from __future__ import annotations

import pandas as pd

from armed_pyro._messages import count_rows
from armed_pyro.inference.posterior import METHODS, Posterior
from armed_pyro.networks.fresh_probe import FreshProbe
from armed_pyro.program import fixed_prior
from armed_pyro.program.model import MixedEffects
from armed_pyro.report.cells import as_text
from armed_pyro.report.results import Results

ENDINGS = {
    "converged": "converged: the evidence lower bound has stopped improving",
    "validation": "converged: the validation loss has stopped improving",
    "steps": "NOT CONVERGED: the steps ran out; allow more with Schedule(steps=...)",
    "diverged": "DIVERGED: these are the last good parameters",
    "interrupted": "NOT CONVERGED: the training was interrupted",
}

# The ending of a fit whose guide needed no training.
AT_MODE = "converged: the hyperparameters are at their mode, where the guide needs no training"

WEIGHTS = {
    "frequency": "frequencies, with which log-likelihoods are multiplied; their sum is {:.5g}",
    "precision": "precisions; the residual variance of a row is residual_sd^2 / weight",
    "se": "none; the residual sds of the rows are their known standard errors",
}


def summarize(results: Results) -> str:
    """The summary of a fit as text, in the layout of lme4 and brms."""
    model = results.posterior.model
    lines = (f"  {site}: {prior}" for site, prior in priors(model).items())
    parts = [
        _head(results.posterior),
        _section("Priors", "\n".join(lines)),
        _random(results),
        _fixed(results),
    ]
    parts += [_convergence(results), results.verdicts.text]
    return "\n\n".join(parts)


def priors(model: MixedEffects) -> dict[str, str]:
    """Prior of every latent site, in the units of the data."""
    facts = model.data_facts()
    lines: dict[str, str] = {}
    for factor in model.factors:
        lines |= factor.describe_priors()
    if model.common_terms():
        lines["fixed_effect"] = fixed_prior.describe(model)
    for name, design in model.designs.items():
        lines[f"fixed_effect of {name}"] = fixed_prior.describe_parameter(model, name, design)
    for parameter in model.family.parameters:
        if facts.weights_kind == "se":
            lines[parameter.name] = "known: the standard errors of the rows"
            continue
        lines[parameter.name] = parameter.describe(model.priors, facts.spread)
    for other in model.others:
        scale = other.prior.scale
        number = scale if isinstance(scale, float | int) else None
        prior = other.prior.describe(facts.feature_spread * (number or 1.0))
        lines[other.sd_site] = prior + ", scaled to the data" * (number is None)
    return lines or {"(none)": "the program has no latent site"}


def adversaries(posterior: Posterior) -> list[str]:
    """Factor, layers, weight and warm-up of every adversary."""
    history, lines = posterior.history, []
    for place, game in enumerate(posterior.model.adversaries):
        tried = [r["weight"] for r in history.weights if r["adversary"] == place]
        how = f" (chosen from {', '.join(f'{w:g}' for w in tried)})" if tried else ""
        line = f"{game.factor}, on {', '.join(game.taps)}, weight {game.weight:g}{how}"
        # Fits saved by earlier versions do not tell the steps of their warm-up.
        warmup = history.warmup[place : place + 1]
        lines.append("".join([line, *(f", warm-up {steps} steps" for steps in warmup)]))
    return lines


def fresh_probes(posterior: Posterior) -> list[str]:
    """How well fresh probes read the clusters that adversaries should hide."""
    probes = [FreshProbe.from_json(record) for record in posterior.history.probes]
    return [f"Fresh probe of {probe.factor}: {probe}" for probe in probes]


def of_event(model: MixedEffects) -> str:
    """Text such as ' of "case"' for the modelled event; empty without one."""
    return "" if model.event is None else f" of {model.event!r}"


def outcome_labels(model: MixedEffects) -> dict[str, str]:
    """The modelled event, or the reference, of an outcome with labels."""
    classes, family = model.data_facts().classes, model.family
    if family.has_class_probabilities and not family.multiclass:
        return {"Categories": " < ".join(family.class_labels(classes) or ())}
    if family.multiclass and classes is not None:
        return {"Reference class": f"{classes[0]!r} (the first); the others are relative to it"}
    if classes is not None:
        event = f"{classes[1]!r} (the second label, against {classes[0]!r})"
        return {"Modelled event": f"{event}; event= or --event chooses it"}
    return {"Modelled event": "1 (against 0)"} if family.is_class and not family.multiclass else {}


def how_training_ended(posterior: Posterior) -> str:
    """Why and when the training ended."""
    steps = len(posterior.history.loss)
    ending = AT_MODE if steps == 1 and posterior.stopped == "converged" else None
    return ending or f"{ENDINGS[posterior.stopped]} ({steps:,} steps)"


def described(posterior: Posterior) -> str:
    """Outcome, family, random effects, size and end of training in one line."""
    model, facts = posterior.model, posterior.model.data_facts()
    random = " + ".join(map(str, model.outcome_terms)) or "no random effects"
    sizes = "".join(f", {len(levels)} of {name}" for name, levels in facts.levels.items())
    fixed = "linear" if model.linear else type(model.network).__name__
    event = "" if model.event is None else f" = {model.event!r}"
    further = "".join(f", {text}" for text in model.parameter_texts())
    return (
        f"{facts.outcome_name}{event} ({model.family}): {fixed} + {random}{further}; "
        f"{count_rows(facts.n_rows)}{sizes}; {ENDINGS[posterior.stopped].partition(':')[0]}"
    )


def _section(title: str, body: str) -> str:
    return f"{title}:\n{body}"


def _head(posterior: Posterior) -> str:
    model = posterior.model
    facts = model.data_facts()
    weights = sum(p.numel() for p in model.net.parameters())
    fixed = "linear, latent coefficients" if model.linear else f"network of {weights} weights"
    if model.bayesian_head and not model.linear:
        fixed += ", last layer latent"
    if facts.linear_names:
        fixed += ", and latent linear effects"
    features = len(facts.feature_names) or "x".join(map(str, facts.feature_shape))
    random = " + ".join(map(str, model.outcome_terms)) or "none"
    sizes = ", ".join(f"{name}: {len(levels)}" for name, levels in facts.levels.items()) or "none"
    lines = [
        "Mixed-effects network fitted by stochastic variational inference",
        f"  Outcome: {facts.outcome_name} ({model.family})",
        *(f"  {name}: {line}" for name, line in outcome_labels(model).items()),
        f"  Fixed effects: {fixed}, on {features} feature(s)",
        f"  Random effects: {random}",
        *(f"  Predictor: {text}" for text in model.parameter_texts()),
        f"  Rows: {facts.n_rows}; clusters: {sizes}",
    ]
    if facts.between is not None:
        lines.append(f"  Clusters' means: {facts.between.note}")
    if facts.weights_kind:
        lines.append(f"  Weights: {WEIGHTS[facts.weights_kind].format(facts.weights_sum)}")
    lines += [
        f"  Other outcome: {other.name} (features reconstructed by {other.at}), "
        f"weight {other.weight:.4g}"
        for other in model.others
    ]
    return "\n".join([*lines, *(f"  Adversary: {line}" for line in adversaries(posterior))])


def _random(results: Results) -> str:
    table = results.variance_components
    shares = table[table.statistic.isin(["icc", "r2_marginal", "r2_conditional"])]
    spreads = table[~table.statistic.isin(["variance", "share", *shares.statistic])]
    spreads = spreads.drop(columns="mean")
    interval = f"{results.prob:.0%} equal-tailed interval"
    title = f"Variance components (posterior median, {interval})"
    return "\n".join([_section(title, _frame(spreads)), "", _frame(shares.drop(columns="mean"))])


def _fixed(results: Results) -> str:
    table = results.fixed_effects
    if table.empty:
        return "Fixed effects: weights of a network, without uncertainty"
    model = results.posterior.model
    if not model.linear:
        kept = table.term.str.startswith("between(") | table.term.isin(model.parameter_terms())
        shown, body = table[kept], list[str]()
        if model.bayesian_head:
            count = len(table) - len(model.parameter_terms())
            body.append(f"  {count} latent weights of the last layer; see Fit.fixed_effects()")
            shown = table[table.term.isin(model.parameter_terms())]
        if not shown.empty:
            body.append(_frame(shown))
        if not body:
            return "Fixed effects: a network, and linear effects; see Fit.fixed_effects()"
    else:
        body = [_frame(table)]
    interval = f"{results.prob:.0%} equal-tailed interval"
    of = "" if model.event is None else f"of {model.event!r}, "
    return _section(f"Fixed effects ({of}posterior mean, {interval})", "\n".join(body))


def _held_out(posterior: Posterior) -> list[str]:
    """A line on the networks that held-out parts of the rows stopped."""
    history, folds = posterior.history, posterior.model.fold_networks
    if not history.fold_steps:
        return []
    if folds is None:
        return [f"  Network: stopped after {history.fold_steps[0]} steps by a fifth of the rows"]
    unit = "rows" if folds.factor is None else f"clusters of {folds.factor}"
    steps = f"{min(history.fold_steps)} to {max(history.fold_steps)} steps"
    return [f"  Networks: {len(folds)}, each trained without a part of the {unit} ({steps})"]


def _convergence(results: Results) -> str:
    posterior = results.posterior
    history, facts = posterior.history, posterior.model.data_facts()
    lines = [f"  {how_training_ended(posterior)}", *_held_out(posterior)]
    if history.elbo:
        last = history.elbo[-min(len(history.elbo), 100) :]
        lines.append(f"  Evidence lower bound: {sum(last) / len(last) * facts.n_rows:.2f}")
    draws = "the guide's own"
    if posterior.refined is not None:
        qualities = posterior.refined.quality.items()
        quality = ", ".join(f"{name} {value:.3g}" for name, value in qualities)
        draws = f"{METHODS[posterior.refined.method]} ({quality})"
    lines.append(f"  Posterior draws: {draws}")
    lines += [f"  {line}" for line in fresh_probes(posterior)]
    return _section("Convergence", "\n".join(lines))


def _frame(table: pd.DataFrame) -> str:
    body = as_text(table).to_string(index=False)
    return "\n".join(f"  {line}" for line in body.splitlines())
