"""Proposals of a fit's guide with importance weights, nested by cluster."""

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
from armed_pyro.rows.cluster_chunks import Pieces
from armed_pyro.rows.source import RowSource

__all__ = ["BLOCK", "affordable", "importance_draws", "refinable", "weighed"]


# Log-likelihoods (rows times draws times particles): in all, in one block, and the number at
# which even the fewest draws take too long.
MOST_EVALUATIONS, BLOCK, TOO_MANY = 2**26, 2**20, 2**32
# Rows times particles beyond which rows are weighed in pieces, for all draws at once.
MOST_AT_ONCE, PIECE = 2**21, 2**21
MOST_VALUES = 2**24  # in the draws of all sites
MOST_WORK = 2**38  # multiplications of all draws
PARTICLES, MOST_CLUSTERS = 16, 500
MOST_DRAWS, FEWEST_DRAWS = 4000, 200


def refinable(posterior: Posterior, source: RowSource | None = None) -> bool:
    """Whether there is something latent, and rows, but not too many to weigh its draws.

    `source` are the rows of a fit that only keeps a sample of them.
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
    """The posterior with the importance weights of its guide's draws, where they can be had."""
    if posterior.importance is not None or not refinable(posterior):
        return posterior
    return replace(posterior, importance=importance_draws(posterior))


def _particles(posterior: Posterior) -> int:
    # One where the guide's conditional was found to be exact.
    several = posterior.guide.nested() is not None and posterior.history.particles > 1
    return max(PARTICLES, posterior.history.particles) if several else 1


