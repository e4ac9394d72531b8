"""Every parameter of a program by name: draws, and intervals."""

from __future__ import annotations

import numpy as np
import pandas as pd

from armed_pyro._messages import check_probability
from armed_pyro.inference.posterior import Posterior
from armed_pyro.summaries.datatree import cell_name, cells, latent_dataset

__all__ = ["confint", "parameters"]


def parameters(
    posterior: Posterior, draws: int = 4000, seed: int | None = None
) -> dict[str, np.ndarray]:
    """Draws of all parameters on the original scale, by name; random effects left out.

    Fixed effects come first, with the names of their terms; others have those of `Fit.to_datatree`,
    such as ``site_sd[Intercept]``. A correlation appears once.
    """
    latents = posterior.hyperparameters(draws, seed=seed)
    fixed: dict[str, np.ndarray] = {}
    others: dict[str, np.ndarray] = {}
    for variable, array in latent_dataset(posterior.model, latents, draws).data_vars.items():
        places = [list(array[dim].to_numpy()) for dim in array.dims if dim not in ("chain", "draw")]
        for labels, values in cells(array):
            positions = [axis.index(label) for axis, label in zip(places, labels, strict=True)]
            if len(labels) == 2 and positions[0] >= positions[1]:
                continue  # the diagonal of a correlation matrix, and what is below
            if variable == "fixed_effect":
                fixed[str(labels[0])] = values.reshape(-1)
            else:
                others[cell_name(variable, labels)] = values.reshape(-1)
    return fixed | others


def confint(
    posterior: Posterior, *, draws: int = 4000, prob: float = 0.95, seed: int | None = None
) -> pd.DataFrame:
    """Equal-tailed credible intervals of all parameters: fixed effects, sds, correlations.

    Returns
    -------
    pandas.DataFrame
        Columns lower and upper, one row per parameter, with the names of `parameters`.

    Raises
    ------
    ValueError
        If `prob` is not a probability.

    Examples
    --------
    ``fit.confint(prob=0.9).loc["Days"]``
    """
    check_probability(prob)
    tail = (1 - prob) / 2
    values = parameters(posterior, draws, seed)
    ends = {name: np.quantile(drawn, [tail, 1 - tail]) for name, drawn in values.items()}
    table = pd.DataFrame.from_dict(ends, orient="index", columns=["lower", "upper"])
    table.index.name, table.attrs["prob"] = "parameter", prob
    return table
