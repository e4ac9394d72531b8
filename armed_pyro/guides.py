"""Variational families: ordinary Pyro guides with the program's sites."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from torch import Tensor, nn
from torch.distributions import biject_to, constraints

from armed_pyro.factors import Factor, weighted
from armed_pyro.program import MixedEffects
from armed_pyro.pseudo import PseudoObservations, observe
from armed_pyro.rows import Membership, Rows, RowSource

__all__ = ["Guide", "StructuredGuide", "WhitenedNormal"]


class Guide(nn.Module, ABC):
    """Approximate posterior q of a bound program: samples every latent site of the program."""

    @abstractmethod
    def forward(self, rows: Rows) -> dict[str, Tensor]:
        """Sample all latent sites, random effects for the clusters of `rows`."""

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
        with torch.no_grad(), pyro.plate("draws", n, dim=-2):
            return self(rows)


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


@dataclass(frozen=True)
class _GlobalSite:
    """A hyperparameter's place in the vector theta."""

    name: str
    start: int
    stop: int
    shape: torch.Size
    event_dim: int
    transform: Any

    def read(self, theta: Float[Tensor, "... size"]) -> tuple[Tensor, Tensor]:
        """The site's value, and minus the log-determinant of its transform."""
        free = theta[..., self.start : self.stop].reshape(theta.shape[:-1] + self.shape)
        value = self.transform(free)
        log_det = self.transform.log_abs_det_jacobian(free, value)
        log_det = sum_rightmost(log_det, log_det.dim() - value.dim() + self.event_dim)
        return value, -log_det


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
    """

    loc: nn.Parameter
    tril: nn.Parameter

    def __init__(self, model: MixedEffects, source: RowSource | None = None) -> None:
        super().__init__()
        like = model.reference()
        facts = model.data_facts()
        self.known = model.known()
        self.model_precision = model.precision
        self.factors: tuple[Factor, ...] = model.factors
        self.sites = _global_sites(model)
        size = self.sites[-1].stop if self.sites else 0
        self.loc = nn.Parameter(like.new_tensor(_start(model, self.sites)))
        self.tril = nn.Parameter(0.1 * torch.eye(size, dtype=like.dtype, device=like.device))
        fixed = len(model.fixed_terms()) if model.bayesian_head else 0
        self._pseudo = nn.ModuleList(
            PseudoObservations(factor, len(facts.counts[factor.name]), fixed, like)
            for factor in self.factors
        )
        if source is not None and self.factors:
            observe(model, self.pseudo, self._hyperparameters(self.loc.detach()), source)

    @property
    def pseudo(self) -> tuple[PseudoObservations, ...]:
        """Pseudo-observations of every factor."""
        return cast("tuple[PseudoObservations, ...]", tuple(self._pseudo))

    def forward(self, rows: Rows) -> dict[str, Tensor]:
        latents = dict(self.known)
        if self.sites:
            base = dist.MultivariateNormal(self.loc, scale_tril=self._scale_tril())
            theta = pyro.sample("_theta", base, infer={"is_auxiliary": True})
            for site in self.sites:
                value, log_density = site.read(theta)
                point = dist.Delta(value, log_density, event_dim=site.event_dim)
                latents[site.name] = pyro.sample(site.name, point)
        for factor, pseudo in zip(self.factors, self.pseudo, strict=True):
            membership = rows.memberships[factor.name]
            conditional = self._conditional(factor, pseudo, latents, membership)
            with factor.plate(membership), weighted(membership):
                latents[factor.effect_site] = pyro.sample(factor.effect_site, conditional)
        return latents

    def center(self, rows: Rows) -> dict[str, Tensor]:
        latents = self._hyperparameters(self.loc)
        for factor, pseudo in zip(self.factors, self.pseudo, strict=True):
            membership = rows.memberships[factor.name]
            conditional = self._conditional(factor, pseudo, latents, membership)
            latents[factor.effect_site] = conditional.mean
        return latents

    def _hyperparameters(self, theta: Float[Tensor, " size"]) -> dict[str, Tensor]:
        return self.known | {site.name: site.read(theta)[0] for site in self.sites}

    def _scale_tril(self) -> Float[Tensor, "size size"]:
        # A signed diagonal is a valid factor up to the sign of its columns; |.| fixes the sign.
        return self.tril.tril(-1) + torch.diag(self.tril.diagonal().abs() + 1e-8)

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
        scale = factor.scale(latents)
        if pseudo.full:
            lower = torch.diag_embed(scale) if factor.diagonal else scale
            whitened = lower.mT @ (tau[..., None, None] * precision) @ lower
            identity = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
            root = torch.linalg.cholesky(whitened + identity)
            mean = torch.cholesky_solve(lower.mT @ pull[..., None], root)[..., 0]
            return WhitenedNormal(lower, mean, root)
        sd = scale if factor.diagonal else factor.sd(latents)
        q = 1 + sd**2 * tau[..., None] * precision
        return dist.Normal(sd**2 * pull / q, sd * q.rsqrt()).to_event(1)


def _global_sites(model: MixedEffects) -> tuple[_GlobalSite, ...]:
    """The program's latent sites outside the plates, in order of appearance."""
    facts, like = model.data_facts(), model.reference()
    x = torch.zeros(1, *facts.feature_shape, dtype=like.dtype, device=like.device)
    one = torch.zeros(1, dtype=torch.long, device=like.device)
    memberships = {name: Membership(one, one) for name in model.factor_names()}
    trials = torch.ones(1, dtype=like.dtype, device=like.device)
    training = model.training
    model.eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        trace = poutine.trace(model).get_trace(Rows(x, None, memberships, trials=trials))
    model.train(training)
    effects = {factor.effect_site for factor in model.factors}
    sites, start = [], 0
    for name, node in trace.nodes.items():
        outside = name in effects or name == facts.outcome_name
        if node["type"] != "sample" or node["is_observed"] or outside:
            continue
        if type(node["fn"]).__name__ == "_Subsample":
            continue
        distribution = cast("dist.TorchDistribution", node["fn"])
        transform = biject_to(distribution.support)
        free = transform.inv(node["value"])
        stop = start + free.numel()
        event_dim = distribution.event_dim
        sites.append(_GlobalSite(name, start, stop, free.shape, event_dim, transform))
        start = stop
    return tuple(sites)


def _start(model: MixedEffects, sites: tuple[_GlobalSite, ...]) -> list[float]:
    """Starting point of theta: moderate random effects, no correlation, null fixed effects."""
    start: list[float] = []
    for site in sites:
        size = site.stop - site.start
        if site.name.endswith("_sd"):
            start += [math.log(0.5 / math.sqrt(max(1, size / 2)))] * size
        elif site.name == model.family.dispersion_name:
            start += [math.log(0.7)] * size
        else:
            start += [0.0] * size
    return start
