"""`diagnose`: all checks of a fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import pandas as pd
from torch import Tensor

from armed_pyro._messages import cause
from armed_pyro.checks.adversary_checks import adversary_checks
from armed_pyro.checks.check import BROKEN, SEVERITY, Check, Part, checked, failed
from armed_pyro.checks.design_checks import design_checks
from armed_pyro.checks.held_out_checks import held_out_checks
from armed_pyro.checks.inference_checks import (
    EXACT,
    finite_draws,
    finite_tables,
    inference_checks,
)
from armed_pyro.checks.misfit_checks import misfit_checks
from armed_pyro.checks.pivotal_checks import normality_checks
from armed_pyro.checks.predictive_checks import predictive_checks
from armed_pyro.checks.prior_checks import (
    boundary_checks,
    coefficient_checks,
    effective_clusters,
    sensitivity_checks,
    variance_checks,
)
from armed_pyro.checks.verdict import Diagnostics
from armed_pyro.inference.importance_sampling import affordable, weighed
from armed_pyro.inference.posterior import Posterior
from armed_pyro.inference.refine import duration, nuts_seconds
from armed_pyro.summaries.importance_statistics import leave_one_out

__all__ = ["diagnose"]


Latents = Mapping[str, Tensor]
Group = Callable[[Posterior, Latents], Iterable[Check]]

# Posterior draws that the checks use.
DRAWS = 1000
# PSIS-LOO is left out of the figures for more rows than this.
MOST_ROWS_LOO = 20_000
# Groups of checks with the part that they judge, and the name of the check that fails if a group
# cannot be computed.
GROUPS: tuple[tuple[Part, str, Group], ...] = (
    ("model", "design", design_checks),
    ("model", "clusters", variance_checks),
    ("model", "boundary", boundary_checks),
    ("model", "prior sensitivity", sensitivity_checks),
    ("model", "coefficients", coefficient_checks),
    ("model", "held-out rows", held_out_checks),
    ("model", "normality", normality_checks),
    ("model", "residuals", misfit_checks),
    ("model", "adversary", lambda posterior, _: adversary_checks(posterior)),
)


def diagnose(posterior: Posterior, weigh: Callable[[], Posterior] | None = None) -> Diagnostics:
    """All checks of a fit; a check that cannot be computed fails.

    Checks of the computation are the end of the training, the iterates of q(theta) (drift and
    R-hat; Dhaka et al. 2020), and the error of the weighted draws (Pareto k-hat overall and by
    cluster), or R-hat, ESS and divergences of NUTS.

    Checks of the model are collinear columns and separation, what the data say of every sd and
    coefficient beyond the prior (power scaling; Kallioinen et al. 2024), posterior predictive
    checks by cluster, normality of the random effects, the distribution of the residuals, and
    score tests of left-out curves, slopes and factors, of spread, dispersion, autocorrelation and
    outliers. Of a network, log score and coverage of rows that it was not trained on are checked.
    Fresh probes read the clusters that adversaries should hide.
    PSIS-LOO and leave-one-cluster-out are reported without a verdict.

    Parameters
    ----------
    posterior : Posterior
        The fitted program.
    weigh : callable, optional
        Gives the posterior with importance weights; by default they are computed.

    Examples
    --------
    ``print(fit.diagnostics())``
    """
    checks, latents, clusters, figures = list[Check](), None, pd.DataFrame(), {}
    try:
        posterior = weighed(posterior) if weigh is None else weigh()
    except BROKEN as error:
        checks.append(failed("computation", "accuracy of the draws", cause(error)))
    try:
        latents = posterior.draws(min(DRAWS, affordable(posterior)))
    except BROKEN as error:
        checks.append(failed("computation", "draws", cause(error)))
    checks += checked("computation", "training", lambda: inference_checks(posterior))
    checks += checked("computation", "tables", lambda: finite_tables(posterior))
    if latents is not None:
        checks += finite_draws(latents)
        clusters, predictive = predictive_checks(posterior, latents, posterior.importance)
        checks += [*_model(posterior, latents), *predictive]
        figures = _figures(posterior, clusters)
    checks.sort(key=lambda check: -SEVERITY.index(check.verdict))
    return Diagnostics(tuple(checks), clusters, figures, _time(posterior, checks))


def _time(posterior: Posterior, checks: Iterable[Check]) -> str:
    """Expected time of exact draws, if a check advises them."""
    if not any(check.advice == EXACT for check in checks):
        return ""
    try:
        return duration(nuts_seconds(posterior))
    except BROKEN:
        return ""


def _model(posterior: Posterior, latents: Latents) -> Iterator[Check]:
    """Checks of all groups."""
    if posterior.sampled:
        n, kept = posterior.model.data_facts().n_rows, posterior.data.n_rows
        groupings = posterior.data.groupings.items()
        sizes = [f"{grouping.n_clusters} clusters of {name}" for name, grouping in groupings]
        reason = f"of {n} rows {kept}, in {', '.join(sizes) or 'no clusters'}, were kept at random"
        yield Check("model", "rows", "pass", f"{reason}; outcomes are checked in these")
    for part, name, group in GROUPS:
        yield from checked(part, name, lambda group=group: group(posterior, latents))  # type: ignore[misc]


def _figures(posterior: Posterior, clusters: pd.DataFrame) -> dict[str, float | None]:
    """Numbers without a verdict; those that cannot be computed are None."""
    weighted, figures = posterior.importance, dict[str, float | None]()
    if weighted is not None:
        figures |= {"k_hat": weighted.k_hat, "ess": weighted.effective}
    if posterior.data.n_rows <= MOST_ROWS_LOO and not posterior.sampled:
        try:
            figures |= leave_one_out(posterior)
        except BROKEN:
            figures["elpd_loo"] = None
    if "elpd" in clusters:
        left_out = clusters.elpd.dropna()
        figures |= {
            "elpd_loco": float(left_out.mean() * len(clusters.elpd)),
            "elpd_loco_se": float(left_out.std() * len(clusters.elpd) / len(left_out) ** 0.5),
            "elpd_loco_bad": float((clusters.elpd_k_hat > 0.7).sum()),
        }
    sizes = effective_clusters(posterior)
    return figures | {f"effective_clusters[{name}]": value for name, value in sizes.items()}
