"""Scores of single rows with outcomes, of seen and of new clusters."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy
from jaxtyping import Float

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.inference.posterior import Posterior
from armed_pyro.prediction.chunks import predict_rows
from armed_pyro.prediction.predict import effect_source
from armed_pyro.prediction.scores import log_densities

__all__ = ["RowScores", "row_scores"]


@dataclass(frozen=True, eq=False)
class RowScores:
    """Log predictive density of every row's outcome, and the loss of its prediction.

    The loss is 1 for a wrong class and 0 for the right one; of other outcomes it is the squared
    error of the predictive mean.
    """

    log_score: Float[np.ndarray, " rows"]
    loss: Float[np.ndarray, " rows"]


def row_scores(
    posterior: Posterior,
    data: ClusteredData,
    unseen: str = "marginal",
    *,
    support: ClusteredData | None = None,
    draws: int = 400,
) -> RowScores:
    """Scores of rows with outcomes; `unseen` and `support` are those of `predict`.

    The density of each row is its own, not the joint density of its cluster: it scores predictions
    that are made before any outcome of the cluster is known, except for the support.
    """
    if data.outcome is None:
        raise ValueError("scores compare predictions with outcomes, but the rows have none")
    source, _ = effect_source(posterior, data, unseen, support=support, draws=draws)
    log_rows = log_densities(posterior, data, source, draws)
    log_score = scipy.special.logsumexp(log_rows, axis=0) - np.log(len(log_rows))
    mean = predict_rows(posterior, data, source, draws=draws, others=False).mean
    y = data.outcome.numpy()
    if posterior.model.family.is_class:
        predicted = mean.argmax(1) if mean.ndim == 2 else mean > 0.5
        return RowScores(log_score, (predicted != posterior.model.family.codes(y)).astype(float))
    return RowScores(log_score, (y - mean) ** 2)
