"""`Hyperparameters`: q(theta), one joint distribution in unconstrained coordinates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn
from torch.distributions import biject_to, constraints
from torch.distributions.transforms import CorrCholeskyTransform

from armed_pyro.distributions.cholesky_correlation import CorrelationCholesky
from armed_pyro.distributions.flow import AutoregressiveNormal, CoupledNormal, Flow, FlowParameters
from armed_pyro.program.model import MixedEffects

__all__ = ["Hyperparameters", "is_positive"]


# With more hyperparameters than this, steps of the guide's matrices are shortened in proportion.
FULL_STEPS = 6


@dataclass(frozen=True)
class _GlobalSite:
    """A hyperparameter's site, whose coordinates are ``theta[..., start:stop]``.

    `transform` maps the unconstrained value, of this `shape`, to the site's support.
    """

    name: str
    start: int
    stop: int
    shape: torch.Size
    event_dim: int
    transform: Any
    positive: bool

    def read(self, theta: Float[Tensor, "... size"]) -> tuple[Tensor, Tensor]:
        """The site's value, and the log-density that its transform adds: minus log |det|."""
        free = theta[..., self.start : self.stop].reshape(theta.shape[:-1] + self.shape)
        bounded = free
        if self.positive:
            # The log of an sd about which the data say little can take any value. Gradients
            # contain fourth powers of sds, which must neither overflow nor underflow.
            limits = torch.finfo(free.dtype)
            least, most = 8 * limits.tiny**0.25, limits.max**0.25 / 8
            bounded = free.clamp(math.log(least), math.log(most))
        value = self.transform(bounded)
        log_det = self.transform.log_abs_det_jacobian(free, value)
        log_det = sum_rightmost(log_det, log_det.dim() - value.dim() + self.event_dim)
        return value, -log_det


