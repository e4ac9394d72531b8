"""Posterior of every cluster's random effects."""

from __future__ import annotations

import numpy as np
import pandas as pd

from armed_pyro.inference.posterior import Posterior

__all__ = ["random_effects"]


def random_effects(
    posterior: Posterior, *, draws: int = 1000, prob: float = 0.9, seed: int | None = None
) -> pd.DataFrame:
    """Posterior mean and interval of every cluster's random effects, on the original scale.

    Parameters
    ----------
    posterior : Posterior
        The fitted program.
    draws : int
        Posterior draws.
    prob : float
        Probability of the equal-tailed intervals.
    seed : int, optional
        Seed of the draws; by default that of the fit.

    Returns
    -------
    pandas.DataFrame
        Columns factor, term, cluster, mean, lower, upper: one row per factor, term and cluster.

    Examples
    --------
    ``random_effects(fit.posterior).query("term == 'Intercept'")``
    """
    latents = posterior.draws(draws, seed=seed)
    levels = posterior.model.data_facts().levels
    tail = (1 - prob) / 2
    columns = ["factor", "term", "cluster", "mean", "lower", "upper"]
    tables = []
    for factor in posterior.model.factors:
        effects = latents[factor.effect_site].to(factor.to_original)
        original = (effects @ factor.to_original.mT).cpu().numpy()
        mean = original.mean(0)
        lower, upper = np.quantile(original, [tail, 1 - tail], axis=0)
        # Labels become objects: concatenating integers of one factor with decimals of another would
        # turn the integers into decimals.
        clusters = levels[factor.name].astype(object)
        for place, term in enumerate(factor.terms):
            values = (clusters, mean[:, place], lower[:, place], upper[:, place])
            table = dict(zip(columns[2:], values, strict=True))
            tables.append(pd.DataFrame({"factor": factor.name, "term": term, **table}))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)
