"""Scores of the predictions of held-out rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

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
    """Scores of the predictions of held-out rows, one row per set.

    New clusters among the rows are predicted by the mode "marginal".

    Parameters
    ----------
    posterior : Posterior
        The fitted program.
    held_out : mapping of str to ClusteredData
        Sets of rows that were not trained on, with their outcomes.
    prob : float
        Probability of the predictive intervals.
    draws : int
        Posterior draws.

    Returns
    -------
    pandas.DataFrame
        Columns held_out (name of the set), rows, unseen (rows in clusters not seen in training).
        For outcomes with classes also auroc (one class against the rest), accuracy and log_loss;
        for other outcomes rmse and coverage (share of outcomes inside their predictive interval).

    Raises
    ------
    ValueError
        If a set has no outcome.

    Examples
    --------
    ``evaluate(fit.posterior, {"test": test_rows})``
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
        if posterior.model.family.is_class:
            record |= _class_scores(y.astype(int), mean)
        else:
            limits = [part.interval(of="outcome") for part in parts]
            lower, upper = (np.concatenate(ends) for ends in zip(*limits, strict=True))
            record["rmse"] = float(np.sqrt(((y - mean) ** 2).mean()))
            record["coverage"] = float(((lower <= y) & (y <= upper)).mean())
        records.append(record)
    return pd.DataFrame(records)


def _class_scores(y: np.ndarray, mean: np.ndarray) -> dict[str, float]:
    from sklearn import metrics  # slow to import

    probability = mean if mean.ndim == 2 else np.stack([1 - mean, mean], 1)
    # The AUROC of a class is undefined if all rows, or none, are of that class.
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
