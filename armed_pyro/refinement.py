"""Draws better than the guide's own: importance weighted, or by NUTS in its coordinates."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import torch
from jaxtyping import Float
from pyro.infer import MCMC, NUTS
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from rich.progress import Progress
from torch import Tensor

from armed_pyro.arvizstats import pareto_smooth
from armed_pyro.guides import joined
from armed_pyro.importance import Weighted, weigh
from armed_pyro.modulations import modulates, row_cost
from armed_pyro.noise import Noise, gaussian_noise, proposal_noise
from armed_pyro.rows import Rows

if TYPE_CHECKING:
    from armed_pyro.fitted import Fit

__all__ = [
    "METHODS",
    "ImportanceDraws",
    "RefinedDraws",
    "importance_draws",
    "refinable",
    "refine",
]

METHODS: Mapping[str, str] = {
    "psis": "importance-weighted draws of the guide, Pareto smoothed",
    "nuts": "Hamiltonian Monte Carlo in the guide's coordinates, the network held",
}
# Log-likelihoods (rows times draws times particles): in all, in one block, and the number at
# which even the fewest draws take too long.
MOST_EVALUATIONS, BLOCK, TOO_MANY = 2**26, 2**20, 2**31
MOST_VALUES = 2**24  # in the draws of all sites
PARTICLES, MOST_CLUSTERS = 16, 500
MOST_DRAWS, FEWEST_DRAWS = 4000, 200


@dataclass(frozen=True, eq=False)
class RefinedDraws:
    """Posterior draws that replace the guide's.

    Attributes
    ----------
    method : str
        "psis" or "nuts".
    latents : mapping of str to Tensor
        Draws of all latent sites, shaped as a guide's.
    quality : mapping of str to float
        k_hat and ess (psis); r_hat, ess and divergences (nuts): the worst over all sites.
    """

    method: str
    latents: Mapping[str, Tensor]
    quality: Mapping[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return max(value.shape[0] for value in self.latents.values() if value.dim() > 1)

    def choose(self, n: int) -> dict[str, Tensor]:
        """n of the draws, at random; without repeats where there are enough."""
        size = len(self)
        index = torch.randperm(size)[:n] if n <= size else torch.randint(size, (n,))
        return {
            name: value[index.to(value.device)] if value.dim() > 1 else value
            for name, value in self.latents.items()
        }


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
    clusters : Float[ndarray, "draws clusters"]
        log p(y_k | theta) of each nested cluster.
    cluster_k_hat : Float[ndarray, "clusters"]
        The same shape for the particles of each cluster, over all draws; missing (nan) in all
        but 500 clusters, drawn at random, where there are more.
    """

    latents: Mapping[str, Tensor]
    log_weights: Float[np.ndarray, " draws"]
    k_hat: float
    clusters: Float[np.ndarray, "draws clusters"]
    cluster_k_hat: Float[np.ndarray, " clusters"]

    @property
    def weights(self) -> Float[np.ndarray, " draws"]:
        """Normalised weights."""
        return np.exp(self.log_weights)

    @property
    def effective(self) -> float:
        """Effective sample size, 1 / sum of squared weights."""
        return float(1 / np.sum(self.weights**2))

    def resample(self, n: int) -> dict[str, Tensor]:
        """n draws of equal weight."""
        # Systematic: a draw of weight w comes floor(n w) or ceil(n w) times.
        edges = (np.arange(n) + float(torch.rand(()))) / n
        index = np.searchsorted(np.cumsum(self.weights), edges).clip(max=len(self.weights) - 1)
        chosen = torch.as_tensor(index)
        return {
            name: value[chosen.to(value.device)] if value.dim() > 1 else value
            for name, value in self.latents.items()
        }


def refinable(fit: Fit) -> bool:
    """Whether there is something latent, and few enough rows to weigh its draws."""
    latent = bool(fit.guide.noise_shapes(fit.model.clusters()))
    per_draw = fit.data.n_rows * _particles(fit) * row_cost(fit.model)
    return latent and FEWEST_DRAWS * per_draw < TOO_MANY


def _particles(fit: Fit) -> int:
    # One where the guide's conditional was found to be exact.
    several = fit.guide.nested() is not None and fit.history.particles > 1
    return max(PARTICLES, fit.history.particles) if several else 1


