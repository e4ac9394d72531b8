"""MeNet: a network whose last layer has random effects, by expectation-maximisation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from armed_pyro import ClusteredData
from armed_pyro.analysis.rivals.descent import FixedPredictor, Rows, descend
from armed_pyro.analysis.rivals.rival import Rival, Setting, Trained

__all__ = ["LastLayerEffects", "MeNet"]

NEWTON_STEPS = 8


@dataclass(frozen=True)
class MeNet(Rival):
    r"""Random effects on the weights and the bias of the last layer.

    .. math:: \eta_i = f(x_i) + (1, h_i)^\top u_{k(i)}, \quad u_k \sim N(0, \Sigma)

    h are the penultimate layer's activations. The E step, for each cluster with design
    :math:`Z_k = (1, h)`, weights W and residuals r of its rows, is

    .. math:: \hat u_k = (I + \Sigma Z_k^\top W Z_k)^{-1} \Sigma Z_k^\top (W Z_k \hat u_k + r),
              \quad C_k = (I + \Sigma Z_k^\top W Z_k)^{-1} \Sigma

    For a gaussian outcome, :math:`W = I / \sigma^2` and :math:`r = (y - \eta) / \sigma^2`, which
    gives the paper's posterior. The paper leaves binary outcomes open; here the E step finds the
    mode of the posterior by Newton's method, with :math:`W = p (1 - p)` and r = y - p. The M step
    sets :math:`\Sigma = \overline{\hat u \hat u^\top + C}` and :math:`\sigma^2 = \overline{(y -
    \eta)^2 + z^\top C z}`, and takes a window of gradient steps of the network with
    :math:`\hat u` held fixed.

    Unseen clusters get the random effects' mean, zero.

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
        rows = module.predictor.encode(data)
        held = None if validation is None else module.predictor.encode(validation)
        steps = descend(
            module,
            rows,
            module.loss,
            self.setting.schedule,
            seed,
            held=held,
            after_window=lambda: module.expect(rows),
        )

        def predict(new: ClusteredData) -> Float[np.ndarray, " rows"]:
            with torch.no_grad():
                eta = module(module.predictor.encode(new))
            return module.predictor.mean(eta)

        standardise = module.predictor.scaling.standardise
        return Trained(predict, module.predictor.net, data, standardise, steps)


class LastLayerEffects(nn.Module):
    """The network of a `MeNet`, and the state of its EM algorithm.

    Attributes
    ----------
    effects : Float[Tensor, "clusters units+1"]
        Posterior means (or modes) of the random effects on bias and weights.
    covariance : Float[Tensor, "units+1 units+1"]
        Covariance of the random effects.
    residual : Float[Tensor, ""]
        Residual variance of a gaussian outcome, in the outcome's standard units.

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
        size = predictor.units + 1
        self.register_buffer("effects", torch.zeros(predictor.n_clusters, size))
        self.register_buffer("covariance", 0.1 * torch.eye(size))
        self.register_buffer("residual", torch.ones(()))

    def forward(self, rows: Rows) -> Float[Tensor, " rows"]:
        """The predictor with the random effects' posterior means; zeros for unseen clusters."""
        fixed, hidden = self.predictor(rows)
        unseen = self.effects.new_zeros(1, self.effects.shape[1])
        effects = torch.cat([self.effects, unseen])[rows.codes]
        return fixed + (_design(hidden) * effects).sum(-1)

    def loss(self, rows: Rows) -> Float[Tensor, ""]:
        """Loss of a mini-batch, with the random effects held fixed."""
        return self.predictor.loss(self(rows), rows)

    @torch.no_grad()
    def expect(self, rows: Rows) -> None:
        """The E step, and the M step of the variances."""
        fixed, hidden = self.predictor(rows)
        target, Z = self.predictor.target(rows), _design(hidden)
        second, squares = torch.zeros_like(self.covariance), torch.zeros_like(target)
        for k in range(len(self.effects)):
            inside = rows.codes == k
            z, f, y = Z[inside], fixed[inside], target[inside]
            u, C = self._posterior(z, f, y, self.effects[k])
            self.effects[k] = u
            second += torch.outer(u, u) + C
            squares[inside] = (y - f - z @ u).square() + ((z @ C) * z).sum(-1)
        self.covariance.copy_(second / len(self.effects))
        self.residual.copy_(squares.mean())

    def _posterior(self, z: Tensor, f: Tensor, y: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (or mode) and covariance of one cluster's random effects."""
        D, gram = self.covariance, torch.zeros_like(self.covariance)
        identity = torch.eye(len(D)).to(D)
        for _ in range(NEWTON_STEPS if self.predictor.binary else 1):
            eta = f + z @ u
            if self.predictor.binary:
                p = torch.sigmoid(eta)
                w, r = p * (1 - p), y - p
            else:
                w, r = torch.ones_like(eta) / self.residual, (y - eta) / self.residual
            gram = (z.T * w) @ z
            u = torch.linalg.solve(identity + D @ gram, D @ (gram @ u + z.T @ r))
        C = torch.linalg.solve(identity + D @ gram, D)
        return u, (C + C.T) / 2


def _design(hidden: Float[Tensor, "rows units"]) -> Float[Tensor, "rows units+1"]:
    return torch.cat([hidden.new_ones(len(hidden), 1), hidden], -1)
