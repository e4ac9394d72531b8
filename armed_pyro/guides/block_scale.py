"""The block-diagonal scale L of the random effects of several grouping factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["BlockScale"]


@dataclass(frozen=True)
class BlockScale:
    r"""L = diag(rows) blockdiag(L_1, ..., L_1, L_2, ...), never written out.

    Each factor has the same block for each of its clusters, so that u = L z are the effects of
    standard normal z. If every factor has a single term, L is diagonal and all products are
    elementwise.

    Attributes
    ----------
    blocks : sequence of Float[Tensor, "... terms terms"]
        One block per factor, lower triangular.
    clusters : sequence of int
        Number of clusters of each factor.
    rows : Float[Tensor, "... m"], optional
        Multipliers of the rows; 1 by default.

    Examples
    --------
    >>> L = BlockScale([torch.tensor([[2.0]]), torch.tensor([[3.0]])], clusters=[2, 1])
    >>> L.right(torch.eye(3))
    tensor([[2., 0., 0.],
            [0., 2., 0.],
            [0., 0., 3.]])
    """

    blocks: Sequence[Float[Tensor, "... terms terms"]]
    clusters: Sequence[int]
    rows: Float[Tensor, "... m"] | None = None

    def right(self, matrix: Float[Tensor, "... n m"]) -> Float[Tensor, "... n m"]:
        """M L, for any matrix M."""
        if self._diagonal is not None:
            return matrix * self._diagonal[..., None, :]
        matrix = matrix if self.rows is None else matrix * self.rows[..., None, :]
        return self._times(matrix, self.blocks)

    def both(self, matrix: Float[Tensor, "... m m"]) -> Float[Tensor, "... m m"]:
        """L' M L, for a symmetric matrix M."""
        if self._diagonal is not None:
            # The outer product as a matrix product: its gradient is then a matrix product, too.
            return self._diagonal[..., :, None] @ self._diagonal[..., None, :] * matrix
        return self.right(self.right(matrix).mT)

    def diagonal_bound(self, diagonal: Float[Tensor, " m"]) -> Float[Tensor, "... m"]:
        """Upper bound of diag(L' M L), for any positive definite M with this diagonal.

        With blocks of several terms, (sum_i L_ij v_i)^2 <= terms sum_i L_ij^2 v_i^2; with single
        terms the bound is attained.
        """
        if self._diagonal is not None:
            return self._diagonal**2 * diagonal
        diagonal = diagonal if self.rows is None else diagonal * self.rows**2
        squares = [block.shape[-1] * block**2 for block in self.blocks]
        return self._times(diagonal[..., None, :], squares)[..., 0, :]

    @cached_property
    def _diagonal(self) -> Float[Tensor, "... m"] | None:
        """L's diagonal if all factors have a single term, else None."""
        if any(block.shape[-1] > 1 for block in self.blocks):
            return None
        batch = torch.broadcast_shapes(*(block.shape[:-2] for block in self.blocks))
        pairs = zip(self.blocks, self.clusters, strict=True)
        diagonal = torch.cat([block[..., 0].expand(*batch, k) for block, k in pairs], -1)
        return diagonal if self.rows is None else diagonal * self.rows

    def _times(self, matrix: Tensor, blocks: Sequence[Tensor]) -> Tensor:
        pieces, start = [], 0
        for block, k in zip(blocks, self.clusters, strict=True):
            t = block.shape[-1]
            piece = matrix[..., start : start + k * t].unflatten(-1, (k, t))
            pieces.append((piece @ block.unsqueeze(-3)).flatten(-2))
            start += k * t
        batch = torch.broadcast_shapes(*(piece.shape[:-1] for piece in pieces))
        return torch.cat([piece.expand(*batch, -1) for piece in pieces], -1)
