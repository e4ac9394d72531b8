"""Learners of a table's outcome, with their usual defaults: a network, two stages, a linear model.

They are compared on new clusters and on new rows of seen clusters, and share no network and no
training, unlike the rivals of `armed_pyro.analysis.rivals.rival`.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import scipy
from jaxtyping import Float
from sklearn.compose import TransformedTargetRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV, KFold, StratifiedKFold
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from armed_pyro import ClusteredData, Schedule
from armed_pyro.analysis.rivals.architectures import Dense
from armed_pyro.analysis.rivals.linear_mixed import LinearMixed
from armed_pyro.analysis.rivals.rival import Setting, outcomes

__all__ = ["Learner", "LinearMixedModel", "PlainNetwork", "Predict", "Task", "TwoStages"]

Predict = Callable[[ClusteredData], Float[np.ndarray, " rows"]]
EDGE = 1e-4  # distance from 0 and 1 of a probability before its logit is taken


@dataclass(frozen=True)
class Task:
    """The grouping factor and the family of the outcome."""

    factor: str
    family: str

    @property
    def binary(self) -> bool:
        """Whether the outcome is 0 or 1, and predictions are probabilities."""
        return self.family == "bernoulli"


class Learner(ABC):
    """A way to learn E[y | x, cluster] from rows.

    Attributes
    ----------
    name : str
        Its name in tables.
    """

    name: str

    @abstractmethod
    def train(self, data: ClusteredData, task: Task, seed: int) -> Predict:
        """Learn from these rows; the result predicts E[y] of rows of seen and of new clusters."""


@dataclass(frozen=True)
class PlainNetwork(Learner):
    """scikit-learn's multilayer perceptron, which does not know the clusters.

    Its weight decay is chosen by cross-validation on rows: by log loss for a binary outcome, by
    squared error for any other. (Early stopping by a part of the rows is worse: scikit-learn's
    classifier stops by accuracy, and kept networks whose probabilities had hardly moved from 1/2.)

    Attributes
    ----------
    hidden : tuple of int
        Widths of the hidden layers.
    decays : tuple of float
        Weight decays to choose from.
    epochs : int
        Largest number of epochs.

    Examples
    --------
    ``PlainNetwork().train(data, Task("id", "gaussian"), seed=0)(rows)``
    """

    name: str = "plain network"
    hidden: tuple[int, ...] = (32, 32)
    decays: tuple[float, ...] = (1e-3, 0.1, 1.0, 10.0)
    epochs: int = 300

    def train(self, data: ClusteredData, task: Task, seed: int) -> Predict:
        network = MLPClassifier if task.binary else MLPRegressor
        made = network(
            hidden_layer_sizes=self.hidden,
            learning_rate_init=0.003,
            max_iter=self.epochs,
            random_state=seed,
        )
        score = "neg_log_loss" if task.binary else "neg_mean_squared_error"
        folds = (StratifiedKFold if task.binary else KFold)(3, shuffle=True, random_state=seed)
        search = make_pipeline(
            StandardScaler(), GridSearchCV(made, {"alpha": self.decays}, scoring=score, cv=folds)
        )
        x, y = table_of(data), outcomes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the epochs are a setting
            if task.binary:
                search.fit(x, y)
                return lambda rows: np.asarray(search.predict_proba(table_of(rows))[:, 1])
            scaled = TransformedTargetRegressor(search, transformer=StandardScaler()).fit(x, y)
        return lambda rows: np.asarray(scaled.predict(table_of(rows)))


@dataclass(frozen=True)
class LinearMixedModel(Learner):
    """statsmodels' linear mixed model with a random intercept; see `LinearMixed`.

    Columns that depend linearly on others are left out. Counts are modelled as gaussian.

    Examples
    --------
    ``LinearMixedModel().train(data, Task("id", "gaussian"), seed=0)(rows)``
    """

    name: str = "linear mixed model"

    def train(self, data: ClusteredData, task: Task, seed: int) -> Predict:
        kept = independent_columns(table_of(data))
        family = "bernoulli" if task.binary else "gaussian"
        # Of the setting, a linear mixed model uses the factor and the family alone.
        setting = Setting("", "", Dense((1,)), Schedule(), factor=task.factor, family=family)
        trained = LinearMixed(setting).train(with_columns(data, task, kept), None, seed)
        return lambda rows: trained.predict(with_columns(rows, task, kept))


@dataclass(frozen=True)
class TwoStages(Learner):
    """A plain network, then a mixed model with a random intercept for what it leaves.

    The second stage models residuals; of a binary outcome, it is a logistic mixed model whose only
    feature is the network's log odds.

    Examples
    --------
    ``TwoStages().train(data, Task("id", "gaussian"), seed=0)(rows)``
    """

    name: str = "two stages"
    first: Learner = PlainNetwork()
    second: Learner = LinearMixedModel()

    def train(self, data: ClusteredData, task: Task, seed: int) -> Predict:
        network = self.first.train(data, task, seed)
        if task.binary:
            mixed = self.second.train(
                _of(data, task, _logit(network(data)), outcomes(data)), task, 0
            )
            return lambda rows: mixed(_of(rows, task, _logit(network(rows)), None))
        residuals = _of(data, task, np.zeros((data.n_rows, 0)), outcomes(data) - network(data))
        mixed = self.second.train(residuals, task, seed)
        return lambda rows: network(rows) + mixed(_of(rows, task, np.zeros((rows.n_rows, 0)), None))


def table_of(data: ClusteredData) -> Float[np.ndarray, "rows features"]:
    """The features as a matrix; images as rows of pixels."""
    return data.features.reshape(data.n_rows, -1).numpy().astype(float)


def independent_columns(x: Float[np.ndarray, "rows features"]) -> np.ndarray:
    """Positions of columns that, with an intercept, do not depend linearly on each other."""
    if not x.shape[1]:
        return np.arange(0)
    spread = x.std(0)
    centred = (x - x.mean(0)) / np.where(spread > 0, spread, 1.0)
    _, r, order = scipy.linalg.qr(centred, mode="economic", pivoting=True)
    size = np.abs(np.diag(r))
    return np.sort(order[: int((size > 1e-8 * max(size[0], 1e-300)).sum())])


def with_columns(data: ClusteredData, task: Task, kept: np.ndarray) -> ClusteredData:
    """The rows with these columns as features, and the one grouping factor."""
    return _of(data, task, table_of(data)[:, kept], data.outcome)


def _of(data: ClusteredData, task: Task, x: np.ndarray, y: object) -> ClusteredData:
    """The rows' clusters with other features and another outcome."""
    x = x if x.ndim == 2 else x[:, None]
    labels = pd.Series(data.grouping(task.factor).labels())
    made = ClusteredData.from_arrays(x, y, {task.factor: labels}, outcome_name=data.outcome_name)
    return replace(made, continuous=(True,) * x.shape[1])


def _logit(p: np.ndarray) -> np.ndarray:
    p = p.clip(EDGE, 1 - EDGE)
    return np.asarray(np.log(p / (1 - p)))
