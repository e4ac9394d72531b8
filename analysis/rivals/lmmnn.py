"""LMMNN: a network with a random intercept that is integrated out of the likelihood."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.polynomial.hermite_e import hermegauss
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from armed_pyro import ClusteredData
from armed_pyro.analysis.rivals.descent import FixedPredictor, Rows, descend
from armed_pyro.analysis.rivals.rival import Rival, Setting, Trained

__all__ = ["LMMNN", "InterceptPosterior", "intercepts", "log_marginal"]

NODES = 15
NEWTON_STEPS = 8


@dataclass(frozen=True)
class LMMNN(Rival):
    r"""A network trained on the negative log-likelihood with the random intercept integrated out.

    .. math:: \eta_i = f(x_i) + b_{k(i)}, \quad b_k \sim N(0, \sigma_b^2), \quad
              -\log p(y) = -\sum_k \log \int \prod_{i \in k} p(y_i | \eta_i) \, p(b_k) \, db_k

    The integral has a closed form for a gaussian outcome (the multivariate normal with covariance
    :math:`\sigma_b^2 Z Z^\top + \sigma^2 I`). For a binary outcome it is computed by adaptive
    Gauss-Hermite quadrature over each cluster's intercept. As in the paper, a mini-batch's loss
    is the likelihood of its rows alone, with their part of the covariance matrix.

    Rows of seen clusters are predicted with the posterior of their intercept given all training
    rows: with its mean (the BLUP) for gaussian outcomes, and with P(y = 1) averaged over it for
    binary ones. In unseen clusters the prior of the intercept takes the place of the posterior.

    References
    ----------
    Simchoni, Rosset (2023), "Integrating random effects in deep neural networks", JMLR 24,
    sections 3 and 4.

    Examples
    --------
    ``LMMNN(setting).train(data, validation, seed=0).predict(rows)``
    """

    setting: Setting
    name: str = "LMMNN"

    @property
    def clustered(self) -> bool:
        return True

    def train(self, data: ClusteredData, validation: ClusteredData | None, seed: int) -> Trained:
        module = _Marginal(FixedPredictor(self.setting, data, seed))
        rows = module.predictor.encode(data)
        held = None if validation is None else module.predictor.encode(validation)
        steps = descend(
            module,
            rows,
            module.loss,
            self.setting.schedule,
            seed,
            held=held,
            held_loss=lambda new: module.predictive_loss(new, rows),
        )

        def predict(new: ClusteredData) -> Float[np.ndarray, " rows"]:
            with torch.no_grad():
                return module.expected(module.predictor.encode(new), rows).numpy()

        standardise = module.predictor.scaling.standardise
        return Trained(predict, module.predictor.net, data, standardise, steps)


@dataclass(frozen=True)
class InterceptPosterior:
    """Mode and sd of each cluster's intercept given its rows; the mode of a gaussian is its mean.

    Attributes
    ----------
    center, sd : Float[Tensor, "clusters"]
    """

    center: Float[Tensor, " clusters"]
    sd: Float[Tensor, " clusters"]


def intercepts(
    eta: Float[Tensor, " rows"],
    y: Float[Tensor, " rows"],
    codes: Tensor,
    n_clusters: int,
    sd: Tensor,
    residual: Tensor | None,
) -> InterceptPosterior:
    r"""Posterior of b_k given the cluster's rows, found by Newton's method if y is binary.

    .. math:: \hat b_k = \arg\max_b \sum_{i \in k} \log p(y_i | \eta_i + b) - b^2 / 2 \sigma_b^2

    Parameters
    ----------
    eta, y : Float[Tensor, "rows"]
        Predictor of the fixed effects, and outcome.
    codes : Int[Tensor, "rows"]
        Cluster of each row.
    n_clusters : int
    sd : Float[Tensor, ""]
        :math:`\sigma_b`.
    residual : Float[Tensor, ""] or None
        Residual sd of a gaussian outcome; None for a binary outcome.

    Examples
    --------
    >>> y, unit = torch.tensor([1.0, 1.0, 4.0]), torch.tensor(1.0)
    >>> intercepts(torch.zeros(3), y, torch.tensor([0, 0, 1]), 2, unit, unit).center
    tensor([0.6667, 2.0000])
    """
    b, curvature = eta.new_zeros(n_clusters), eta.new_zeros(n_clusters)

    def total(values: Tensor) -> Tensor:
        return torch.zeros_like(b).index_add(0, codes, values)

    precision = sd**-2
    for _ in range(NEWTON_STEPS if residual is None else 1):
        now = eta + b[codes]
        if residual is None:
            p = torch.sigmoid(now)
            weight, slope = p * (1 - p), y - p
        else:
            weight, slope = torch.ones_like(now) / residual**2, (y - now) / residual**2
        curvature = total(weight) + precision
        b = b + (total(slope) - precision * b) / curvature
    return InterceptPosterior(b, curvature.rsqrt())


def log_marginal(
    eta: Float[Tensor, " rows"],
    y: Float[Tensor, " rows"],
    codes: Tensor,
    n_clusters: int,
    sd: Tensor,
    residual: Tensor | None,
) -> Float[Tensor, ""]:
    r"""log p(y) with the random intercepts integrated out.

    A gaussian outcome has, for each cluster, with residuals r and :math:`v = \sigma^2 + n
    \sigma_b^2`,

    .. math:: \log p(y_k) = -\tfrac12 \big[n \log 2 \pi + (n - 1) \log \sigma^2 + \log v +
              (r^\top r - (1^\top r)^2 \sigma_b^2 / v) / \sigma^2 \big]

    A binary outcome has, with quadrature nodes at the mode :math:`\hat b` plus the posterior sd s
    times x,

    .. math:: \log p(y_k) = \log \sum_q w_q \, s \, e^{x_q^2 / 2}
              N(\hat b + s x_q; 0, \sigma_b^2) \prod_i p(y_i | \eta_i + \hat b + s x_q) \sqrt{2 \pi}

    The parameters are those of `intercepts`.

    Examples
    --------
    >>> eta, codes, sd = torch.zeros(1), torch.tensor([0]), torch.tensor(1.0)
    >>> float(log_marginal(eta, torch.ones(1), codes, 1, sd, None).exp().round(decimals=4))
    0.5
    """
    count = torch.bincount(codes, minlength=n_clusters)
    present = count > 0

    def total(values: Tensor) -> Tensor:
        zeros = values.new_zeros(*values.shape[:-1], n_clusters)
        return zeros.index_add(-1, codes, values)[..., present]

    if residual is not None:
        r, n = y - eta, count[present].to(eta)
        v = residual**2 + n * sd**2
        squares = (total(r * r) - total(r) ** 2 * sd**2 / v) / residual**2
        logs = n * math.log(2 * math.pi) + (n - 1) * 2 * residual.log() + v.log() + squares
        return -0.5 * logs.sum()
    with torch.no_grad():
        known = intercepts(eta, y, codes, n_clusters, sd, None)
    nodes, weights = (torch.as_tensor(part).to(eta)[:, None] for part in hermegauss(NODES))
    b = known.center + known.sd * nodes
    likelihood = total(logsigmoid((2 * y - 1) * (eta + b[:, codes])))
    prior = -0.5 * (b[:, present] / sd) ** 2 - sd.log()
    spread = weights.log() + 0.5 * nodes**2 + known.sd[present].log() - 0.5 * math.log(2 * math.pi)
    return torch.logsumexp(likelihood + prior + spread, 0).sum()


class _Marginal(nn.Module):
    """The network and the standard deviations of intercept and residual."""

    def __init__(self, predictor: FixedPredictor) -> None:
        super().__init__()
        self.predictor = predictor
        self.log_sd = nn.Parameter(torch.tensor(math.log(0.5)))
        self.log_residual = nn.Parameter(torch.zeros(()), requires_grad=not predictor.binary)

    def sds(self) -> tuple[Tensor, Tensor | None]:
        """Sd of the intercept, and of a gaussian outcome's residual."""
        return self.log_sd.exp(), None if self.predictor.binary else self.log_residual.exp()

    def loss(self, rows: Rows) -> Float[Tensor, ""]:
        """-log p(y) of a mini-batch, per row."""
        eta, _ = self.predictor(rows)
        y, n_clusters = self.predictor.target(rows), self.predictor.n_clusters
        return -log_marginal(eta, y, rows.codes, n_clusters, *self.sds()) / len(rows)

    def expected(self, new: Rows, training: Rows) -> Float[Tensor, " rows"]:
        """E[y | x, cluster, training rows], on the outcome's scale."""
        predictor = self.predictor
        sd, residual = self.sds()
        eta, _ = predictor(training)
        y = predictor.target(training)
        known = intercepts(eta, y, training.codes, predictor.n_clusters, sd, residual)
        center = torch.cat([known.center, known.center.new_zeros(1)])[new.codes]
        spread = torch.cat([known.sd, sd[None]])[new.codes]
        eta = predictor(new)[0] + center
        if not predictor.binary:
            return torch.as_tensor(predictor.mean(eta))
        nodes, weights = (torch.as_tensor(part).to(eta)[:, None] for part in hermegauss(NODES))
        chance = torch.sigmoid(eta + spread * nodes)
        return (weights * chance).sum(0) / math.sqrt(2 * math.pi)

    def predictive_loss(self, held: Rows, training: Rows) -> Float[Tensor, ""]:
        """Loss of held-out rows given the intercepts' posterior from the training rows."""
        expected, y = self.expected(held, training), held.outcome()
        if not self.predictor.binary:
            return (y - expected).square().mean()
        p = expected.clamp(1e-6, 1 - 1e-6)
        return -(y * p.log() + (1 - y) * (1 - p).log()).mean()
