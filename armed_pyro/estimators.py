"""Mixed-effects networks as estimators of scikit-learn."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Self

import numpy as np
import pandas as pd
from jaxtyping import Float, Shaped
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.metrics import accuracy_score, r2_score
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import nn

from armed_pyro._messages import check_known
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.engine.schedule import Schedule
from armed_pyro.fitting import fit
from armed_pyro.networks.by_name import network
from armed_pyro.prediction.unseen import MODES
from armed_pyro.program.model import MixedEffects
from armed_pyro.random_effects.formula import parse_terms
from armed_pyro.random_effects.smooth import Smooth

__all__ = ["MixedEffectsClassifier", "MixedEffectsRegressor"]

Net = str | Callable[[int, int], nn.Module]
# The cluster of rows without groups at prediction.
UNKNOWN = "(no group)"


class _MixedEffectsEstimator(BaseEstimator, ABC):
    """Fit, and expected outcomes of new rows."""

    random: str
    net: Net
    unseen: str
    draws: int
    steps: int | None
    refine: bool
    random_state: Any

    @abstractmethod
    def _family(self) -> str:
        """Name of the family of the outcomes."""

    @abstractmethod
    def _outcome(self, y: Any) -> Float[np.ndarray, " rows"]:
        """Outcomes as numbers."""

    def _outputs(self) -> int:
        """Outputs of the network."""
        return 1

    def fit(self, X: Any, y: Any, groups: Any = None) -> Self:
        """Fit the program.

        Parameters
        ----------
        X : array or table of numbers, shape "rows features"
            Features. The names of a table's columns can be used in `random`.
        y : array, shape "rows"
            Outcomes.
        groups : array of shape "rows", or table with one column per grouping factor
            Labels of the clusters. Without groups there are no random effects.

        Returns
        -------
        Self
            The fitted estimator; ``fit_`` is its `armed_pyro.Fit`.

        Raises
        ------
        ValueError
            If lengths differ, values are missing, or a parameter is unknown.
        """
        check_known("mode for unseen=", [self.unseen], [mode for mode in MODES if mode != "adapt"])
        numeric = not isinstance(self, ClassifierMixin)
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=numeric, ensure_min_samples=2)
        outcome = self._outcome(y)
        terms: str | tuple[()] = self.random if groups is not None else ()
        if groups is None and self.random:
            warnings.warn(
                f"random={self.random!r} is not used, as fit() got no groups: pass groups=labels "
                "(in pipelines and searches, request it with set_fit_request(groups=True))",
                UserWarning,
                stacklevel=2,
            )
        data = self._data(X, outcome, groups)
        head = isinstance(self.net, str) and self.net == "linear"
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        model = MixedEffects(self._network(seed), terms, self._family(), bayesian_head=head)
        self.fit_ = fit(
            model,
            data,
            schedule=None if self.steps is None else Schedule(steps=self.steps),
            refine=self.refine,
            seed=seed,
            progress=False,
        )
        return self

    def _network(self, seed: int) -> nn.Module:
        sizes = int(self.n_features_in_), self._outputs()
        return (
            network(self.net, *sizes, seed=seed) if isinstance(self.net, str) else self.net(*sizes)
        )

    def _data(
        self, X: Float[np.ndarray, "rows features"], y: np.ndarray | None, groups: Any
    ) -> ClusteredData:
        names = getattr(self, "feature_names_in_", None)
        names = [f"x{i}" for i in range(X.shape[1])] if names is None else list(names)
        return ClusteredData.from_arrays(X, y, self._clusters(groups, len(X)), feature_names=names)

    def _clusters(self, groups: Any, rows: int) -> Mapping[str, Any]:
        """Labels by grouping factor; ValueError if they do not fit to `random` or the rows."""
        factors = dict.fromkeys(
            name
            for term in parse_terms(self.random)
            if not isinstance(term, Smooth)
            for name in term.factor.split(":")
        )
        if groups is None:
            return {}
        table = groups if isinstance(groups, pd.DataFrame) else None
        if table is None:
            labels = groups if isinstance(groups, pd.Series) else np.asarray(groups)
            if labels.ndim != 1 or len(factors) != 1:
                raise ValueError(
                    f"groups must be one label per row for the factor of random={self.random!r}, "
                    f"or a table with the columns {list(factors)}; found an array of shape "
                    f"{labels.shape}"
                )
            table = pd.DataFrame({next(iter(factors)): np.asarray(labels)})
        check_known("column of groups", list(factors), list(table.columns))
        if len(table) != rows:
            raise ValueError(f"groups have {len(table)} rows, X has {rows}")
        return {name: table[name].to_numpy() for name in factors}

    def _expected(self, X: Any, groups: Any) -> Float[np.ndarray, "rows ..."]:
        """Posterior mean of E[y | x, cluster]."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        names = dict.fromkeys(
            n for f in self.fit_.model.clustered_factors for n in f.name.split(":")
        )
        told = groups is not None and len(names) > 0
        if not told:
            groups = pd.DataFrame({name: np.full(len(X), UNKNOWN) for name in names})
        data = self._data(X, None, groups if names else None)
        with warnings.catch_warnings():
            if not told:
                warnings.filterwarnings("ignore", "no cluster of")
            made = self.fit_.predict(data, unseen=self.unseen, draws=self.draws, others=False)
        return made.mean


