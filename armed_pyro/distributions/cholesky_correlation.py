"""Unconstrained coordinates of correlation matrices."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions.transforms import CorrCholeskyTransform
from torch.nn.functional import pad, softplus

__all__ = ["CorrelationCholesky", "log_volume"]


class CorrelationCholesky(CorrCholeskyTransform):
    r"""From D (D - 1) / 2 real numbers to the Cholesky factor of a D x D correlation matrix.

    .. math:: r = \tanh x, \quad L_{ij} = r_{ij} \prod_{k < j} \sqrt{1 - r_{ik}^2}, \quad j \le i,
              \quad r_{ii} = 1

    The map is torch's, and that of the Stan Reference Manual, "Cholesky factors of correlation
    matrices". It indexes by places that are computed beforehand instead of by masks, so it can be
    compiled.
    """

    def _call(self, x: Float[Tensor, "... pairs"]) -> Float[Tensor, "... D D"]:
        size = round(0.5 + math.sqrt(0.25 + 2 * x.shape[-1]))
        edge = 1 - torch.finfo(x.dtype).eps
        flat = x.new_zeros(*x.shape[:-1], size * size)
        tanh = torch.tanh(x).clamp(-edge, edge)
        r = flat.index_copy(-1, _below(size, 1, x), tanh).unflatten(-1, (size, size))
        left = (1 - r**2).sqrt().cumprod(-1)[..., :-1]
        unit = torch.eye(size, dtype=x.dtype, device=x.device)
        return (r + unit) * pad(left, (1, 0), value=1.0)

    def log_abs_det_jacobian(
        self, x: Float[Tensor, "... pairs"], y: Tensor, intermediates: Any = None
    ) -> Float[Tensor, "..."]:
        left = (1 - (y * y).cumsum(-1)).flatten(-2).index_select(-1, _below(y.shape[-1], 2, x))
        by_tanh = -2 * (x + softplus(-2 * x) - math.log(2)).sum(-1)
        return 0.5 * left.log().sum(-1) + by_tanh


def _below(size: int, offset: int, like: Tensor) -> Tensor:
    """Places in a flattened square matrix at least `offset` below its diagonal."""
    places = [i * size + j for i in range(size) for j in range(i - offset + 1)]
    return torch.tensor(places, dtype=torch.long, device=like.device)


def log_volume(sd: Tensor, cholesky: Float[Tensor, "... n n"]) -> Float[Tensor, "..."]:
    r"""log |d D / d (sd, R's Cholesky factor C)| = :math:`\sum_i n log s_i + (n - 1 - i) log C_ii`.

    A constant is left out. i counts from 0, and C is known by its elements below the diagonal.
    """
    n = sd.shape[-1]
    powers = torch.arange(n - 1, -1, -1, dtype=sd.dtype, device=sd.device)
    diagonal = cholesky.diagonal(dim1=-2, dim2=-1)
    return n * sd.log().sum(-1) + (powers[:-1] * diagonal[..., :-1].log()).sum(-1)
