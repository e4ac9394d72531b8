"""Draws from a fitted guide with importance weights, nested by cluster."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import cast

import numpy as np
import pyro
import torch
from jaxtyping import Float, Int
from rich.progress import Progress
from torch import Tensor

from armed_pyro._messages import progress_console
from armed_pyro.guides.base import Guide, joined
from armed_pyro.guides.closed_form import MarginalLikelihood, cost
from armed_pyro.guides.noise import gaussian_noise, heavy_noise, proposal_noise
from armed_pyro.inference.marginal_weights import (
    exact_likelihood,
    joint_draws,
    marginal_draws,
)
from armed_pyro.inference.nested_weights import Weighted, nested_from, resampled, weigh
from armed_pyro.inference.posterior import ImportanceDraws, Posterior
from armed_pyro.inference.psis import pareto_smooth
from armed_pyro.program.model import MixedEffects
from armed_pyro.program.predictor import modulates, row_cost
from armed_pyro.rows.passes import Pieces
from armed_pyro.rows.source import RowSource

__all__ = [
    "BLOCK",
    "affordable",
    "efficient",
    "importance_draws",
    "n_effects",
    "refinable",
    "settled",
    "weighed",
]

# Log-likelihoods (rows times draws times particles): in total, in one block of draws, and the total
# at which even the fewest draws take too long.
MOST_EVALUATIONS, BLOCK, TOO_MANY = 2**26, 2**20, 2**32
# Log-likelihoods of one draw beyond which the rows are read in pieces, each for all draws at once;
# log-likelihoods of one piece.
MOST_AT_ONCE, PIECE = 2**21, 2**21
MOST_VALUES = 2**24  # values in the draws of all random effects
MOST_WORK = 2**38  # multiplications of all draws
MOST_CLOSED = 2**29  # values in the closed forms of all draws
PARTICLES, MOST_CLUSTERS = 16, 500
MOST_DRAWS, FEWEST_DRAWS = 4000, 200
# Draws of theta at the mode by which its weights are judged; the largest k-hat and the smallest
# share of effective draws of a guide that need not be trained.
TRIED, SMALL_K_HAT, EFFICIENT = 1000, 0.3, 0.5
# Multiplications that are free: 1,000 draws with a matrix of 300 random effects, or 1,600 draws of
# 1,700 clusters with two terms, take 1 to 3 s. Beyond them draws are weighed until the Monte Carlo
# error of the mean of every hyperparameter is below ACCURATE posterior sds, looked at every
# CHECKED draws.
FREE_WORK, CHECKED, ACCURATE = 2**33, 50, 0.05
# Draws at which clusters are left out if these draws exceed FREE_WORK.
FEW_LEFT_OUT = 100
# Draws at which clusters are left out, and rows of these clusters, where theta alone is weighed.
LEFT_OUT_DRAWS, MOST_WATCHED = 1000, 2**14


def refinable(posterior: Posterior, source: RowSource | None = None) -> bool:
    """Whether importance weights exist or can be computed in acceptable time.

    They need a latent site and all training rows: as `source` if the fit keeps only a sample.
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
    guide = posterior.guide
    grouped = guide.nested() is not None or guide.particles() is not None
    several = grouped and posterior.history.particles > 1
    return max(PARTICLES, posterior.history.particles) if several else 1


