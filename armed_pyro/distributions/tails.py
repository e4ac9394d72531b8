"""Tail probabilities by quadrature, where torch has no differentiable distribution function."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

__all__ = ["log_tail", "nodes_of"]

# Of log probabilities, the error is below 1e-7 for Student's t and 1e-5 for gamma distributions.
NODES = 32


@cache
def _rule(power: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Nodes on (0, inf), w / (1 - w)^power at Gauss-Legendre nodes w, and logs of their weights."""
    x, weight = np.polynomial.legendre.leggauss(NODES)
    w = (x + 1) / 2
    slope = (1 + (power - 1) * w) / (1 - w) ** (power + 1)
    return tuple(w / (1 - w) ** power), tuple(np.log(weight / 2 * slope))


def nodes_of(length: Tensor, power: int) -> Tensor:
    """Distances from the start of a tail that decays over `length`, in a new last dimension.

    A larger power of the nodes suits a heavier tail.
    """
    return length[..., None] * length.new_tensor(_rule(power)[0])


def log_tail(log_density: Tensor, log_ratio: Tensor, length: Tensor, power: int) -> Tensor:
    r"""log of the integral of a density from a point on.

    .. math:: \log \int_0^\infty f(x + s) \, ds =
        \log f(x) + \log \int_0^\infty f(x + s) / f(x) \, ds

    `log_ratio` is log f(x + s) - log f(x) at `nodes_of` the same length and power.
    """
    weights = log_density.new_tensor(_rule(power)[1])
    return log_density + length.log() + torch.logsumexp(log_ratio + weights, -1)
