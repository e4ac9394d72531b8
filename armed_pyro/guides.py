"""Variational families: ordinary Pyro guides with the program's sites."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from armed_pyro.factors import Factor, weighted
from armed_pyro.hyperparameters import Hyperparameters
from armed_pyro.program import MixedEffects
from armed_pyro.pseudo import PseudoObservations, observe
from armed_pyro.rows import Membership, Rows, RowSource

__all__ = ["Guide", "StructuredGuide", "WhitenedNormal"]


# Draws over which the slope and curvature of the likelihood are averaged.
REFRESH_DRAWS = 16


class Guide(nn.Module, ABC):
    """Approximate posterior q of a bound program: samples every latent site of the program.

    Examples
    --------
    >>> sorted(Guide.__abstractmethods__)  # what a variational family of one's own has to give
    ['center', 'every_cluster', 'forward', 'most_draws', 'refresh']
    """

    @abstractmethod
    def forward(self, rows: Rows) -> dict[str, Tensor]:
        """Sample all latent sites, random effects for the clusters of `rows`."""

    @abstractmethod
    def refresh(self, model: MixedEffects, source: RowSource) -> None:
        """Take in what all rows say at the present state, between steps of training."""

    @abstractmethod
    def every_cluster(self) -> bool:
        """Whether every cluster has to be drawn with every mini-batch."""

    @abstractmethod
    def most_draws(self) -> int:
        """Draws that fit into memory at once."""

    @abstractmethod
    def center(self, rows: Rows) -> dict[str, Tensor]:
        """The latent sites at the guide's centre, without randomness."""

    def draws(self, rows: Rows, n: int) -> dict[str, Tensor]:
        """n joint draws of all latent sites.

        Returns
        -------
        dict of str to Tensor
            Random effects with shape "n clusters terms"; other sites "n 1 ...".
        """
        pieces = []
        with torch.no_grad():
            for start in range(0, n, self.most_draws()):
                with pyro.plate("draws", min(self.most_draws(), n - start), dim=-2):
                    pieces.append(self(rows))
        known = {name for name, value in pieces[0].items() if value.dim() < 2}
        return {
            name: value if name in known else torch.cat([piece[name] for piece in pieces])
            for name, value in pieces[0].items()
        }


