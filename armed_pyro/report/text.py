"""What a fit prints: program, data, variance components, fixed effects, verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from armed_pyro.inference.draws import METHODS
from armed_pyro.program.model import MixedEffects

if TYPE_CHECKING:
    from armed_pyro.fitting import Fit

__all__ = ["priors", "text"]


def text(fit: Fit, *, prob: float = 0.9) -> str:
    """The summary, laid out as lme4's and brms' are.

    Parameters
    ----------
    fit : Fit
        The fit.
    prob : float
        Probability of the equal-tailed intervals.
    """
    return "\n\n".join(
        [
            _head(fit),
            _section("Priors", "\n".join(f"  {k}: {v}" for k, v in priors(fit.model).items())),
            _random(fit, prob),
            _fixed(fit, prob),
            _convergence(fit),
            _section("Verdict", fit.diagnostics().brief()),
        ]
    )


def priors(model: MixedEffects) -> dict[str, str]:
    """Prior of every latent site, in the units of the data."""
    facts, given = model.data_facts(), model.priors
    lines: dict[str, str] = {}
    for factor in model.factors:
        lines |= factor.describe_priors()
    if model.bayesian_head:
        unit = "sd of the outcome" if facts.spread != 1 else "link scale"
        lines["fixed_effect"] = f"Normal(0, {given.fixed_sd:.4g}) ({unit}, per sd of the feature)"
    if model.family.dispersion_name == "residual_sd":
        scale = given.residual_sd.scale
        number = scale if isinstance(scale, float | int) else facts.spread
        lines["residual_sd"] = given.residual_sd.describe(float(number))
    elif model.family.dispersion_name == "shape":
        lines["shape"] = "InverseGamma(0.4, 0.3)"
    for one in model.others:
        scale = one.prior.scale
        number = scale if isinstance(scale, float | int) else 1.0
        lines[one.sd_site] = one.prior.describe(facts.feature_spread * float(number))
    return lines or {"(none)": "the program has no latent site"}


def _section(title: str, body: str) -> str:
    return f"{title}:\n{body}"


def _head(fit: Fit) -> str:
    model, facts = fit.model, fit.model.data_facts()
    weights = sum(p.numel() for p in model.net.parameters())
    fixed = "linear, latent coefficients" if model.linear else f"network of {weights} weights"
    if model.bayesian_head and not model.linear:
        fixed += ", last layer latent"
    features = len(facts.feature_names) or "x".join(map(str, facts.feature_shape))
    random = " + ".join(map(str, model.terms)) or "none"
    sizes = ", ".join(f"{name}: {len(levels)}" for name, levels in facts.levels.items()) or "none"
    lines = [
        "Mixed-effects network fitted by stochastic variational inference",
        f"  Outcome: {facts.outcome_name} ({model.family.name})",
        f"  Fixed effects: {fixed}, on {features} feature(s)",
        f"  Random effects: {random}",
        f"  Rows: {facts.n_rows}; clusters: {sizes}",
    ]
    lines += [
        f"  Other outcome: {one.name} (features rebuilt by {one.at}), weight {one.weight:.4g}"
        for one in model.others
    ]
    lines += [
        f"  Adversary: {game.factor}, on {', '.join(game.taps)}, weight {game.weight:g}"
        for game in model.adversaries
    ]
    return "\n".join(lines)


def _random(fit: Fit, prob: float) -> str:
    table = fit.variance_components(prob=prob)
    spreads = table[table.statistic.isin(["sd", "cor"])].drop(columns="mean")
    other = table[table.statistic.isin(["icc", "r2_marginal", "r2_conditional"])]
    title = f"Variance components (posterior median, {prob:.0%} equal-tailed interval)"
    return "\n".join([_section(title, _frame(spreads)), "", _frame(other.drop(columns="mean"))])


def _fixed(fit: Fit, prob: float) -> str:
    table = fit.fixed_effects(prob=prob)
    if table.empty:
        return "Fixed effects: weights of a network, without uncertainty"
    body = _frame(table)
    if not fit.model.linear:
        body = f"  {len(table)} latent weights of the last layer; see Fit.fixed_effects()"
    return _section(f"Fixed effects (posterior mean, {prob:.0%} equal-tailed interval)", body)


def _convergence(fit: Fit) -> str:
    reasons = {
        "converged": "converged: the evidence lower bound has stopped improving",
        "validation": "converged: the validation loss has stopped improving",
        "steps": "NOT CONVERGED: the steps ran out; allow more with Schedule(steps=...)",
        "diverged": "DIVERGED: these are the last good parameters",
    }
    history = fit.history
    lines = [f"  {reasons[fit.stopped]} ({len(history.loss)} steps)"]
    if history.elbo:
        last = history.elbo[-min(len(history.elbo), 100) :]
        n = fit.model.data_facts().n_rows
        lines.append(f"  Evidence lower bound: {sum(last) / len(last) * n:.2f}")
    draws = "the guide's own"
    if fit.refined is not None:
        quality = ", ".join(f"{name} {value:.3g}" for name, value in fit.refined.quality.items())
        draws = f"{METHODS[fit.refined.method]} ({quality})"
    lines.append(f"  Posterior draws: {draws}")
    # No window of steps has been closed if the first one diverged.
    accuracies = history.adversary_accuracy[-1] if history.adversary_accuracy else []
    for game, accuracy in zip(fit.model.adversaries, accuracies, strict=False):
        counts = fit.model.data_facts().counts[game.factor]
        lines.append(
            f"  Adversary of {game.factor}: accuracy {accuracy:.3f}, "
            f"chance {float(counts.max() / counts.sum()):.3f}"
        )
    return _section("Convergence", "\n".join(lines))


def _frame(table: pd.DataFrame) -> str:
    body = table.to_string(index=False, float_format=lambda value: f"{value:.4g}")
    return "\n".join(f"  {line}" for line in body.splitlines())
