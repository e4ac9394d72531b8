"""The training objective: evidence lower bound, fixed effects on their own, and the game."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from pyro import poutine
from torch import Tensor

from armed_pyro.engine.loss import Loss
from armed_pyro.guides.base import Guide
from armed_pyro.guides.noise import gaussian_noise, proposal_noise
from armed_pyro.inference.nested_weights import weigh
from armed_pyro.program.model import MixedEffects
from armed_pyro.program.predictor import Predictor
from armed_pyro.rows.batch import Rows

__all__ = ["NestedBound", "Objective"]


@dataclass(frozen=True)
class Objective:
    r"""-ELBO + lambda_F (-log p(y | f alone)) + cross-entropy of the adversaries.

    .. math:: ELBO = E_q[\log p(y, u, \theta) - \log q(u, \theta)]

    with one draw of q, and gradients that stick the landing: a guide's density of its own draw
    holds its parameters fixed, which leaves the gradient unbiased and takes its noise to zero as
    q approaches the posterior (Roeder, Wu, Duvenaud 2017). The second term trains the network,
    not the family's parameters or latent fixed effects, which it would otherwise count twice. The
    adversaries' gradients reach the network reversed. The Pyro model and guide enter unchanged.

    Parameters
    ----------
    model, guide : MixedEffects, Guide
        The program and its approximate posterior.
    """

    model: MixedEffects
    guide: Guide

    def __call__(self, rows: Rows, progress: float | Tensor = 1.0) -> Loss:
        """The objective on some rows.

        Parameters
        ----------
        rows : Rows
            All rows, or a mini-batch with its weights.
        progress : float or Float[Tensor, ""]
            Share of the training steps done, for the adversaries' warm-up.
        """
        n = self.model.data_facts().n_rows
        share = rows.scale * len(rows) / n  # 1, but for one of several processes
        guide_trace = poutine.trace(self.guide).get_trace(rows)
        model_trace = poutine.trace(poutine.replay(self.model, trace=guide_trace)).get_trace(rows)
        elbo = (model_trace.log_prob_sum() - guide_trace.log_prob_sum()) / n
        elbo = torch.as_tensor(elbo)
        predictor = cast("Predictor", model_trace.nodes["_RETURN"]["value"])
        total, zero = -elbo, torch.zeros_like(elbo)
        fixed = zero
        if self.model.fixed_weight:
            drawn = cast("dict[str, Tensor]", guide_trace.nodes["_RETURN"]["value"])
            latents = {name: value.detach() for name, value in drawn.items()}
            fixed = share * self._fixed(rows, predictor, latents)
            total = total + self.model.fixed_weight * fixed
        rounds = [
            # `forward`, as no handler of Pyro's need see the game: it is not in the density.
            game.forward(
                predictor.activations,
                rows.memberships[game.factor].clusters(),
                game.strength(progress).to(elbo),
            )
            for game in self.model.adversaries
        ]
        game = share * sum((one.cross_entropy for one in rounds), zero)
        accuracy = torch.stack([one.accuracy for one in rounds]) if rounds else elbo.new_zeros(0)
        return Loss(total + game, elbo.detach(), fixed.detach(), game.detach(), accuracy)

    def _fixed(
        self, rows: Rows, predictor: Predictor, latents: dict[str, Tensor]
    ) -> Float[Tensor, ""]:
        model, activations = self.model, predictor.activations
        assert predictor.output is not None  # for mypy: see `binding.needs_fixed_run`
        eta = model.fixed_predictor(rows, predictor.output, activations, latents)
        log_prob = model.density(eta, latents, rows).log_prob(rows.outcome())
        means = {one.name: activations[one.at] for one in model.others}
        for one, density in model.other_densities(means, latents, rows).items():
            log_prob = log_prob + one.weight * density.log_prob(rows.x)
        return -(log_prob if rows.weights is None else rows.weights * log_prob).mean()


@dataclass(frozen=True)
class NestedBound:
    r"""The evidence lower bound of a settled network, importance-weighted by cluster.

    .. math:: E_{q(\theta)}\Big[\log \frac{p(\theta)}{q(\theta)} + \sum_k \log \frac{1}{M}
        \sum_m \frac{p(y_k \mid u_{km}, \theta) \, p(u_{km} \mid \theta)}
        {r(u_{km} \mid \theta)}\Big]

    With one particle from the guide's conditional it is the usual bound; with more it approaches
    that of the marginal likelihood, in which the random effects are integrated out. It stays
    unbiased in mini-batches of whole clusters (Geffner and Domke 2022).

    Parameters
    ----------
    model, guide : MixedEffects, Guide
        The program and its approximate posterior.
    particles : int
        M.
    """

    model: MixedEffects
    guide: Guide
    particles: int

    def __call__(self, rows: Rows, draws: int) -> Loss:
        """The bound's negative on all rows, or on a mini-batch of whole clusters.

        Parameters
        ----------
        draws : int
            Draws of theta over which it is averaged.
        """
        like = self.model.reference()
        if self.particles == 1:
            noise = gaussian_noise(self.guide, rows, draws, like)
        else:
            noise = proposal_noise(self.guide, rows, draws, self.particles, like, heavy=False)
        total = weigh(self.model, self.guide, rows, noise).total().mean()
        elbo = total / self.model.data_facts().n_rows
        zero = torch.zeros_like(elbo)
        none = zero.new_zeros(0)
        return Loss(-elbo, elbo.detach(), zero, zero, none)
