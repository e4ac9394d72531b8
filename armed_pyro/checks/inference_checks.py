"""Checks of the computation: training, weights of the draws, guide, chains."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyro
import torch
from jaxtyping import Float
from pyro import poutine
from torch import Tensor

from armed_pyro.checks.check import Check, Word, severity
from armed_pyro.checks.quantities import reported
from armed_pyro.engine.schedule import MOVING
from armed_pyro.guides.hyperparameters import is_positive
from armed_pyro.guides.noise import proposal_variance
from armed_pyro.inference.posterior import ImportanceDraws, Posterior
from armed_pyro.program.model import MixedEffects
from armed_pyro.summaries.variance import fixed_effects, variance_components

__all__ = ["EXACT", "finite_draws", "finite_tables", "inference_checks"]


# Error of a reported mean or sd, in posterior sds: a tenth changes the second digit of an interval.
INACCURATE, WRONG = 0.1, 0.5
# Error of a guide whose draws are reported as they are, in posterior sds; ratio of its sds.
GUIDE_BIAS, GUIDE_RATIO = 0.25, 1.3
# Movement of q(theta) in its last window, in posterior sds; noise of iterates moves it by 0.1.
DRIFT = 0.25
FEWEST_CHAIN_DRAWS = 400.0  # effective draws, for an error of 0.05 posterior sds
EXACT = 'take slower but exact draws: fit.refine("nuts"), armed-pyro fit --refine nuts'
MORE_STEPS = "allow more steps: Schedule(steps=...), --steps"


def inference_checks(posterior: Posterior) -> Iterator[Check]:
    """Checks of the training, and of the importance weights or chains."""
    yield from _training(posterior)
    if posterior.refined is not None and posterior.refined.method == "nuts":
        yield from _nuts(posterior.refined.quality)
    elif posterior.importance is not None:
        yield from _weights(posterior, posterior.importance)
    elif posterior.model.factors:
        reason = "there are too many rows to weigh hundreds of draws"
        yield Check("computation", "accuracy of the draws", "not checked", reason)


def finite_draws(latents: Mapping[str, Tensor]) -> Iterator[Check]:
    """A failed check if draws are not finite."""
    bad = [name for name, value in latents.items() if not torch.isfinite(value).all()]
    if bad:
        reason = f"the posterior draws of {', '.join(bad[:3])} are not finite numbers"
        yield Check("computation", "draws", "fail", reason, advice="see the end of the training")


def finite_tables(posterior: Posterior) -> Iterator[Check]:
    """A failed check if an estimate of the variance components or fixed effects is not finite."""
    tables = {"variance component": variance_components, "fixed effect": fixed_effects}
    for kind, make in tables.items():
        table = make(posterior, draws=200)
        bad = table[~np.isfinite(table[["mean", "median"]].to_numpy(float)).all(axis=1)]
        if len(bad):
            label = " ".join(str(value) for value in bad.iloc[0][:3])
            reason = f"{len(bad)} of {len(table)} {kind}s are not finite numbers, such as {label}"
            yield Check("computation", f"{kind}s", "fail", reason, advice="look for extreme values")


def _training(posterior: Posterior) -> Iterator[Check]:
    steps, history = len(posterior.history.loss), posterior.history
    name, stopped = "training", posterior.stopped
    if stopped == "diverged":
        reason = "the training diverged, and these are its last good parameters"
        advice = "see the message of fit"
        yield Check("computation", name, "fail", reason, advice=advice)
    elif stopped in ("steps", "interrupted"):
        end = f"its {steps} steps ran out" if stopped == "steps" else "it was interrupted"
        reason = f"the training had not converged when {end}"
        early = history.settled is None or "steps" in history.fold_stopped
        if early and history.fold_stopped:
            unfinished = history.fold_stopped.count("steps")
            steps = posterior.schedule.steps
            reason = (
                f"{unfinished} of {len(history.fold_stopped)} networks were still improving when "
                f"their {steps} steps ran out"
            )
        elif early:
            reason += ", before the guide was settled at the network's final weights"
        verdict: Word = "fail" if early and posterior.schedule.stages else "warn"
        yield Check("computation", name, verdict, reason, advice=MORE_STEPS)
    else:
        end = "was stopped by validation, then settled," if stopped == "validation" else "converged"
        reason = f"the training {end} after {steps} steps"
        if steps == 1:
            reason = "the hyperparameters are at their mode, where the guide needs no training"
        yield Check("computation", name, "pass", reason)
    yield from _iterates(posterior)


def _iterates(posterior: Posterior) -> Iterator[Check]:
    history = posterior.history
    rates = history.rate[len(history.rate) - len(history.drift) :]
    at_full_rate = [place for place, rate in enumerate(rates) if rate == 1]
    if not at_full_rate or not math.isfinite(history.r_hat[at_full_rate[-1]]):
        return
    r_hat, drift = history.r_hat[at_full_rate[-1]], history.drift[at_full_rate[-1]]
    verdict = severity(drift, DRIFT, noise=r_hat < MOVING)
    still = "still moved" if verdict != "pass" else "moved"
    yield Check(
        "computation",
        "iterates",
        verdict,
        f"the approximate posterior {still} by {drift:.2f} posterior sds in the last steps at the "
        f"full learning rate (split R-hat of q(theta) {r_hat:.3f})",
        drift,
        "movement of the approximate posterior, in posterior sds",
        DRIFT,
        advice="" if verdict == "pass" else MORE_STEPS,
    )


def _weights(posterior: Posterior, weighted: ImportanceDraws) -> Iterator[Check]:
    """Accuracy of the weighted draws, and of the guide where its draws are reported."""
    error, quantity = _error(posterior, weighted)
    share = weighted.effective / len(weighted.log_weights)
    k_hat = weighted.k_hat
    verdict = severity(error, INACCURATE, WRONG) if k_hat < 1 else "fail"
    terms = f"(Pareto k-hat {k_hat:.2f}, effective share of the draws {share:.0%})"
    if k_hat < 1:
        reason = f"weighted draws give all means and sds to within {error:.2g} posterior sds"
        if verdict != "pass":
            reason = f"the mean or sd of {quantity} may be off by {error:.2g} posterior sds"
    else:
        reason = (
            "the approximate posterior misses part of the posterior, and weights cannot mend it"
        )
        if posterior.model.factors and posterior.guide.nested() is None:
            # Weights of this many effects at once degenerate with any guide: k-hat proves nothing.
            verdict = "not checked"
            reason = "the approximation of so many effects at once cannot be verified by weights"
    yield Check(
        "computation",
        "accuracy of the draws",
        verdict,
        f"{reason} {terms}",
        error if math.isfinite(error) else None,
        "error of the worst mean or sd, in posterior sds",
        INACCURATE,
        advice="" if verdict == "pass" else _exact(posterior),
    )
    if posterior.refined is None and verdict == "pass":
        yield _guide(posterior.model, weighted)
    yield from _by_cluster(posterior, weighted)


def _error(posterior: Posterior, weighted: ImportanceDraws) -> tuple[float, str]:
    r"""Error of the worst mean or sd that weighted draws give, in posterior sds; its quantity.

    The error is the Monte Carlo error :math:`\sqrt{\sum w_i^2 (h_i - \bar h)^2} / sd(h)`, and the
    same of the sd. If k-hat is so high that this error cannot be relied on (Vehtari et al. 2024),
    what the weights' tail hides is added: with a Pareto tail of shape k and the largest weight w,
    the draws miss a mass of w / (2 (1 - k)), which is taken to lie three sds from the mean.
    """
    weights, k_hat = weighted.weights, max(0.0, weighted.k_hat)
    if k_hat >= 1:
        return math.inf, ""
    reliable = k_hat < min(1 - 1 / math.log10(len(weights)), 0.7)
    unseen = 0.0 if reliable else 0.5 * float(weights.max()) / (1 - k_hat)
    worst, name = 0.0, "the draws"
    for quantity, values in reported(posterior, weighted.latents).items():
        error = _monte_carlo_error(weights, values)
        if (values > 0).all():  # skewed, or near zero: extreme draws dominate one of the two
            error = min(error, _monte_carlo_error(weights, np.log(values)))
        if not error <= worst:
            worst, name = error, quantity
    return worst + 3 * unseen, name


def _monte_carlo_error(
    weights: Float[np.ndarray, " draws"], draws: Float[np.ndarray, " draws"]
) -> float:
    """Error of the mean or the sd of weighted draws, the larger, in sds; 0 for a constant."""
    centred = draws - weights @ draws
    variance = float(weights @ centred**2)
    if variance <= 1e-24 * (1 + float(np.abs(draws).max())) ** 2:
        return 0.0
    mean = math.sqrt(weights**2 @ centred**2 / variance)
    return max(mean, math.sqrt(weights**2 @ (centred**2 - variance) ** 2) / (2 * variance))


def _guide(model: MixedEffects, weighted: ImportanceDraws) -> Check:
    bias, ratio = _guide_error(model, weighted)
    good = bias < GUIDE_BIAS and ratio < GUIDE_RATIO
    return Check(
        "computation",
        "guide",
        "pass" if good else "fail" if math.isnan(bias) else "warn",
        f"the means of the approximate posterior are off by at most {bias:.2f} posterior sds, its "
        f"sds by a factor of at most {ratio:.2f}",
        bias if math.isfinite(bias) else None,
        "error of the worst mean, in posterior sds",
        GUIDE_BIAS,
        advice="" if good else "use fit.refine(), which corrects this",
    )


def _exact(posterior: Posterior) -> str:
    """Advice to draw by NUTS, for which all rows are needed."""
    if posterior.sampled:
        return "fit the table in memory, or a part of it, which allows exact draws (NUTS)"
    return EXACT


def _by_cluster(posterior: Posterior, weighted: ImportanceDraws) -> Iterator[Check]:
    if not len(weighted.cluster_k_hat):
        return
    k_hats = weighted.cluster_k_hat[~np.isnan(weighted.cluster_k_hat)]
    high = int((k_hats > 0.7).sum())
    bad = high / max(1, len(k_hats))
    # The k-hat of a single cluster may be high by chance.
    verdict = severity(bad, 0.05, 0.3, noise=high < 2)
    yield Check(
        "computation",
        "draws by cluster",
        verdict,
        f"the random effects of {high} of {len(k_hats)} clusters are approximated badly (their "
        "k-hat is above 0.7)",
        bad,
        "share of the clusters with k-hat above 0.7",
        0.05,
        advice="" if verdict == "pass" else _exact(posterior),
    )


def _nuts(quality: Mapping[str, float]) -> Iterator[Check]:
    longer = 'run longer: fit.refine("nuts", draws=..., warmup=...)'
    r_hat, ess, divergences = (quality[name] for name in ("r_hat", "ess", "divergences"))
    error = 1 / math.sqrt(ess) if ess > 0 else math.nan
    verdict = severity(r_hat, 1.01, 1.05)
    if not ess >= FEWEST_CHAIN_DRAWS and verdict == "pass":
        verdict = "warn"
    if not math.isfinite(error):
        verdict = "fail"
    reason = f"the chains give all means to within {error:.2g} posterior sds"
    if verdict != "pass":
        reason = f"the chains have not mixed, and means may be off by {error:.2g} posterior sds"
    yield Check(
        "computation",
        "NUTS",
        verdict,
        f"{reason} (largest split R-hat {r_hat:.3f}, smallest effective sample size {ess:.0f})",
        error if math.isfinite(error) else None,
        "Monte Carlo error of the worst mean, in posterior sds",
        FEWEST_CHAIN_DRAWS**-0.5,
        advice="" if verdict == "pass" else longer,
    )
    if divergences:
        reason = f"the sampler could not follow the posterior in {divergences:.0f} places "
        reason += "(divergent transitions)"
        advice = "give tighter priors to sds near zero"
        yield Check("computation", "divergences", "warn", reason, divergences, advice=advice)


def _guide_error(model: MixedEffects, weighted: ImportanceDraws) -> tuple[float, float]:
    """Largest error of the guide's means, in posterior sds, and largest ratio of sds, either way.

    The weighted draws stand for the posterior.
    """
    worst, factor = 0.0, 1.0
    positive = _positive_sites(model)
    sites = {
        name: value.reshape(len(value), -1).double().cpu().numpy()
        for name, value in weighted.latents.items()
        if value.dim() > 1 and value.shape[1] == 1  # no site that is known, no effects of clusters
    }
    # Proposals are wider than the guide: dividing by `inflation` gives the guide's sds.
    size = sum(draws.shape[1] for draws in sites.values())
    inflation = math.sqrt(proposal_variance(max(1, size)))
    for name, draws in sites.items():
        # The guide is nearly normal in the logarithms of sds.
        values = np.log(draws) if name in positive else draws
        mean = weighted.weights @ values
        sd = np.sqrt(weighted.weights @ (values - mean) ** 2)
        moves = sd > 1e-12
        shift = np.abs(values.mean(0) - mean)[moves] / sd[moves]
        ratio = values.std(0)[moves] / inflation / sd[moves]
        worst = float(np.fmax(worst, shift.max(initial=0)))
        factor = max(factor, float(np.maximum(ratio, 1 / ratio).max(initial=1)))
        if not np.isfinite(values).all():
            return math.nan, math.nan
    return worst, factor


def _positive_sites(model: MixedEffects) -> set[str]:
    """Names of the sites whose support is the positive numbers."""
    with model.seeded(0), pyro.validation_enabled(False):
        row = model.data_facts().one_row(model.reference())
        nodes: Mapping[str, Any] = poutine.trace(model).get_trace(row).nodes
    return {
        name
        for name, node in nodes.items()
        if node["type"] == "sample" and is_positive(getattr(node["fn"], "support", None))
    }
