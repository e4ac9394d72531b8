"""Can a fit be trusted? Checks of inference, data and model, with reasons and next steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from torch import Tensor

from armed_pyro.datatree import leave_one_out, pareto_smooth, prior_sensitivity
from armed_pyro.predictivechecks import cluster_checks, effect_normality, residual_uniformity
from armed_pyro.refinement import refinable

if TYPE_CHECKING:
    from armed_pyro.fitted import Fit
    from armed_pyro.refinement import ImportanceDraws

__all__ = ["Check", "Diagnostics", "diagnose", "k_hat_threshold"]

ORDER = ("pass", "warn", "fail")
# Posterior draws that the checks are made of.
DRAWS = 1000
FEW_CLUSTERS, TOO_FEW_CLUSTERS = 5.0, 3.0
SENSITIVE = 0.2
MOVING = 1.05  # R-hat of the iterates: half a posterior sd
MOST_ROWS_LOO = 20_000


@dataclass(frozen=True)
class Check:
    """One question asked of a fit.

    Attributes
    ----------
    name : str
        What is checked.
    verdict : {"pass", "warn", "fail"}
        The answer.
    value, threshold : float or None
        What was found, and where it stops being good.
    reason : str
        What was found, in words.
    advice : str
        What to do; empty where the check passed.
    """

    name: str
    verdict: str
    value: float | None
    threshold: float | None
    reason: str
    advice: str = ""


@dataclass(frozen=True, eq=False)
class Diagnostics:
    """Verdict on a fit.

    Attributes
    ----------
    checks : tuple of Check
        All checks made, those that failed first.
    clusters : pandas.DataFrame
        By cluster: factor, cluster, rows, posterior predictive checks (statistic, replicated
        median and p-value of mean, sd, zeros), and for the nested factor k_hat, elpd (expected
        log density when the cluster is left out) and elpd_k_hat.
    figures : mapping of str to float or None
        k_hat, ess, elpd_loo, elpd_loo_se, p_loo, elpd_loo_bad (rows with k-hat above 0.7),
        elpd_loco, elpd_loco_se, elpd_loco_bad (clusters likewise), and the effective number of
        clusters of each factor.

    Examples
    --------
    >>> found = Check("steps", "warn", 200, None, "the steps ran out", "allow more steps")
    >>> print(Diagnostics((found,), pd.DataFrame(), {}))
    Verdict: WARN
      warn  steps: the steps ran out
            -> allow more steps
    """

    checks: tuple[Check, ...]
    clusters: pd.DataFrame
    figures: Mapping[str, float | None] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """The worst verdict of all checks: "pass", "warn" or "fail"."""
        return max((check.verdict for check in self.checks), key=ORDER.index, default="pass")

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the verdict is not "pass"."""
        return tuple(check.reason for check in self.checks if check.verdict != "pass")

    def to_frame(self) -> pd.DataFrame:
        """One row a check."""
        return pd.DataFrame([asdict(check) for check in self.checks])

    def to_json(self) -> dict[str, Any]:
        """Verdict, checks and figures as JSON values."""
        checks = [{k: _finite(v) for k, v in asdict(check).items()} for check in self.checks]
        figures = {name: _finite(value) for name, value in self.figures.items()}
        return {"verdict": self.verdict, "checks": checks, "figures": figures}

    def __str__(self) -> str:
        return "\n".join([f"Verdict: {self.verdict.upper()}", *_lines(self.checks)])

    def brief(self) -> str:
        """The verdict, and the checks that did not pass."""
        open_ones = [check for check in self.checks if check.verdict != "pass"]
        passed = f"{len(self.checks) - len(open_ones)} of {len(self.checks)} checks passed"
        return "\n".join([f"  {self.verdict.upper()}: {passed}", *_lines(open_ones)])


def _lines(checks: Iterable[Check]) -> Iterator[str]:
    for check in checks:
        yield f"  {check.verdict:4}  {check.name}: {check.reason}"
        if check.advice:
            yield f"        -> {check.advice}"


def k_hat_threshold(draws: int) -> float:
    """min(1 - 1 / log10(S), 0.7): below it importance weights can be relied upon.

    Examples
    --------
    >>> k_hat_threshold(100), k_hat_threshold(4000)
    (0.5, 0.7)

    References
    ----------
    Vehtari et al. (2024), "Pareto smoothed importance sampling", JMLR 25(72).
    """
    return min(1 - 1 / math.log10(draws), 0.7)


