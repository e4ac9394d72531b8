"""E[y | x, cluster] and y for rows of seen and new clusters, under every mode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pandas as pd

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.inference.posterior import Posterior
from armed_pyro.prediction.adapt import adapt, check_support
from armed_pyro.prediction.chunks import check_settings, new_effects, predict_rows
from armed_pyro.prediction.cluster_classifier import Classifiers
from armed_pyro.prediction.result import Prediction
from armed_pyro.prediction.similarity import Evidence, Resembling, gather_evidence, warn_if_alien
from armed_pyro.prediction.unseen import (
    RESEMBLING,
    EffectSource,
    Marginal,
    Population,
    check_mode,
    new_clusters,
    one_cluster_per_row,
)

__all__ = ["effect_source", "predict", "source_of"]


def predict(
    posterior: Posterior,
    data: ClusteredData | pd.DataFrame,
    *,
    unseen: str | None = None,
    support: ClusteredData | pd.DataFrame | None = None,
    pooled: bool = True,
    draws: int = 1000,
    prob: float = 0.9,
    seed: int | None = None,
    others: bool = True,
    classifiers: Classifiers | None = None,
) -> Prediction:
    r"""E[y | x, cluster] and y of new rows, under every posterior draw.

    Parameters
    ----------
    data : ClusteredData or table
        New rows; a table is encoded as the training table was. The outcome is not needed.
    unseen : {"population", "marginal", "membership", "nearest", "adapt"}, optional
        Source of the random effects of clusters not seen in training; see
        `armed_pyro.prediction.unseen.MODES`. Required if there are such clusters. All rows of a new
        cluster share its draw.
    support : ClusteredData or table, optional
        Labelled rows of the new clusters, for "adapt"; see `armed_pyro.prediction.adapt.adapt`.
    pooled : bool
        For "membership" and "nearest": whether to pool the features of all rows of a new cluster.
        Otherwise each row is treated as a separate cluster, as in the ARMED paper.
    draws, seed : int
        Posterior draws, and their seed; by default that of the fit.
    prob : float
        Probability of the intervals.
    others : bool
        Whether to predict the program's other outcomes, too. Reconstructed images cost a pass of
        the decoder for each draw.
    classifiers : Classifiers, optional
        Classifiers for "membership" and "nearest"; a missing one is trained.

    Raises
    ------
    ValueError
        If there are unseen clusters and no mode for them, the rows do not match the training data,
        or support rows lack outcomes or belong to clusters that are not in the data.

    Examples
    --------
    ``predict(fit.posterior, rows, unseen="marginal").to_frame()``
    """
    check_settings(draws, prob)
    data = posterior.encode(data)
    source, membership = effect_source(
        posterior,
        data,
        unseen,
        support=support,
        pooled=pooled,
        draws=draws,
        seed=seed,
        classifiers=classifiers,
    )
    by_row = unseen in RESEMBLING and not pooled
    rows = one_cluster_per_row(posterior.model, data) if by_row else data
    made = predict_rows(posterior, rows, source, draws=draws, prob=prob, seed=seed, others=others)
    new = {} if by_row else new_effects(posterior.model, source, data)
    return replace(made, new=new, membership=membership)


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

    The parameters are those of `predict`. The table is `Evidence.table` of
    `armed_pyro.prediction.similarity`, for "membership" and "nearest".

    Raises
    ------
    ValueError
        If the mode is missing, unknown, or lacks the support that it needs.
    """
    new = new_clusters(posterior.model, data)
    check_mode(unseen, new, support=support is not None)
    evidence = table = None
    if unseen in RESEMBLING and any(map(len, new.values())):
        evidence = gather_evidence(
            posterior,
            data if pooled else one_cluster_per_row(posterior.model, data),
            Classifiers() if classifiers is None else classifiers,
        )
        table = evidence.table()
        warn_if_alien(table)
    source = source_of(posterior, unseen, new, support, evidence, draws=draws, seed=seed)
    return source, table


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

    `new` are the labels of all new clusters. `evidence` is needed for "membership" and "nearest".
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
