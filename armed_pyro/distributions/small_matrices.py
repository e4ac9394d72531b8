"""Linear algebra for many small matrices, one per cluster."""

from __future__ import annotations

from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

__all__ = [
    "FEW",
    "log_volume",
    "lower_triangular",
    "multiply",
    "precision_root",
    "sheared_diagonal",
    "solve",
    "sum_last",
]


# Up to this size, element by element is several times faster than batched linear algebra.
FEW = 4


def precision_root(whitened: Float[Tensor, "... n n"]) -> Float[Tensor, "... n n"]:
    """Cholesky factor of I + L'AL, robust to rounding when an sd was drawn very large.

    It is computed column by column, for all matrices at once. In exact arithmetic every pivot is at
    least 1, because L'AL is positive semi-definite. Pivots are clamped to that, and to the rounding
    error of a large diagonal.
    """
    n = whitened.shape[-1]
    rest = whitened + torch.eye(n, dtype=whitened.dtype, device=whitened.device)
    rounding = 8 * torch.finfo(rest.dtype).eps
    least = (rounding * rest.diagonal(dim1=-2, dim2=-1)).detach().clamp(min=1)
    columns: list[Tensor] = []
    for j in range(n):
        pivot = torch.maximum(rest[..., :1, 0], least[..., j, None]).sqrt()
        below = rest[..., 1:, 0] / pivot
        columns.append(pad(torch.cat([pivot, below], -1), (j, 0)))
        rest = rest[..., 1:, 1:] - below[..., :, None] * below[..., None, :]
    return torch.stack(columns, -1)


def lower_triangular(root: Float[Tensor, "... n n"]) -> Float[Tensor, "... n n"]:
    """The lower triangular L, with positive diagonal, for which L L' = root root'."""
    # In single precision a nearly singular root would lose its last pivots.
    upper = torch.linalg.qr(root.double().mT).R
    signs = torch.where(upper.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(upper)
    return (signs[..., None] * upper).mT.to(root)


def sheared_diagonal(
    row: Float[Tensor, " n"], sd: Float[Tensor, "... n"]
) -> Float[Tensor, "... n n"]:
    r"""Cholesky factor of T diag(sd^2) T', for T the identity but for its first row, (1, t).

    With :math:`c_j = sd_0^2 + \sum_{i > j} t_i^2 sd_i^2`, its elements are
    :math:`L_{00} = \sqrt{c_0}`, :math:`L_{i0} = t_i sd_i^2 / \sqrt{c_0}`,
    :math:`L_{jj} = sd_j \sqrt{c_j / c_{j-1}}` and
    :math:`L_{ij} = -t_i t_j sd_i^2 sd_j / \sqrt{c_j c_{j-1}}`. Nothing cancels, so all of them are
    exact where T diag(sd) is nearly singular.
    """
    t, sds, first = row[1:], sd[..., 1:], sd[..., :1] ** 2
    squares = torch.cat([(t * sds) ** 2, torch.zeros_like(first)], -1)
    c = first + squares.flip(-1).cumsum(-1).flip(-1)
    pull, ends = t * sds**2, c[..., 1:] * c[..., :-1]
    below = -pull[..., :, None] * (t * sds / ends.sqrt())[..., None, :]
    inner = below.tril(-1) + torch.diag_embed(sds * (c[..., 1:] / c[..., :-1]).sqrt())
    left = torch.cat([c[..., :1], pull], -1) / c[..., :1].sqrt()
    return torch.cat([left[..., None], pad(inner, (0, 0, 1, 0))], -1)


def sum_last(values: Float[Tensor, "... terms"]) -> Float[Tensor, "..."]:
    """Sum over the last dimension."""
    if not 0 < values.shape[-1] <= FEW:
        return values.sum(-1)
    return reduce(torch.add, values.unbind(-1))


def multiply(
    matrix: Float[Tensor, "... terms terms"], vector: Float[Tensor, "... terms"]
) -> Float[Tensor, "... terms"]:
    """Matrix times vector, for many small matrices."""
    if vector.shape[-1] > FEW:
        return (matrix @ vector[..., None])[..., 0]
    columns = zip(matrix.unbind(-1), vector.unbind(-1), strict=True)
    return reduce(torch.add, (column * value[..., None] for column, value in columns))


def solve(
    matrix: Float[Tensor, "... n n"], right: Float[Tensor, "... n columns"], *, upper: bool
) -> Float[Tensor, "... n columns"]:
    """X with matrix X = right, for many triangular matrices."""
    n = matrix.shape[-1]
    if n > FEW:
        return torch.linalg.solve_triangular(matrix, right, upper=upper)
    solved: dict[int, Tensor] = {}
    for i in reversed(range(n)) if upper else range(n):
        known = (matrix[..., i, j, None] * row for j, row in solved.items())
        rest = reduce(torch.sub, known, right[..., i, :])
        solved[i] = rest / matrix[..., i, i, None]
    return torch.stack([solved[i] for i in range(n)], -2)


def log_volume(sd: Tensor, cholesky: Float[Tensor, "... n n"]) -> Float[Tensor, "..."]:
    r"""log |d D / d (sd, R's Cholesky factor C)| = :math:`\sum_i n log s_i + (n - 1 - i) log C_ii`.

    A constant is left out. i counts from 0, and C is known by its elements below the diagonal.
    """
    n = sd.shape[-1]
    powers = torch.arange(n - 1, -1, -1, dtype=sd.dtype, device=sd.device)
    diagonal = cholesky.diagonal(dim1=-2, dim2=-1)
    return n * sd.log().sum(-1) + (powers[:-1] * diagonal[..., :-1].log()).sum(-1)
