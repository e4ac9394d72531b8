"""Linear algebra for many small matrices, with the dimensions of the matrices first.

Each operation works on one matrix element of all draws and clusters, which is contiguous.
"""

from __future__ import annotations

from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["along", "identity", "inverse_root", "product", "transposed"]


# Products of matrices up to this size are written as sums: the matrices are many and small.
SMALL = 8


def inverse_root(
    whitened: Float[Tensor, "n n ..."],
) -> tuple[Float[Tensor, "n n ..."], Float[Tensor, "n ..."]]:
    """R^{-1} and R's diagonal, with R R' = I + L'AL, as in `small_matrices.precision_root`."""
    n = len(whitened)
    ones = identity(whitened)
    rest = torch.cat([whitened + ones, ones.expand_as(whitened)], 1)
    rounding = 8 * torch.finfo(rest.dtype).eps
    least = (rounding * rest.diagonal()).movedim(-1, 0).clamp(min=1)
    rows, pivots = [], []
    for j in range(n):
        pivot = torch.maximum(rest[0, 0], least[j]).sqrt()
        row = rest[0] / pivot
        pivots.append(pivot)
        # Row j of R' is followed by row j of the inverse, whose entries beyond j are zero.
        rows.append(row[n - j :])
        rest = rest[1:, 1:] - (row[1 : n - j, None] * row[None, 1:])
    return torch.stack(rows), torch.stack(pivots)


def product(a: Float[Tensor, "n k ..."], b: Float[Tensor, "k m ..."]) -> Float[Tensor, "n m ..."]:
    """A B."""
    if 0 < a.shape[1] <= SMALL:
        columns = zip(a.unbind(1), b.unbind(0), strict=True)
        return reduce(torch.add, (column[:, None] * row for column, row in columns))
    trailing = (matrix.movedim((0, 1), (-2, -1)) for matrix in (a, b))
    return torch.matmul(*trailing).movedim((-2, -1), (0, 1))


def along(matrix: Float[Tensor, "n k ..."], vector: Float[Tensor, "k ..."]) -> Tensor:
    """Matrix times vector."""
    return (matrix * vector[None]).sum(1)


def transposed(matrix: Float[Tensor, "n m ..."]) -> Float[Tensor, "m n ..."]:
    """A'."""
    return matrix.transpose(0, 1)


def identity(like: Float[Tensor, "n n ..."]) -> Tensor:
    """The identity matrix, with as many dimensions as `like`."""
    ones = torch.eye(len(like), dtype=like.dtype, device=like.device)
    return ones.reshape(*ones.shape, *[1] * (like.dim() - 2))
