"""The linear mixed model with a random intercept, fitted by statsmodels."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from statsmodels.genmod.bayes_mixed_glm import BinomialBayesMixedGLM
from statsmodels.regression.mixed_linear_model import MixedLM
from torch import nn
from torch.nn.utils import skip_init

from armed_pyro import ClusteredData
from armed_pyro.analysis.rivals.descent import Scaling
from armed_pyro.analysis.rivals.rival import Rival, Setting, Trained, outcomes

__all__ = ["LinearMixed"]


@dataclass(frozen=True)
class LinearMixed(Rival):
    r"""Linear fixed effects of the standardised features, and a random intercept.

    .. math:: \eta_i = \beta_0 + x_i^\top \beta + b_{k(i)}, \quad b_k \sim N(0, \sigma_b^2)

    A gaussian outcome is fitted by MixedLM (REML), a binary one by BinomialBayesMixedGLM
    (variational Bayes with :math:`\beta_j \sim N(0, prior\_sd^2)` and :math:`\log \sigma_b \sim
    N(0, 0.5^2)`). Neither stops early, so the validation rows are training rows too.

    Seen clusters are predicted with the estimated posterior mean of their intercept, unseen ones
    with zero, the population mean.

    Attributes
    ----------
    prior_sd : float
        Prior sd of a binary outcome's coefficients. Without such a prior, small data with many
        features separate the classes and the estimates diverge.

    Examples
    --------
    ``LinearMixed(setting).train(data, None, seed=0).predict(rows)``
    """

    setting: Setting
    name: str = "linear mixed model"
    prior_sd: float = 1.0

    @property
    def clustered(self) -> bool:
        return True

    def train(self, data: ClusteredData, validation: ClusteredData | None, seed: int) -> Trained:
        setting = self.setting
        rows = data if validation is None else _joined(data, validation)
        if len(rows.features.shape) != 2:
            raise ValueError("the linear mixed model takes tabular features, not images")
        scaling = Scaling.of(rows)
        levels, codes = rows.grouping(setting.factor).levels, rows.grouping(setting.factor).codes
        X = _design(scaling, rows)
        if setting.family == "bernoulli":
            beta, effects = self._logistic(outcomes(rows), X, codes.numpy(), len(levels))
        elif setting.family == "gaussian":
            result = MixedLM(outcomes(rows), X, groups=codes.numpy()).fit(reml=True)
            beta = np.asarray(result.fe_params)
            effects = np.array(
                [float(np.ravel(result.random_effects[k])[0]) for k in range(len(levels))]
            )
        else:
            raise ValueError(
                f"the linear mixed model takes outcomes of the families bernoulli and gaussian, "
                f"not {setting.family!r}: leave it out of the comparison"
            )
        with warnings.catch_warnings():
            # Without features, torch warns that there is nothing to initialise.
            warnings.simplefilter("ignore")
            net = skip_init(nn.Linear, X.shape[1] - 1, 1, dtype=torch.float64)
        with torch.no_grad():
            net.weight.copy_(torch.as_tensor(beta[1:])[None])
            net.bias.fill_(float(beta[0]))
        known = pd.Series(effects, index=levels)

        def predict(new: ClusteredData) -> Float[np.ndarray, " rows"]:
            shift = known.reindex(new.grouping(setting.factor).labels()).fillna(0.0).to_numpy()
            eta = _design(scaling, new) @ beta + shift
            return 1 / (1 + np.exp(-eta)) if setting.family == "bernoulli" else eta

        return Trained(predict, net, rows, scaling.standardise, 0)

    def _logistic(
        self, y: np.ndarray, X: np.ndarray, codes: np.ndarray, n_clusters: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Posterior means of the coefficients and of the clusters' intercepts."""
        Z = np.eye(n_clusters)[codes]
        ident = np.zeros(n_clusters, dtype=int)
        model = BinomialBayesMixedGLM(y, X, Z, ident, vcp_p=0.5, fe_p=self.prior_sd)
        # statsmodels would start at random; zero makes the fit reproducible.
        size = X.shape[1] + 1 + n_clusters
        result = model.fit_vb(mean=np.zeros(size), sd=np.full(size, 0.5))
        return np.asarray(result.fe_mean), np.asarray(result.vc_mean)


def _joined(first: ClusteredData, second: ClusteredData) -> ClusteredData:
    """The rows of both, with their grouping factors."""
    return ClusteredData.from_arrays(
        torch.cat([first.features, second.features]),
        np.concatenate([outcomes(first), outcomes(second)]),
        {
            name: np.concatenate([grouping.labels(), second.grouping(name).labels()])
            for name, grouping in first.groupings.items()
        },
        feature_names=first.feature_names or None,
        outcome_name=first.outcome_name,
    )


def _design(scaling: Scaling, data: ClusteredData) -> Float[np.ndarray, "rows columns"]:
    x = scaling.standardise(data.features).numpy()
    return np.column_stack([np.ones(len(x)), x])