def refine(
    fit: Fit,
    method: str = "psis",
    *,
    draws: int = 4000,
    chains: int = 4,
    warmup: int = 500,
    seed: int | None = None,
    progress: bool = True,
) -> Fit:
    """The fit with better posterior draws, its network held.

    Parameters
    ----------
    fit : Fit
        The fit.
    method : {"psis", "nuts"}
        Importance-weighted draws of the guide: the weights are nested, a few particles for each
        cluster within each draw of the hyperparameters, and Pareto smoothed. Or the No-U-Turn
        sampler in the coordinates in which the guide is standard normal, started from it: slower
        by far, and right even where the guide is not (k-hat above 0.7).
    draws : int
        Draws to keep, fewer where there are very many clusters; with NUTS over all chains.
    chains, warmup : int
        Of NUTS.
    seed : int, optional
        The fit's own by default.
    progress : bool
        Whether to show a progress bar.

    Returns
    -------
    Fit
        Whose tables, predictions and DataTree use these draws; their quality is in
        ``fit.refined.quality``, and `Fit.diagnostics` judges them.

    Raises
    ------
    ValueError
        If there is no such method, or nothing latent to refine.

    Examples
    --------
    ``fit(model, data).refine().variance_components()``

    References
    ----------
    Vehtari et al. (2024), "Pareto smoothed importance sampling", JMLR 25(72).
    Hoffman et al. (2019), "NeuTra-lizing bad geometry in Hamiltonian Monte Carlo".
    """
    if method not in METHODS:
        known = "; ".join(f"{name}: {meaning}" for name, meaning in METHODS.items())
        raise ValueError(f"unknown method {method!r}: choose one of {known}")
    if draws < 2 or chains < 1 or warmup < 1:
        raise ValueError(
            f"draws must be at least 2, chains and warmup at least 1, found {draws}, {chains}, "
            f"{warmup}"
        )
    if not fit.guide.noise_shapes(fit.model.clusters()):
        raise ValueError("there is nothing to refine: the program has no latent site")
    seed = fit.seed if seed is None else seed
    if method == "psis":
        same = seed == fit.seed
        weighted = fit.importance if same else importance_draws(fit, seed=seed, progress=progress)
        with fit.model.seeded(seed + 5):
            latents = weighted.resample(min(draws, _affordable(fit)))
        quality = {"k_hat": weighted.k_hat, "ess": weighted.effective}
    else:
        latents, quality = _nuts(fit, math.ceil(draws / chains), chains, warmup, seed, progress)
    better = replace(fit, refined=RefinedDraws(method, latents, quality))
    if "importance" in vars(fit):
        vars(better)["importance"] = fit.importance  # the guide is the same
    return better