def diagnose(fit: Fit) -> Diagnostics:
    """All checks of a fit.

    Inference: end of the training, iterates of q(theta) (drift and R-hat; Dhaka et al. 2020),
    Pareto k-hat over all and by cluster, or R-hat, ESS and divergences of NUTS. Data: effective
    number of clusters, sds that cannot be told from zero, sensitivity to the priors (power
    scaling; Kallioinen et al. 2024). Model: posterior predictive checks by cluster, normality of
    the random effects, distribution of the residuals. PSIS-LOO and leave-one-cluster-out are
    reported without a verdict.

    Examples
    --------
    ``print(fit.diagnostics())``
    """
    latents = fit.draws(DRAWS)
    weighted = fit.importance if refinable(fit) else None
    checks = [*_training(fit), *_sampling(fit, weighted), *_clusters(fit)]
    checks += [*_boundary(fit, latents), *_priors(fit, latents)]
    tables, predictive = _predictive(fit, latents, weighted)
    checks += [*predictive, *_normality(fit, latents), *_residuals(fit, latents)]
    checks.sort(key=lambda check: -ORDER.index(check.verdict))
    figures = _figures(fit, weighted, tables)
    return Diagnostics(tuple(checks), tables, figures)


# --- inference --------------------------------------------------------------------------------


def _training(fit: Fit) -> Iterator[Check]:
    steps, history = len(fit.history.loss), fit.history
    more = "allow more steps: Schedule(steps=...), --steps"
    reasons = {
        "converged": ("pass", f"converged after {steps} steps", ""),
        "validation": ("pass", f"stopped by validation, then settled, after {steps} steps", ""),
        "steps": ("warn", f"the steps ran out after {steps}", more),
        "diverged": ("fail", "the loss diverged: these are the last good parameters", "see fit"),
    }
    verdict, reason, advice = reasons[fit.stopped]
    if fit.stopped == "steps" and history.settled is None:
        reason += ", before the guide was settled at the network's final weights"
        verdict = "fail" if fit.schedule.stages else "warn"
    yield Check("training", verdict, steps, None, reason, advice)
    at_full_rate = [
        place
        for place, rate in enumerate(history.rate[len(history.rate) - len(history.drift) :])
        if rate == 1
    ]
    if at_full_rate and math.isfinite(history.r_hat[at_full_rate[-1]]):
        r_hat, drift = history.r_hat[at_full_rate[-1]], history.drift[at_full_rate[-1]]
        good = r_hat < MOVING
        reason = (
            f"in its last window at the full rate q(theta) moved by {drift:.2f} posterior sds "
            f"(split R-hat {r_hat:.3f})"
        )
        advice = "" if good else more
        yield Check("iterates", "pass" if good else "warn", r_hat, MOVING, reason, advice)


def _sampling(fit: Fit, weighted: ImportanceDraws | None) -> Iterator[Check]:
    if weighted is None:
        if fit.model.factors:
            reason = "not computed: there are too many rows to weigh hundreds of draws"
            yield Check("k-hat", "pass", None, None, reason)
        return
    if fit.refined is not None and fit.refined.method == "nuts":
        yield from _nuts(fit.refined.quality)
        return
    limit = k_hat_threshold(len(weighted.log_weights))
    k_hat, share = weighted.k_hat, weighted.effective / len(weighted.log_weights)
    reason = f"Pareto k-hat {k_hat:.2f}, effective share of the draws {share:.0%}"
    nuts = 'the guide misses part of the posterior: use fit.refine("nuts")'
    verdict = "pass" if k_hat < limit else "warn" if k_hat < 1 else "fail"
    yield Check("k-hat", verdict, k_hat, limit, reason, "" if verdict == "pass" else nuts)
    if fit.refined is None and verdict == "pass":
        bias, ratio = _guide_error(weighted)
        good = bias < 0.25 and ratio < 1.3
        reason = (
            f"the guide's means are off by at most {bias:.2f} posterior sds, its sds by a factor "
            f"of at most {ratio:.2f}"
        )
        advice = "" if good else "use fit.refine(), which corrects this"
        yield Check("guide", "pass" if good else "warn", bias, 0.25, reason, advice)
    if len(weighted.cluster_k_hat):
        bad = float((weighted.cluster_k_hat[~np.isnan(weighted.cluster_k_hat)] > 0.7).mean())
        verdict = "pass" if bad < 0.05 else "warn" if bad < 0.3 else "fail"
        reason = f"k-hat above 0.7 in {bad:.0%} of the clusters"
        yield Check("k-hat by cluster", verdict, bad, 0.05, reason, "" if bad < 0.05 else nuts)


