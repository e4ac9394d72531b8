"""Draws from a fitted guide with importance weights, nested by cluster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from rich.progress import Progress
from torch import Tensor

from armed_pyro.guides.noise import Noise, proposal_noise
from armed_pyro.inference.draws import ImportanceDraws, resampled
from armed_pyro.inference.nested_weights import Weighted, weigh
from armed_pyro.inference.posterior import Posterior
from armed_pyro.inference.psis import pareto_smooth
from armed_pyro.program.predictor import modulates, row_cost
from armed_pyro.rows.passes import Pieces
from armed_pyro.rows.source import RowSource

__all__ = ["BLOCK", "affordable", "importance_draws", "refinable", "weighed"]


# Log-likelihoods (rows times draws times particles): in total, in one block of draws, and the total
# at which even the fewest draws take too long.
MOST_EVALUATIONS, BLOCK, TOO_MANY = 2**26, 2**20, 2**32
# Log-likelihoods of one draw beyond which the rows are read in pieces, each for all draws at once;
# log-likelihoods of one piece.
MOST_AT_ONCE, PIECE = 2**21, 2**21
MOST_VALUES = 2**24  # values in the draws of all random effects
MOST_WORK = 2**38  # multiplications of all draws
PARTICLES, MOST_CLUSTERS = 16, 500
MOST_DRAWS, FEWEST_DRAWS = 4000, 200


def refinable(posterior: Posterior, source: RowSource | None = None) -> bool:
    """Whether importance weights exist or can be computed in acceptable time.

    They need a latent site and all training rows. A fit that keeps only a sample of the rows needs
    them as `source`.
    """
    if posterior.importance is not None:
        return True
    n = posterior.model.data_facts().n_rows
    if posterior.sampled and source is None:
        return False
    per_draw = n * _particles(posterior) * row_cost(posterior.model)
    many = per_draw > MOST_AT_ONCE and len(posterior.model.factors) > 1
    latent = bool(posterior.guide.noise_shapes(posterior.model.clusters()))
    return latent and not many and FEWEST_DRAWS * per_draw < TOO_MANY


def weighed(posterior: Posterior) -> Posterior:
    """The posterior with its importance weights, or unchanged if it is not `refinable`."""
    if posterior.importance is not None or not refinable(posterior):
        return posterior
    return replace(posterior, importance=importance_draws(posterior))


def _particles(posterior: Posterior) -> int:
    # Training chose one particle if the guide's conditional is exact; then one is enough here too.
    several = posterior.guide.nested() is not None and posterior.history.particles > 1
    return max(PARTICLES, posterior.history.particles) if several else 1


def importance_draws(
    posterior: Posterior,
    source: RowSource | None = None,
    *,
    seed: int | None = None,
    progress: bool = False,
) -> ImportanceDraws:
    """Up to 4,000 draws from the guide, and their importance weights, nested by cluster.

    Large data get fewer draws, but at least 200. The proposal of the hyperparameters has heavier
    tails than the guide; otherwise the tail of as few as 200 weights looks heavy by chance.

    Parameters
    ----------
    source : RowSource, optional
        The training rows with the frozen network's outputs; computed from `posterior.data` if None.
    seed : int, optional
        Seed of the draws; the posterior's by default.
    progress : bool
        Whether to show a progress bar.
    """
    model, guide = posterior.model, posterior.guide
    source = model.compute(model.encode(posterior.data)) if source is None else source
    seed, particles = posterior.seed if seed is None else seed, _particles(posterior)
    per_draw = max(1, len(source)) * particles * row_cost(model)
    by_work = MOST_WORK // max(1, guide.work())
    by_rows = MOST_EVALUATIONS // per_draw
    n = max(FEWEST_DRAWS, min(MOST_DRAWS, by_rows, by_work, affordable(posterior)))
    size, rows_at_once = max(1, min(n, BLOCK // per_draw, guide.most_draws())), len(source)
    if per_draw > MOST_AT_ONCE:
        size, rows_at_once = n, max(1, PIECE // (n * particles * row_cost(model)))
    pieces = Pieces.of(source, rows_at_once, guide.nested_name())
    collected = _Collected.of(posterior, n, particles)
    with model.seeded(seed + 4), Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("importance weights", total=n * len(pieces.shares))
        for start in range(0, n, size):
            draws = slice(start, min(start + size, n))
            step = partial(bar.advance, task, draws.stop - draws.start)
            _weigh(posterior, pieces, collected, draws, particles, step)
    log_weights, k_hat = pareto_smooth(collected.totals.double().cpu().numpy()[None])
    # Draws of negligible weight do not matter, so their particles must not set a cluster's k-hat.
    counts = torch.as_tensor(n * np.exp(log_weights[0, : len(collected.tails)]) > 0.3)
    if not counts.any():
        counts = torch.ones_like(counts)
    clusters = collected.clusters.double().cpu().numpy()
    by_cluster = _cluster_k_hat(posterior, collected.tails[counts])
    latents = collected.latents
    return ImportanceDraws(latents, log_weights[0], float(k_hat[0]), clusters, by_cluster)


@dataclass(frozen=True)
class _Collected:
    """Log-weights and sites of all draws; log p(y_k | theta) and log-ratios of watched clusters."""

    # The arrays are allocated once and filled block by block. Joining blocks would take their
    # memory twice, and small arrays kept between large freed ones would fragment the heap.
    site: str  # of the nested effects; empty without a nested factor
    n_clusters: int
    watched: Int[Tensor, " watched"]
    totals: Float[Tensor, " draws"]
    clusters: Float[Tensor, "draws watched"]
    tails: Float[Tensor, "kept particles watched"]
    latents: dict[str, Tensor]

    @classmethod
    def of(cls, posterior: Posterior, draws: int, particles: int) -> _Collected:
        nested, watched = posterior.guide.nested(), _watched(posterior)
        like = posterior.model.reference()
        kept = max(1, min(draws, 4000 // particles))  # draws whose particles give the k-hats
        tails = torch.zeros(kept, particles, len(watched), dtype=like.dtype)
        totals, clusters = like.new_zeros(draws), like.new_zeros(draws, len(watched))
        site = "" if nested is None else nested.effect_site
        return cls(site, _nested_clusters(posterior), watched, totals, clusters, tails, {})

    def put(self, draws: slice, chosen: Int[Tensor, " chosen"] | None, weighted: Weighted) -> None:
        """Fill in these draws for the chosen clusters (None: all), one resampled particle each."""
        target, source = torch.arange(len(self.watched)), self.watched
        if chosen is not None:
            target = torch.isin(self.watched, chosen.cpu()).nonzero()[:, 0]
            source = torch.searchsorted(chosen.cpu(), self.watched[target])
        place = slice(None) if chosen is None else chosen
        clusters, tails = weighted.clusters()[:, source], self.tails[draws]
        self.clusters[draws, target] = clusters
        ratios = weighted.particles[..., source] - clusters[:, None]
        tails[..., target] = ratios[: len(tails)].cpu()
        for name, value in resampled(weighted, self.site).items():
            if value.dim() < 2:  # a site with a known value has no dimension of draws
                self.latents[name] = value
                continue
            nested = name == self.site
            if name not in self.latents:
                width = self.n_clusters if nested else value.shape[1]
                shape = (len(self.totals), width, *value.shape[2:])
                self.latents[name] = value.new_empty(shape)
            self.latents[name][draws, place if nested else slice(None)] = value


def _weigh(
    posterior: Posterior,
    pieces: Pieces,
    collected: _Collected,
    draws: slice,
    particles: int,
    advance: Callable[[], None],
) -> None:
    """Make these draws, and add up their log-weights over all pieces of the rows."""
    model, guide, count = posterior.model, posterior.guide, draws.stop - draws.start
    shared: dict[str, Tensor] = {}
    outer: dict[str, Tensor] = {}
    for rows, chosen, share in zip(pieces.read(), pieces.clusters, pieces.shares, strict=True):
        noise = proposal_noise(
            guide, rows, count, particles, model.reference(), stretch=particles > 1
        )
        # All sites but the nested effects have the same draws in every piece.
        if not shared:
            shared = {k: v for k, v in noise.values.items() if k != collected.site}
            outer = {k: v for k, v in noise.log_ratio.items() if k != collected.site}
        values, ratio = {**noise.values, **shared}, {**noise.log_ratio, **outer}
        weighted = weigh(model, guide, rows, Noise(values, ratio))
        collected.totals[draws] += share * weighted.total()
        collected.put(draws, chosen, weighted)
        advance()


def affordable(posterior: Posterior) -> int:
    """Number of draws of all clusters' random effects that fit into memory."""
    model = posterior.model
    if modulates(model):
        return FEWEST_DRAWS
    levels = model.data_facts().levels
    effects = sum(len(factor.terms) * len(levels[factor.name]) for factor in model.factors)
    return max(FEWEST_DRAWS, MOST_VALUES // max(1, effects))


def _nested_clusters(posterior: Posterior) -> int:
    """Number of clusters of the nested factor; 0 without one."""
    nested = posterior.guide.nested_name()
    return 0 if nested is None else len(posterior.model.data_facts().levels[nested])


def _watched(posterior: Posterior) -> Int[Tensor, " watched"]:
    """Clusters of the nested factor whose k-hat is computed: all, or 500 at random."""
    n = _nested_clusters(posterior)
    return torch.as_tensor(np.sort(np.random.default_rng(0).permutation(n)[:MOST_CLUSTERS]))


def _cluster_k_hat(
    posterior: Posterior, log_ratios: Float[Tensor, "draws particles watched"]
) -> np.ndarray:
    """k-hat of the watched clusters' particles, nan for all others."""
    watched, k_hat = _watched(posterior).numpy(), np.full(_nested_clusters(posterior), np.nan)
    k_hat[watched] = -np.inf
    if log_ratios.shape[1] > 1:
        k_hat[watched] = pareto_smooth(log_ratios.flatten(0, 1).T.double().numpy())[1]
    return k_hat