class WhitenedNormal(dist.TorchDistribution):
    r"""u = L z with z ~ N(m, (C C')^-1).

    The density of random effects in the coordinates in which their prior is standard normal. It
    needs no inverse of the prior's covariance L L', so a standard deviation near zero is safe.

    Parameters
    ----------
    scale : Float[Tensor, "... terms terms"]
        L, lower triangular.
    mean : Float[Tensor, "... terms"]
        m.
    precision_tril : Float[Tensor, "... terms terms"]
        C, lower triangular.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, scale: Tensor, mean: Tensor, precision_tril: Tensor) -> None:
        self.scale_tril = scale
        self.mean_whitened = mean
        self.precision_tril = precision_tril
        super().__init__(mean.shape[:-1], mean.shape[-1:], validate_args=False)

    @property
    def mean(self) -> Tensor:
        """L m."""
        return (self.scale_tril @ self.mean_whitened[..., None])[..., 0]

    def expand(self, batch_shape: Any, _instance: Any = None) -> WhitenedNormal:
        if torch.Size(batch_shape) == self.batch_shape:
            return self
        shape = torch.Size(batch_shape)
        return WhitenedNormal(
            self.scale_tril,
            self.mean_whitened.expand(shape + self.event_shape),
            self.precision_tril,
        )

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        shape = torch.Size(sample_shape) + self.batch_shape + self.event_shape
        noise = torch.randn(shape, dtype=self.scale_tril.dtype, device=self.scale_tril.device)
        spread = torch.linalg.solve_triangular(self.precision_tril.mT, noise[..., None], upper=True)
        z = self.mean_whitened[..., None] + spread
        return (self.scale_tril @ z)[..., 0]

    def log_prob(self, value: Tensor) -> Tensor:
        z = torch.linalg.solve_triangular(self.scale_tril, value[..., None], upper=False)
        noise = (self.precision_tril.mT @ (z - self.mean_whitened[..., None]))[..., 0]
        log_det = self.precision_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_det = log_det - self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = 0.5 * math.log(2 * math.pi) * value.shape[-1]
        return log_det - 0.5 * (noise**2).sum(-1) - constant


class StructuredGuide(Guide):
    r"""Hyperparameters jointly normal; random effects conditionally normal given them.

    .. math::
        \theta &\sim N(\mu, \Lambda \Lambda^\top), \quad
            \theta = (\log sd, \text{unconstrained } R, \log \text{dispersion}, \beta) \\
        u_k \mid \theta &\sim N\big(L Q_k^{-1} L^\top \tau A_k (m_k - G_k \beta),
            L Q_k^{-1} L^\top\big), \quad Q_k = I + L^\top \tau A_k L

    with L the scale of the random effects given theta (u = L z with z standard normal a priori)
    and tau the sampled residual precision (1 where the family has none). A_k, m_k, G_k are
    pseudo-observations of cluster k. For gaussian outcomes with linear fixed effects and terms
    on inputs, they start at what the rows say and the conditional is exact for every theta;
    elsewhere they start from the curvature of the likelihood and are trained. A_k is full for at
    most 16 terms a factor, and diagonal beyond. Random effects of different factors are
    independent given theta, which makes the variance components of crossed factors too certain.

    Memory is O(clusters x terms^2), or O(clusters x terms) beyond 16 terms.

    Parameters
    ----------
    model : MixedEffects
        A bound program.
    source : RowSource, optional
        Training rows, from which the pseudo-observations start; without them they start at the
        prior.

    Examples
    --------
    >>> from armed_pyro import ClusteredData
    >>> x, y, g = [[0.0], [1.0], [3.0], [4.0]], [1, 2, 5, 6], [0, 0, 1, 1]
    >>> data = ClusteredData.from_arrays(x, y, {"g": g})
    >>> model = MixedEffects(nn.Linear(1, 1).double(), "(1 | g)").bind(data)
    >>> guide = StructuredGuide(model, model.encode(data))
    >>> guide.draws(model.clusters(), 3)["g_effect"].shape  # draws, clusters, terms
    torch.Size([3, 2, 1])
    """

    def __init__(self, model: MixedEffects, source: RowSource | None = None) -> None:
        super().__init__()
        facts = model.data_facts()
        self.hyperparameters = Hyperparameters(model)
        self.model_precision = model.precision
        self.factors: tuple[Factor, ...] = model.factors
        fixed = len(model.fixed_terms()) if model.bayesian_head else 0
        self._pseudo = nn.ModuleList(
            PseudoObservations(factor, len(facts.counts[factor.name]), fixed, model.reference())
            for factor in self.factors
        )
        if source is not None and self.factors:
            with torch.no_grad():
                latents = self.hyperparameters.center()
            observe(model, self.pseudo, latents, source)

    @property
    def pseudo(self) -> tuple[PseudoObservations, ...]:
        """Pseudo-observations of every factor."""
        return cast("tuple[PseudoObservations, ...]", tuple(self._pseudo))

    def refresh(self, model: MixedEffects, source: RowSource) -> None:
        if any(one.full for one in self.pseudo):
            observe(model, self.pseudo, self.draws(model.clusters(), REFRESH_DRAWS), source)

    def every_cluster(self) -> bool:
        return False

    def most_draws(self) -> int:
        return max(1, 100_000_000 // max([1, *(one.base.numel() for one in self.pseudo)]))

    def forward(self, rows: Rows) -> dict[str, Tensor]:
        latents = self.hyperparameters()
        for factor, pseudo in zip(self.factors, self.pseudo, strict=True):
            membership = rows.memberships[factor.name]
            conditional = self._conditional(factor, pseudo, latents, membership)
            with factor.plate(membership), weighted(membership):
                latents[factor.effect_site] = pyro.sample(factor.effect_site, conditional)
        return latents

    def center(self, rows: Rows) -> dict[str, Tensor]:
        latents = self.hyperparameters.center()
        for factor, pseudo in zip(self.factors, self.pseudo, strict=True):
            membership = rows.memberships[factor.name]
            conditional = self._conditional(factor, pseudo, latents, membership)
            latents[factor.effect_site] = conditional.mean
        return latents

    def _conditional(
        self,
        factor: Factor,
        pseudo: PseudoObservations,
        latents: Mapping[str, Tensor],
        membership: Membership,
    ) -> Any:
        """q(u | theta) for the clusters drawn."""
        tau = self.model_precision(latents)
        precision, pull = pseudo(membership.index, latents.get("fixed_effect"))
        pull = tau[..., None] * pull
        if pseudo.full:
            lower = factor.scale_matrix(latents)
            whitened = lower.mT @ (tau[..., None, None] * precision) @ lower
            identity = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
            root = torch.linalg.cholesky(whitened + identity)
            mean = torch.cholesky_solve(lower.mT @ pull[..., None], root)[..., 0]
            return WhitenedNormal(lower, mean, root)
        sd = factor.sd(latents)
        q = 1 + sd**2 * tau[..., None] * precision
        return dist.Normal(sd**2 * pull / q, sd * q.rsqrt()).to_event(1)
