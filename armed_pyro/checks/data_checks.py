"""Checks of a fit's data and model: clusters, priors, predictions, random effects, residuals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd
from torch import Tensor

from armed_pyro.checks.inference_checks import Check
from armed_pyro.checks.predictive_checks import (
    cluster_checks,
    effect_normality,
    residual_uniformity,
)
from armed_pyro.families.family import Family
from armed_pyro.inference.posterior import ImportanceDraws, Posterior
from armed_pyro.inference.psis import pareto_smooth
from armed_pyro.random_effects.grouping_factor import Factor
from armed_pyro.summaries.arviz_stats import prior_sensitivity

__all__ = ["data_checks", "effective_clusters", "predictive_checks"]


FEW_CLUSTERS, TOO_FEW_CLUSTERS = 5.0, 3.0  # effective clusters below which a check warns, fails
SENSITIVE = 0.2  # sensitivity to the prior's scale above which a check warns
NEAR_ZERO = 0.1  # posterior share of an sd near zero above which a check warns


def data_checks(posterior: Posterior, latents: Mapping[str, Tensor]) -> Iterator[Check]:
    """Checks of the data's information, the priors, and the random effects' and residuals' laws."""
    yield from _clusters(posterior)
    yield from _boundary(posterior, latents)
    yield from _priors(posterior, latents)
    yield from _normality(posterior, latents)
    yield from _residuals(posterior, latents)


def effective_clusters(posterior: Posterior) -> dict[str, float]:
    """(sum n_k)^2 / sum n_k^2 by factor: the equivalent number of clusters of equal size."""
    counts = posterior.model.data_facts().counts
    names = [factor.name for factor in posterior.model.factors]
    return {
        name: float(counts[name].sum() ** 2 / (counts[name].double() ** 2).sum()) for name in names
    }


def _clusters(posterior: Posterior) -> Iterator[Check]:
    for name, effective in effective_clusters(posterior).items():
        total = len(posterior.model.data_facts().levels[name])
        verdict = "pass" if effective >= FEW_CLUSTERS else "warn"
        verdict = "fail" if effective < TOO_FEW_CLUSTERS else verdict
        reason = f"{name!r} has {total} clusters, as informative as {effective:.1f} of equal size"
        advice = (
            ""
            if verdict == "pass"
            else (
                f"its variance is a guess from the prior: more clusters, or {name!r} as a feature"
            )
        )
        yield Check(f"clusters of {name}", verdict, effective, FEW_CLUSTERS, reason, advice)


def _units(factor: Factor) -> set[str]:
    """Terms of a hidden layer's units or filters, which are interpreted together, not singly."""
    names = [name for block in factor.blocks if block.width > 1 for name in block.names]
    return {term for term in factor.terms if any(term.startswith(name) for name in names)}


def _boundary(posterior: Posterior, latents: Mapping[str, Tensor]) -> Iterator[Check]:
    for factor in posterior.model.factors:
        sd = factor.sd(latents)
        if sd.dim() < 3:
            continue  # fixed by the prior
        draws = sd[:, 0].double().cpu()
        # A uniform posterior on (0, a) has 18% of its mass below a fifth of its 90% quantile.
        near = (draws < 0.2 * draws.quantile(0.9, dim=0)).double().mean(0)
        for term, share in zip(factor.terms, near.tolist(), strict=True):
            if share <= NEAR_ZERO or term in _units(factor):
                continue
            reason = (
                f"the sd of {factor.name}[{term}] cannot be told from zero: {share:.0%} of its "
                "posterior lies below a fifth of its 90% quantile"
            )
            advice = "leave the term out, or report the interval, not the estimate"
            yield Check(
                f"boundary of {factor.name}[{term}]", "warn", share, NEAR_ZERO, reason, advice
            )


def _priors(posterior: Posterior, latents: Mapping[str, Tensor]) -> Iterator[Check]:
    units = {
        f"{factor.name}_sd[{term}]" for factor in posterior.model.factors for term in _units(factor)
    }
    all_sensitivities = prior_sensitivity(posterior, latents)
    sensitivity = {name: value for name, value in all_sensitivities.items() if name not in units}
    if not sensitivity:
        return
    worst = max(sensitivity, key=lambda name: sensitivity[name])
    value = sensitivity[worst]
    sensitive = [name for name, size in sensitivity.items() if size > SENSITIVE]
    reason = f"power-scaling the priors moves {worst} most: sensitivity {value:.2f}"
    if not sensitive:
        yield Check("prior sensitivity", "pass", value, SENSITIVE, reason)
        return
    shown = ", ".join(sensitive[:3]) + (", ..." if len(sensitive) > 3 else "")
    reason = f"the prior influences {shown} strongly: sensitivity up to {value:.2f}"
    advice = "the data say little of it, or contradict the prior: justify the prior, or change it"
    yield Check("prior sensitivity", "warn", value, SENSITIVE, reason, advice)


