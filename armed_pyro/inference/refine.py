"""Draws that improve on the guide: importance weighted, or by NUTS in its coordinates."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import pyro
import torch
from pyro.infer import MCMC, NUTS
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from rich.progress import Progress
from torch import Tensor

from armed_pyro._messages import progress_console
from armed_pyro.guides.base import joined, selected
from armed_pyro.guides.noise import Noise, gaussian_noise
from armed_pyro.inference.importance_sampling import BLOCK, affordable, importance_draws
from armed_pyro.inference.nested_weights import resampled, weigh
from armed_pyro.inference.posterior import METHODS, ImportanceDraws, Posterior, RefinedDraws
from armed_pyro.rows.batch import Rows

__all__ = ["duration", "nuts_seconds", "refine"]


# Gradients of one NUTS transition in the guide's coordinates, where the posterior is nearly
# standard normal: trees of depth 3 or 4 with the guide's usual errors.
GRADIENTS = 12


def refine(
    posterior: Posterior,
    method: str = "psis",
    *,
    draws: int = 4000,
    joint: int | None = None,
    chains: int = 4,
    warmup: int = 500,
    seed: int | None = None,
    progress: bool = True,
) -> Posterior:
    """The posterior with better draws, at the same network weights; see `Fit.refine`.

    Where weights do not depend on random effects, these are drawn for the first `joint` draws; by
    default for all.
    """
    if method not in METHODS:
        known = "; ".join(f"{name}: {meaning}" for name, meaning in METHODS.items())
        raise ValueError(f"unknown method {method!r}: choose one of {known}")
    if draws < 2 or chains < 1 or warmup < 1:
        raise ValueError(
            f"draws must be at least 2, chains and warmup at least 1, found {draws}, {chains}, "
            f"{warmup}"
        )
    if not posterior.guide.noise_shapes(posterior.model.clusters()):
        raise ValueError("there is nothing to refine: the program has no latent site")
    seed = posterior.seed if seed is None else seed
    weighted = posterior.importance if seed == posterior.seed else None
    if posterior.sampled and (method == "nuts" or weighted is None):
        raise ValueError(
            f"the fit keeps {posterior.data.n_rows} of its {posterior.model.data_facts().n_rows} "
            "rows, but refining its draws needs all of them: fit with refine=True"
        )
    if method == "psis":
        if weighted is None:
            weighted = importance_draws(posterior, seed=seed, progress=progress)
        if seed == posterior.seed:
            posterior = replace(posterior, importance=weighted)
        with posterior.model.seeded(seed + 5):
            quality = {"k_hat": weighted.k_hat, "ess": weighted.effective}
            most = affordable(posterior)
            if any(f.effect_site not in weighted.latents for f in posterior.model.factors):
                pool = _with_effects(posterior, weighted, draws, min(joint or draws, most))
                refined = RefinedDraws(method, pool, quality)
            else:
                index = weighted.resample(min(draws, most))
                refined = RefinedDraws(method, weighted.latents, quality, index)
    else:
        pool, quality = _nuts(posterior, math.ceil(draws / chains), chains, warmup, seed, progress)
        refined = RefinedDraws(method, pool, quality)
    return replace(posterior, refined=refined)


def _with_effects(
    posterior: Posterior, weighted: ImportanceDraws, draws: int, joint: int
) -> dict[str, Tensor]:
    """Resampled hyperparameters, and random effects for the first `joint` of them."""
    # In random order, as neighbours may be copies of a draw.
    index = weighted.resample(draws)
    latents = selected(weighted.latents, index[torch.randperm(draws)])
    effects = [factor.effect_site for factor in posterior.model.factors]
    rows, size, pieces = posterior.model.clusters(), posterior.guide.most_draws(), []
    with pyro.validation_enabled(False):
        for start in range(0, min(joint, draws), size):
            part = selected(latents, slice(start, min(start + size, joint)))
            drawn = posterior.guide.effects_given(part, rows)
            pieces.append({site: drawn[site] for site in effects})
    return latents | joined(pieces)


def _nuts(
    posterior: Posterior, draws: int, chains: int, warmup: int, seed: int, progress: bool
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Draws of all chains, one chain after the other, and measures of their mixing."""
    model, guide = posterior.model, posterior.guide
    rows = model.compute(model.encode(posterior.data)).all()
    potential = partial(_potential, posterior, rows)
    sampled, divergences = [], 0
    devices = [model.reference().device] if model.reference().is_cuda else []
    with (
        pyro.validation_enabled(False),
        torch.random.fork_rng(devices=devices),
        Progress(console=progress_console(), disable=not progress, transient=True) as bar,
    ):
        task = bar.add_task("NUTS", total=chains * (draws + warmup))
        for chain in range(chains):
            torch.manual_seed(seed + 101 * chain + 6)
            start = dict(gaussian_noise(guide, rows, 1, model.reference()).values)
            kernel = NUTS(potential_fn=potential, target_accept_prob=0.85, max_tree_depth=7)
            mcmc = MCMC(
                kernel,
                draws,
                warmup,
                initial_params=start,
                disable_progbar=True,
                hook_fn=lambda *_: bar.advance(task),
            )
            mcmc.run()
            sampled.append(mcmc.get_samples())
            divergences += len(mcmc.diagnostics()["divergences"]["chain 0"])
    noise = {name: torch.cat([chain[name] for chain in sampled])[:, 0] for name in sampled[0]}
    nested, blocks = guide.nested(), []
    size = max(1, BLOCK // max(1, len(rows)))
    for values in zip(*(value.split(size) for value in noise.values()), strict=True):
        block = Noise(dict(zip(noise, values, strict=True)), {})
        with torch.no_grad(), pyro.validation_enabled(False):
            weighted = weigh(model, guide, rows, block)
        blocks.append(resampled(weighted, nested.effect_site if nested else ""))
    latents = joined(blocks)
    return latents, _mixing(latents, chains) | {"divergences": float(divergences)}


def _potential(posterior: Posterior, rows: Rows, noise: dict[str, Tensor]) -> Tensor:
    """Minus the log-density of the noise from which the guide makes the latent sites."""
    weighted = weigh(posterior.model, posterior.guide, rows, Noise(noise, {}))
    squares = torch.stack([(value**2).sum() for value in noise.values()]).sum()
    return 0.5 * squares - weighted.total().sum()


def nuts_seconds(
    posterior: Posterior, *, draws: int = 4000, chains: int = 4, warmup: int = 500
) -> float:
    """Expected seconds of ``refine(posterior, "nuts")``, from the time of a few gradients.

    Transitions take more gradients where the guide is far from the posterior: the time may be
    several times longer then.

    Examples
    --------
    ``duration(nuts_seconds(fit.posterior))``
    """
    rows = posterior.model.compute(posterior.model.encode(posterior.data)).all()
    seconds = list[float]()
    with posterior.model.seeded(posterior.seed), pyro.validation_enabled(False):
        noise = gaussian_noise(posterior.guide, rows, 1, posterior.model.reference()).values
        for _ in range(4):  # the first is slower
            start = time.perf_counter()
            with torch.enable_grad():
                point = {k: value.clone().requires_grad_() for k, value in noise.items()}
                _potential(posterior, rows, point).backward()
            seconds.append(time.perf_counter() - start)
    return min(seconds) * GRADIENTS * (math.ceil(draws / chains) + warmup) * chains


def duration(seconds: float) -> str:
    """A time in words, to the precision of an estimate.

    Examples
    --------
    >>> duration(4.2), duration(75), duration(10_000)
    ('10 seconds', '2 minutes', '3 hours')
    """
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds > 1.2 * size:
            return f"{max(2, round(seconds / size))} {unit}"
    return f"{10 * math.ceil(seconds / 10)} seconds"


def _mixing(latents: Mapping[str, Tensor], chains: int) -> dict[str, float]:
    r_hat, ess = 1.0, math.inf
    for value in latents.values():
        if value.dim() > 1:
            by_chain = value.unflatten(0, (chains, -1)).flatten(2).double()
            moves = by_chain.flatten(0, 1).std(0) > 0
            r_hat = max(r_hat, float(split_gelman_rubin(by_chain, 0, 1)[moves].max()))
            ess = min(ess, float(effective_sample_size(by_chain, 0, 1)[moves].min()))
    return {"r_hat": r_hat, "ess": ess}
