"""The source of new clusters' random effects, by mode."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.inference.posterior import Posterior
from armed_pyro.prediction.adapt import adapt, check_support
from armed_pyro.prediction.cluster_classifier import Classifiers
from armed_pyro.prediction.similarity import Evidence, Resembling, gather_evidence, warn_if_alien
from armed_pyro.prediction.unseen import (
    EffectSource,
    Marginal,
    Population,
    check_mode,
    new_clusters,
    one_cluster_per_row,
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
    """Check the mode; return the source of the new clusters' effects, and the membership table.

    The parameters are those of `armed_pyro.prediction.predict.predict`.

    Returns
    -------
    EffectSource
        Source of the effects of the new clusters of these rows.
    pandas.DataFrame or None
        `armed_pyro.prediction.similarity.Evidence.table`, for "membership" and "nearest".

    Raises
    ------
    ValueError
        If the mode is missing, unknown, or lacks the support that it needs.

    Examples
    --------
    ``source, _ = effect_source(fit.posterior, rows, "marginal")``
    """
    new = new_clusters(posterior.model.data_facts(), posterior.model, data)
    check_mode(unseen, new, support=support is not None)
    evidence = None
    if unseen in ("membership", "nearest") and any(map(len, new.values())):
        evidence = gather_evidence(
            posterior,
            data if pooled else one_cluster_per_row(posterior.model, data),
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
    """The source of new clusters' effects under a mode that `check_mode` has accepted.

    Parameters
    ----------
    posterior : Posterior
        The fitted program.
    unseen : str or None
        The mode; "marginal" if there is none.
    new : mapping of str to pandas.Index
        Labels of all new clusters, by factor.
    support : ClusteredData or table, optional
        Labelled rows, for "adapt".
    evidence : Evidence, optional
        Evidence of the features, for "membership" and "nearest".
    draws : int
        Posterior draws.
    seed : int, optional
        Seed of the draws; by default that of the fit.

    Examples
    --------
    ``source_of(fit.posterior, "marginal", new_clusters(facts, model, rows))``
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
