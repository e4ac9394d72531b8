"""The linear mixed model with a random intercept, by statsmodels."""

from __future__ import annotations

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
from armed_pyro.analysis.rivals import Rival, Setting, Trained, outcomes
from armed_pyro.families.registry import family_named
from armed_pyro.program.data_spec import Facts

__all__ = ["LinearMixed"]


@dataclass(frozen=True)
class LinearMixed(Rival):
    r"""Linear fixed effects of the standardised features, and a random intercept.

    .. math:: \eta_i = \beta_0 + x_i^\top \beta + b_{k(i)}, \quad b_k \sim N(0, \sigma_b^2)

    by statsmodels: MixedLM (REML) of a gaussian outcome, BinomialBayesMixedGLM of a binary one
    (variational Bayes with :math:`\beta_j \sim N(0, prior\_sd^2)` and :math:`\log \sigma_b \sim
    N(0, 0.5^2)`). There is nothing to stop early, so validation rows are trained on, too.

    Seen clusters are predicted with their intercept's estimated posterior mean, unseen ones with
    zero, its population mean.

    Attributes
    ----------
    prior_sd : float
        Of the coefficients of a binary outcome: small data with many features need some.

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
        facts = Facts.of(rows, family_named(setting.family), (setting.factor,))
        levels, codes = rows.grouping(setting.factor).levels, rows.grouping(setting.factor).codes
        X = _design(facts, rows)
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
        net = skip_init(nn.Linear, X.shape[1] - 1, 1, dtype=torch.float64)
        with torch.no_grad():
            net.weight.copy_(torch.as_tensor(beta[1:])[None])
            net.bias.fill_(float(beta[0]))
        known = pd.Series(effects, index=levels)

        def predict(new: ClusteredData) -> Float[np.ndarray, " rows"]:
            shift = known.reindex(new.grouping(setting.factor).labels()).fillna(0.0).to_numpy()
            eta = _design(facts, new) @ beta + shift
            return 1 / (1 + np.exp(-eta)) if setting.family == "bernoulli" else eta

        return Trained(predict, net, rows, facts, 0)

    def _logistic(
        self, y: np.ndarray, X: np.ndarray, codes: np.ndarray, n_clusters: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Posterior means of the coefficients and of the clusters' intercepts."""
        Z = np.eye(n_clusters)[codes]
        ident = np.zeros(n_clusters, dtype=int)
        model = BinomialBayesMixedGLM(y, X, Z, ident, vcp_p=0.5, fe_p=self.prior_sd)
        # From zero, where statsmodels would start at random.
        size = X.shape[1] + 1 + n_clusters
        result = model.fit_vb(mean=np.zeros(size), sd=np.full(size, 0.5))
        return np.asarray(result.fe_mean), np.asarray(result.vc_mean)


def _joined(one: ClusteredData, other: ClusteredData) -> ClusteredData:
    """The rows of both, with their grouping factors."""
    return ClusteredData.from_arrays(
        torch.cat([one.features, other.features]),
        np.concatenate([outcomes(one), outcomes(other)]),
        {
            name: np.concatenate([grouping.labels(), other.grouping(name).labels()])
            for name, grouping in one.groupings.items()
        },
        feature_names=one.feature_names or None,
        outcome_name=one.outcome_name,
    )


def _design(facts: Facts, data: ClusteredData) -> Float[np.ndarray, "rows columns"]:
    x = facts.standardise(data.features).numpy()
    return np.column_stack([np.ones(len(x)), x])
