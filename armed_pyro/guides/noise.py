"""The random numbers that a guide turns into draws, given explicitly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from pyro.poutine.messenger import Messenger
from torch import Tensor

from armed_pyro.distributions.quasi_random import lattice, stretched
from armed_pyro.distributions.whitened import LOG_SQRT_2PI, Pushforward
from armed_pyro.guides.base import Guide
from armed_pyro.rows.batch import Rows

__all__ = ["Given", "Noise", "gaussian_noise", "no_noise", "proposal_noise", "proposal_variance"]


# Degrees of freedom of the proposal of the hyperparameters; share of its draws that go far along
# one coordinate, and their scale.
PROPOSAL_DF, SHARE_ALONG_ONE, ALONG_ONE = 8.0, 0.3, 3.0


@dataclass(frozen=True)
class Noise:
    r"""Noise for the sites of a guide, S draws of all and M particles of the nested effects.

    Attributes
    ----------
    values : mapping of str to Tensor
        "draws 1 clusters terms", "draws 1 1 size"; "draws particles clusters terms" for the
        effects of the guide's nested factor.
    log_ratio : mapping of str to Tensor
        log-density of a site's noise over that of standard normal noise, one value a draw (and
        particle and cluster); sites left out have standard normal noise.
    held : bool
        Whether random effects are held where this noise puts them: gradients by the
        hyperparameters then go through densities alone. Where their conditional is exact,
        :math:`p(y, u \mid \theta) / q(u \mid \theta)` is the same for all u, and so are
        gradients, for less work.
    """

    values: Mapping[str, Tensor]
    log_ratio: Mapping[str, Tensor]
    held: bool = False


class Given(Messenger):
    """Handler by which a guide makes its draws of given noise, however many draws that is.

    Random effects are `held`, without gradients, if so wanted: see `Noise`.
    """

    def __init__(self, values: Mapping[str, Tensor], *, held: bool = False) -> None:
        super().__init__()
        self.values, self.held = values, held

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name in self.values:
            value = cast("Pushforward", msg["fn"]).push(self.values[name])
            # Another tensor, so that its density is computed from the value, not from the noise.
            msg["value"] = value.detach() if self.held and name != "_theta" else value
            msg["done"] = True


def gaussian_noise(guide: Guide, rows: Rows, draws: int, like: Tensor) -> Noise:
    """Standard normal noise, with a single particle a draw."""
    shapes = guide.noise_shapes(rows).items()
    return Noise({site: _normal(draws, 1, shape, like) for site, shape in shapes}, {})


def no_noise(guide: Guide, rows: Rows, like: Tensor) -> Noise:
    """One draw at the guide's centre, its random effects held."""
    shapes = guide.noise_shapes(rows).items()
    return Noise({site: like.new_zeros(1, 1, *_padded(shape)) for site, shape in shapes}, {}, True)


def proposal_noise(
    guide: Guide,
    rows: Rows,
    draws: int,
    particles: int,
    like: Tensor,
    *,
    heavy: bool = True,
    stretch: bool = True,
) -> Noise:
    """Noise of proposals: tails heavier than the guide's, particles spread evenly.

    The nested effects' noise comes from randomly shifted lattices, a lattice of M points for each
    draw and cluster.

    Parameters
    ----------
    heavy : bool
        Whether the hyperparameters' noise has the tails of `_far_reaching` instead of normal ones.
    stretch : bool
        Whether the normal tails of the nested effects are stretched by ``sinh(t asinh(.))``, with
        t 1.6 for one effect a cluster, 1.4 for two, 1.2 for more.
    """
    nested = guide.nested()
    values, ratio = {}, {}
    for site, shape in guide.noise_shapes(rows).items():
        if nested is not None and site == nested.effect_site:
            even = torch.special.ndtri(lattice(draws, particles, shape, like))
            values[site] = even
            if stretch:
                values[site], ratio[site] = stretched(even)
        elif site == "_theta" and heavy:
            values[site], ratio[site] = _far_reaching(_normal(draws, 1, shape, like))
        else:
            values[site] = _normal(draws, 1, shape, like)
    return Noise(values, ratio)


def proposal_variance(size: int) -> float:
    """Variance of a coordinate of the heavy noise of that many hyperparameters."""
    of_t = PROPOSAL_DF / (PROPOSAL_DF - 2)
    along = 1 + (ALONG_ONE**2 * of_t - 1) / size
    return (1 - SHARE_ALONG_ONE) * of_t + SHARE_ALONG_ONE * along


def _normal(draws: int, particles: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
    whole = (draws, particles, *_padded(shape))
    return torch.randn(whole, dtype=like.dtype, device=like.device)


def _padded(shape: tuple[int, ...]) -> tuple[int, ...]:
    """With a dimension in the place of clusters."""
    return shape if len(shape) > 1 else (1, *shape)


def _far_reaching(normal: Float[Tensor, "... size"]) -> tuple[Tensor, Tensor]:
    r"""Noise with heavy tails in all directions, and heavier ones along single coordinates.

    Multivariate t; or, in three of ten draws, normal but for one coordinate, which is t with three
    times the scale: a posterior that an sd near zero, say, gives a long tail leaves the guide
    along one coordinate, and tails that long in all of them would waste the draws.
    """
    size, df = normal.shape[-1], PROPOSAL_DF
    chi2 = torch.distributions.Chi2(normal.new_tensor(df)).sample(normal.shape[:-1])
    stretch = (df / chi2).sqrt()[..., None]
    chosen = torch.randint(size, (*normal.shape[:-1], 1), device=normal.device)
    alone = torch.arange(size, device=normal.device) == chosen
    single = torch.where(alone, ALONG_ONE * stretch * normal, normal)
    by_one = torch.rand(normal.shape[:-1], device=normal.device)[..., None] < SHARE_ALONG_ONE
    noise = torch.where(by_one, single, stretch * normal)
    log_normal = -0.5 * noise**2 - LOG_SQRT_2PI
    constant = math.lgamma((df + size) / 2) - math.lgamma(df / 2)
    constant -= size / 2 * math.log(df * math.pi)
    log_t = constant - (df + size) / 2 * torch.log1p((noise**2).sum(-1) / df)
    t = torch.distributions.StudentT(df, noise.new_tensor(0.0), noise.new_tensor(ALONG_ONE))
    log_single = torch.logsumexp(t.log_prob(noise) - log_normal, -1) - math.log(size)
    log_ratio = torch.logaddexp(
        math.log(1 - SHARE_ALONG_ONE) + log_t - log_normal.sum(-1),
        math.log(SHARE_ALONG_ONE) + log_single,
    )
    return noise, log_ratio.flatten(1).sum(-1)