class Hyperparameters(nn.Module):
    r"""q(theta), the joint posterior of all latent sites outside the plates over clusters.

    .. math:: \theta \sim \text{AutoregressiveNormal}, \quad
        \theta = (\log \text{family}, \log sd, \text{unconstrained } R, \dots, \beta)

    Sites are in the order in which the program samples them, but latent fixed effects come last,
    because their scale depends on the variances. Before `train_shape`, q(theta) is a
    `CoupledNormal`.

    With many hyperparameters, each row of the flow's matrices is a sum of many trained numbers,
    all moved at once by Adam, and the noise of their gradients would add up. Beyond
    `FULL_STEPS` hyperparameters the matrices are therefore trained in smaller units.

    Where sds stand at x = 0, theta holds other coordinates, which do not depend on the origin of x,
    and `Factor.from_guide` gives the sites.

    Hyperparameters that are `known` from their priors have no place in theta, whose length is
    `size`. If q(theta) is `shaped`, skewness, tails and dependent scales are trained.
    """

    anchor: Tensor
    frame: Tensor
    shift: nn.Parameter
    log_scale: nn.Parameter
    coupling: nn.Parameter
    twist: nn.Parameter
    bow: nn.Parameter
    skew: nn.Parameter
    log_tail: nn.Parameter

    def __init__(self, model: MixedEffects) -> None:
        super().__init__()
        like = model.reference()
        self.known = model.known()
        self.sites = _global_sites(model)
        self._moving = tuple(factor for factor in model.factors if factor.from_zero is not None)
        self.size = size = self.sites[-1].stop if self.sites else 0
        self._reach = min(1.0, FULL_STEPS / max(1, size))
        self.register_buffer("anchor", like.new_tensor(_start(model, self.sites)))
        self.register_buffer("frame", torch.eye(size, dtype=like.dtype, device=like.device))
        self.log_scale = nn.Parameter(like.new_full((size,), math.log(0.1)))
        self.shift = nn.Parameter(like.new_zeros(size))
        self.coupling = nn.Parameter(like.new_zeros(size, size))
        # Fixed at the normal distribution until `train_shape`: with the single draw of a network's
        # step, gradients of the shape are noise, and a shape that drifts makes draws that overflow.
        self.twist = nn.Parameter(like.new_zeros(size, size), requires_grad=False)
        self.bow = nn.Parameter(like.new_zeros(size, size), requires_grad=False)
        self.skew = nn.Parameter(like.new_zeros(size), requires_grad=False)
        self.log_tail = nn.Parameter(like.new_zeros(size), requires_grad=False)
        self.shaped = False

    def forward(self) -> dict[str, Tensor]:
        """Sample ``_theta`` and every hyperparameter's site; the known ones are returned, too."""
        latents = dict(self.known)
        if self.sites:
            theta = pyro.sample("_theta", self.distribution(), infer={"is_auxiliary": True})
            values, log_densities = self._read(theta)
            for site in self.sites:
                log_density = log_densities[site.name]
                point = dist.Delta(values[site.name], log_density, event_dim=site.event_dim)
                latents[site.name] = pyro.sample(site.name, point)
        return latents

    def _read(
        self, theta: Float[Tensor, "... size"]
    ) -> tuple[dict[str, Tensor], dict[str, Float[Tensor, "..."]]]:
        """Each site's value, and minus the log |det| of the map that makes it from theta."""
        read = {site.name: site.read(theta) for site in self.sites}
        values = {name: value for name, (value, _) in read.items()}
        log_densities = {name: log_density for name, (_, log_density) in read.items()}
        for factor in self._moving:
            moved, log_det = factor.from_guide(values)
            if moved:
                values |= moved
                log_densities[factor.sd_site] = log_densities[factor.sd_site] - log_det
        return values, log_densities

    def train_shape(self) -> None:
        """Switch gradients on for all parameters, those of the shape included."""
        self.requires_grad_(True)
        self.shaped = True

    def distribution(self) -> Flow:
        """q(theta)."""
        return (AutoregressiveNormal if self.shaped else CoupledNormal)(
            FlowParameters(
                anchor=self.anchor,
                frame=self.frame,
                shift=self.shift,
                log_scale=self.log_scale,
                coupling=self._reach * self.coupling.tril(-1),
                twist=self._reach * self.twist.tril(-1),
                bow=self._reach * self.bow.tril(-1),
                skew=self.skew,
                log_tail=self.log_tail,
            )
        )

    def center(self) -> dict[str, Tensor]:
        """The hyperparameters at zero noise, with the known ones."""
        theta = self.distribution().push(torch.zeros_like(self.anchor))
        return self.known | self._read(theta)[0]

    def _load_from_state_dict(self, *args: Any, **settings: Any) -> None:
        super()._load_from_state_dict(*args, **settings)
        shape = (self.twist, self.bow, self.skew, self.log_tail)
        self.shaped = self.shaped or any(bool(parameter.any()) for parameter in shape)

    @torch.no_grad()
    def set_normal(self, mean: Float[Tensor, " size"], root: Float[Tensor, "size size"]) -> None:
        """Set q(theta) to N(mean, root root'), with root lower triangular, in place."""
        self.anchor.copy_(mean)
        self.frame.copy_(root)
        for parameter in self.parameters():
            parameter.zero_()


def _global_sites(model: MixedEffects) -> tuple[_GlobalSite, ...]:
    """The program's latent sites outside the plates, in order of appearance, fixed effects last."""
    facts, like = model.data_facts(), model.reference()
    training = model.training
    model.eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        trace = prune_subsample_sites(poutine.trace(model).get_trace(facts.one_row(like)))
    model.train(training)
    inside = {facts.outcome_name, *(factor.effect_site for factor in model.factors)}
    sites, start = [], 0
    for name in sorted(trace.stochastic_nodes, key=lambda name: name == "fixed_effect"):
        if name in inside:
            continue
        distribution = cast("dist.TorchDistribution", trace.nodes[name]["fn"])
        transform = biject_to(distribution.support)
        if isinstance(transform, CorrCholeskyTransform):
            transform = CorrelationCholesky()
        free = transform.inv(trace.nodes[name]["value"])
        stop = start + free.numel()
        positive, event_dim = is_positive(distribution.support), distribution.event_dim
        sites.append(_GlobalSite(name, start, stop, free.shape, event_dim, transform, positive))
        start = stop
    return tuple(sites)


def is_positive(support: Any) -> bool:
    """Whether a support is the positive numbers, such as that of an sd."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    bounded = hasattr(support, "upper_bound")  # a probability
    return bool(getattr(support, "lower_bound", None) == 0) and not bounded


def _start(model: MixedEffects, sites: tuple[_GlobalSite, ...]) -> list[float]:
    """Starting point of theta: `MixedEffects.starts`, and 0 for sites that it leaves out."""
    values, start = model.starts(), list[float]()
    for site in sites:
        if site.name in values:
            start += site.transform.inv(values[site.name]).flatten().tolist()
        else:
            start += [0.0] * (site.stop - site.start)
    return start
