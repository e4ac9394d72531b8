"""Posterior predictive checks by cluster, and pivotal checks of effects and residuals."""

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

from armed_pyro.guides.base import selected
from armed_pyro.inference.posterior import Posterior
from armed_pyro.program.model import MixedEffects
from armed_pyro.program.predictor import modulates
from armed_pyro.random_effects.grouping_factor import Factor
from armed_pyro.rows.batch import Rows

__all__ = ["ClusterChecks", "cluster_checks", "effect_normality", "residual_uniformity"]


Draws = Mapping[str, Tensor]
# Larger data are checked in a random sample of this size: a misfit that only shows in more rows or
# clusters is too small to matter.
MOST_ROWS, MOST_CLUSTERS = 50_000, 500
PIVOTAL_DRAWS = 40
BLOCK = 2**20  # rows times draws of one block of replications


@dataclass(frozen=True, eq=False)
class ClusterChecks:
    """Posterior predictive checks of statistics of each cluster of one factor.

    Attributes
    ----------
    table : pandas.DataFrame
        Columns cluster, rows, and for each statistic (mean, sd, zeros) its value, the median of
        its replications, and the mid-p-value.
    overall : mapping of str to (float, float)
        For each statistic the posterior predictive p-value of the sum of the clusters' squared
        standardised deviations, and that sum relative to its mean over replications.
    """

    table: pd.DataFrame
    overall: Mapping[str, tuple[float, float]]


def cluster_checks(
    posterior: Posterior, factor: str, latents: Draws, *, seed: int = 0
) -> ClusterChecks:
    r"""Compare statistics of every cluster's outcomes with replications from the posterior.

    .. math:: D(y) = \sum_k \frac{(T_k(y) - E[T_k(y^{rep})])^2}{Var(T_k(y^{rep}))}, \quad
        p = P(D(y^{rep}) \ge D(y) \mid y)

    T is the mean, the standard deviation or, for counts, the share of zeros in a cluster.

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

    References
    ----------
    Gelman, Meng, Stern (1996), Statistica Sinica 6: posterior predictive assessment.
    """
    model = posterior.model
    rows, position, labels = _sampled_rows(posterior, factor, seed)
    counts = torch.bincount(position, minlength=len(labels)).to(model.reference())
    observed = _statistics(rows.outcome()[None], position, counts, model)
    n = max([1, *(value.shape[0] for value in latents.values() if value.dim() > 1)])
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
            blocks.append(_statistics(replicated, position, counts, model))
    repeated = {name: torch.cat([block[name] for block in blocks]) for name in observed}
    table: dict[str, Any] = {"cluster": labels, "rows": counts.long().cpu().numpy()}
    overall = {}
    for name, value in observed.items():
        actual, copies = value[0].cpu().numpy(), repeated[name].cpu().numpy()
        below = (copies < actual).mean(0) + 0.5 * (copies == actual).mean(0)
        table |= {name: actual, f"{name}_replicated": np.median(copies, 0), f"{name}_p": below}
        overall[name] = _discrepancy(actual, copies)
    return ClusterChecks(pd.DataFrame(table), overall)


def _discrepancy(
    observed: Float[np.ndarray, " clusters"], replicated: Float[np.ndarray, "draws clusters"]
) -> tuple[float, float]:
    center, spread = replicated.mean(0), replicated.std(0)
    varies = spread > 1e-12
    spread = np.where(varies, spread, 1.0)
    weight = varies / spread**2
    actual = float((weight * (observed - center) ** 2).sum())
    expected = (weight * (replicated - center) ** 2).sum(1)
    p = (1 + (expected >= actual).sum()) / (1 + len(expected))
    return float(p), actual / max(float(expected.mean()), 1e-12)


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
    index = torch.isin(codes, chosen.to(codes)).nonzero()[:, 0]
    rows = source.batch(index, dense_up_to=max(len(counts) for counts in source.counts.values()))
    return rows, torch.searchsorted(chosen.to(codes), codes[index]), levels[chosen.numpy()]


