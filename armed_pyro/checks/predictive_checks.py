"""Does the program describe the data? Posterior predictive and pivotal checks, by cluster."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor

from armed_pyro.guides.base import selected
from armed_pyro.inference.posterior import Posterior
from armed_pyro.program.model import MixedEffects
from armed_pyro.program.predictor import modulates
from armed_pyro.random_effects.grouping_factor import Factor
from armed_pyro.rows.batch import Rows

__all__ = ["ClusterChecks", "cluster_checks", "effect_normality", "residual_uniformity"]


Draws = Mapping[str, Tensor]
# Clusters are left out at random beyond these numbers: what only shows in more is no matter.
MOST_ROWS, MOST_CLUSTERS = 50_000, 500
PIVOTAL_DRAWS = 40
BLOCK = 2**20  # rows times draws that are replicated at once


@dataclass(frozen=True, eq=False)
class ClusterChecks:
    """Posterior predictive checks of statistics of each cluster of one factor.

    Attributes
    ----------
    table : pandas.DataFrame
        Columns cluster, rows, and for each statistic (mean, sd, zeros) its value, the median of
        its replications, and the mid-p-value.
    overall : mapping of str to (float, float)
        For each statistic the posterior predictive p-value of the clusters' squared standardised
        deviations, and their sum in units of what the replications have.
    """

    table: pd.DataFrame
    overall: Mapping[str, tuple[float, float]]


def cluster_checks(
    posterior: Posterior, factor: str, latents: Draws, *, seed: int = 0
) -> ClusterChecks:
    r"""Compare the outcomes of every cluster with replications of them.

    .. math:: D(y) = \sum_k \frac{(T_k(y) - E[T_k(y^{rep})])^2}{Var(T_k(y^{rep}))}, \quad
        p = P(D(y^{rep}) \ge D(y) \mid y)

    for T the mean, the standard deviation and (counts) the share of zeros in a cluster.

    Parameters
    ----------
    posterior : Posterior
        The fitted program.
    factor : str
        Grouping factor whose clusters are compared.
    latents : mapping of str to Tensor
        Posterior draws, as `Fit.draws` gives them.

    References
    ----------
    Gelman, Meng, Stern (1996), Statistica Sinica 6: posterior predictive assessment.
    """
    model = posterior.model
    rows, position, labels = _some_rows(posterior, factor, seed)
    counts = torch.bincount(position, minlength=len(labels)).to(model.reference())
    observed = _statistics(rows.outcome()[None], position, counts, model)
    n = max([1, *(value.shape[0] for value in latents.values() if value.dim() > 1)])
    # Random numbers are made 16 at a time: in such blocks those of most families (not of negative
    # binomial and categorical outcomes, which take several passes) are those of all draws at once.
    size = 16 * max(1, BLOCK // (16 * len(rows)))
    blocks = list[dict[str, Tensor]]()
    with model.seeded(seed + 7), torch.no_grad():
        if not modulates(model):  # the network need not run in every block
            rows = replace(rows, computed=model.run_network(rows)[1])
        for start in range(0, n, size):
            some = selected(latents, slice(start, min(start + size, n)))
            eta = model.predictor(rows, some).eta
            eta = eta.expand(min(size, n - start), *eta.shape[-2:])
            replicated = model.density(eta, some, rows).sample()
            blocks.append(_statistics(replicated, position, counts, model))
    repeated = {name: torch.cat([block[name] for block in blocks]) for name in observed}
    table: dict[str, Any] = {"cluster": labels, "rows": counts.long().cpu().numpy()}
    overall = {}
    for name, value in observed.items():
        one, many = value[0].cpu().numpy(), repeated[name].cpu().numpy()
        below = (many < one).mean(0) + 0.5 * (many == one).mean(0)
        table |= {name: one, f"{name}_replicated": np.median(many, 0), f"{name}_p": below}
        overall[name] = _discrepancy(one, many)
    return ClusterChecks(pd.DataFrame(table), overall)


def _discrepancy(
    observed: Float[np.ndarray, " clusters"], replicated: Float[np.ndarray, "draws clusters"]
) -> tuple[float, float]:
    center, spread = replicated.mean(0), replicated.std(0)
    varies = spread > 1e-12
    spread = np.where(varies, spread, 1.0)
    weight = varies / spread**2
    own = float((weight * (observed - center) ** 2).sum())
    others = (weight * (replicated - center) ** 2).sum(1)
    p = (1 + (others >= own).sum()) / (1 + len(others))
    return float(p), own / max(float(others.mean()), 1e-12)


def _statistics(
    y: Float[Tensor, "draws rows"],
    position: Int[Tensor, " rows"],
    counts: Float[Tensor, " clusters"],
    model: MixedEffects,
) -> dict[str, Float[Tensor, "draws clusters"]]:
    def mean(values: Tensor) -> Tensor:
        sums = values.new_zeros(len(values), len(counts)).index_add_(1, position, values)
        return sums / counts

    name, first = model.family.name, mean(y)
    statistics = {"mean": first}
    several = (counts > 1).to(y)
    if name not in ("bernoulli", "categorical"):
        centred = y - first[:, position]
        statistics["sd"] = several * mean(centred**2).sqrt()
    if name in ("poisson", "negative_binomial", "binomial"):
        statistics["zeros"] = mean((y == 0).to(y))
    return statistics


def _some_rows(
    posterior: Posterior, factor: str, seed: int
) -> tuple[Rows, Int[Tensor, " rows"], pd.Index]:
    """All rows, or those of some clusters drawn at random; each one's cluster, and its label."""
    model = posterior.model
    source = model.encode(posterior.data)
    codes, levels = source.codes[factor], model.data_facts().levels[factor]
    chosen = source.counts[factor].cpu().nonzero()[:, 0]  # a sample has not all of them
    if len(source) > MOST_ROWS:
        share = max(2, len(chosen) * MOST_ROWS // len(source))
        order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))
        chosen = chosen[order[:share]].sort().values
    index = torch.isin(codes, chosen.to(codes)).nonzero()[:, 0]
    rows = source.batch(index, dense_up_to=max(len(one) for one in source.counts.values()))
    return rows, torch.searchsorted(chosen.to(codes), codes[index]), levels[chosen.numpy()]