def predictive_checks(
    posterior: Posterior, latents: Mapping[str, Tensor], weighted: ImportanceDraws | None
) -> tuple[pd.DataFrame, list[Check]]:
    """Posterior predictive checks: a table with one row per cluster, and the verdicts."""
    tables, checks = [], []
    for factor in posterior.model.factors:
        compared = cluster_checks(posterior, factor.name, latents, seed=posterior.seed)
        table = compared.table.assign(factor=factor.name)
        nested = posterior.guide.nested()
        if weighted is not None and nested is factor and len(table) == len(weighted.cluster_k_hat):
            elpd, bad = _left_out(weighted)
            table = table.assign(k_hat=weighted.cluster_k_hat, elpd=elpd, elpd_k_hat=bad)
        tables.append(table)
        for name, (p, ratio) in compared.overall.items():
            checks.append(_discrepancy(factor.name, name, p, ratio))
    whole = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
    first = [name for name in ("factor", "cluster", "rows") if name in whole]
    return whole[[*first, *(name for name in whole if name not in first)]], checks


def _discrepancy(factor: str, statistic: str, p: float, ratio: float) -> Check:
    verdict = "pass"
    if p < 0.01 and ratio > 1.2:
        verdict = "fail" if p < 0.0025 and ratio > 1.5 else "warn"
    reason = (
        f"the {statistic} of the outcome in each cluster deviates {ratio:.2f} times as much as "
        f"replications do (p = {p:.3f})"
    )
    advice = "" if verdict == "pass" else "another family (overdispersion?), or more random effects"
    return Check(f"predictive {statistic} by {factor}", verdict, p, 0.01, reason, advice)


def _normality(posterior: Posterior, latents: Mapping[str, Tensor]) -> Iterator[Check]:
    for factor in posterior.model.factors:
        tests = effect_normality(factor, latents, seed=posterior.seed)
        if not tests:
            continue
        worst = min(tests, key=lambda term: tests[term][0])
        p, w = min(1.0, tests[worst][0] * len(tests)), tests[worst][1]  # Bonferroni
        verdict = "pass" if p > 0.01 else "warn" if p > 1e-5 else "fail"
        not_ = "not " if verdict != "pass" else ""
        reason = (
            f"random effects of {factor.name} are {not_}compatible with a normal distribution "
            f"(least {worst}: Shapiro-Wilk W {w:.3f}, p = {p:.2g})"
        )
        advice = "look at their histogram: groups of clusters (a missing feature), or outliers"
        yield Check(f"normality of {factor.name}", verdict, p, 0.01, reason, advice if not_ else "")


def _residuals(posterior: Posterior, latents: Mapping[str, Tensor]) -> Iterator[Check]:
    family = posterior.model.family
    uniformity = residual_uniformity(posterior, latents, seed=posterior.seed)
    if uniformity is None:
        yield _unchecked_residuals(family)
        return
    p, distance = uniformity
    verdict = "pass"
    if p < 1e-3 and distance > 0.03:
        verdict = "fail" if p < 1e-6 and distance > 0.1 else "warn"
    reason = (
        f"quantile residuals of family {family.name!r} are {distance:.3f} from uniform "
        f"(p = {p:.2g})"
    )
    advice = "" if verdict == "pass" else "try another family or a transformed outcome"
    yield Check("residuals", verdict, p, 1e-3, reason, advice)


def _unchecked_residuals(family: Family) -> Check:
    """The check that reports that residuals were not checked, and why."""
    if family.no_residuals:
        reason = f"not checked for family {family.name!r}: {family.no_residuals}"
        return Check("residuals", "pass", None, None, reason)
    reason = f"not checked: family {family.name!r} gives no distribution function"
    advice = "add the method `cdf` to the family, so that its residuals can be checked"
    return Check("residuals", "warn", None, None, reason, advice)


def _left_out(weighted: ImportanceDraws) -> tuple[np.ndarray, np.ndarray]:
    """log p(y_k | y of the other clusters) and k-hat of its weights; NaN if not computed."""
    clusters, weighed = weighted.clusters.T, ~np.isnan(weighted.cluster_k_hat)
    elpd, k_hat = np.full(len(weighed), np.nan), np.full(len(weighed), np.nan)
    smoothed, k_hat[weighed] = pareto_smooth(weighted.log_weights - clusters)
    elpd[weighed] = np.logaddexp.reduce(smoothed + clusters, axis=1)
    return elpd, k_hat