def effect_normality(
    factor: Factor, latents: Draws, *, seed: int = 0
) -> dict[str, tuple[float, float]]:
    r"""Normality of the random effects: for each term a p-value and the mean of Shapiro-Wilk's W.

    In one posterior draw, :math:`z_k = L^{-1} u_k` are independent standard normal if the program
    is correct, which makes them pivotal. The p-value is twice the smaller of the Shapiro-Wilk
    test's and the kurtosis test's, each the median over draws. The kurtosis test detects two
    groups of clusters even if draws are noisy. Large factors are checked in a sample of their
    clusters; factors with fewer than 8 clusters are not checked.

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
    draws = selected(latents, slice(PIVOTAL_DRAWS))
    scale = factor.scale_matrix(draws).expand(len(effects), 1, -1, -1)
    z = torch.linalg.solve_triangular(scale, effects[..., None], upper=False)[..., 0]
    z = z.double().cpu()
    results = {}
    for place, term in enumerate(factor.terms):
        by_draw = z[..., place].numpy()
        tests = [scipy.stats.shapiro(values) for values in by_draw]
        p = float(np.median([test.pvalue for test in tests]))
        if by_draw.shape[1] >= 20:  # the kurtosis test is inaccurate for fewer clusters
            p = min(p, float(np.median(scipy.stats.kurtosistest(by_draw, axis=1).pvalue)))
        results[term] = (min(1.0, 2 * p), float(np.mean([test.statistic for test in tests])))
    return results


def residual_uniformity(
    posterior: Posterior, latents: Draws, *, seed: int = 0
) -> tuple[float, float] | None:
    r"""Kolmogorov-Smirnov p-value (median over draws) and distance (mean) of quantile residuals.

    Randomised quantile residuals :math:`F(y_i \mid \eta_i)` of one posterior draw are uniform and
    independent if the program is correct. None if the family has no distribution function
    (`Family.cdf`), or no residuals to check.

    References
    ----------
    Dunn and Smyth (1996), JCGS 5(3): randomized quantile residuals.
    """
    model, family = posterior.model, posterior.model.family
    if family.no_residuals:
        return None
    source = model.encode(posterior.data)
    index = torch.arange(len(source))
    if len(source) > MOST_ROWS:
        generator = torch.Generator().manual_seed(seed)
        index = torch.randperm(len(source), generator=generator)[:MOST_ROWS]
    index = index.to(source.like.device)
    rows = source.batch(index, dense_up_to=max([0, *map(len, source.counts.values())]))
    drawn = selected(latents, slice(PIVOTAL_DRAWS))
    with torch.no_grad():
        eta = model.predictor(rows, drawn).eta
        parameters = {
            name: value.reshape(-1, 1) for name, value in model.family_parameters(drawn).items()
        }
        y = rows.outcome().double()
        eta = eta.reshape(-1, *eta.shape[-2:])
        draws = max([len(eta), *map(len, parameters.values())])
        rng, tests = np.random.default_rng(seed), []
        for draw in range(draws):  # draw by draw, because each needs several arrays of all rows
            values = {
                name: all_draws[min(draw, len(all_draws) - 1)]
                for name, all_draws in parameters.items()
            }
            predictor = eta[min(draw, len(eta) - 1)]
            values = dict(model.row_parameters(values, rows))
            upper = family.cdf(y, predictor, values, rows)
            if upper is None:
                return None
            lower = family.cdf(y - 1, predictor, values, rows) if family.integer else upper
            assert lower is not None  # for mypy: the same function returned `upper`
            noise = rng.uniform(size=len(y))
            quantiles = lower.numpy() + noise * (upper - lower).numpy()
            tests.append(scipy.stats.kstest(quantiles, "uniform"))
    p = float(np.median([test.pvalue for test in tests]))
    return p, float(np.mean([test.statistic for test in tests]))
