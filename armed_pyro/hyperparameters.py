"""The hyperparameters' part of a guide: one normal distribution in unconstrained coordinates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from torch import Tensor, nn
from torch.distributions import biject_to

from armed_pyro.rows import Membership, Rows

if TYPE_CHECKING:
    from armed_pyro.program import MixedEffects

__all__ = ["Hyperparameters"]


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


class Hyperparameters(nn.Module):
    r"""Joint posterior of everything outside the plates over clusters.

    .. math:: \theta \sim N(\mu, \Lambda \Lambda^\top), \quad
        \theta = (\log \text{dispersion}, \beta, \log sd, \text{unconstrained } R, \dots)

    in the order in which the program samples them.

    Parameters
    ----------
    model : MixedEffects
        A bound program.
    """

    loc: nn.Parameter
    log_scale: nn.Parameter
    coupling: nn.Parameter

    def __init__(self, model: MixedEffects) -> None:
        super().__init__()
        like = model.reference()
        self.known = model.known()
        self.sites = _global_sites(model)
        size = self.sites[-1].stop if self.sites else 0
        self.loc = nn.Parameter(like.new_tensor(_start(model, self.sites)))
        self.log_scale = nn.Parameter(like.new_full((size,), math.log(0.1)))
        self.coupling = nn.Parameter(like.new_zeros(size, size))

    def forward(self) -> dict[str, Tensor]:
        """Sample every hyperparameter's site."""
        latents = dict(self.known)
        if self.sites:
            base = dist.MultivariateNormal(self.loc, scale_tril=self.scale_tril())
            theta = pyro.sample("_theta", base, infer={"is_auxiliary": True})
            for site in self.sites:
                value, log_density = site.read(theta)
                point = dist.Delta(value, log_density, event_dim=site.event_dim)
                latents[site.name] = pyro.sample(site.name, point)
        return latents

    def center(self) -> dict[str, Tensor]:
        """The hyperparameters at the mean of theta."""
        return self.known | {site.name: site.read(self.loc)[0] for site in self.sites}

    def scale_tril(self) -> Float[Tensor, "size size"]:
        """Cholesky factor of the covariance: diag(exp(log_scale)) (I + strictly lower coupling)."""
        # Relative to the scale, so that a step of training means the same whether theta is known
        # to one digit or to four.
        identity = torch.eye(len(self.loc), dtype=self.loc.dtype, device=self.loc.device)
        return self.log_scale.exp()[:, None] * (identity + self.coupling.tril(-1))

    @torch.no_grad()
    def set_scale_tril(self, factor: Float[Tensor, "size size"]) -> None:
        """Make this the Cholesky factor of the covariance."""
        diagonal = factor.diagonal()
        self.log_scale.copy_(diagonal.log())
        self.coupling.copy_((factor / diagonal[:, None]).tril(-1))


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
        if site.name == model.family.dispersion_name:
            start += [math.log(0.7)] * size
        elif site.name.endswith("_sd"):
            start += [math.log(0.5 / math.sqrt(max(1, size / 2)))] * size
        else:
            start += [0.0] * size
    return start
