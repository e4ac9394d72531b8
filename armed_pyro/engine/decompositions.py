"""Operations as simpler ones: a compiler fuses these with all around them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch._inductor import inductor_prims

from armed_pyro.distributions.small_matrices import substitute

__all__ = ["DECOMPOSITIONS"]


# Multiplications up to which sums are faster than a call of the matrix library.
SMALL = 4096
# Rows and columns of matrices of which any number are multiplied term by term.
TINY = 4
# The same of many matrices, as a sum that no library does as fast: it is never laid out.
MODEST = 16
# Numbers up to which triangular systems and running sums are written out.
FEW = 8


def _product(a: Tensor, b: Tensor) -> Any:
    """a @ b."""
    rows, inner, columns = *a.shape[-2:], b.shape[-1]
    if max(inner, columns) <= TINY:
        pairs = zip(a.unbind(-1), b.unbind(-2), strict=True)
        return reduce(torch.add, (one[..., :, None] * other[..., None, :] for one, other in pairs))
    modest = a.dim() == 3 and max(rows, inner, columns) <= MODEST
    if modest or a.numel() * columns <= SMALL or rows * columns <= TINY:
        return (a[..., :, :, None] * b[..., None, :, :]).sum(-2)
    return NotImplemented


def _sum_and_product(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    """beta c + alpha a @ b."""
    product = _product(a, b)
    return NotImplemented if product is NotImplemented else beta * c + alpha * product


def _triangular(
    a: Tensor, b: Tensor, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Any:
    """x with a x = b."""
    if a.shape[-1] > FEW or not left or unitriangular:
        return NotImplemented
    return substitute(a, b, upper=upper)


def _cholesky(b: Tensor, root: Tensor, upper: bool = False) -> Any:
    """x with root root' x = b."""
    if root.shape[-1] > FEW or upper:
        return NotImplemented
    return substitute(root.mT, substitute(root, b, upper=False), upper=True)


def _running(operation: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    def run(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Any:
        """Sums or products of what comes up to each place."""
        if x.dim() == 0 or not 0 < x.shape[dim] <= FEW:
            return NotImplemented
        parts = (x if dtype is None else x.to(dtype)).unbind(dim)
        if not parts[0].is_floating_point():
            return NotImplemented
        return torch.stack(list(accumulate(parts, operation)), dim)

    return run


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    """The original changes its running statistics without declaring it."""
    if mean is None or variance is None or not training:
        return NotImplemented
    out, batch_mean, root, new_mean, new_variance = (
        torch.ops.aten._native_batch_norm_legit_functional(
            x, weight, bias, mean, variance, training, momentum, eps
        )
    )
    mean.copy_(new_mean)
    variance.copy_(new_variance)
    return out, batch_mean, root


def _clone(x: Tensor, *, memory_format: torch.memory_format = torch.preserve_format) -> Any:
    """A copy that is kept, and laid out as it was asked for.

    The compiler's own follows what it reads, and is made anew wherever it is read.
    """
    if memory_format != torch.contiguous_format:
        return NotImplemented
    strides = torch.empty(x.shape, device="meta").stride()
    return inductor_prims.force_stride_order(x, strides)


DECOMPOSITIONS: Mapping[Any, Callable[..., Any]] = {
    torch.ops.aten.mm.default: _product,
    torch.ops.aten.bmm.default: _product,
    torch.ops.aten.addmm.default: _sum_and_product,
    torch.ops.aten.linalg_solve_triangular.default: _triangular,
    torch.ops.aten.cumsum.default: _running(torch.add),
    torch.ops.aten.cumprod.default: _running(torch.mul),
    torch.ops.aten.cholesky_solve.default: _cholesky,
    torch.ops.aten.native_batch_norm.default: _batch_norm,
    torch.ops.aten.clone.default: _clone,
}
