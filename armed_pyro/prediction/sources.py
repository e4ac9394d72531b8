"""What gives new clusters their random effects, under each mode."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.inference.posterior import Posterior
from armed_pyro.prediction.adapt import adapt, check_support
from armed_pyro.prediction.cluster_classifier import Classifiers
from armed_pyro.prediction.similarity import Evidence, Resembling, gather, warn_if_alien
from armed_pyro.prediction.unseen import (
    EffectSource,
    Marginal,
    Population,
    apart,
    check_mode,
    new_clusters,
)

__all__ = ["effect_source", "source_of"]


def effect_source(
    posterior: Posterior,
    data: ClusteredData,
    unseen: str | None,
    *,
    support: ClusteredData | pd.DataFrame | None = None,
    pooled: bool = True,
    draws: int = 1000,
    seed: int | None = None,
    classifiers: Classifiers | None = None,
) -> tuple[EffectSource, pd.DataFrame | None]:
    """What gives the new clusters of these rows their effects, and the membership table."""
    new = new_clusters(posterior.model.data_facts(), posterior.model, data)
    check_mode(unseen, new, support=support is not None)
    evidence = None
    if unseen in ("membership", "nearest") and any(map(len, new.values())):
        evidence = gather(
            posterior,
            data if pooled else apart(posterior.model, data),
            Classifiers() if classifiers is None else classifiers,
        )
        warn_if_alien(evidence.table())
    source = source_of(posterior, unseen, new, support, evidence, draws=draws, seed=seed)
    return source, None if evidence is None else evidence.table()


def source_of(
    posterior: Posterior,
    unseen: str | None,
    new: Mapping[str, pd.Index],
    support: ClusteredData | pd.DataFrame | None = None,
    evidence: Evidence | None = None,
    *,
    draws: int = 1000,
    seed: int | None = None,
) -> EffectSource:
    """What gives new clusters their effects under a mode that has been checked.

    Parameters
    ----------
    new : mapping of str to pandas.Index
        Labels of all new clusters.
    support, evidence
        For the modes that need them.
    """
    seed = posterior.seed if seed is None else seed
    if unseen == "adapt" and support is not None:
        rows = posterior.encode(support)
        check_support(posterior, rows, new)
        return adapt(posterior, rows, draws=draws, seed=seed).source()
    latents = posterior.draws(draws, seed=seed)
    if evidence is not None:
        return Resembling(latents, seed, evidence, nearest=unseen == "nearest")
    return Population(latents) if unseen == "population" else Marginal(latents, seed)
