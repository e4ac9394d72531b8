"""Quasi-random points: randomly shifted lattices, and normal noise with stretched tails."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from armed_pyro.distributions.small_matrices import sum_last

__all__ = ["lattice", "stretched"]


# Stretch of the proposal for one, two, or more effects per cluster. The error of a lattice falls
# with the smoothness of the periodic integrand, and with tails this heavy a few points are as good
# as adaptive quadrature: the variance of log p^(y_k) is below 1e-6 with 16 points for one effect,
# and below 1e-4 with 32 points for two. In more dimensions heavier tails cost more than they gain.
STRETCH = (1.6, 1.4, 1.2)


def stretched(normal: Float[Tensor, "... size"]) -> tuple[Tensor, Tensor]:
    """sinh(t asinh(normal)), and its log-density minus that of standard normal noise ("...")."""
    stretch = STRETCH[min(normal.shape[-1], len(STRETCH)) - 1]
    # asinh written out: torch's own is slow.
    size = normal.abs()
    inner = stretch * torch.copysign(torch.log(size + torch.sqrt(1 + size**2)), normal)
    noise = torch.sinh(inner)
    squares = noise**2, normal**2
    # log |d noise / d normal|, with cosh(inner)^2 = 1 + noise^2.
    log_det = 0.5 * (torch.log1p(squares[0]) - torch.log1p(squares[1])) + math.log(stretch)
    return noise, sum_last(0.5 * (squares[0] - squares[1]) - log_det)


def lattice(
    draws: int, particles: int, shape: tuple[int, ...], like: Tensor
) -> Float[Tensor, "draws particles clusters terms"]:
    """Evenly spread points of (0, 1)^terms: a rank-1 lattice, shifted at random.

    `shape` is the number of clusters and of terms; every draw and cluster has its own shift. The
    points are in the precision and on the device of `like`.
    """
    # Made on the device: a copy to it would make the step wait.
    exact: dict[str, Any] = {"dtype": torch.float64, "device": like.device}
    steps = torch.tensor(_generator(particles, shape[-1]), **exact) / particles
    points = torch.arange(particles, **exact)[:, None] * steps % 1
    shift = torch.rand((draws, 1, *shape), dtype=like.dtype, device=like.device)
    edge = torch.finfo(like.dtype).eps
    return ((points.to(like)[:, None, :] + shift) % 1).clamp(edge, 1 - edge)


@lru_cache
def _generator(points: int, terms: int) -> tuple[int, ...]:
    """Generating vector of a rank-1 lattice, chosen component by component.

    Sloan and Reztsov (2002), Mathematics of Computation 71(237).
    """
    index = np.arange(points)

    def kernel(step: int) -> np.ndarray:
        x = index * step % points / points
        return 1 + 2 * np.pi**2 * (x * x - x + 1 / 6)

    steps, product = [1], kernel(1)
    candidates = [step for step in range(1, max(2, points)) if math.gcd(step, points) == 1]
    for _ in range(terms - 1):
        best = min(candidates, key=lambda step: float((product * kernel(step)).sum()))
        product = product * kernel(best)
        product = product / product.mean()
        steps.append(best)
    return tuple(steps)
