"""Draws of every reported hyperparameter, by name."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from torch import Tensor

from armed_pyro.guides.base import n_draws
from armed_pyro.inference.posterior import Posterior
from armed_pyro.summaries.datatree import cell_name, cells, latent_dataset

__all__ = ["reported"]


def reported(
    posterior: Posterior, latents: Mapping[str, Tensor]
) -> dict[str, Float[np.ndarray, " draws"]]:
    """Draws of every hyperparameter on the original scale; names such as ``site_sd[Intercept]``.

    Random effects are left out; quantities that are known are constant.

    Examples
    --------
    ``reported(fit.posterior, fit.draws())["site_sd[Intercept]"].mean()``
    """
    effects = {factor.effect_site for factor in posterior.model.factors}
    outside = {name: value for name, value in latents.items() if name not in effects}
    n = n_draws(outside) or 1
    values: dict[str, Float[np.ndarray, " draws"]] = {}
    for name, array in latent_dataset(posterior.model, outside, n).data_vars.items():
        for labels, draws in cells(array):
            values[cell_name(name, labels)] = draws[0].astype(float)
    return values