def importance_draws(
    fit: Fit, *, seed: int | None = None, progress: bool = False
) -> ImportanceDraws:
    """Proposals made with the guide, and their importance weights, nested by cluster.

    As many as 4,000, fewer where the data are large, of hyperparameters with tails heavier than
    the guide's: then even of 200 weights no tail looks heavy by chance.
    """
    model, guide = fit.model, fit.guide
    source = model.compute(model.encode(fit.data))
    rows, seed = source.all(), fit.seed if seed is None else seed
    nested = guide.nested()
    particles = _particles(fit)
    per_draw = max(1, len(rows)) * particles * row_cost(model)
    n = max(FEWEST_DRAWS, min(MOST_DRAWS, MOST_EVALUATIONS // per_draw, _affordable(fit)))
    size = max(1, min(n, BLOCK // per_draw))
    latents: list[dict[str, Tensor]] = []
    totals, clusters, tails = [], [], []
    kept = max(1, min(n, 4000 // particles))  # draws from which the clusters' tails are read
    with model.seeded(seed + 4), Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("importance weights", total=n)
        for start in range(0, n, size):
            count = min(size, n - start)
            noise = proposal_noise(
                guide, rows, count, particles, model.reference(), stretch=particles > 1
            )
            weighted = weigh(model, guide, rows, noise)
            totals.append(weighted.total())
            clusters.append(weighted.clusters())
            if start < kept:
                tails.append((weighted.particles - clusters[-1][:, None]).cpu())
            latents.append(_resampled(weighted, nested.effect_site if nested else ""))
            bar.advance(task, count)
    log_weights, k_hat = pareto_smooth(torch.cat(totals).double().cpu().numpy()[None])
    # How clusters fare in draws that hardly count does not matter.
    counts = torch.as_tensor(n * np.exp(log_weights[0, :kept]) > 0.3)
    if not counts.any():
        counts = torch.ones_like(counts)
    return ImportanceDraws(
        joined(latents),
        log_weights[0],
        float(k_hat[0]),
        torch.cat(clusters).double().cpu().numpy(),
        _cluster_k_hat(torch.cat(tails)[:kept][counts]) if nested is not None else np.zeros(0),
    )


def _affordable(fit: Fit) -> int:
    effects = [
        len(factor.terms) * len(fit.model.data_facts().levels[factor.name])
        for factor in fit.model.factors
    ]
    if modulates(fit.model):
        return FEWEST_DRAWS
    return max(FEWEST_DRAWS, MOST_VALUES // max(1, sum(effects)))


def _cluster_k_hat(log_ratios: Float[Tensor, "draws particles clusters"]) -> np.ndarray:
    # Normalised within a draw: only how the particles of one cluster compare matters.
    clusters = log_ratios.shape[2]
    chosen = np.random.default_rng(0).permutation(clusters)[:MOST_CLUSTERS]
    k_hat = np.full(clusters, np.nan)
    k_hat[chosen] = -np.inf
    if log_ratios.shape[1] > 1:
        k_hat[chosen] = pareto_smooth(log_ratios[..., chosen].flatten(0, 1).T.double().numpy())[1]
    return k_hat


def _resampled(weighted: Weighted, site: str) -> dict[str, Tensor]:
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


def _nuts(
    fit: Fit, draws: int, chains: int, warmup: int, seed: int, progress: bool
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Draws of all chains one after the other, and how well they mixed."""
    model, guide = fit.model, fit.guide
    rows = model.compute(model.encode(fit.data)).all()

    def potential(noise: dict[str, Tensor]) -> Tensor:
        weighted = weigh(model, guide, rows, Noise(noise, {}))
        squares = torch.stack([(one**2).sum() for one in noise.values()]).sum()
        return 0.5 * squares - weighted.total().sum()

    sampled, divergences = [], 0
    devices = [model.reference().device] if model.reference().is_cuda else []
    with (
        pyro.validation_enabled(False),
        torch.random.fork_rng(devices=devices),
        Progress(disable=not progress, transient=True) as bar,
    ):
        task = bar.add_task("NUTS", total=chains * (draws + warmup))
        for chain in range(chains):
            torch.manual_seed(seed + 101 * chain + 6)
            start = dict(gaussian_noise(guide, rows, 1, model.reference()).values)
            kernel = NUTS(potential_fn=potential, target_accept_prob=0.85, max_tree_depth=7)

            def advance(*_: Any) -> None:
                bar.advance(task)

            mcmc = MCMC(
                kernel,
                draws,
                warmup,
                initial_params=start,
                disable_progbar=True,
                hook_fn=advance,
            )
            mcmc.run()
            sampled.append(mcmc.get_samples())
            divergences += len(mcmc.diagnostics()["divergences"]["chain 0"])
    noise = {name: torch.stack([chain[name] for chain in sampled]) for name in sampled[0]}
    flat = {name: value.flatten(0, 1)[:, 0] for name, value in noise.items()}
    latents = joined(list(_latents(fit, rows, flat)))
    quality = _mixing(latents, chains) | {"divergences": float(divergences)}
    return latents, quality


def _latents(fit: Fit, rows: Rows, noise: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """What the guide makes of this noise, in blocks of draws."""
    n = len(next(iter(noise.values())))
    size = max(1, BLOCK // max(1, len(rows)))
    for start in range(0, n, size):
        part = {name: value[start : start + size] for name, value in noise.items()}
        with torch.no_grad(), pyro.validation_enabled(False):
            weighted = weigh(fit.model, fit.guide, rows, Noise(part, {}))
        nested = fit.guide.nested()
        yield _resampled(weighted, nested.effect_site if nested else "")


def _mixing(latents: Mapping[str, Tensor], chains: int) -> dict[str, float]:
    r_hat, ess = 1.0, math.inf
    for value in latents.values():
        if value.dim() > 1:
            by_chain = value.unflatten(0, (chains, -1)).flatten(2).double()
            moves = by_chain.flatten(0, 1).std(0) > 0
            r_hat = max(r_hat, float(split_gelman_rubin(by_chain, 0, 1)[moves].max()))
            ess = min(ess, float(effective_sample_size(by_chain, 0, 1)[moves].min()))
    return {"r_hat": r_hat, "ess": ess}
