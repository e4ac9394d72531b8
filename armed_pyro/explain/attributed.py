"""Attribution: importance of features, and the sd of their slopes over clusters, as tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr

from armed_pyro._messages import unknown

__all__ = ["METHODS", "Attribution"]


METHODS: Mapping[str, str] = {
    "gradient": "gradient of the fixed effects at the mean input",
    "integrated": "integrated gradients from the mean input to each row",
    "grad_cam": "Grad-CAM: where in an image a layer's feature maps speak for the predictor",
}


@dataclass(frozen=True, eq=False)
class Attribution:
    r"""Importance of every feature for the fixed effects, and the sd of its slope over clusters.

    Attributes
    ----------
    method : str
        One of `METHODS`.
    posterior : xarray.Dataset
        Draws (chain, draw, feature[, column]), in units of the predictor, per standard deviation
        of the feature:

        - importance: \|slope\|, or the mean over rows of \|attribution\|. Without chain and draw
          unless the network's last layer is latent: other weights are point estimates.
        - slope: the signed gradient; for the method "gradient" only.
        - ``<factor>_slope`` (..., cluster, feature): what each cluster adds to the slope.
        - ``<factor>_sd``: sd of that over clusters; see
          `armed_pyro.explain.attribution.attribution`.

        The coordinate ``scale`` holds the features' sds (1 for 0/1 columns). Features of images
        have the dimensions axis_1, axis_2, ... instead.
    rows : xarray.DataArray
        Posterior mean of every row's signed attribution (row, feature[, column]).

    Examples
    --------
    >>> from torch import nn
    >>> from armed_pyro import Attribution, MixedEffects, Schedule, fit
    >>> from armed_pyro.data.simulate import mixed_model
    >>> data, _ = mixed_model("gaussian", 8, 10, sd=[1.0, 0.5], coefficients=[0.0, 2.0, 0.1])
    >>> model = MixedEffects(nn.Linear(2, 1), "(1 + x0 | site)", bayesian_head=True)
    >>> result = fit(model, data, schedule=Schedule(steps=20), refine=False, progress=False)
    >>> found: Attribution = result.attribution(draws=100)
    >>> found.table(units="original").set_index("feature")["site_sd"] > 0
    feature
    x0     True
    x1    False
    Name: site_sd, dtype: bool
    """

    method: str
    posterior: xr.Dataset
    rows: xr.DataArray

    def table(self, *, prob: float = 0.9, units: str = "sd") -> pd.DataFrame:
        r"""Posterior means and intervals, the most important feature first.

        Parameters
        ----------
        prob : float
            Probability of the equal-tailed intervals.
        units : {"sd", "original"}
            Per standard deviation of the feature, or per unit of it. Integrated gradients are
            parts of the predictor, not slopes, and are "sd" only.

        Returns
        -------
        pandas.DataFrame
            Columns feature, column (where the predictor has several), and for importance, slope
            (method "gradient") and every ``<factor>_sd``: the mean, under its name, and the
            interval, ``..._lower`` and ``..._upper``, missing for point estimates.
        """
        if not 0 < prob < 1:
            raise ValueError(f"`prob` must lie between 0 and 1, not {prob}")
        if units not in ("sd", "original"):
            raise unknown("unit", units, ("sd", "original"))
        if units == "original" and self.method != "gradient":
            raise ValueError(
                f"attributions by {self.method!r} are parts of the predictor, not slopes: they "
                'have no original units; choose units="sd", or the method "gradient"'
            )
        data = self.posterior
        shown = {str(name): one for name, one in data.items() if not str(name).endswith("_slope")}
        scale = data["scale"] if units == "original" else 1.0
        inner = [dim for dim in data["importance"].dims if dim not in ("chain", "draw")]
        table = data["importance"].isel(chain=0, draw=0, missing_dims="ignore")
        labels = table.to_dataframe("value").reset_index()[inner].astype(str)
        features = [dim for dim in inner if dim != "column"]
        frame = pd.DataFrame({"feature": labels[features].agg(",".join, axis=1)})
        if "column" in inner:
            frame["column"] = labels["column"]
        tail = (1 - prob) / 2
        for name, values in shown.items():
            drawn = (values / scale).transpose("chain", "draw", *inner, missing_dims="ignore")
            flat = drawn.to_numpy().reshape(-1, len(frame))
            frame[name] = flat.mean(0)
            for end, share in (("lower", tail), ("upper", 1 - tail)):
                latent = "draw" in drawn.dims
                frame[f"{name}_{end}"] = np.quantile(flat, share, axis=0) if latent else np.nan
        table = frame.sort_values("importance", ascending=False, kind="stable", ignore_index=True)
        table.attrs |= {"prob": prob, "units": units, "method": self.method}
        return table
