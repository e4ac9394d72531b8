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
    "nuts": "Hamiltonian Monte Carlo in the guide's coordinates, the network held",
}


@dataclass(frozen=True, eq=False)
class RefinedDraws:
    """Posterior draws that replace the guide's.

    Attributes
    ----------
    method : str
        "psis" or "nuts".
    pool : mapping of str to Tensor
        Draws of all latent sites, shaped as a guide's, from which they are taken.
    quality : mapping of str to float
        k_hat and ess (psis); r_hat, ess and divergences (nuts): the worst over all sites.
    index : Int[Tensor, "draws"], optional
        Which of the pool they are, one by one; all of it by default.
    """

    method: str
    pool: Mapping[str, Tensor]
    quality: Mapping[str, float] = field(default_factory=dict)
    # Very many clusters' effects are not to be held twice, as they were proposed and resampled.
    index: Int[Tensor, " draws"] | None = None

    def __len__(self) -> int:
        return len(self._index())

    @property
    def latents(self) -> dict[str, Tensor]:
        """Draws of all latent sites, shaped as a guide's."""
        return selected(self.pool, self._index())

    def choose(self, n: int) -> dict[str, Tensor]:
        """n of the draws, at random; without repeats where there are enough."""
        size = len(self)
        chosen = torch.randperm(size)[:n] if n <= size else torch.randint(size, (n,))
        return selected(self.pool, self._index()[chosen])

    def _index(self) -> Int[Tensor, " draws"]:
        if self.index is not None:
            return self.index
        return torch.arange(max(one.shape[0] for one in self.pool.values() if one.dim() > 1))


@dataclass(frozen=True, eq=False)
class ImportanceDraws:
    """Proposed draws with nested importance weights.

    Attributes
    ----------
    latents : mapping of str to Tensor
        All latent sites, nested effects already resampled within each draw.
    log_weights : Float[ndarray, "draws"]
        Pareto-smoothed, normalised.
    k_hat : float
        Shape of the weights' tail (Vehtari et al. 2024): below 0.7 they can be relied upon.
    clusters : Float[ndarray, "draws watched"]
        log p(y_k | theta) of the nested clusters whose k-hat is not missing.
    cluster_k_hat : Float[ndarray, "clusters"]
        The same shape for the particles of each cluster, over all draws; missing (nan) in all
        but 500 clusters, drawn at random, where there are more.
    """

    latents: Mapping[str, Tensor]
    log_weights: Float[np.ndarray, " draws"]
    k_hat: float
    clusters: Float[np.ndarray, "draws watched"]
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
        """Which draws are n of equal weight."""
        # Systematic: a draw of weight w comes floor(n w) or ceil(n w) times.
        edges = (np.arange(n) + float(torch.rand(()))) / n
        index = np.searchsorted(np.cumsum(self.weights), edges).clip(max=len(self.weights) - 1)
        return torch.as_tensor(index)


def resampled(weighted: Weighted, site: str) -> dict[str, Tensor]:
    """One particle of every cluster in every draw, and the draws' own dimensions "n 1 ..."."""
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
