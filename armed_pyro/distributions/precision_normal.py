"""`PrecisionNormal`: one long normal vector, given by its precision matrix."""

from __future__ import annotations

from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor

from armed_pyro.distributions.whitened import LOG_SQRT_2PI, Whitened

__all__ = ["PrecisionNormal"]


class PrecisionNormal(Whitened):
    r"""z ~ N(m, P^{-1}) with m = P^{-1} r, drawn as :math:`m + C^{-\top} noise` with C C' = P.

    The gradient of the density of a value that was not drawn here needs P^{-1} only:

    .. math:: \log N(z) = \tfrac12 \log |P| - \tfrac12 (z^\top P z - 2 z^\top r + r^\top P^{-1} r)
        + const, \quad \nabla_P = \tfrac12 (P^{-1} - z z^\top + m m^\top)

    This takes a fourth of the work of the gradient through the Cholesky factor. Use `of` to make
    the distribution from P and r.

    Parameters
    ----------
    precision : Float[Tensor, "... size size"]
        P.
    pull : Float[Tensor, "... size"]
        r.
    root : Float[Tensor, "... size size"]
        C, lower triangular.
    mean : Float[Tensor, "... size"]
        m.
    detached : PrecisionNormal, optional
        As of `Whitened`.

    Examples
    --------
    >>> PrecisionNormal.of(2 * torch.eye(2), torch.tensor([2.0, 4.0])).mean
    tensor([1., 2.])
    """

    def __init__(
        self,
        precision: Float[Tensor, "... size size"],
        pull: Float[Tensor, "... size"],
        root: Float[Tensor, "... size size"],
        mean: Float[Tensor, "... size"],
        detached: Whitened | None = None,
    ) -> None:
        self.precision, self.pull = precision, pull
        super().__init__(mean.new_ones(()), mean, root, detached)

    @classmethod
    def of(
        cls,
        precision: Float[Tensor, "... size size"],
        pull: Float[Tensor, "... size"],
        detached: Whitened | None = None,
    ) -> Self:
        """The distribution with precision P and P m = r."""
        root = torch.linalg.cholesky(precision)
        # Two triangular solves, because `cholesky_solve` would copy the matrix.
        half = torch.linalg.solve_triangular(root, pull[..., None], upper=False)
        mean = torch.linalg.solve_triangular(root.mT, half, upper=True)[..., 0]
        return cls(precision, pull, root, mean, detached)

    def expand(self, batch_shape: Any, _instance: Any = None) -> PrecisionNormal:
        shape = torch.Size(batch_shape)
        if shape == self.batch_shape:
            return self
        full = shape + self.event_shape
        pull, mean = self.pull.expand(full), self.mean.expand(full)
        detached = None if self.detached is None else self.detached.expand(shape)
        return PrecisionNormal(self.precision, pull, self.root, mean, detached)

    def log_prob(self, value: Tensor) -> Tensor:
        drawn = self._drawn is not None and self._drawn[0] is value
        if drawn or not (torch.is_grad_enabled() and self.precision.requires_grad):
            return super().log_prob(value)
        batch = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        size = value.shape[-1]
        # Expanded here, so that autograd adds up the gradients of tensors that draws share.
        arguments = (
            self.precision.expand(*batch, size, size),
            self.pull.expand(*batch, size),
            value.expand(*batch, size),
            self.root.detach().expand(*batch, size, size),
            self.mean_whitened.detach().expand(*batch, size),
        )
        density: Tensor = _Density.apply(*arguments)  # type: ignore[no-untyped-call]
        return density

    def _log_det(self) -> Float[Tensor, "..."]:
        return self.root.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def _noise(self, z: Tensor) -> Tensor:
        return (self.root.mT @ (z - self.mean_whitened)[..., None])[..., 0]

    def _scaled(self, z: Tensor) -> Tensor:
        return z

    def _whitened(self, value: Tensor) -> Tensor:
        return value

    def _spread(self, noise: Tensor) -> Tensor:
        upper = self.root.mT
        return torch.linalg.solve_triangular(upper, noise[..., None], upper=True)[..., 0]


class _Density(torch.autograd.Function):
    """log N(z; P^{-1} r, P^{-1}), with gradients in P, r and z; C and m are known."""

    @staticmethod
    def forward(
        ctx: Any, precision: Tensor, pull: Tensor, z: Tensor, root: Tensor, mean: Tensor
    ) -> Tensor:
        ctx.save_for_backward(precision, pull, z, root)
        noise = (root.mT @ (z - mean)[..., None])[..., 0]
        log_det = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return log_det - 0.5 * (noise**2).sum(-1) - LOG_SQRT_2PI * z.shape[-1]

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
        by_z = gradient[..., None] * (pull - (precision @ z[..., None])[..., 0])
        return by_precision, gradient[..., None] * off, by_z, None, None


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
