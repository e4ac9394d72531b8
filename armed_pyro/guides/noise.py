"""The standard normal noise behind a guide's draws, made explicitly and handed to the guide."""

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

__all__ = [
    "Noise",
    "NoiseMessenger",
    "gaussian_noise",
    "heavy_noise",
    "no_noise",
    "proposal_noise",
    "proposal_variance",
]


# The hyperparameters' proposal: degrees of freedom; the share of draws that are heavy-tailed along
# a single coordinate; and the scale of that coordinate.
PROPOSAL_DF, SHARE_ALONG_ONE, ALONG_ONE = 8.0, 0.3, 3.0


@dataclass(frozen=True)
class Noise:
    r"""Noise of a guide's sites: S draws of every site, M particles of the nested effects.

    `values` are "draws 1 clusters terms" for random effects, "draws 1 1 size" for sites without
    clusters, and "draws particles clusters terms" for the guide's nested factor. `log_ratio` is
    the log-density of a site's noise minus that of standard normal noise, one value per draw (and
    particle and cluster); sites that are left out have standard normal noise.

    If `held`, random effects are constants, and gradients in the hyperparameters flow through
    densities only. Where the conditional is exact, :math:`p(y, u \mid \theta) / q(u \mid \theta)`
    is the same for all u, and these gradients are right and cheaper.
    """

    values: Mapping[str, Tensor]
    log_ratio: Mapping[str, Tensor]
    held: bool = False


class NoiseMessenger(Messenger):
    """Pyro handler under which a guide's sites take their noise from here.

    The number of draws is that of the noise; no plate of draws is needed. Sites that are left out
    are sampled as usual.
    """

    def __init__(self, values: Mapping[str, Tensor], *, held: bool = False) -> None:
        super().__init__()
        self.values, self.held = values, held

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name in self.values:
            value = cast("Pushforward", msg["fn"]).push(self.values[name])
            # A detached value is a new tensor, so its density is computed from the value and not
            # from the noise, see `Pushforward`.
            msg["value"] = value.detach() if self.held and name != "_theta" else value
            msg["done"] = True


def gaussian_noise(guide: Guide, rows: Rows, draws: int, like: Tensor) -> Noise:
    """Standard normal noise in the precision and on the device of `like`; one particle per draw."""
    shapes = guide.noise_shapes(rows).items()
    return Noise({site: _normal(draws, shape, like) for site, shape in shapes}, {})


def no_noise(guide: Guide, rows: Rows, like: Tensor) -> Noise:
    """One draw at the guide's centre, with constant random effects."""
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
    """Noise of importance-sampling proposals: heavier tails, and evenly spread particles.

    The nested effects' noise comes from randomly shifted lattices, with one lattice of `particles`
    points for each draw and cluster; with `stretch`, its tails are those of
    `armed_pyro.distributions.quasi_random.stretched`. With `heavy`, the hyperparameters' noise has
    the tails of `_heavy_tailed`.
    """
    nested, groups = guide.nested(), guide.particles()
    values, ratio = {}, {}
    for site, shape in guide.noise_shapes(rows).items():
        if nested is not None and site == nested.effect_site:
            normal = torch.special.ndtri(lattice(draws, particles, shape, like))
            values[site] = normal
            if stretch:
                values[site], ratio[site] = stretched(normal)
        elif groups is not None and site in groups.sites:
            # Stretched tails in each of a group's many dimensions would waste particles.
            values[site] = torch.special.ndtri(lattice(draws, particles, shape, like))
        elif site == "_theta" and heavy:
            values[site], ratio[site] = _heavy_tailed(_normal(draws, shape, like))
        else:
            values[site] = _normal(draws, shape, like)
    return Noise(values, ratio)


def heavy_noise(
    guide: Guide, draws: int, like: Tensor
) -> tuple[Float[Tensor, "draws 1 1 size"], Float[Tensor, " draws"]]:
    """Noise of proposals of the hyperparameters alone, and its log-ratio: see `proposal_noise`."""
    return _heavy_tailed(_normal(draws, (guide.hyperparameters.size,), like))


def proposal_variance(size: int) -> float:
    """Variance of each coordinate of the heavy-tailed noise of `size` hyperparameters."""
    student_t = PROPOSAL_DF / (PROPOSAL_DF - 2)
    along_one = 1 + (ALONG_ONE**2 * student_t - 1) / size
    return (1 - SHARE_ALONG_ONE) * student_t + SHARE_ALONG_ONE * along_one


def _normal(draws: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.randn((draws, 1, *_padded(shape)), dtype=like.dtype, device=like.device)


def _padded(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape with a 1 in the place of the clusters, if it has none."""
    return shape if len(shape) > 1 else (1, *shape)


def _heavy_tailed(
    normal: Float[Tensor, "draws ... size"],
) -> tuple[Tensor, Float[Tensor, " draws"]]:
    r"""Noise with heavy tails in all directions, heavier along single coordinates; its log-ratio.

    A mixture: multivariate t with probability 0.7, else normal except for one coordinate, which is
    t with three times the scale. A posterior with a long tail, such as that of an sd near zero,
    departs from the guide along one coordinate, and tails of that length in all coordinates would
    waste draws.
    """
    size, df = normal.shape[-1], PROPOSAL_DF
    chi2 = torch.distributions.Chi2(normal.new_tensor(df)).sample(normal.shape[:-1])
    stretch = (df / chi2).sqrt()[..., None]
    chosen = torch.randint(size, (*normal.shape[:-1], 1), device=normal.device)
    is_chosen = torch.arange(size, device=normal.device) == chosen
    single = torch.where(is_chosen, ALONG_ONE * stretch * normal, normal)
    along_one = torch.rand(normal.shape[:-1], device=normal.device)[..., None] < SHARE_ALONG_ONE
    noise = torch.where(along_one, single, stretch * normal)
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