def _nuts(quality: Mapping[str, float]) -> Iterator[Check]:
    longer = 'run longer: fit.refine("nuts", draws=..., warmup=...)'
    r_hat, ess, divergences = (quality[name] for name in ("r_hat", "ess", "divergences"))
    verdict = "pass" if r_hat < 1.01 else "warn" if r_hat < 1.05 else "fail"
    reason = f"largest split R-hat {r_hat:.3f}, smallest effective sample size {ess:.0f}"
    if ess < 400:
        verdict = max(verdict, "warn", key=ORDER.index)
    yield Check("NUTS", verdict, r_hat, 1.01, reason, "" if verdict == "pass" else longer)
    if divergences:
        reason = f"{divergences:.0f} divergent transitions"
        yield Check("divergences", "warn", divergences, 0, reason, "tighten the priors")


def _guide_error(weighted: ImportanceDraws) -> tuple[float, float]:
    """Largest difference of means, in posterior sds, and factor of sds, draws over weighted."""
    worst, factor = 0.0, 1.0
    # The proposals' tails are heavier than the guide's: t with 8 degrees of freedom.
    inflation = math.sqrt(8 / 6)
    for name, value in weighted.latents.items():
        if value.dim() < 2 or value.shape[1] != 1:
            continue  # known, or effects of clusters
        draws = value.reshape(len(value), -1).double().cpu().numpy()
        mean = weighted.weights @ draws
        sd = np.sqrt(weighted.weights @ (draws - mean) ** 2)
        moves = sd > 1e-12
        own = draws.std(0)[moves] / inflation
        if name.endswith("_sd"):  # skewed: on the scale on which the guide is nearly normal
            logs = np.log(draws[:, moves])
            mean_log = weighted.weights @ logs
            sd_log = np.sqrt(weighted.weights @ (logs - mean_log) ** 2)
            shift = np.abs(logs.mean(0) - mean_log) / sd_log
            ratio = logs.std(0) / inflation / sd_log
        else:
            shift = np.abs(draws.mean(0) - mean)[moves] / sd[moves]
            ratio = own / sd[moves]
        worst = max(worst, float(shift.max(initial=0)))
        factor = max(factor, float(np.maximum(ratio, 1 / ratio).max(initial=1)))
    return worst, factor


# --- data -------------------------------------------------------------------------------------


def _effective_clusters(fit: Fit) -> dict[str, float]:
    """(sum n_k)^2 / sum n_k^2, by factor: as many clusters of equal size weigh the same."""
    counts = fit.model.data_facts().counts
    names = [factor.name for factor in fit.model.factors]
    return {
        name: float(counts[name].sum() ** 2 / (counts[name].double() ** 2).sum()) for name in names
    }


def _clusters(fit: Fit) -> Iterator[Check]:
    for name, effective in _effective_clusters(fit).items():
        total = len(fit.model.data_facts().levels[name])
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


def _boundary(fit: Fit, latents: Mapping[str, Tensor]) -> Iterator[Check]:
    for factor in fit.model.factors:
        sd = latents[f"{factor.name}_sd"]
        if sd.dim() < 3:
            continue  # known
        draws = sd[:, 0].double().cpu()
        near = (draws < 0.1 * draws.median(0).values).double().mean(0)
        for term, share in zip(factor.terms, near.tolist(), strict=True):
            if share <= 0.05:
                continue
            reason = (
                f"the sd of {factor.name}[{term}] cannot be told from zero: {share:.0%} of its "
                "posterior lies below a tenth of the median"
            )
            advice = "leave the term out, or report the interval, not the estimate"
            yield Check(f"boundary of {factor.name}[{term}]", "warn", share, 0.05, reason, advice)