def effect_normality(
    factor: Factor, latents: Draws, *, seed: int = 0
) -> dict[str, tuple[float, float]]:
    r"""Are the random effects normal? For each term a p-value and the mean of Shapiro-Wilk's W.

    In one posterior draw, :math:`z_k = L^{-1} u_k` are independent standard normal if the program
    is right: a pivotal quantity. The p-value is twice the smaller of Shapiro-Wilk's and of the
    kurtosis test's (which sees two groups of clusters where draws are noisy), each the median over
    draws. Some clusters are left out of large factors, terms with fewer than 8 altogether.

    References
    ----------
    Yuan and Johnson (2012), Biometrics 68(1): goodness-of-fit diagnostics for Bayesian
    hierarchical models.
    """
    effects = latents[factor.effect_site]
    if effects.dim() < 3 or effects.shape[1] < 8:
        return {}
    generator = torch.Generator().manual_seed(seed)
    clusters = torch.randperm(effects.shape[1], generator=generator)[:MOST_CLUSTERS]
    effects = effects[:PIVOTAL_DRAWS, clusters]
    some = selected(latents, slice(PIVOTAL_DRAWS))
    scale = factor.scale_matrix(some).expand(len(effects), 1, -1, -1)
    z = torch.linalg.solve_triangular(scale, effects[..., None], upper=False)[..., 0]
    z = z.double().cpu()
    results = {}
    for place, term in enumerate(factor.terms):
        draws = z[..., place].numpy()
        tests = [stats.shapiro(draw) for draw in draws]
        p = float(np.median([test.pvalue for test in tests]))
        if draws.shape[1] >= 20:  # fewer are too few for the kurtosis test
            p = min(p, float(np.median(stats.kurtosistest(draws, axis=1).pvalue)))
        results[term] = (min(1.0, 2 * p), float(np.mean([test.statistic for test in tests])))
    return results


def residual_uniformity(
    posterior: Posterior, latents: Draws, *, seed: int = 0
) -> tuple[float, float] | None:
    r"""Has the outcome the family's distribution? A p-value, and the distance from it.

    Randomised quantile residuals :math:`F(y_i \mid \eta_i)` of one posterior draw are uniform and
    independent if the program is right. Kolmogorov-Smirnov's p-value (median over draws) and
    distance (mean); None for categorical outcomes, whose distribution has no order, and for
    single trials, which any probability fits.

    References
    ----------
    Dunn and Smyth (1996), JCGS 5(3): randomized quantile residuals.
    """
    model, name = posterior.model, posterior.model.family.name
    if name not in _CDF:
        return None
    source = model.encode(posterior.data)
    index = torch.arange(len(source))
    if len(source) > MOST_ROWS:
        generator = torch.Generator().manual_seed(seed)
        index = torch.randperm(len(source), generator=generator)[:MOST_ROWS]
    index = index.to(source.like.device)
    rows = source.batch(index, dense_up_to=max([0, *map(len, source.counts.values())]))
    some = selected(latents, slice(PIVOTAL_DRAWS))
    with torch.no_grad():
        eta = model.predictor(rows, some).eta
        mean = model.family.mean(eta, rows).double().cpu().numpy()
        y = rows.outcome().double().cpu().numpy()
        dispersion = some.get(model.family.dispersion_name or "")
        if dispersion is not None:
            spread = model.data_facts().spread
            dispersion = model.family.original_dispersion(dispersion, spread).double().cpu()
    mean = mean.reshape(-1, len(y))
    dispersions = np.broadcast_to(1.0 if dispersion is None else dispersion.numpy(), (len(mean), 1))
    trials = 1.0 if rows.trials is None else rows.trials.double().cpu().numpy()
    rng, tests = np.random.default_rng(seed), []
    for one, own in zip(mean, dispersions, strict=True):  # apart, as each takes several arrays
        extra = {"dispersion": own, "trials": trials}
        upper = _CDF[name](y, one, extra)
        lower = upper if name == "gaussian" else _CDF[name](y - 1, one, extra)
        quantiles = lower + rng.uniform(size=len(y)) * (upper - lower)
        tests.append(stats.kstest(quantiles, "uniform"))
    p = float(np.median([test.pvalue for test in tests]))
    return p, float(np.mean([test.statistic for test in tests]))


_CDF: Mapping[str, Callable[[Any, Any, Mapping[str, Any]], Any]] = {
    "gaussian": lambda y, mean, extra: stats.norm.cdf(y, mean, extra["dispersion"]),
    "binomial": lambda y, mean, extra: stats.binom.cdf(y, extra["trials"], mean / extra["trials"]),
    "poisson": lambda y, mean, extra: stats.poisson.cdf(y, mean),
    "negative_binomial": lambda y, mean, extra: stats.nbinom.cdf(
        y, extra["dispersion"], extra["dispersion"] / (extra["dispersion"] + mean)
    ),
}
