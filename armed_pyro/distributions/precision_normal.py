"""`PrecisionNormal`: one long normal vector, given by its precision matrix."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from armed_pyro.distributions.whitened import Whitened, WhitenedNormal

__all__ = ["PrecisionNormal"]


class PrecisionNormal(WhitenedNormal):
    r"""z ~ N(m, P^{-1}) with m = P^{-1} r, drawn as :math:`m + C^{-\top} noise` with C C' = P.

    P is `precision` and r is `pull`; `detached` is as of `Whitened`. The gradient of the density
    of a value that was not drawn here needs P^{-1} only:

    .. math:: \log N(z) = \tfrac12 \log |P| - \tfrac12 (z^\top P z - 2 z^\top r + r^\top P^{-1} r)
        + const, \quad \nabla_P = \tfrac12 (P^{-1} - z z^\top + m m^\top)

    This takes a fourth of the work of the gradient through the Cholesky factor.

    Examples
    --------
    >>> PrecisionNormal(2 * torch.eye(2), torch.tensor([2.0, 4.0])).mean
    tensor([1., 2.])
    """

    def __init__(
        self,
        precision: Float[Tensor, "... size size"],
        pull: Float[Tensor, "... size"],
        detached: Whitened | None = None,
    ) -> None:
        self.precision, self.pull = precision, pull
        root = torch.linalg.cholesky(precision)
        # Two triangular solves, because `cholesky_solve` would copy the matrix.
        half = torch.linalg.solve_triangular(root, pull[..., None], upper=False)
        mean = torch.linalg.solve_triangular(root.mT, half, upper=True)[..., 0]
        super().__init__(mean.new_ones(()), mean, root, detached)

    def expand(self, batch_shape: Any, _instance: Any = None) -> PrecisionNormal:
        shape = torch.Size(batch_shape)
        if shape == self.batch_shape:
            return self
        detached = None if self.detached is None else self.detached.expand(shape)
        return PrecisionNormal(self.precision, self.pull.expand(shape + self.event_shape), detached)

    def log_prob(self, value: Tensor) -> Tensor:
        drawn = self._drawn is not None and self._drawn[0] is value
        if drawn or not (torch.is_grad_enabled() and self.precision.requires_grad):
            return super().log_prob(value)
        with torch.no_grad():
            density = super().log_prob(value)
        arguments = density, self.precision, self.pull, value, self.root.detach()
        with_gradients: Tensor = _Density.apply(*arguments)  # type: ignore[no-untyped-call]
        return with_gradients

    def _log_det(self) -> Float[Tensor, "..."]:
        return self.root.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def _scaled(self, z: Tensor) -> Tensor:
        return z

    def _whitened(self, value: Tensor) -> Tensor:
        return value


class _Density(torch.autograd.Function):
    """The known log N(z; P^{-1} r, P^{-1}), with gradients in P, r and z."""

    @staticmethod
    def forward(
        ctx: Any, density: Tensor, precision: Tensor, pull: Tensor, z: Tensor, root: Tensor
    ) -> Tensor:
        ctx.save_for_backward(precision, pull, z, root)
        return density.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        precision, pull, z, root = ctx.saved_tensors
        (gradient,) = gradients
        inverse: Tensor = _Inverse.apply(precision, root)  # type: ignore[no-untyped-call]
        mean = (inverse @ pull[..., None])[..., 0]
        # z z' - m m' as (z - m)((z + m) / 2)' and its transpose, without cancellation near z = m.
        off, middle = z - mean, 0.5 * (z + mean)
        outer = off[..., :, None] * middle[..., None, :]
        by_precision = 0.5 * gradient[..., None, None] * (inverse - outer - outer.mT)
        by_pull = gradient[..., None] * off
        by_z = gradient[..., None] * (pull - (precision @ z[..., None])[..., 0])
        return (
            None,
            by_precision.sum_to_size(precision.shape),
            by_pull.sum_to_size(pull.shape),
            by_z.sum_to_size(z.shape),
            None,
        )


class _Inverse(torch.autograd.Function):
    """P^{-1} from the known C, with gradients in P."""

    @staticmethod
    def forward(ctx: Any, precision: Tensor, root: Tensor) -> Tensor:
        inverse = torch.cholesky_inverse(root)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        return -(inverse @ gradients[0] @ inverse), None
