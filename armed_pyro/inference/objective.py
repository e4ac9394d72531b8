"""The training objectives: of network, adversaries and guide together, and of the guide alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from pyro import poutine
from torch import Tensor

from armed_pyro.engine.compiled_step import Loss
from armed_pyro.guides.base import Guide
from armed_pyro.inference.nested_weights import bound_noise, weigh
from armed_pyro.program.model import MixedEffects
from armed_pyro.program.predictor import Predictor
from armed_pyro.rows.batch import Rows

__all__ = ["NestedBound", "Objective"]


@dataclass(frozen=True)
class Objective:
    r"""-ELBO + lambda_F (-log p(y | f alone)) + cross-entropy of the adversaries.

    .. math:: ELBO = E_q[\log p(y, u, \theta) - \log q(u, \theta)]

    with one draw of q. The gradient "sticks the landing": log q is evaluated with its parameters
    held fixed, which keeps the gradient unbiased and makes its noise vanish as q approaches the
    posterior (Roeder, Wu, Duvenaud 2017). The second term trains the network only. Latent sites are
    detached in it, because it would count their likelihood twice. The adversaries' gradients reach
    the network reversed.
    """

    model: MixedEffects
    guide: Guide

    def __call__(self, rows: Rows, progress: float | Tensor = 1.0) -> Loss:
        """The objective on all rows or a mini-batch, a mean over rows.

        `progress` is the share of their warm-up that the adversaries have behind them: one number,
        or one for each adversary.
        """
        n = self.model.data_facts().n_rows
        share = rows.scale * len(rows) / n  # 1 unless several processes share the rows
        guide_trace = poutine.trace(self.guide).get_trace(rows)
        model_trace = poutine.trace(poutine.replay(self.model, trace=guide_trace)).get_trace(rows)
        elbo = torch.as_tensor((model_trace.log_prob_sum() - guide_trace.log_prob_sum()) / n)
        predictor = cast("Predictor", model_trace.nodes["_RETURN"]["value"])
        total, zero = -elbo, torch.zeros_like(elbo)
        fixed = zero
        if self.model.fixed_weight:
            drawn = cast("dict[str, Tensor]", guide_trace.nodes["_RETURN"]["value"])
            latents = {name: value.detach() for name, value in drawn.items()}
            fixed = share * self._fixed(rows, predictor, latents)
            total = total + self.model.fixed_weight * fixed
        shares = torch.as_tensor(progress).expand(len(self.model.adversaries))
        results = [
            # `forward` directly: the adversarial loss is not in the density that Pyro sees.
            adversary.forward(
                predictor.activations,
                rows.memberships[adversary.factor].clusters(),
                adversary.strength(warmed).to(elbo),
            )
            for adversary, warmed in zip(self.model.adversaries, shares, strict=True)
        ]
        adversarial = share * sum((result.cross_entropy for result in results), zero)
        rounds = [result.accuracy for result in results]
        accuracy = torch.stack(rounds).to(elbo) if rounds else elbo.new_zeros(0)
        parts = elbo.detach(), fixed.detach(), adversarial.detach()
        return Loss(total + adversarial, *parts, accuracy)

    def _fixed(
        self, rows: Rows, predictor: Predictor, latents: dict[str, Tensor]
    ) -> Float[Tensor, ""]:
        model, activations = self.model, predictor.activations
        assert predictor.output is not None  # for mypy; see `binding.needs_fixed_run`
        eta = model.fixed_predictor(rows, predictor.output, activations, latents)
        log_prob = model.density(eta, latents, rows).log_prob(rows.outcome())
        means = {rebuilt.name: activations[rebuilt.tap] for rebuilt in model.others}
        for rebuilt, density in model.other_densities(means, latents, rows).items():
            log_prob = log_prob + rebuilt.weight * density.log_prob(rows.x)
        frequencies = model.frequencies(rows)
        return -(log_prob if frequencies is None else frequencies * log_prob).mean()


@dataclass(frozen=True)
class NestedBound:
    r"""-ELBO of a frozen network, importance-weighted by cluster.

    .. math:: ELBO = E_{q(\theta)}\Big[\log \frac{p(\theta)}{q(\theta)} + \sum_k \log \frac{1}{M}
        \sum_m \frac{p(y_k \mid u_{km}, \theta) \, p(u_{km} \mid \theta)}
        {r(u_{km} \mid \theta)}\Big]

    With one particle from the guide's conditional this is the usual bound. With more particles it
    approaches the bound with the random effects integrated out. Mini-batches of whole clusters
    estimate it without bias (Geffner and Domke 2022).
    """

    model: MixedEffects
    guide: Guide
    particles: int  # M: draws of each cluster's random effects per draw of theta

    def __call__(self, rows: Rows, draws: int) -> Loss:
        """The loss on all rows or whole clusters: a mean over rows, and over draws of theta."""
        noise = bound_noise(self.guide, rows, draws, self.particles, self.model.reference())
        total = weigh(self.model, self.guide, rows, noise).total().mean()
        elbo = total / self.model.data_facts().n_rows
        zero = torch.zeros_like(elbo)
        return Loss(-elbo, elbo.detach(), zero, zero, zero.new_zeros(0))
