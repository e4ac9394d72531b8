"""Nested importance weights: of a guide's draws, and of each cluster's effects within a draw."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro import poutine
from torch import Tensor

from armed_pyro.guides.base import Guide, ParticleGroups, n_draws
from armed_pyro.guides.noise import Noise, NoiseMessenger, gaussian_noise, proposal_noise
from armed_pyro.program.model import MixedEffects
from armed_pyro.rows.batch import Rows

__all__ = ["Weighted", "bound_noise", "log_prior", "nested_from", "resampled", "weigh"]


@dataclass(frozen=True)
class Weighted:
    r"""S draws of all latent sites with M particles each of the nested factor's effects.

    Given theta (all sites but the nested effects) the clusters are independent, so a few particles
    estimate the likelihood of each cluster:

    .. math:: \hat p(y_k \mid \theta) = \frac{1}{M} \sum_m
        \frac{p(y_k \mid u_{km}, \theta) \, p(u_{km} \mid \theta)}{r(u_{km} \mid \theta)}

    `outer` is log p(theta) minus the log-density of theta under the proposal. Without a nested
    factor, the log-likelihood of all rows is added. `hyper` is its part -log q(theta), of the
    guide's site ``_theta``. `particles` are log-weights.

    References
    ----------
    Geffner and Domke (2022), "Variational inference with locally enhanced bounds for
    hierarchical models", ICML.
    """

    latents: dict[str, Tensor]  # "draws 1 ..."; nested effects "draws particles clusters terms"
    outer: Float[Tensor, " draws"]
    hyper: Float[Tensor, " draws"]
    particles: Float[Tensor, "draws particles clusters"]
    cluster_weight: Tensor | float  # of each cluster in a mini-batch
    # Each entry's place among the clusters, by site, if the guide has `ParticleGroups`.
    groups: Mapping[str, Tensor] = field(default_factory=dict)

    def clusters(self) -> Float[Tensor, "draws clusters"]:
        """Estimate of log p(y_k | theta) for every nested cluster."""
        if self.particles.shape[1] == 1:
            return self.particles[:, 0]
        return torch.logsumexp(self.particles, 1) - math.log(self.particles.shape[1])

    def total(self) -> Float[Tensor, " draws"]:
        """Log-weight of every draw; its expectation is a lower bound of the log evidence."""
        return self.outer + (self.cluster_weight * self.clusters()).sum(-1)


def weigh(model: MixedEffects, guide: Guide, rows: Rows, noise: Noise) -> Weighted:
    """Map noise to the guide's draws, and compute their log-weights.

    With several particles a mini-batch must hold whole clusters.
    """
    nested, outcome = guide.nested(), model.data_facts().outcome_name
    groups = guide.particles()
    sites = {} if groups is None else groups.sites
    site = "" if nested is None else nested.effect_site
    with NoiseMessenger(noise.values, held=noise.held):
        guide_trace = poutine.trace(guide).get_trace(rows)
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(rows)

    def counts(name: str, node: Any) -> bool:
        skipped = name in (site, outcome, *sites) or node["is_observed"]
        return not skipped and type(node["fn"]).__name__ != "_Subsample"

    guide_trace.compute_log_prob(counts)
    model_trace.compute_log_prob(counts)
    draws = max(value.shape[0] for value in noise.values.values()) if noise.values else 1
    zero = model.reference().new_zeros(draws)
    outer, hyper = zero, zero
    for node in model_trace.nodes.values():
        if "log_prob" in node:
            outer = outer + _by_draw(node["log_prob"])
    for name, node in guide_trace.nodes.items():
        if "log_prob" in node:
            outer = outer - _by_draw(node["log_prob"])
            if name == "_theta":
                hyper = hyper - _by_draw(node["log_prob"])
    for name, ratio in noise.log_ratio.items():
        if name != site and name not in sites:
            outer = outer - ratio.reshape(draws, -1).sum(-1)
    log_likelihood = _density(model_trace, outcome).log_prob(rows.outcome())
    for reconstruction in model.others:
        rebuilt = _density(model_trace, reconstruction.name).log_prob(rows.x)
        log_likelihood = log_likelihood + reconstruction.weight * rebuilt
    frequencies = model.frequencies(rows)
    if frequencies is not None:
        counted = log_likelihood.new_zeros(()).where(frequencies == 0, log_likelihood)
        log_likelihood = frequencies * counted
    latents = cast("dict[str, Tensor]", guide_trace.nodes["_RETURN"]["value"])
    if groups is not None:
        traces = model_trace, guide_trace
        particles = _grouped(groups, traces, noise, rows.scale * log_likelihood, rows)
        return Weighted(latents, outer, hyper, particles, 1.0, sites)
    if nested is None:
        # Without latent sites the log-likelihood has no dimension of draws.
        outer = outer + rows.scale * log_likelihood.sum(-1).reshape(-1)
        return Weighted(latents, outer, hyper, zero.new_zeros(draws, 1, 0), 1.0)
    value = cast("Tensor", guide_trace.nodes[site]["value"])
    particles = _density(model_trace, site).log_prob(value)
    particles = particles - _density(guide_trace, site).log_prob(value)
    if site in noise.log_ratio:
        particles = particles - noise.log_ratio[site]
    membership = rows.memberships[nested.name]
    weight = membership.weight
    # `Weighted.total` multiplies by the cluster's weight, so the rows are divided by it here.
    scale = rows.scale if weight is None else rows.scale / weight[membership.position]
    log_likelihood = (scale * log_likelihood).expand(*particles.shape[:-1], -1)
    particles = particles.index_add(-1, membership.position, log_likelihood.to(particles))
    return Weighted(latents, outer, hyper, particles, 1.0 if weight is None else weight)


def _grouped(
    groups: ParticleGroups,
    traces: tuple[poutine.Trace, poutine.Trace],
    noise: Noise,
    log_likelihood: Float[Tensor, "... rows"],
    rows: Rows,
) -> Float[Tensor, "draws particles groups"]:
    """Log-weights of the particles of every group."""
    model_trace, guide_trace = traces
    parts = [(groups.of_rows(rows), log_likelihood)]
    for site, group in groups.sites.items():
        value = cast("Tensor", guide_trace.nodes[site]["value"])
        ratio = _density(model_trace, site).log_prob(value)
        ratio = ratio - _density(guide_trace, site).log_prob(value)
        parts.append((group, ratio - noise.log_ratio.get(site, 0.0)))
    lead = torch.broadcast_shapes(*(values.shape[:-1] for _, values in parts))
    total = parts[-1][1].new_zeros(*lead, groups.count)
    for group, values in parts:
        total = total.index_add(-1, group, values.expand(*lead, -1).to(total))
    return total


def bound_noise(guide: Guide, rows: Rows, draws: int, particles: int, like: Tensor) -> Noise:
    """Noise of the guide's own draws of theta, with M particles of the nested effects for each."""
    if particles == 1:
        return gaussian_noise(guide, rows, draws, like)
    return proposal_noise(guide, rows, draws, particles, like, heavy=False)