def importance_draws(
    posterior: Posterior,
    source: RowSource | None = None,
    *,
    seed: int | None = None,
    progress: bool = False,
) -> ImportanceDraws:
    """Proposals made with the guide, and their importance weights, nested by cluster.

    As many as 4,000, fewer where the data are large, of hyperparameters with tails heavier than
    the guide's: then even of 200 weights no tail looks heavy by chance. `source` are the rows, if
    they are at hand already.
    """
    model, guide = posterior.model, posterior.guide
    source = model.compute(model.encode(posterior.data)) if source is None else source
    seed, particles = posterior.seed if seed is None else seed, _particles(posterior)
    per_draw = max(1, len(source)) * particles * row_cost(model)
    by_work = MOST_WORK // max(1, guide.work())
    n = max(
        FEWEST_DRAWS, min(MOST_DRAWS, MOST_EVALUATIONS // per_draw, affordable(posterior), by_work)
    )
    size, rows_at_once = max(1, min(n, BLOCK // per_draw, guide.most_draws())), len(source)
    if per_draw > MOST_AT_ONCE:
        size, rows_at_once = n, max(1, PIECE // (n * particles * row_cost(model)))
    pieces = Pieces.of(source, rows_at_once, guide.nested_name())
    found = _Found.of(posterior, n, particles)
    with model.seeded(seed + 4), Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("importance weights", total=n * len(pieces.shares))
        for start in range(0, n, size):
            draws = slice(start, min(start + size, n))
            step = partial(bar.advance, task, draws.stop - draws.start)
            _weigh(posterior, pieces, found, draws, particles, step)
    log_weights, k_hat = pareto_smooth(found.totals.double().cpu().numpy()[None])
    # How clusters fare in draws that hardly count does not matter.
    counts = torch.as_tensor(n * np.exp(log_weights[0, : len(found.tails)]) > 0.3)
    if not counts.any():
        counts = torch.ones_like(counts)
    return ImportanceDraws(
        found.latents,
        log_weights[0],
        float(k_hat[0]),
        found.clusters.double().cpu().numpy(),
        _cluster_k_hat(posterior, found.tails[counts])
        if guide.nested() is not None
        else np.zeros(0),
    )


@dataclass(frozen=True)
class _Found:
    """Of all draws: log-weights, sites, and log p^(y_k | theta) and log-ratios of watched clusters.

    Made at once and filled in block by block and piece by piece: joined, the blocks would take
    their memory twice, and what is kept of each would lie between the large arrays that are freed,
    and keep theirs.
    """

    site: str  # of the nested effects
    n_clusters: int
    watched: Int[Tensor, " watched"]
    totals: Float[Tensor, " draws"]
    clusters: Float[Tensor, "draws watched"]
    tails: Float[Tensor, "kept particles watched"]
    latents: dict[str, Tensor]

    @classmethod
    def of(cls, posterior: Posterior, draws: int, particles: int) -> _Found:
        like, watched, nested = (
            posterior.model.reference(),
            _watched(posterior),
            posterior.guide.nested(),
        )
        k = 0 if nested is None else len(posterior.model.data_facts().levels[nested.name])
        kept = max(1, min(draws, 4000 // particles))  # from which the clusters' tails are read
        tails = torch.zeros(kept, particles, len(watched), dtype=like.dtype)
        totals, clusters = like.new_zeros(draws), like.new_zeros(draws, len(watched))
        site = "" if nested is None else nested.effect_site
        return cls(site, k, watched, totals, clusters, tails, {})

    def put(self, draws: slice, chosen: Int[Tensor, " chosen"] | None, weighted: Weighted) -> None:
        """Fill in some draws of all clusters, or of those chosen, one particle drawn of each."""
        here, mine = torch.arange(len(self.watched)), self.watched
        if chosen is not None:
            here = torch.isin(self.watched, chosen.cpu()).nonzero()[:, 0]
            mine = torch.searchsorted(chosen.cpu(), self.watched[here])
        place = slice(None) if chosen is None else chosen
        own, tails = weighted.clusters()[:, mine], self.tails[draws]
        self.clusters[draws, here] = own
        tails[..., here] = (weighted.particles[..., mine] - own[:, None])[: len(tails)].cpu()
        for name, value in resampled(weighted, self.site).items():
            if value.dim() < 2:  # known
                self.latents[name] = value
                continue
            nested = name == self.site
            if name not in self.latents:
                clusters = self.n_clusters if nested else value.shape[1]
                shape = (len(self.totals), clusters, *value.shape[2:])
                self.latents[name] = value.new_empty(shape)
            self.latents[name][draws, place if nested else slice(None)] = value


def _weigh(
    posterior: Posterior,
    pieces: Pieces,
    found: _Found,
    draws: slice,
    particles: int,
    advance: Callable[[], None],
) -> None:
    """Make these draws, and weigh them by all pieces of the rows."""
    model, guide, count = posterior.model, posterior.guide, draws.stop - draws.start
    shared: dict[str, Tensor] = {}
    outer: dict[str, Tensor] = {}
    for rows, chosen, share in zip(pieces.read(), pieces.clusters, pieces.shares, strict=True):
        noise = proposal_noise(
            guide, rows, count, particles, model.reference(), stretch=particles > 1
        )
        # The other sites' draws are the same for all pieces.
        if not shared:
            shared = {name: one for name, one in noise.values.items() if name != found.site}
            outer = {name: one for name, one in noise.log_ratio.items() if name != found.site}
        values, ratio = {**noise.values, **shared}, {**noise.log_ratio, **outer}
        weighted = weigh(model, guide, rows, Noise(values, ratio))
        found.totals[draws] += share * weighted.total()
        found.put(draws, chosen, weighted)
        advance()


def affordable(posterior: Posterior) -> int:
    """Draws that fit into memory, with the random effects of all clusters."""
    effects = [
        len(factor.terms) * len(posterior.model.data_facts().levels[factor.name])
        for factor in posterior.model.factors
    ]
    if modulates(posterior.model):
        return FEWEST_DRAWS
    return max(FEWEST_DRAWS, MOST_VALUES // max(1, sum(effects)))


def _watched(posterior: Posterior) -> Int[Tensor, " watched"]:
    """Clusters of the nested factor whose particles are looked at: all, or 500 at random."""
    nested = posterior.guide.nested()
    n = 0 if nested is None else len(posterior.model.data_facts().levels[nested.name])
    return torch.as_tensor(np.sort(np.random.default_rng(0).permutation(n)[:MOST_CLUSTERS]))


def _cluster_k_hat(
    posterior: Posterior, log_ratios: Float[Tensor, "draws particles watched"]
) -> np.ndarray:
    # Normalised within a draw: only how the particles of one cluster compare matters.
    nested, watched = posterior.guide.nested(), _watched(posterior).numpy()
    clusters = 0 if nested is None else len(posterior.model.data_facts().levels[nested.name])
    k_hat = np.full(clusters, np.nan)
    k_hat[watched] = -np.inf
    if log_ratios.shape[1] > 1:
        k_hat[watched] = pareto_smooth(log_ratios.flatten(0, 1).T.double().numpy())[1]
    return k_hat
