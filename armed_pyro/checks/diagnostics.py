"""`Diagnostics`: the verdict on a fit, with reasons and advice."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import pandas as pd

from armed_pyro.checks.data_checks import data_checks, effective_clusters, predictive_checks
from armed_pyro.checks.inference_checks import ORDER, Check, inference_checks
from armed_pyro.inference.importance_sampling import affordable, weighed
from armed_pyro.inference.posterior import ImportanceDraws, Posterior
from armed_pyro.summaries.arviz_stats import leave_one_out

__all__ = ["Diagnostics", "diagnose"]


# Posterior draws that the checks use.
DRAWS = 1000
# PSIS-LOO is left out of the figures for more rows than this.
MOST_ROWS_LOO = 20_000


@dataclass(frozen=True, eq=False)
class Diagnostics:
    """Verdict on a fit.

    Attributes
    ----------
    checks : tuple of Check
        All checks, failed checks first.
    clusters : pandas.DataFrame
        One row per cluster: factor, cluster, rows, and posterior predictive checks (statistic,
        replicated median and p-value of mean, sd, zeros). The nested factor also has k_hat, elpd
        (expected log density when the cluster is left out) and elpd_k_hat.
    figures : mapping of str to float or None
        k_hat, ess, elpd_loo, elpd_loo_se, p_loo, elpd_loo_bad (number of rows with k-hat above
        0.7), elpd_loco, elpd_loco_se, elpd_loco_bad (number of clusters with k-hat above 0.7), and
        the effective number of clusters of each factor.

    Examples
    --------
    >>> check = Check("steps", "warn", 200, None, "the steps ran out", "allow more steps")
    >>> print(Diagnostics((check,), pd.DataFrame(), {}))
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
        """Reasons of all checks that did not pass."""
        return tuple(check.reason for check in self.checks if check.verdict != "pass")

    def to_frame(self) -> pd.DataFrame:
        """One row per check."""
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
        not_passed = [check for check in self.checks if check.verdict != "pass"]
        passed = f"{len(self.checks) - len(not_passed)} of {len(self.checks)} checks passed"
        return "\n".join([f"  {self.verdict.upper()}: {passed}", *_lines(not_passed)])


def diagnose(posterior: Posterior) -> Diagnostics:
    """All checks of a fit.

    Checks of the inference are the end of the training, the iterates of q(theta) (drift and R-hat;
    Dhaka et al. 2020), and Pareto k-hat overall and by cluster, or R-hat, ESS and divergences of
    NUTS. Checks of the data are the effective number of clusters, sds that cannot be distinguished
    from zero, and sensitivity to the priors (power scaling; Kallioinen et al. 2024). Checks of the
    model are posterior predictive checks by cluster, normality of the random effects, and the
    distribution of the residuals. PSIS-LOO and leave-one-cluster-out are reported without a
    verdict.

    Examples
    --------
    ``print(fit.diagnostics())``
    """
    latents = posterior.draws(min(DRAWS, affordable(posterior)))
    posterior = weighed(posterior)
    weighted = posterior.importance
    clusters, predictive = predictive_checks(posterior, latents, weighted)
    checks = [
        *_rows(posterior),
        *inference_checks(posterior, weighted),
        *data_checks(posterior, latents),
        *predictive,
    ]
    checks.sort(key=lambda check: -ORDER.index(check.verdict))
    return Diagnostics(tuple(checks), clusters, _figures(posterior, weighted, clusters))


def _rows(posterior: Posterior) -> Iterator[Check]:
    if posterior.sampled:
        n, kept = posterior.model.data_facts().n_rows, posterior.data.n_rows
        groupings = posterior.data.groupings.items()
        sizes = [f"{grouping.n_clusters} clusters of {name}" for name, grouping in groupings]
        reason = f"of {n} rows {kept}, in {', '.join(sizes) or 'no clusters'}, were kept at random"
        reason += "; outcomes and residuals are checked in these"
        yield Check("rows", "pass", float(kept), None, reason)


def _figures(
    posterior: Posterior, weighted: ImportanceDraws | None, clusters: pd.DataFrame
) -> dict[str, float | None]:
    figures: dict[str, float | None] = {}
    if weighted is not None:
        figures |= {"k_hat": weighted.k_hat, "ess": weighted.effective}
    if posterior.data.n_rows <= MOST_ROWS_LOO and not posterior.sampled:
        figures |= leave_one_out(posterior)
    if "elpd" in clusters:
        left_out = clusters.elpd.dropna()
        figures |= {
            "elpd_loco": float(left_out.mean() * len(clusters.elpd)),
            "elpd_loco_se": float(left_out.std() * len(clusters.elpd) / len(left_out) ** 0.5),
            "elpd_loco_bad": float((clusters.elpd_k_hat > 0.7).sum()),
        }
    sizes = effective_clusters(posterior)
    return figures | {f"effective_clusters[{name}]": value for name, value in sizes.items()}


def _lines(checks: Iterable[Check]) -> Iterator[str]:
    for check in checks:
        yield f"  {check.verdict:4}  {check.name}: {check.reason}"
        if check.advice:
            yield f"        -> {check.advice}"


def _finite(value: Any) -> Any:
    """The value, or None for an infinite or missing float, which JSON cannot hold."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