def _priors(fit: Fit, latents: Mapping[str, Tensor]) -> Iterator[Check]:
    sensitivity = prior_sensitivity(fit, latents)
    if not sensitivity:
        return
    worst = max(sensitivity, key=lambda name: sensitivity[name])
    value = sensitivity[worst]
    many = [name for name, one in sensitivity.items() if one > SENSITIVE]
    reason = f"power-scaling the priors moves {worst} most: sensitivity {value:.2f}"
    if not many:
        yield Check("prior sensitivity", "pass", value, SENSITIVE, reason)
        return
    shown = ", ".join(many[:3]) + (", ..." if len(many) > 3 else "")
    reason = f"the prior says much of {shown}: sensitivity up to {value:.2f}"
    advice = "the data say little of it, or contradict the prior: justify the prior, or change it"
    yield Check("prior sensitivity", "warn", value, SENSITIVE, reason, advice)


# --- model ------------------------------------------------------------------------------------


def _predictive(
    fit: Fit, latents: Mapping[str, Tensor], weighted: ImportanceDraws | None
) -> tuple[pd.DataFrame, list[Check]]:
    tables, checks = [], []
    for factor in fit.model.factors:
        found = cluster_checks(fit, factor.name, latents, seed=fit.seed)
        table = found.table.assign(factor=factor.name)
        nested = fit.guide.nested()
        if weighted is not None and nested is factor and len(table) == len(weighted.cluster_k_hat):
            elpd, bad = _left_out(weighted)
            table = table.assign(k_hat=weighted.cluster_k_hat, elpd=elpd, elpd_k_hat=bad)
        tables.append(table)
        for name, (p, ratio) in found.overall.items():
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


def _normality(fit: Fit, latents: Mapping[str, Tensor]) -> Iterator[Check]:
    for factor in fit.model.factors:
        for term, (p, w) in effect_normality(factor, latents, seed=fit.seed).items():
            verdict = "pass" if p > 0.005 else "warn" if p > 1e-5 else "fail"
            reason = (
                f"random effects {factor.name}[{term}] are "
                f"{'not ' * (verdict != 'pass')}compatible with a normal distribution "
                f"(Shapiro-Wilk W {w:.3f}, p = {p:.2g})"
            )
            advice = (
                ""
                if verdict == "pass"
                else (
                    "look at their histogram: groups of clusters (a missing feature), or outliers"
                )
            )
            yield Check(f"normality of {factor.name}[{term}]", verdict, p, 0.005, reason, advice)


def _residuals(fit: Fit, latents: Mapping[str, Tensor]) -> Iterator[Check]:
    found = residual_uniformity(fit, latents, seed=fit.seed)
    if found is None:
        return
    p, distance = found
    verdict = "pass"
    if p < 1e-3 and distance > 0.03:
        verdict = "fail" if p < 1e-6 and distance > 0.1 else "warn"
    family = fit.model.family.name
    reason = (
        f"quantile residuals of family {family!r} are {distance:.3f} from uniform (p = {p:.2g})"
    )
    advice = "" if verdict == "pass" else "try another family or a transformed outcome"
    yield Check("residuals", verdict, p, 1e-3, reason, advice)


# --- figures ----------------------------------------------------------------------------------


def _left_out(weighted: ImportanceDraws) -> tuple[np.ndarray, np.ndarray]:
    """log p(y_k | y of the other clusters), and k-hat of its weights, of the clusters looked at."""
    clusters = weighted.clusters.T
    elpd, k_hat = np.full(len(clusters), np.nan), np.full(len(clusters), np.nan)
    chosen = ~np.isnan(weighted.cluster_k_hat)
    smoothed, k_hat[chosen] = pareto_smooth(weighted.log_weights - clusters[chosen])
    elpd[chosen] = np.logaddexp.reduce(smoothed + clusters[chosen], axis=1)
    return elpd, k_hat


def _figures(
    fit: Fit, weighted: ImportanceDraws | None, clusters: pd.DataFrame
) -> dict[str, float | None]:
    figures: dict[str, float | None] = {}
    if weighted is not None:
        figures |= {"k_hat": weighted.k_hat, "ess": weighted.effective}
    if fit.data.n_rows <= MOST_ROWS_LOO:
        figures |= leave_one_out(fit)
    if "elpd" in clusters:
        left_out = clusters.elpd.dropna()
        figures |= {
            "elpd_loco": float(left_out.mean() * len(clusters.elpd)),
            "elpd_loco_se": float(left_out.std() * len(clusters.elpd) / len(left_out) ** 0.5),
            "elpd_loco_bad": float((clusters.elpd_k_hat > 0.7).sum()),
        }
    sizes = _effective_clusters(fit)
    return figures | {f"effective_clusters[{name}]": value for name, value in sizes.items()}


def _finite(value: Any) -> Any:
    """JSON has no infinities."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
