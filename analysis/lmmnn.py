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
from armed_pyro.analysis.descent import FixedPredictor, descend
from armed_pyro.analysis.rivals import Rival, Setting, Trained
from armed_pyro.rows.batch import Rows

__all__ = ["LMMNN", "InterceptPosterior", "intercepts", "log_marginal"]

NODES = 15
NEWTON_STEPS = 8


@dataclass(frozen=True)
class LMMNN(Rival):
    r"""Network trained on the negative log-likelihood with the random intercept integrated out.

    .. math:: \eta_i = f(x_i) + b_{k(i)}, \quad b_k \sim N(0, \sigma_b^2), \quad
              -\log p(y) = -\sum_k \log \int \prod_{i \in k} p(y_i | \eta_i) \, p(b_k) \, db_k

    in closed form for a gaussian outcome (the multivariate normal with covariance
    :math:`\sigma_b^2 Z Z^\top + \sigma^2 I`), by adaptive Gauss-Hermite quadrature over each
    cluster's intercept for a binary one. As in the paper, a mini-batch's loss is the likelihood of
    its own rows, with their part of the covariance matrix.

    Rows of seen clusters are predicted with the posterior of their intercept given all training
    rows: its mean (the BLUP) for gaussian outcomes, P(y = 1) averaged over it for binary ones. In
    unseen clusters the intercept's prior takes the posterior's place.

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
            held_loss=lambda new: module.predictive_loss(new, rows),
        )

        def predict(new: ClusteredData) -> Float[np.ndarray, " rows"]:
            with torch.no_grad():
                return module.expected(module.predictor.encode(new).all(), rows).numpy()

        return Trained(predict, module.predictor.net, data, module.predictor.facts, steps)


@dataclass(frozen=True)
class InterceptPosterior:
    """Mode (of a gaussian outcome also mean) and sd of every cluster's intercept, given its rows.

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
    r"""The posterior of b_k given the cluster's rows, by Newton's method where y is binary.

    .. math:: \hat b_k = \arg\max_b \sum_{i \in k} \log p(y_i | \eta_i + b) - b^2 / 2 \sigma_b^2

    Parameters
    ----------
    eta, y : Float[Tensor, "rows"]
        FixedPredictor of the fixed effects, and outcome.
    codes : Int[Tensor, "rows"]
        Cluster of each row.
    n_clusters : int
    sd : Float[Tensor, ""]
        :math:`\sigma_b`.
    residual : Float[Tensor, ""] or None
        Residual sd of a gaussian outcome; None for a binary one.

    Examples
    --------
    >>> y = torch.tensor([1.0, 1.0, 4.0])
    >>> one = torch.tensor(1.0)
    >>> intercepts(torch.zeros(3), y, torch.tensor([0, 0, 1]), 2, one, one).center
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

    Of a gaussian outcome, cluster by cluster, with residuals r and :math:`v = \sigma^2 + n
    \sigma_b^2`,

    .. math:: \log p(y_k) = -\tfrac12 \big[n \log 2 \pi + (n - 1) \log \sigma^2 + \log v +
              (r^\top r - (1^\top r)^2 \sigma_b^2 / v) / \sigma^2 \big]

    and of a binary one, with quadrature nodes at the mode :math:`\hat b` plus the posterior sd s
    times x,

    .. math:: \log p(y_k) = \log \sum_q w_q \, s \, e^{x_q^2 / 2}
              N(\hat b + s x_q; 0, \sigma_b^2) \prod_i p(y_i | \eta_i + \hat b + s x_q) \sqrt{2 \pi}

    Parameters are those of `intercepts`.

    Examples
    --------
    >>> none = torch.zeros(2)
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
    nodes, weights = (torch.as_tensor(one).to(eta)[:, None] for one in hermegauss(NODES))
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
        """Of the intercept, and of a gaussian outcome's residual."""
        return self.log_sd.exp(), None if self.predictor.binary else self.log_residual.exp()

    def loss(self, rows: Rows) -> Float[Tensor, ""]:
        """-log p(y) of a mini-batch, per row."""
        eta, _ = self.predictor(rows)
        y, codes = self.predictor.target(rows), self.predictor.codes(rows)
        return -log_marginal(eta, y, codes, self.predictor.n_clusters, *self.sds()) / len(rows)

    def expected(self, new: Rows, training: Rows) -> Float[Tensor, " rows"]:
        """E[y | x, cluster, training rows], on the outcome's scale."""
        predictor = self.predictor
        sd, residual = self.sds()
        eta, _ = predictor(training)
        y, codes = predictor.target(training), predictor.codes(training)
        known = intercepts(eta, y, codes, predictor.n_clusters, sd, residual)
        place = predictor.codes(new).clamp(max=predictor.n_clusters)
        center = torch.cat([known.center, known.center.new_zeros(1)])[place]
        spread = torch.cat([known.sd, sd[None]])[place]
        eta = predictor(new)[0] + center
        if not predictor.binary:
            return torch.as_tensor(predictor.mean(eta))
        nodes, weights = (torch.as_tensor(one).to(eta)[:, None] for one in hermegauss(NODES))
        chance = torch.sigmoid(eta + spread * nodes)
        return (weights * chance).sum(0) / math.sqrt(2 * math.pi)

    def predictive_loss(self, held: Rows, training: Rows) -> Float[Tensor, ""]:
        """Loss of held-out rows given the training rows' intercepts."""
        expected, y = self.expected(held, training), held.outcome()
        if not self.predictor.binary:
            return (y - expected).square().mean()
        p = expected.clamp(1e-6, 1 - 1e-6)
        return -(y * p.log() + (1 - y) * (1 - p).log()).mean()
