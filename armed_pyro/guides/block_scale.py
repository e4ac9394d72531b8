"""A block-diagonal scale of the random effects of several grouping factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from armed_pyro.distributions.shapes import broadcast_shape
from armed_pyro.distributions.small_matrices import multiply

__all__ = ["BlockScale"]


@dataclass(frozen=True)
class BlockScale:
    r"""L = blockdiag(L_1, ..., L_1, L_2, ...), never written out, with u = L z.

    `blocks` are lower triangular, one per factor; it is repeated for each of the factor's
    `clusters`.
    """

    blocks: Sequence[Float[Tensor, "... terms terms"]]
    clusters: Sequence[int]

    def times(self, vector: Float[Tensor, "... m"]) -> Float[Tensor, "... m"]:
        """L v."""
        return self._by_block(self.blocks, vector)

    def transpose_times(self, vector: Float[Tensor, "... m"]) -> Float[Tensor, "... m"]:
        """L' v."""
        return self._by_block([block.mT for block in self.blocks], vector)

    def both(self, matrix: Float[Tensor, "... m m"]) -> Float[Tensor, "... m m"]:
        """L' M L, for a symmetric matrix M."""
        of_rows = [block.mT.unsqueeze(-3) for block in self.blocks]
        return self._by_block(of_rows, self._by_block(of_rows, matrix).mT)

    def diagonal_bound(self, diagonal: Float[Tensor, " m"]) -> Float[Tensor, "... m"]:
        """Upper bound of diag(L' M L), for any positive definite M with this diagonal.

        (sum_i L_ij v_i)^2 <= terms sum_i L_ij^2 v_i^2; with single terms the bound is attained.
        """
        squares = [block.shape[-1] * block.mT**2 for block in self.blocks]
        return self._by_block(squares, diagonal)

    def _by_block(self, blocks: Sequence[Tensor], vector: Tensor) -> Tensor:
        sizes = [block.shape[-1] * k for block, k in zip(blocks, self.clusters, strict=True)]
        pieces = [
            multiply(block.unsqueeze(-3), part.unflatten(-1, (-1, block.shape[-1]))).flatten(-2)
            for block, part in zip(blocks, vector.split(sizes, -1), strict=True)
        ]
        batch = broadcast_shape(*(piece.shape[:-1] for piece in pieces))
        return torch.cat([piece.expand(*batch, -1) for piece in pieces], -1)
