"""MeNet: a network whose last layer has random effects, by expectation-maximisation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from armed_pyro import ClusteredData
from armed_pyro.analysis.descent import FixedPredictor, descend
from armed_pyro.analysis.rivals import Rival, Setting, Trained
from armed_pyro.rows.batch import Rows

__all__ = ["LastLayerEffects", "MeNet"]

NEWTON_STEPS = 8


@dataclass(frozen=True)
class MeNet(Rival):
    r"""Random effects on the weights and the bias of the last layer.

    .. math:: \eta_i = f(x_i) + (1, h_i)^\top u_{k(i)}, \quad u_k \sim N(0, \Sigma)

    with h the penultimate layer's activations. E step, for each cluster with design
    :math:`Z_k = (1, h)`, weights W and residuals r of its rows,

    .. math:: \hat u_k = (I + \Sigma Z_k^\top W Z_k)^{-1} \Sigma Z_k^\top (W Z_k \hat u_k + r),
              \quad C_k = (I + \Sigma Z_k^\top W Z_k)^{-1} \Sigma

    :math:`W = I / \sigma^2` and :math:`r = (y - \eta) / \sigma^2` of a gaussian outcome, which is
    the paper's posterior; of a binary one, which the paper leaves open, the mode of the posterior
    by Newton's method with :math:`W = p (1 - p)`, r = y - p. M step:
    :math:`\Sigma = \overline{\hat u \hat u^\top + C}`, :math:`\sigma^2 = \overline{(y - \eta)^2 +
    z^\top C z}`, and a window of gradient steps of the network with :math:`\hat u` held.

    An unseen cluster has the random effects' mean, zero.

    References
    ----------
    Xiong, Kim, Singh (2019), "Mixed effects neural networks (MeNets) with applications to gaze
    estimation", CVPR, section 3.

    Examples
    --------
    ``MeNet(setting).train(data, validation, seed=0).predict(rows)``
    """

    setting: Setting
    name: str = "MeNet"

    @property
    def clustered(self) -> bool:
        return True

    def train(self, data: ClusteredData, validation: ClusteredData | None, seed: int) -> Trained:
        module = LastLayerEffects(FixedPredictor(self.setting, data, seed))
        source = module.predictor.encode(data)
        rows = source.all()
        held = None if validation is None else module.predictor.encode(validation).all()
        steps = descend(
            module,
            source,
            module.loss,
            self.setting.schedule,
            seed,
            held=held,
            after_window=lambda: module.expect(rows),
        )

        def predict(new: ClusteredData) -> Float[np.ndarray, " rows"]:
            with torch.no_grad():
                eta = module(module.predictor.encode(new).all())
            return module.predictor.mean(eta)

        return Trained(predict, module.predictor.net, data, module.predictor.facts, steps)


class LastLayerEffects(nn.Module):
    """The network of a `MeNet`, and the state of its EM algorithm.

    Attributes
    ----------
    effects : Float[Tensor, "clusters units+1"]
        Posterior means (or modes) of the random effects of bias and weights.
    covariance : Float[Tensor, "units+1 units+1"]
        Of the random effects.
    residual : Float[Tensor, ""]
        Variance of a gaussian outcome's residual, in the outcome's standard units.

    Examples
    --------
    ``LastLayerEffects(FixedPredictor(setting, data, seed=0))(rows)``
    """

    effects: Tensor
    covariance: Tensor
    residual: Tensor

    def __init__(self, predictor: FixedPredictor) -> None:
        super().__init__()
        self.predictor = predictor
        with torch.no_grad():
            width = predictor(predictor.facts.one_row(next(predictor.parameters())))[1].shape[1]
        self.register_buffer("effects", torch.zeros(predictor.n_clusters, width + 1))
        self.register_buffer("covariance", 0.1 * torch.eye(width + 1))
        self.register_buffer("residual", torch.ones(()))

    def forward(self, rows: Rows) -> Float[Tensor, " rows"]:
        """The predictor with the random effects' posterior means; zeros for unseen clusters."""
        fixed, hidden = self.predictor(rows)
        codes, none = self.predictor.codes(rows), self.effects.new_zeros(1, self.effects.shape[1])
        mine = torch.cat([self.effects, none])[codes.clamp(max=len(self.effects))]
        return fixed + (_design(hidden) * mine).sum(-1)

    def loss(self, rows: Rows) -> Float[Tensor, ""]:
        """Of a mini-batch, random effects held."""
        return self.predictor.loss(self(rows), rows)

    @torch.no_grad()
    def expect(self, rows: Rows) -> None:
        """The E step, and the M step of the variances."""
        fixed, hidden = self.predictor(rows)
        target, codes, Z = self.predictor.target(rows), self.predictor.codes(rows), _design(hidden)
        second, squares = torch.zeros_like(self.covariance), torch.zeros_like(target)
        for k in range(len(self.effects)):
            own = codes == k
            z, f, y = Z[own], fixed[own], target[own]
            u, C = self._posterior(z, f, y, self.effects[k])
            self.effects[k] = u
            second += torch.outer(u, u) + C
            squares[own] = (y - f - z @ u).square() + ((z @ C) * z).sum(-1)
        self.covariance.copy_(second / len(self.effects))
        self.residual.copy_(squares.mean())

    def _posterior(self, z: Tensor, f: Tensor, y: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (or mode) and covariance of one cluster's random effects."""
        D, gram = self.covariance, torch.zeros_like(self.covariance)
        one = torch.eye(len(D)).to(D)
        for _ in range(NEWTON_STEPS if self.predictor.binary else 1):
            eta = f + z @ u
            if self.predictor.binary:
                p = torch.sigmoid(eta)
                w, r = p * (1 - p), y - p
            else:
                w, r = torch.ones_like(eta) / self.residual, (y - eta) / self.residual
            gram = (z.T * w) @ z
            u = torch.linalg.solve(one + D @ gram, D @ (gram @ u + z.T @ r))
        C = torch.linalg.solve(one + D @ gram, D)
        return u, (C + C.T) / 2


def _design(hidden: Float[Tensor, "rows units"]) -> Float[Tensor, "rows units+1"]:
    return torch.cat([hidden.new_ones(len(hidden), 1), hidden], -1)