class MixedEffectsRegressor(RegressorMixin, _MixedEffectsEstimator):
    """Mixed-effects network for numbers or counts, as an estimator of scikit-learn.

    Parameters
    ----------
    random : str
        Random effects in lme4's syntax, on the names of the features; an array of groups belongs to
        its only grouping factor, whatever its name.
    net : str or callable
        "linear" with latent coefficients, "dense", or a function of the numbers of features and
        outputs that returns a network.
    family : {"gaussian", "poisson", "negative_binomial"}
        Distribution of the outcome.
    unseen : {"marginal", "population", "membership", "nearest"}
        Random effects of groups that training has not seen, and of rows without groups.
    draws : int
        Posterior draws of a prediction.
    steps : int, optional
        Steps of training; by default as many as are needed to converge.
    refine : bool
        Whether to weight the posterior draws by importance.
    random_state : int, RandomState or None
        Seed of network, training and draws.

    Attributes
    ----------
    fit_ : Fit
        The fit, with variance components, effects and checks.
    n_features_in_, feature_names_in_
        As of all estimators.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> site = np.repeat(np.arange(10), 6)
    >>> X = rng.normal(size=(60, 1))
    >>> y = 3 * X[:, 0] + rng.normal(size=10)[site] + 0.1 * rng.normal(size=60)
    >>> model = MixedEffectsRegressor(steps=50).fit(X, y, groups=site)
    >>> model.score(X, y, groups=site) > 0.95
    True
    """

    def __init__(
        self,
        random: str = "(1 | group)",
        net: Net = "linear",
        family: str = "gaussian",
        unseen: str = "marginal",
        draws: int = 400,
        steps: int | None = None,
        refine: bool = True,
        random_state: Any = 0,
    ) -> None:
        self.random = random
        self.net = net
        self.family = family
        self.unseen = unseen
        self.draws = draws
        self.steps = steps
        self.refine = refine
        self.random_state = random_state

    def _family(self) -> str:
        return self.family

    def _outcome(self, y: Any) -> Float[np.ndarray, " rows"]:
        return np.asarray(y, dtype=np.float64)

    def predict(self, X: Any, groups: Any = None) -> Float[np.ndarray, " rows"]:
        """E[y | x, cluster] of rows; clusters that are new, or not given, are as `unseen` says."""
        return self._expected(X, groups)

    def score(self, X: Any, y: Any, groups: Any = None, sample_weight: Any = None) -> float:
        """R2 of the predictions."""
        return float(r2_score(y, self.predict(X, groups), sample_weight=sample_weight))


class MixedEffectsClassifier(ClassifierMixin, _MixedEffectsEstimator):
    """Mixed-effects network for classes, as an estimator of scikit-learn.

    Two classes are a bernoulli outcome, more are categorical.

    Parameters
    ----------
    random, net, unseen, draws, steps, refine, random_state
        As in `MixedEffectsRegressor`.

    Attributes
    ----------
    fit_ : Fit
        The fit.
    classes_ : ndarray
        Labels of the classes.
    n_features_in_, feature_names_in_
        As of all estimators.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> site = np.repeat(np.arange(10), 12)
    >>> X = rng.normal(size=(120, 1))
    >>> y = np.where(4 * X[:, 0] + rng.normal(size=10)[site] > 0, "ill", "well")
    >>> model = MixedEffectsClassifier(steps=50).fit(X, y, groups=site)
    >>> model.classes_.tolist(), model.predict_proba(X, groups=site).shape
    (['ill', 'well'], (120, 2))
    """

    def __init__(
        self,
        random: str = "(1 | group)",
        net: Net = "linear",
        unseen: str = "marginal",
        draws: int = 400,
        steps: int | None = None,
        refine: bool = True,
        random_state: Any = 0,
    ) -> None:
        self.random = random
        self.net = net
        self.unseen = unseen
        self.draws = draws
        self.steps = steps
        self.refine = refine
        self.random_state = random_state

    def _family(self) -> str:
        return "bernoulli" if len(self.classes_) == 2 else "categorical"

    def _outputs(self) -> int:
        return 1 if len(self.classes_) == 2 else len(self.classes_)

    def _outcome(self, y: Any) -> Float[np.ndarray, " rows"]:
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError("the classifier needs at least 2 classes, but y has 1 class")
        return codes.astype(np.float64)

    def predict_proba(self, X: Any, groups: Any = None) -> Float[np.ndarray, "rows classes"]:
        """Probability of every class, in the order of ``classes_``."""
        expected = self._expected(X, groups)
        return np.column_stack([1 - expected, expected]) if expected.ndim == 1 else expected

    def predict(self, X: Any, groups: Any = None) -> Shaped[np.ndarray, " rows"]:
        """The most probable class of every row."""
        probabilities = self.predict_proba(X, groups)
        return np.asarray(self.classes_[probabilities.argmax(axis=1)])

    def score(self, X: Any, y: Any, groups: Any = None, sample_weight: Any = None) -> float:
        """Accuracy of the predicted classes."""
        return float(accuracy_score(y, self.predict(X, groups), sample_weight=sample_weight))
