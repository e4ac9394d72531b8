"""Scale of several factors' effects given the hyperparameters, block by block."""

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
    """L, block-diagonal: for each factor the same block, as often as it has clusters.

    Its rows may be multiplied.

    Attributes
    ----------
    blocks : sequence of Float[Tensor, "... terms terms"]
        One a factor.
    clusters : sequence of int
        Clusters of each factor.
    rows : Float[Tensor, "... m"], optional
        Multipliers of L's rows.
    """

    blocks: Sequence[Float[Tensor, "... terms terms"]]
    clusters: Sequence[int]
    rows: Float[Tensor, "... m"] | None = None

    def right(self, matrix: Float[Tensor, "... rows m"]) -> Float[Tensor, "... rows m"]:
        """Matrix times L."""
        if self._diagonal is not None:
            return matrix * self._diagonal[..., None, :]
        matrix = matrix if self.rows is None else matrix * self.rows[..., None, :]
        return self._times(matrix, self.blocks)

    def both(self, matrix: Float[Tensor, "... m m"]) -> Float[Tensor, "... m m"]:
        """L' times a symmetric matrix times L."""
        if self._diagonal is not None:
            # As a matrix product the gradient by the diagonal is one, too.
            return self._diagonal[..., :, None] @ self._diagonal[..., None, :] * matrix
        return self.right(self.right(matrix).mT)

    def largest(self, diagonal: Float[Tensor, " m"]) -> Float[Tensor, "... m"]:
        """Bound of the diagonal of L' M L, of a positive definite M with this diagonal."""
        if self._diagonal is not None:
            return self._diagonal**2 * diagonal
        diagonal = diagonal if self.rows is None else diagonal * self.rows**2
        squares = [one.shape[-1] * one**2 for one in self.blocks]
        return self._times(diagonal[..., None, :], squares)[..., 0, :]

    @cached_property
    def _diagonal(self) -> Float[Tensor, "... m"] | None:
        """Of L, where all factors have a single term."""
        if any(one.shape[-1] > 1 for one in self.blocks):
            return None
        batch = torch.broadcast_shapes(*(one.shape[:-2] for one in self.blocks))
        pairs = zip(self.blocks, self.clusters, strict=True)
        diagonal = torch.cat([one[..., 0].expand(*batch, k) for one, k in pairs], -1)
        return diagonal if self.rows is None else diagonal * self.rows

    def _times(self, matrix: Tensor, blocks: Sequence[Tensor]) -> Tensor:
        pieces, start = [], 0
        for block, k in zip(blocks, self.clusters, strict=True):
            t = block.shape[-1]
            piece = matrix[..., start : start + k * t].unflatten(-1, (k, t))
            pieces.append((piece @ block.unsqueeze(-3)).flatten(-2))
            start += k * t
        batch = torch.broadcast_shapes(*(one.shape[:-1] for one in pieces))
        return torch.cat([one.expand(*batch, -1) for one in pieces], -1)
