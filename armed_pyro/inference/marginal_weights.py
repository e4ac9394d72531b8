"""Weights of draws of the hyperparameters, with the random effects integrated out exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from jaxtyping import Float
from pyro import poutine
from torch import Tensor

from armed_pyro.engine.compiled_step import Loss
from armed_pyro.guides.base import Guide
from armed_pyro.guides.closed_form import MarginalLikelihood
from armed_pyro.guides.noise import NoiseMessenger
from armed_pyro.program.model import MixedEffects
from armed_pyro.random_effects.covariance import Latents
from armed_pyro.rows.source import RowSource

__all__ = ["MarginalBound", "MarginalDraws", "exact_likelihood", "joint_draws", "marginal_draws"]


@dataclass(frozen=True)
class MarginalDraws:
    r"""Draws of the hyperparameters, with :math:`\log p(\theta, y) - \log q(\theta)`."""

    latents: dict[str, Tensor]  # hyperparameters, "draws 1 1 ..."
    total: Float[Tensor, " draws"]
    hyper: Float[Tensor, " draws"]  # its part -log q(theta)
    effects: dict[str, Tensor] = field(default_factory=dict)  # "draws clusters terms", if drawn

    def squeezed(self) -> dict[str, Tensor]:
        """The sites in the shapes of `Guide.draws`: "draws 1 ..."."""
        hyper = {
            name: value.squeeze(1) if value.dim() > 2 else value
            for name, value in self.latents.items()
        }
        return hyper | self.effects


def exact_likelihood(
    model: MixedEffects, guide: Guide, source: RowSource
) -> MarginalLikelihood | None:
    """log p(y | theta) of the rows, if it has a closed form and the guide's effects are exact."""
    anything = guide.hyperparameters.size > 0
    if not anything or (model.factors and not guide.exact(model)):
        return None
    return guide.closed_form(model, source)


def marginal_draws(
    model: MixedEffects,
    guide: Guide,
    closed: MarginalLikelihood,
    noise: Float[Tensor, "draws 1 1 size"],
) -> MarginalDraws:
    """Map noise to the guide's draws of the hyperparameters, and weigh them; no row is read."""
    return _weighed(model, guide, noise, lambda latents: (closed.log_likelihood(latents), {}))


def joint_draws(
    model: MixedEffects,
    guide: Guide,
    closed: MarginalLikelihood,
    noise: Float[Tensor, "draws 1 1 size"],
) -> MarginalDraws:
    """The same as `marginal_draws`, with the random effects that the closed form draws beside."""
    return _weighed(model, guide, noise, closed.with_effects)


def _weighed(
    model: MixedEffects,
    guide: Guide,
    noise: Float[Tensor, "draws 1 1 size"],
    likelihood: Callable[[Latents], tuple[Float[Tensor, " draws"], dict[str, Tensor]]],
) -> MarginalDraws:
    with NoiseMessenger({"_theta": noise}):
        trace = poutine.trace(guide.hyperparameters).get_trace()
    latents = cast("dict[str, Tensor]", trace.nodes["_RETURN"]["value"])
    trace.compute_log_prob()
    log_likelihood, effects = likelihood(latents)
    total = log_likelihood.to(noise) + _log_prior(model, latents)
    hyper = torch.zeros_like(total)
    for name, node in trace.nodes.items():
        if "log_prob" in node:
            density = node["log_prob"].reshape(-1)
            total = total - density
            if name == "_theta":
                hyper = hyper - density
    return MarginalDraws(latents, total, hyper, {k: v.to(noise) for k, v in effects.items()})


def _log_prior(model: MixedEffects, latents: Mapping[str, Tensor]) -> Float[Tensor, " draws"]:
    """Joint log-density of the hyperparameters under their priors."""
    row = model.data_facts().one_row(model.reference())
    prior = poutine.condition(model.sample_latents, data=dict(latents))
    trace = poutine.trace(prior).get_trace(row)
    trace.compute_log_prob(lambda name, _: name in latents)
    densities = [
        node["log_prob"].reshape(-1) for node in trace.nodes.values() if "log_prob" in node
    ]
    return torch.stack([*torch.broadcast_tensors(*densities)]).sum(0)


@dataclass(frozen=True)
class MarginalBound:
    r"""-ELBO of a frozen gaussian program, with the random effects integrated out.

    .. math:: ELBO = E_{q(\theta)}[\log p(\theta) + \log p(y \mid \theta) - \log q(\theta)]
    """

    model: MixedEffects
    guide: Guide
    closed: MarginalLikelihood

    def __call__(self, draws: int) -> Loss:
        """The loss, a mean over rows and draws of the hyperparameters."""
        like, size = self.model.reference(), self.guide.hyperparameters.size
        noise = torch.randn(draws, 1, 1, size, dtype=like.dtype, device=like.device)
        total = marginal_draws(self.model, self.guide, self.closed, noise).total.mean()
        elbo = total / self.model.data_facts().n_rows
        zero = torch.zeros_like(elbo)
        return Loss(-elbo, elbo.detach(), zero, zero, zero.new_zeros(0))