def nested_from(noise: Noise, site: str, first: Noise) -> Noise:
    """The noise of the first piece of the rows; for the nested effects, that of this piece."""
    values, ratios = (
        {**shared, **{name: value for name, value in piece.items() if name == site}}
        for shared, piece in ((first.values, noise.values), (first.log_ratio, noise.log_ratio))
    )
    return Noise(values, ratios, noise.held)


def log_prior(model: MixedEffects, latents: Mapping[str, Tensor]) -> Float[Tensor, " draws"]:
    """Joint log-density of each draw over all sites outside the plates over clusters."""
    effects = {factor.effect_site for factor in model.factors}
    outside = {name: value for name, value in latents.items() if name not in effects}
    with model.seeded(0), pyro.validation_enabled(False):
        row = model.data_facts().one_row(model.reference())
        trace = poutine.trace(poutine.condition(model, data=outside)).get_trace(row)
        trace.compute_log_prob(lambda name, _: name in outside)
    n = n_draws(latents) or 1
    total = model.reference().new_zeros(n)
    for node in trace.nodes.values():
        if "log_prob" in node:
            total = total + node["log_prob"].reshape(-1)
    return total


def resampled(weighted: Weighted, site: str) -> dict[str, Tensor]:
    """Draws with one particle per cluster, picked by weight; sites have shape "n 1 ..."."""
    latents = {
        name: value.squeeze(1) if value.dim() > 2 and value.shape[1] == 1 else value
        for name, value in weighted.latents.items()
    }
    if weighted.groups:
        gumbel = -torch.log(-torch.log(torch.rand_like(weighted.particles)))
        best = (weighted.particles + gumbel).argmax(1)
        for name, group in weighted.groups.items():
            value = weighted.latents[name]
            value = value.expand(len(best), *value.shape[1:])
            picked = best[:, group][:, None, :, None].expand(-1, 1, -1, value.shape[-1])
            picked = picked.clamp(max=value.shape[1] - 1)
            latents[name] = value.gather(1, picked)[:, 0]
        return latents
    if site:
        value = weighted.latents[site]  # draws particles clusters terms
        gumbel = -torch.log(-torch.log(torch.rand_like(weighted.particles)))
        index = (weighted.particles + gumbel).argmax(1)
        value = value.expand(len(index), *value.shape[1:])
        picked = index[:, None, :, None].expand(-1, 1, -1, value.shape[-1])
        latents[site] = value.gather(1, picked)[:, 0]
    return latents


def _density(trace: poutine.Trace, name: str) -> dist.TorchDistribution:
    return cast("dist.TorchDistribution", trace.nodes[name]["fn"])


def _by_draw(log_prob: Tensor) -> Tensor:
    """Sum over all dimensions but that of the draws, if there is a dimension of draws."""
    return log_prob if log_prob.dim() == 0 else log_prob.flatten(1).sum(-1)
