"""Posterior draws: importance weighted, or refined."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from armed_pyro.guides.base import selected
from armed_pyro.inference.nested_weights import Weighted

__all__ = ["METHODS", "ImportanceDraws", "RefinedDraws", "resampled"]


METHODS: Mapping[str, str] = {
    "psis": "importance-weighted draws of the guide, Pareto smoothed",
    "nuts": "Hamiltonian Monte Carlo in the guide's coordinates, the network frozen",
}


@dataclass(frozen=True, eq=False)
class RefinedDraws:
    """Posterior draws that replace the guide's.

    `quality` holds k_hat and ess (psis), or r_hat, ess and divergences (nuts); the worst over all
    sites.

    Examples
    --------
    >>> pool = {"site_sd": torch.tensor([[[0.1]], [[0.2]]])}
    >>> RefinedDraws("psis", pool, index=torch.tensor([1, 1, 0])).latents["site_sd"].flatten()
    tensor([0.2000, 0.2000, 0.1000])
    """

    method: str  # one of `METHODS`
    pool: Mapping[str, Tensor]  # candidate draws of all latent sites, in a guide's shapes
    quality: Mapping[str, float] = field(default_factory=dict)
    # Position of each draw in the pool; None takes the whole pool in order. Resampled effects are
    # not copied: with very many clusters a second copy may not fit.
    index: Int[Tensor, " draws"] | None = None

    def __len__(self) -> int:
        return len(self._index())

    @property
    def latents(self) -> dict[str, Tensor]:
        """Draws of all latent sites, in the shapes that a guide returns."""
        return selected(self.pool, self._index())

    def choose(self, n: int) -> dict[str, Tensor]:
        """n draws at random; with repeats only if there are fewer than n."""
        size = len(self)
        chosen = torch.randperm(size)[:n] if n <= size else torch.randint(size, (n,))
        return selected(self.pool, self._index()[chosen])

    def _index(self) -> Int[Tensor, " draws"]:
        if self.index is not None:
            return self.index
        return torch.arange(max(site.shape[0] for site in self.pool.values() if site.dim() > 1))


@dataclass(frozen=True, eq=False)
class ImportanceDraws:
    """Proposed draws with nested importance weights.

    `k_hat` is the shape of the weights' tail; below 0.7 the weights are reliable (Vehtari et al.
    2024). `cluster_k_hat` is that of each cluster's particles over all draws. Of more than 500
    clusters it is computed for 500 at random and nan for the others.

    Examples
    --------
    >>> none = np.zeros((4, 0))
    >>> equal = ImportanceDraws({}, np.log(np.full(4, 0.25)), 0.1, none, np.zeros(0))
    >>> equal.effective, equal.resample(4)
    (4.0, tensor([0, 1, 2, 3]))
    """

    latents: Mapping[str, Tensor]  # the nested effects are resampled within each draw
    log_weights: Float[np.ndarray, " draws"]  # Pareto smoothed, normalised
    k_hat: float
    clusters: Float[np.ndarray, "draws watched"]  # log p(y_k | theta) where k-hat is computed
    cluster_k_hat: Float[np.ndarray, " clusters"]

    @property
    def weights(self) -> Float[np.ndarray, " draws"]:
        """Normalised weights."""
        return np.exp(self.log_weights)

    @property
    def effective(self) -> float:
        """Effective sample size, 1 / sum of squared weights."""
        return float(1 / np.sum(self.weights**2))

    def resample(self, n: int) -> Int[Tensor, " n"]:
        """Positions of n draws; systematically, one of weight w floor(n w) or ceil(n w) times."""
        edges = (np.arange(n) + float(torch.rand(()))) / n
        index = np.searchsorted(np.cumsum(self.weights), edges).clip(max=len(self.weights) - 1)
        return torch.as_tensor(index)


def resampled(weighted: Weighted, site: str) -> dict[str, Tensor]:
    """Draws with one particle per cluster, picked by weight; sites have shape "n 1 ..."."""
    latents = {
        name: value.squeeze(1) if value.dim() > 2 and value.shape[1] == 1 else value
        for name, value in weighted.latents.items()
    }
    if site:
        value = weighted.latents[site]  # draws particles clusters terms
        gumbel = -torch.log(-torch.log(torch.rand_like(weighted.particles)))
        index = (weighted.particles + gumbel).argmax(1)
        value = value.expand(len(index), *value.shape[1:])
        picked = index[:, None, :, None].expand(-1, 1, -1, value.shape[-1])
        latents[site] = value.gather(1, picked)[:, 0]
    return latents
