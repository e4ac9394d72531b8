"""predict(): E[y | x, cluster] and y for rows of seen and new clusters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.inference.posterior import Posterior
from armed_pyro.prediction.chunks import check_settings, new_effects, predict_chunks
from armed_pyro.prediction.cluster_classifier import Classifiers
from armed_pyro.prediction.result import Prediction, Reconstructed
from armed_pyro.prediction.sources import effect_source
from armed_pyro.prediction.unseen import one_cluster_per_row

__all__ = ["predict"]


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
    posterior : Posterior
        The fitted program.
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
    draws : int
        Posterior draws.
    prob : float
        Probability of the intervals.
    seed : int, optional
        Seed of the draws; by default that of the posterior.
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
    settings: dict[str, Any] = {"draws": draws, "prob": prob, "seed": seed}
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
    by_row = unseen in ("membership", "nearest") and not pooled
    rows = one_cluster_per_row(posterior.model, data) if by_row else data
    parts = list(predict_chunks(posterior, rows, source, others=others, **settings))
    new = {} if by_row else new_effects(posterior.model, source, data)
    first = parts[0]
    return Prediction(
        np.concatenate([part.expected for part in parts], 1),
        np.concatenate([part.outcome for part in parts], 1),
        np.concatenate([part.unseen for part in parts]),
        data.row_labels,
        first.outcome_name,
        first.classes,
        prob,
        new,
        membership,
        Reconstructed.joined(parts),
    )
