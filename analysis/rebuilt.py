"""How well images are rebuilt, and whether their latents keep the clusters apart."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float
from sklearn.metrics import calinski_harabasz_score, davies_bouldin_score

from armed_pyro import ClusteredData
from armed_pyro.analysis.rivals import Setting, Trained
from armed_pyro.networks.taps import pooled, tapped

__all__ = ["IMAGE_METRICS", "image_metrics", "latents"]

# Each with the largest value that it can have; the smallest is 0.
IMAGE_METRICS: Mapping[str, float] = dict.fromkeys(
    ("image mse", "davies-bouldin", "calinski-harabasz"), math.inf
)


def image_metrics(trained: Trained, data: ClusteredData, setting: Setting) -> dict[str, float]:
    """`IMAGE_METRICS` of a model that rebuilds its features; nothing of one that does not.

    The mean squared error is per value, in the features' own units. The two indices are of the
    latents by cluster: latents that do not tell the clusters apart have a large Davies-Bouldin and
    a small Calinski-Harabasz index; those of rows whose clusters are randomised show how large and
    how small.

    Examples
    --------
    ``image_metrics(trained, fold.test, rival.setting)["image mse"]``
    """
    if trained.rebuild is None:
        return {}
    error = trained.rebuild(data) - data.features.numpy()
    place, by = latents(trained, data, setting.architecture.last), data.grouping(setting.factor)
    codes = by.codes.numpy()
    apart = 1 < len(np.unique(codes)) < len(codes)
    return {
        "image mse": float(np.square(error).mean()),
        "davies-bouldin": float(davies_bouldin_score(place, codes)) if apart else math.nan,
        "calinski-harabasz": float(calinski_harabasz_score(place, codes)) if apart else math.nan,
    }


@torch.no_grad()
def latents(trained: Trained, data: ClusteredData, layer: str) -> Float[np.ndarray, "rows width"]:
    """What a module of the network gives for the rows.

    Examples
    --------
    ``latents(trained, fold.test, "latents")``
    """
    like = next(trained.net.parameters())
    with tapped(trained.net.eval(), [layer]) as record:
        trained.net(trained.facts.standardise(data.features).to(like))
    return pooled(record[layer]).double().numpy()
