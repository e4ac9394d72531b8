"""How well held-out rows are predicted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from sklearn import metrics

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.inference.posterior import Posterior
from armed_pyro.prediction.chunks import predict_chunks
from armed_pyro.prediction.unseen import Marginal

__all__ = ["evaluate"]


def evaluate(
    posterior: Posterior,
    held_out: Mapping[str, ClusteredData],
    *,
    prob: float = 0.9,
    draws: int = 1000,
) -> pd.DataFrame:
    """How well held-out rows are predicted; clusters among them that are new are marginal.

    Parameters
    ----------
    posterior : Posterior
        The fitted program.
    held_out : mapping of str to ClusteredData
        Sets of rows that were not trained on, with their outcomes.
    prob : float
        Probability of the predictive intervals.

    Returns
    -------
    pandas.DataFrame
        Columns held_out (the set's name), rows, unseen (rows in clusters not seen in training),
        and for outcomes with classes auroc (one class against the rest), accuracy and log_loss,
        for others rmse and coverage (share of the outcomes inside their predictive intervals).
    """
    records = []
    source = Marginal(posterior.draws(draws), posterior.seed)
    for name, data in held_out.items():
        if data.outcome is None:
            raise ValueError(f"the held-out rows {name!r} have no outcome to compare with")
        parts = list(predict_chunks(posterior, data, source, prob=prob, draws=draws))
        y = data.outcome.numpy()
        mean = np.concatenate([part.mean for part in parts])
        unseen = sum(int((part.unseen != "").sum()) for part in parts)
        record: dict[str, Any] = {"held_out": name, "rows": len(y), "unseen": unseen}
        if posterior.model.family.name in ("bernoulli", "categorical"):
            record |= _class_scores(y.astype(int), mean)
        else:
            limits = [part.interval(of="outcome") for part in parts]
            lower, upper = (np.concatenate(one) for one in zip(*limits, strict=True))
            record["rmse"] = metrics.root_mean_squared_error(y, mean)
            record["coverage"] = float(((lower <= y) & (y <= upper)).mean())
        records.append(record)
    return pd.DataFrame(records)


def _class_scores(y: np.ndarray, mean: np.ndarray) -> dict[str, float]:
    probability = mean if mean.ndim == 2 else np.stack([1 - mean, mean], 1)
    # A class that does not occur, or occurs alone, cannot be ranked against the rest.
    areas = [
        metrics.roc_auc_score(y == code, probability[:, code])
        for code in range(1 if mean.ndim == 1 else 0, probability.shape[1])
        if 0 < (y == code).sum() < len(y)
    ]
    labels = np.arange(probability.shape[1])
    return {
        "auroc": float(np.mean(areas)) if areas else float("nan"),
        "accuracy": float(metrics.accuracy_score(y, probability.argmax(1))),
        "log_loss": float(metrics.log_loss(y, probability, labels=labels)),
    }