def importance_draws(
    posterior: Posterior,
    source: RowSource | None = None,
    closed: MarginalLikelihood | None = None,
    *,
    seed: int | None = None,
    progress: bool = False,
) -> ImportanceDraws:
    """Up to 4,000 draws from the guide, and their importance weights, nested by cluster.

    If log p(y | theta) has a closed form, 4,000 draws of the hyperparameters are weighed without a
    row. Of crossed factors with many random effects, only as many draws are weighed as bring the
    Monte Carlo error of every hyperparameter's mean below 5% of its posterior sd. Otherwise large
    data get fewer draws, but at least 200. The proposal of the hyperparameters has heavier tails
    than the guide; otherwise the tail of as few as 200 weights looks heavy by chance.

    `source` holds the training rows with the frozen network's outputs, by default computed anew,
    and `closed` is the closed form of these rows, if it is already known.
    """
    model, guide = posterior.model, posterior.guide
    source = model.compute(model.encode(posterior.data)) if source is None else source
    seed = posterior.seed if seed is None else seed
    closed = exact_likelihood(model, guide, source) if closed is None else closed
    if closed is not None:
        return _marginal(posterior, source, closed, seed)
    particles = _particles(posterior)
    per_draw = max(1, len(source)) * particles * row_cost(model)
    by_work = MOST_WORK // max(1, guide.work())
    by_rows = MOST_EVALUATIONS // per_draw
    n = max(FEWEST_DRAWS, min(MOST_DRAWS, by_rows, by_work, affordable(posterior)))
    size, rows_at_once = max(1, min(n, BLOCK // per_draw, guide.most_draws())), len(source)
    if per_draw > MOST_AT_ONCE and guide.particles() is None:
        size, rows_at_once = n, max(1, PIECE // (n * particles * row_cost(model)))
    pieces = Pieces.of(source, rows_at_once, guide.nested_name())
    collected = _Collected(posterior, n, particles)
    with (
        model.seeded(seed + 4),
        Progress(console=progress_console(), disable=not progress, transient=True) as bar,
    ):
        task = bar.add_task("importance weights", total=n * len(pieces.shares))
        for start in range(0, n, size):
            draws = slice(start, min(start + size, n))
            for _ in collected.weigh(pieces, draws):
                bar.advance(task, draws.stop - draws.start)
    return collected.smoothed()


def settled(latents: Mapping[str, Tensor], totals: Float[Tensor, " draws"]) -> bool:
    r"""Whether the means of all hyperparameters are known to 5% of their posterior sds.

    .. math:: \Big(\sum_s w_s^2 (h_s - \bar h)^2\Big)^{1/2} < 0.05
        \Big(\sum_s w_s (h_s - \bar h)^2\Big)^{1/2}, \quad w_s \propto \exp(t_s)

    for each element h of the sites of `latents` with one value per draw; t are `totals`.
    """
    weights = torch.softmax(totals.double(), 0)[:, None]
    for value in latents.values():
        if value.dim() > 1 and value.shape[1] == 1:
            flat = value.double().flatten(1)
            squares = (flat - (weights * flat).sum(0)).square()
            error, variance = (weights.square() * squares).sum(0), (weights * squares).sum(0)
            if bool((error > ACCURATE**2 * variance).any()):
                return False
    return True


def _marginal(
    posterior: Posterior, source: RowSource, closed: MarginalLikelihood, seed: int
) -> ImportanceDraws:
    """Weighted draws of the hyperparameters alone."""
    model, guide = posterior.model, posterior.guide
    size, blocks, totals = closed.most_draws(), list[dict[str, Tensor]](), list[Tensor]()
    most = max(FEWEST_DRAWS, min(MOST_DRAWS, MOST_CLOSED // closed.size))
    most = min(most, affordable(posterior)) if closed.work else most
    free, checked, done = _free_draws(closed), 0, 0
    with model.seeded(seed + 4), pyro.validation_enabled(False):
        noise, ratio = heavy_noise(guide, most, model.reference())
        for part, log_ratio in zip(noise.split(size), ratio.split(size), strict=True):
            drawn = joint_draws(model, guide, closed, part)
            totals.append(drawn.total - log_ratio)
            blocks.append(drawn.squeezed())
            done += len(part)
            if done >= max(free, checked + CHECKED):
                checked = done
                if settled(joined(blocks), torch.cat(totals)):
                    break
        log_weights, k_hat = pareto_smooth(torch.cat(totals).double().cpu().numpy()[None])
        weighted = ImportanceDraws(joined(blocks), log_weights[0], float(k_hat[0]))
        nested = guide.nested()
        if nested is None or not weighted.k_hat < 1:
            return weighted
        few = cost(closed) * LEFT_OUT_DRAWS > FREE_WORK
        index = weighted.resample(FEW_LEFT_OUT if few else LEFT_OUT_DRAWS)
        return _with_clusters(posterior, source, weighted, index, noise[index])


@torch.no_grad()
def efficient(model: MixedEffects, guide: Guide, closed: MarginalLikelihood) -> bool:
    """Whether weighted draws of the guide as it is are as good as those of a trained guide."""
    noise, ratio = heavy_noise(guide, TRIED, model.reference())
    with pyro.validation_enabled(False):
        totals = [
            marginal_draws(model, guide, closed, part).total
            for part in noise.split(closed.most_draws())
        ]
    log_weights, k_hat = pareto_smooth((torch.cat(totals) - ratio).double().cpu().numpy()[None])
    share = float(1 / np.square(np.exp(log_weights)).sum()) / TRIED
    return bool(k_hat[0] < SMALL_K_HAT) and share > EFFICIENT


def _free_draws(closed: MarginalLikelihood) -> int:
    """Draws that are weighed whatever their error."""
    return max(FEWEST_DRAWS, min(MOST_DRAWS, FREE_WORK // cost(closed)))


def _with_clusters(
    posterior: Posterior,
    source: RowSource,
    weighted: ImportanceDraws,
    index: Int[Tensor, " chosen"],
    theta_noise: Float[Tensor, "chosen 1 1 size"],
) -> ImportanceDraws:
    """Add log p(y_k | theta, outer effects) of watched clusters at the chosen draws."""
    model, guide, nested = posterior.model, posterior.guide, posterior.guide.nested_name()
    counts = source.counts[cast("str", nested)]
    most = min(MOST_CLUSTERS, len(counts), max(1, MOST_WATCHED * len(counts) // len(source)))
    watched = np.sort(np.random.default_rng(0).permutation(len(counts))[:most])
    rows = source.whole_clusters(cast("str", nested), torch.as_tensor(watched).to(counts.device))
    size, pieces = max(1, min(guide.most_draws(), BLOCK // max(1, len(rows)))), list[Tensor]()
    for part in theta_noise.split(size):
        noise = gaussian_noise(guide, rows, len(part), model.reference())
        noise = replace(noise, values={**noise.values, "_theta": part})
        pieces.append(weigh(model, guide, rows, noise).clusters())
    k_hat = np.full(len(counts), np.nan)
    k_hat[watched] = -np.inf
    clusters = torch.cat(pieces).double().cpu().numpy()
    return replace(weighted, clusters=clusters, cluster_k_hat=k_hat, index=index)


class _Collected:
    """Log-weights and sites of all draws; log p(y_k | theta) and log-ratios of watched clusters.

    The arrays are allocated once and filled block by block. Joining blocks would take their memory
    twice, and small arrays kept between large freed ones would fragment the heap.
    """

    def __init__(self, posterior: Posterior, draws: int, particles: int) -> None:
        model, nested, like = posterior.model, posterior.guide.nested(), posterior.model.reference()
        self.model, self.guide, self.particles = model, posterior.guide, particles
        self.site = "" if nested is None else nested.effect_site
        self.n_clusters = 0 if nested is None else len(model.data_facts().levels[nested.name])
        # Clusters whose k-hat is computed.
        watched = np.random.default_rng(0).permutation(self.n_clusters)[:MOST_CLUSTERS]
        self.watched = torch.as_tensor(np.sort(watched))
        self.totals, self.clusters = like.new_zeros(draws), like.new_zeros(draws, len(watched))
        kept = max(1, min(draws, 4000 // particles))  # draws whose particles give the k-hats
        self.tails = torch.zeros(kept, particles, len(watched), dtype=like.dtype)
        self.latents: dict[str, Tensor] = {}

    def weigh(self, pieces: Pieces, draws: slice) -> Iterator[None]:
        """Make these draws, and add up their log-weights piece by piece of the rows."""
        count, like, first = draws.stop - draws.start, self.model.reference(), None
        several = self.particles > 1
        for rows, chosen, share in zip(pieces.read(), pieces.clusters, pieces.shares, strict=True):
            noise = proposal_noise(self.guide, rows, count, self.particles, like, stretch=several)
            # All sites but the nested effects have the same draws in every piece.
            first = first or noise
            noise = nested_from(noise, self.site, first)
            weighted = weigh(self.model, self.guide, rows, noise)
            self.totals[draws] += share * weighted.total()
            self._put(draws, chosen, weighted)
            yield

    def _put(self, draws: slice, chosen: Int[Tensor, " chosen"] | None, weighted: Weighted) -> None:
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

    def smoothed(self) -> ImportanceDraws:
        """The draws with Pareto-smoothed weights, and the k-hat of each watched cluster."""
        log_weights, k_hat = pareto_smooth(self.totals.double().cpu().numpy()[None])
        # Draws of negligible weight do not matter: their particles must not set a cluster's k-hat.
        counts = torch.as_tensor(len(self.totals) * np.exp(log_weights[0, : len(self.tails)]) > 0.3)
        tails = self.tails[counts] if counts.any() else self.tails
        by_cluster, watched = np.full(self.n_clusters, np.nan), self.watched.numpy()
        by_cluster[watched] = -np.inf
        if self.particles > 1 and len(watched):
            by_cluster[watched] = pareto_smooth(tails.flatten(0, 1).T.double().numpy())[1]
        clusters = self.clusters.double().cpu().numpy()
        return ImportanceDraws(self.latents, log_weights[0], float(k_hat[0]), clusters, by_cluster)


def affordable(posterior: Posterior) -> int:
    """Number of draws of all clusters' random effects that fit into memory."""
    model = posterior.model
    if modulates(model):
        return FEWEST_DRAWS
    return max(FEWEST_DRAWS, MOST_VALUES // max(1, n_effects(model)))


def n_effects(model: MixedEffects) -> int:
    """Number of random effects."""
    levels = model.data_facts().levels
    return sum(len(factor.terms) * len(levels[factor.name]) for factor in model.factors)
