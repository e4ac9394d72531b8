"""Posterior predictive checks by cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import scipy
import torch
from jaxtyping import Float, Int
from torch import Tensor

from armed_pyro._messages import cause
from armed_pyro.checks.check import BROKEN, LEVEL, Check, failed, severity
from armed_pyro.checks.frequencies import counted
from armed_pyro.checks.rank_tests import holm
from armed_pyro.families.family import Family
from armed_pyro.guides.base import n_draws, selected
from armed_pyro.inference.posterior import ImportanceDraws, Posterior
from armed_pyro.program.model import MixedEffects
from armed_pyro.program.predictor import modulates
from armed_pyro.rows.batch import Rows

__all__ = ["MOST_ROWS", "ClusterChecks", "cluster_checks", "predictive_checks"]


Draws = Mapping[str, Tensor]
Discrepancy = tuple[float, float, tuple[float, float]]
# Larger data are checked in a random sample of this size: a misfit that only shows in more rows or
# clusters is too small to matter.
MOST_ROWS = 50_000
BLOCK = 2**20  # rows times draws of one block of replications
# Rows times replications, beyond which there are fewer replications than posterior draws, but at
# least FEWEST: the checks of a linear model would otherwise take longer than its fit.
MOST_REPLICATED, FEWEST = 2**22, 200
LARGEST_COUNT = 2.0**53  # beyond which counts are no longer exact
# Deviation of the clusters' statistics relative to that of replications, which matters.
DEVIATES, DEVIATES_FAR = 1.2, 1.5


@dataclass(frozen=True, eq=False)
class ClusterChecks:
    """Posterior predictive checks of statistics of each cluster of one factor.

    Attributes
    ----------
    table : pandas.DataFrame
        Columns cluster, rows, and for each statistic (mean, sd, zeros) its value, the median of
        its replications, and the mid-p-value.
    overall : mapping of str to (float, float, (float, float))
        For each statistic the posterior predictive p-value of the sum of the clusters' squared
        standardised deviations, that sum relative to its mean over replications, and the 90%
        interval of the ratio that replications imply.
    replications : int
        Number of replicated outcomes of every row.
    """

    table: pd.DataFrame
    overall: Mapping[str, Discrepancy]
    replications: int


def cluster_checks(
    posterior: Posterior, factor: str, latents: Draws, *, seed: int = 0
) -> ClusterChecks:
    r"""Compare statistics of every cluster's outcomes with replications from the posterior.

    .. math:: D(y) = \sum_k \frac{(T_k(y) - E[T_k(y^{rep})])^2}{Var(T_k(y^{rep}))}, \quad
        p = P(D(y^{rep}) \ge D(y) \mid y)

    T is the mean, the standard deviation or, for counts, the share of zeros in a cluster. Every
    draw gives a replication, but with many rows only the first draws do: at least 200, and as many
    as replicate 4 million rows.

    Parameters
    ----------
    posterior : Posterior
        The fitted program.
    factor : str
        Grouping factor whose clusters are compared.
    latents : mapping of str to Tensor
        Posterior draws, as returned by `Fit.draws`.
    seed : int
        Seed of the replications, and of the sample of clusters.

    Raises
    ------
    ValueError
        If replications are not finite.

    References
    ----------
    Gelman, Meng, Stern (1996), Statistica Sinica 6: posterior predictive assessment.
    """
    model = posterior.model
    rows, position, labels = _sampled_rows(posterior, factor, seed)
    counts = torch.bincount(position, minlength=len(labels)).to(model.reference())
    observed = _statistics(rows.outcome()[None], position, counts, model)
    n = n_draws(latents) or 1
    n = min(n, max(FEWEST, MOST_REPLICATED // max(1, len(rows))))
    # Torch makes random numbers 16 at a time. With blocks that are multiples of 16 draws, most
    # families give the same numbers as in a single block. Negative binomial and categorical
    # outcomes do not, because they take several passes.
    size = 16 * max(1, BLOCK // (16 * len(rows)))
    blocks = list[dict[str, Tensor]]()
    with model.seeded(seed + 7), torch.no_grad():
        if not modulates(model):  # one forward pass then serves all blocks
            rows = replace(rows, computed=model.run_network(rows)[1])
        for start in range(0, n, size):
            draws = selected(latents, slice(start, min(start + size, n)))
            eta = model.predictor(rows, draws).eta
            eta = eta.expand(min(size, n - start), *eta.shape[-2:])
            replicated = model.density(eta, draws, rows).sample()
            _check_finite(replicated, model)
            blocks.append(_statistics(replicated, position, counts, model))
    repeated = {name: torch.cat([block[name] for block in blocks]) for name in observed}
    table: dict[str, Any] = {"cluster": labels, "rows": counts.long().cpu().numpy()}
    overall = {}
    for name, value in observed.items():
        actual, copies = value[0].cpu().numpy(), repeated[name].cpu().numpy()
        below = (copies < actual).mean(0) + 0.5 * (copies == actual).mean(0)
        table |= {name: actual, f"{name}_replicated": np.median(copies, 0), f"{name}_p": below}
        overall[name] = _discrepancy(actual, copies)
    return ClusterChecks(pd.DataFrame(table), overall, n)


def _check_finite(replicated: Tensor, model: MixedEffects) -> None:
    """Raise ValueError if replications are not finite, or are counts that overflow."""
    limit = LARGEST_COUNT if model.family.integer else torch.inf
    bad = ~(replicated.abs() < limit)
    if bad.any():
        share = float(bad.any(-1).to(torch.float64).mean())
        raise ValueError(f"replicated outcomes are not finite numbers in {share:.0%} of the draws")


def _discrepancy(
    observed: Float[np.ndarray, " clusters"], replicated: Float[np.ndarray, "draws clusters"]
) -> Discrepancy:
    center, spread = replicated.mean(0), replicated.std(0)
    varies = spread > 1e-12
    spread = np.where(varies, spread, 1.0)
    weight = varies / spread**2
    actual = float((weight * (observed - center) ** 2).sum())
    expected = (weight * (replicated - center) ** 2).sum(1)
    mean, variance = float(expected.mean()), float(expected.var())
    if not mean > 0 or not variance > 0:  # a statistic that does not vary
        return 1.0, 1.0, (1.0, 1.0)
    # Gamma with the replications' mean and variance, as draws are too few for small p-values.
    shape, rate = mean**2 / variance, mean / variance
    ratio, error = actual / mean, 1.645 * variance**0.5 / mean
    p = float(scipy.special.gammaincc(shape, rate * actual))
    return p, ratio, (max(0.0, ratio - error), ratio + error)


def _statistics(
    y: Float[Tensor, "draws rows"],
    position: Int[Tensor, " rows"],
    counts: Float[Tensor, " clusters"],
    model: MixedEffects,
) -> dict[str, Float[Tensor, "draws clusters"]]:
    def mean(values: Tensor) -> Tensor:
        sums = values.new_zeros(len(values), len(counts)).index_add_(1, position, values)
        return sums / counts

    def sd(values: Tensor) -> Tensor:
        centred = values - mean(values)[:, position]
        return (counts > 1).to(values) * mean(centred**2).sqrt()

    def zeros(values: Tensor) -> Tensor:
        return mean((values == 0).to(values))

    compute = {"mean": mean, "sd": sd, "zeros": zeros}
    return {name: compute[name](y) for name in model.family.statistics}


def _sampled_rows(
    posterior: Posterior, factor: str, seed: int
) -> tuple[Rows, Int[Tensor, " rows"], pd.Index]:
    """Rows of all clusters, or of a random sample; each row's position among them; their labels."""
    model = posterior.model
    source = model.encode(posterior.data)
    codes, levels = source.codes[factor], model.data_facts().levels[factor]
    chosen = source.counts[factor].cpu().nonzero()[:, 0]  # a sample of rows may lack clusters
    if len(source) > MOST_ROWS:
        share = max(2, len(chosen) * MOST_ROWS // len(source))
        order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))
        chosen = chosen[order[:share]].sort().values
    found = torch.isin(codes, chosen.to(codes)).nonzero()[:, 0].cpu().numpy()
    copies = counted(posterior.data, found, MOST_ROWS, seed)
    index = torch.from_numpy(copies).to(codes.device)
    chosen = codes[index].unique().cpu()  # clusters whose rows all have frequency 0 are left out
    rows = source.dense_batch(index)
    return rows, torch.searchsorted(chosen.to(codes), codes[index]), levels[chosen.numpy()]


