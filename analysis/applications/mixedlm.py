"""The classical mixed model by REML, with the predictive distribution that statsmodels lacks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from formulaic import model_matrix
from scipy.stats import norm
from statsmodels.regression.mixed_linear_model import MixedLM

__all__ = ["MixedModel"]


class MixedModel:
    r"""statsmodels' MixedLM with a random intercept and slope, and its predictions.

    .. math:: y^* \mid y \sim N(X^*\hat\beta + K (y - X\hat\beta), \;
              Z^* C Z^{*\top} + \sigma^2 I + A \, Var(\hat\beta) A^\top)

    :math:`V = Z D Z^\top + \sigma^2 I` is the covariance of the cluster's known rows,
    :math:`K = Z^* D Z^\top V^{-1}`, :math:`C = D - D Z^\top V^{-1} Z D` and
    :math:`A = X^* - K X`. For a seen cluster this is the BLUP. An unseen cluster has no known rows,
    so it gets the population mean and the marginal variance.

    Parameters
    ----------
    train : pandas.DataFrame
        Training rows.
    outcome, group, slope : str
        Columns of the outcome, of the clusters, and of the random slope.
    fixed : str
        Formula of the fixed effects. Spline columns are computed from the training rows.
    prob : float
        Probability of the predictive intervals.
    """

    def __init__(
        self,
        train: pd.DataFrame,
        outcome: str,
        group: str,
        fixed: str,
        slope: str,
        *,
        prob: float = 0.9,
    ) -> None:
        self.train, self.outcome, self.group, self.slope = train, outcome, group, slope
        self.quantile = float(norm.ppf((1 + prob) / 2))
        design = model_matrix(fixed, train)
        self.columns = design.model_spec
        model = MixedLM(
            train[outcome].to_numpy(),
            design.to_numpy(),
            groups=train[group].to_numpy(),
            exog_re=self._z(train),
        )
        self.result: Any = model.fit(reml=True)
        self.covariance = np.asarray(self.result.cov_re)

    def components(self) -> dict[str, float]:
        """Estimates of the standard deviations and of the correlation."""
        sd = np.sqrt(np.diag(self.covariance))
        return {
            "sd Intercept": float(sd[0]),
            f"sd {self.slope}": float(sd[1]),
            f"cor Intercept,{self.slope}": float(self.covariance[0, 1] / sd.prod()),
            "residual sd": float(np.sqrt(self.result.scale)),
        }

    def forecast(
        self, table: pd.DataFrame, unseen: str, support: pd.DataFrame | None = None
    ) -> pd.DataFrame:
        """The rows, cluster by cluster, with their predictions in columns mean, lower and upper.

        Parameters
        ----------
        table : pandas.DataFrame
            Rows to predict.
        unseen : {"marginal", "population"}
            Mode for clusters without known rows, as in `armed_pyro.Fit.predict`.
        support : pandas.DataFrame, optional
            Rows with outcomes that are known beside the training rows. They update the predictions
            of their clusters, and not the estimates.
        """
        known_rows = self.train if support is None else pd.concat([self.train, support])
        beta, scale = self.result.fe_params, self.result.scale
        of_beta = np.asarray(self.result.cov_params())[: len(beta), : len(beta)]
        parts = []
        for name, rows in table.groupby(self.group, sort=False):
            known = known_rows[known_rows[self.group] == name]
            D = self.covariance * (len(known) > 0 or unseen != "population")
            x, z, X, Z = self._x(rows), self._z(rows), self._x(known), self._z(known)
            K = np.linalg.solve(Z @ D @ Z.T + scale * np.eye(len(Z)), Z @ D @ z.T).T
            A = x - K @ X
            mean = x @ beta + K @ (known[self.outcome].to_numpy() - X @ beta)
            variance = ((z - K @ Z) @ D * z).sum(1) + (A @ of_beta * A).sum(1) + scale
            half = self.quantile * np.sqrt(variance)
            parts.append(rows.assign(mean=mean, lower=mean - half, upper=mean + half))
        return pd.concat(parts)

    def _x(self, table: pd.DataFrame) -> np.ndarray:
        if table.empty:
            return np.zeros((0, len(self.result.fe_params)))
        return np.asarray(self.columns.get_model_matrix(table), float)

    def _z(self, table: pd.DataFrame) -> np.ndarray:
        return np.column_stack([np.ones(len(table)), table[self.slope]])
