"""A random forest with random intercepts, fitted by EM."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from sklearn.ensemble import RandomForestRegressor

from armed_pyro import ClusteredData
from armed_pyro.analysis.rivals.learners import Learner, Predict, Task, table_of
from armed_pyro.analysis.rivals.rival import outcomes

__all__ = ["MixedForest", "intercept_step"]

EDGE = 0.01  # probabilities are clipped to [EDGE, 1 - EDGE]


@dataclass(frozen=True)
class MixedForest(Learner):
    r"""Random forest f with a random intercept.

    .. math:: y_i = f(x_i) + b_{k(i)} + e_i, \quad b_k \sim N(0, \sigma_b^2),
              \quad e_i \sim N(0, \sigma^2)

    Each sweep fits the forest to :math:`y_i - \hat b_{k(i)}`, and then takes an EM step for
    :math:`\sigma_b`, :math:`\sigma` and b, given the forest's out-of-bag predictions. New clusters
    have b = 0. A binary outcome is modelled as a number, and predictions are clipped.

    Attributes
    ----------
    trees, leaf : int
        Number of trees, and least number of rows in a leaf.
    sweeps : int
        Number of sweeps.

    References
    ----------
    Hajjem, Bellavance, Larocque (2014), Journal of Statistical Computation and Simulation 84(6).

    Examples
    --------
    ``MixedForest().train(data, Task("id", "gaussian"), seed=0)(rows)``
    """

    name: str = "mixed forest"
    trees: int = 100
    leaf: int = 5
    sweeps: int = 15

    def train(self, data: ClusteredData, task: Task, seed: int) -> Predict:
        x, y = table_of(data), outcomes(data).astype(float)
        grouping = data.grouping(task.factor)
        codes = grouping.codes.numpy()
        effects = np.zeros(grouping.n_clusters)
        variances = (y.var() / 2, y.var() / 2)
        forest = RandomForestRegressor(
            self.trees, min_samples_leaf=self.leaf, max_features=1 / 3, oob_score=True,
            random_state=seed,
        )  # fmt: skip
        for _ in range(self.sweeps):
            forest.fit(x, y - effects[codes])
            outside = np.nan_to_num(forest.oob_prediction_, nan=float(y.mean()))
            effects, variances = intercept_step(y - outside, codes, *variances)
        known = pd.Series(effects, index=grouping.levels)

        def predict(rows: ClusteredData) -> np.ndarray:
            shift = known.reindex(rows.grouping(task.factor).labels()).fillna(0.0).to_numpy()
            mean = forest.predict(table_of(rows)) + shift
            return np.asarray(mean.clip(EDGE, 1 - EDGE) if task.binary else mean)

        return predict


def intercept_step(
    residual: np.ndarray, codes: np.ndarray, between: float, within: float
) -> tuple[np.ndarray, tuple[float, float]]:
    r"""Posterior means of the intercepts, and the next variances between and within clusters.

    With :math:`s_k = \sigma_b^2 \sigma^2 / (\sigma^2 + n_k \sigma_b^2)`, the posterior is
    :math:`b_k \sim N(s_k \sum_{i \in k} r_i / \sigma^2, s_k)`.

    Examples
    --------
    >>> effects, _ = intercept_step(np.array([1.0, 3.0]), np.array([0, 0]), 1.0, 1.0)
    >>> round(float(effects[0]), 4)
    1.3333
    """
    counts = np.bincount(codes)
    spread = between * within / (within + counts * between)
    effects = spread * np.bincount(codes, residual) / within
    left = (residual - effects[codes]) ** 2 + spread[codes]
    return effects, (float(np.mean(effects**2 + spread)), float(left.mean()))