def predictive_checks(
    posterior: Posterior, latents: Draws, weighted: ImportanceDraws | None
) -> tuple[pd.DataFrame, list[Check]]:
    """Posterior predictive checks: a table with one row per cluster, and the verdicts."""
    tables, found, checks = [], list[tuple[str, str, Discrepancy]](), list[Check]()
    for factor in posterior.model.clustered_factors:
        try:
            compared = cluster_checks(posterior, factor.name, latents, seed=posterior.seed)
        except BROKEN as error:
            checks.append(failed("model", f"predictions by {factor.name}", cause(error)))
            continue
        table = compared.table.assign(factor=factor.name)
        nested = posterior.guide.nested()
        if weighted is not None and nested is factor and len(table) == len(weighted.cluster_k_hat):
            elpd, bad = _left_out(weighted)
            table = table.assign(k_hat=weighted.cluster_k_hat, elpd=elpd, elpd_k_hat=bad)
        tables.append(table)
        found += [(factor.name, name, values) for name, values in compared.overall.items()]
    adjusted = holm(np.array([p for *_, (p, _, _) in found]))
    for (factor_name, name, values), p in zip(found, adjusted.tolist(), strict=True):
        checks.append(_predictive(posterior.model.family, factor_name, name, values, p))
    whole = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
    first = [name for name in ("factor", "cluster", "rows") if name in whole]
    return whole[[*first, *(name for name in whole if name not in first)]], checks


