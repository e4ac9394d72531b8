"""Checks of a fit's inference: training, importance weights, chains."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from armed_pyro.engine.schedule import MOVING
from armed_pyro.guides.noise import proposal_variance
from armed_pyro.inference.posterior import ImportanceDraws, Posterior

__all__ = ["ORDER", "Check", "inference_checks", "k_hat_threshold"]


ORDER = ("pass", "warn", "fail")


@dataclass(frozen=True)
class Check:
    """The result of one check of a fit.

    Attributes
    ----------
    name : str
        Name of the check.
    verdict : {"pass", "warn", "fail"}
        Result.
    value, threshold : float or None
        Measured value, and the threshold for passing.
    reason : str
        Result in words.
    advice : str
        Next step for the user; empty if the check passed.

    Examples
    --------
    >>> Check("k-hat", "pass", 0.31, 0.7, "Pareto k-hat 0.31").verdict
    'pass'
    """

    name: str
    verdict: str
    value: float | None
    threshold: float | None
    reason: str
    advice: str = ""


def k_hat_threshold(draws: int) -> float:
    """min(1 - 1 / log10(S), 0.7), below which importance weights of S draws are reliable.

    Examples
    --------
    >>> k_hat_threshold(100), k_hat_threshold(4000)
    (0.5, 0.7)

    References
    ----------
    Vehtari et al. (2024), "Pareto smoothed importance sampling", JMLR 25(72).
    """
    return min(1 - 1 / math.log10(draws), 0.7)


def inference_checks(posterior: Posterior, weighted: ImportanceDraws | None) -> Iterator[Check]:
    """Checks of the training, and of the importance weights or chains."""
    yield from _training(posterior)
    yield from _sampling(posterior, weighted)


def _training(posterior: Posterior) -> Iterator[Check]:
    steps, history = len(posterior.history.loss), posterior.history
    more = "allow more steps: Schedule(steps=...), --steps"
    reasons = {
        "converged": ("pass", f"converged after {steps} steps", ""),
        "validation": ("pass", f"stopped by validation, then settled, after {steps} steps", ""),
        "steps": ("warn", f"the steps ran out after {steps}", more),
        "diverged": ("fail", "the loss diverged: these are the last good parameters", "see fit"),
    }
    verdict, reason, advice = reasons[posterior.stopped]
    if posterior.stopped == "steps" and history.settled is None:
        reason += ", before the guide was settled at the network's final weights"
        verdict = "fail" if posterior.schedule.stages else "warn"
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


def _sampling(posterior: Posterior, weighted: ImportanceDraws | None) -> Iterator[Check]:
    if weighted is None:
        if posterior.model.factors:
            reason = "not computed: there are too many rows to weigh hundreds of draws"
            yield Check("k-hat", "pass", None, None, reason)
        return
    if posterior.refined is not None and posterior.refined.method == "nuts":
        yield from _nuts(posterior.refined.quality)
        return
    limit = k_hat_threshold(len(weighted.log_weights))
    k_hat, share = weighted.k_hat, weighted.effective / len(weighted.log_weights)
    reason = f"Pareto k-hat {k_hat:.2f}, effective share of the draws {share:.0%}"
    nuts = 'the guide misses part of the posterior: use fit.refine("nuts")'
    verdict = "pass" if k_hat < limit else "warn" if k_hat < 1 else "fail"
    if verdict == "fail" and posterior.model.factors and posterior.guide.nested() is None:
        # Weights of this many effects at once degenerate with any guide: k-hat proves nothing.
        verdict = "warn"
        reason += "; many effects a cluster are known as if independent, which cannot be verified"
    yield Check("k-hat", verdict, k_hat, limit, reason, "" if verdict == "pass" else nuts)
    if posterior.refined is None and verdict == "pass":
        bias, ratio = _guide_error(weighted)
        good = bias < 0.25 and ratio < 1.3
        reason = (
            f"the guide's means are off by at most {bias:.2f} posterior sds, its sds by a factor "
            f"of at most {ratio:.2f}"
        )
        advice = "" if good else "use fit.refine(), which corrects this"
        yield Check("guide", "pass" if good else "warn", bias, 0.25, reason, advice)
    if len(weighted.cluster_k_hat):
        k_hats = weighted.cluster_k_hat[~np.isnan(weighted.cluster_k_hat)]
        high = int((k_hats > 0.7).sum())
        bad = high / len(k_hats)
        # The k-hat of a single cluster may be high by chance.
        good = high < 2 or bad < 0.05
        verdict = "pass" if good else "warn" if bad < 0.3 else "fail"
        reason = f"k-hat above 0.7 in {high} of {len(k_hats)} clusters"
        yield Check("k-hat by cluster", verdict, bad, 0.05, reason, "" if good else nuts)


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
    """Largest error of the guide's means, in posterior sds, and largest ratio of sds, either way.

    The weighted draws stand for the posterior.
    """
    worst, factor = 0.0, 1.0
    # Proposals are wider than the guide: dividing by `inflation` gives the guide's sds.
    size = sum(
        value[0].numel()
        for value in weighted.latents.values()
        if value.dim() > 1 and value.shape[1] == 1
    )
    inflation = math.sqrt(proposal_variance(max(1, size)))
    for name, value in weighted.latents.items():
        if value.dim() < 2 or value.shape[1] != 1:
            continue  # fixed by the prior, or effects of clusters
        draws = value.reshape(len(value), -1).double().cpu().numpy()
        mean = weighted.weights @ draws
        sd = np.sqrt(weighted.weights @ (draws - mean) ** 2)
        moves = sd > 1e-12
        if name.endswith("_sd"):  # skewed; the guide is nearly normal in their logarithms
            logs = np.log(draws[:, moves])
            mean_log = weighted.weights @ logs
            sd_log = np.sqrt(weighted.weights @ (logs - mean_log) ** 2)
            shift = np.abs(logs.mean(0) - mean_log) / sd_log
            ratio = logs.std(0) / inflation / sd_log
        else:
            shift = np.abs(draws.mean(0) - mean)[moves] / sd[moves]
            ratio = draws.std(0)[moves] / inflation / sd[moves]
        worst = max(worst, float(shift.max(initial=0)))
        factor = max(factor, float(np.maximum(ratio, 1 / ratio).max(initial=1)))
    return worst, factor
