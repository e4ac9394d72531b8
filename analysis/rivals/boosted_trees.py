"""GPBoost: boosted trees with random intercepts; needs the optional package gpboost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from armed_pyro import ClusteredData
from armed_pyro.analysis.rivals.learners import Learner, Predict, Task, table_of
from armed_pyro.analysis.rivals.rival import outcomes

__all__ = ["BoostedTrees"]

LIKELIHOODS = {"gaussian": "gaussian", "bernoulli": "bernoulli_logit", "poisson": "poisson"}


@dataclass(frozen=True)
class BoostedTrees(Learner):
    """Boosted trees and a random intercept, with the number of trees from cross-validation.

    Negative binomial counts are modelled as poisson, which has the same mean.

    References
    ----------
    Sigrist (2022), Journal of Machine Learning Research 23(232).

    Examples
    --------
    ``BoostedTrees().train(data, Task("id", "gaussian"), seed=0)(rows)``
    """

    name: str = "GPBoost"
    most_trees: int = 500
    rate: float = 0.05

    def train(self, data: ClusteredData, task: Task, seed: int) -> Predict:
        import gpboost as gpb  # optional

        likelihood = LIKELIHOODS.get(task.family, "poisson")
        x, y, labels = table_of(data), outcomes(data), self._labels(data, task)
        settings: dict[str, Any] = {
            "objective": likelihood, "learning_rate": self.rate, "max_depth": 5,
            "min_data_in_leaf": 10, "verbose": -1, "num_threads": 1, "seed": seed,
        }  # fmt: skip
        tried = gpb.cv(
            params=settings, train_set=gpb.Dataset(x, y),
            gp_model=gpb.GPModel(group_data=labels, likelihood=likelihood),
            num_boost_round=self.most_trees, nfold=4, early_stopping_rounds=20, seed=seed,
            stratified=False, use_gp_model_for_validation=True,
        )  # fmt: skip
        trees = len(next(iter(tried.values())))
        booster = gpb.train(
            params=settings,
            train_set=gpb.Dataset(x, y),
            gp_model=gpb.GPModel(group_data=labels, likelihood=likelihood),
            num_boost_round=trees,
        )

        def predict(rows: ClusteredData) -> np.ndarray:
            made = booster.predict(
                table_of(rows), group_data_pred=self._labels(rows, task), pred_latent=False
            )
            return np.asarray(made["response_mean"])

        return predict

    def _labels(self, data: ClusteredData, task: Task) -> np.ndarray:
        return np.array([str(label) for label in data.grouping(task.factor).labels()])