def _predictive(
    family: Family, factor: str, statistic: str, values: Discrepancy, p: float
) -> Check:
    _, ratio, interval = values
    verdict = severity(ratio, DEVIATES, DEVIATES_FAR, noise=p > LEVEL)
    words = {"zeros": "share of zeros"}.get(statistic, statistic)
    reason = (
        f"the {words} of the outcome in each cluster of {factor} deviates {ratio:.2f} times as "
        f"much as predicted (posterior predictive p = {p:.2g})"
    )
    return Check(
        "model",
        f"predictive {statistic} by {factor}",
        verdict,
        reason,
        ratio,
        f"squared deviation of the clusters' {words}, relative to predictions",
        DEVIATES,
        p,
        interval,
        "" if verdict == "pass" else _advice(family, factor, statistic),
    )


def _advice(family: Family, factor: str, statistic: str) -> str:
    """The next step if a statistic of the clusters is not as predicted."""
    if statistic == "mean":
        return f"more random effects of {factor} (a slope), or a feature of its clusters"
    if statistic == "zeros":
        return family.if_more_zeros
    names = [p.alias or p.name for p in family.without_predictors.parameters if p.link == "log"]
    if names:
        return (
            f"the spread differs between clusters of {factor}: write {names[0]} ~ (1 | {factor}) "
            f"(parameters=, --parameter), transform the outcome, or choose another family"
        )
    if family.integer and not family.is_class:
        return family.if_overdispersed
    return f"more random effects of {factor} (a slope), or another family"


def _left_out(weighted: ImportanceDraws) -> tuple[np.ndarray, np.ndarray]:
    """log p(y_k | y of the other clusters) and k-hat of its weights; NaN if not computed."""
    clusters, weighed = weighted.clusters.T, ~np.isnan(weighted.cluster_k_hat)
    elpd, k_hat = np.full(len(weighed), np.nan), np.full(len(weighed), np.nan)
    smoothed, k_hat[weighed] = weighted.left_out
    elpd[weighed] = np.logaddexp.reduce(smoothed + clusters, axis=1)
    return elpd, k_hat
