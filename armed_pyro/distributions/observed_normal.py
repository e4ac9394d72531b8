"""Random effects given an observation of them: draws with their gradients written out."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from armed_pyro.distributions.small_matrices import precision_root
from armed_pyro.distributions.whitened import LOG_SQRT_2PI, Pushforward, WhitenedNormal

__all__ = ["ObservedNormal"]


# Products of matrices up to this size are sums written out: the matrices are many and small.
SMALL = 8


class ObservedNormal(Pushforward):
    r"""Effects with a normal prior of which there is one observation each.

    .. math:: q(u) \propto N(u; 0, L L^\top) \, N(m; u, (\tau A)^{-1}), \quad A = F F^\top, \quad
        F = B C

    Gradients of own draws stick the landing: in the density of a draw C and m are held.

    Draws, density and gradients are computed by formulas of their own, in which the clusters
    come last, so that one operation works on one number of all of them: automatic
    differentiation would take the decomposition of many small matrices apart.

    Parameters
    ----------
    scale : Float[Tensor, "... terms terms"]
        L, lower triangular.
    tau : Float[Tensor, "..."]
        Precision, with a 1 in the clusters' place if there are draws of it.
    base, trained : Float[Tensor, "clusters terms terms"]
        B and C; B gets no gradient.
    location : Float[Tensor, "... clusters terms"]
        m.
    moving : Float[Tensor, "... clusters terms"], optional
        m once more, whose gradient is that of the draw and of its density: what m owes to other
        latent quantities.
    batch : torch.Size, optional
        Draws and clusters, where they do not follow from these.
    """

    def __init__(
        self,
        scale: Tensor,
        tau: Tensor,
        base: Tensor,
        trained: Tensor,
        location: Tensor,
        moving: Tensor | None = None,
        batch: torch.Size | None = None,
    ) -> None:
        self.scale, self.tau, self.location, self.moving = scale, tau, location, moving
        self.base, self.trained = base, trained
        self.dtype, self.device = location.dtype, location.device
        self._drawn: tuple[Tensor, Tensor] | None = None
        own = torch.broadcast_shapes(scale.shape[:-2], tau.shape, location.shape[:-1])
        super().__init__(batch or own, location.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> ObservedNormal:
        shape = torch.Size(batch_shape)
        given = (self.scale, self.tau, self.base, self.trained, self.location, self.moving)
        return self if shape == self.batch_shape else ObservedNormal(*given, shape)

    @cached_property
    def whitened(self) -> WhitenedNormal:
        """The same distribution by its mean and precision, for automatic differentiation."""
        root = self.base @ self.trained
        half = self.scale.mT @ root
        size = self.tau[..., None, None]
        lower = precision_root(size * (half @ half.mT))
        pull = size * (half @ (root.mT @ self.location[..., None]))
        mean = torch.cholesky_solve(pull, lower)[..., 0]
        return WhitenedNormal(self.scale, mean, lower)

    @property
    def mean(self) -> Tensor:
        """Mean of the effects."""
        return self.whitened.mean

    @property
    def root(self) -> Float[Tensor, "... terms terms"]:
        """Cholesky factor of the precision of L^{-1} u."""
        return self.whitened.root

    def push(self, noise: Float[Tensor, "... terms"]) -> Float[Tensor, "... terms"]:
        batch = max(noise.dim() - 1, len(self.batch_shape))
        given = (
            _ahead(self.base, 2, batch),
            _ahead(self.trained, 2, batch),
            _ahead(self.location, 1, batch),
            _ahead(self.tau, 0, batch),
            _ahead(self.scale, 2, batch),
            _ahead(noise, 1, batch),
            None if self.moving is None else _ahead(self.moving, 1, batch),
        )
        effects, density = _Draw.apply(*given)  # type: ignore[no-untyped-call]
        value: Tensor = effects.movedim(0, -1)
        self._drawn = (value, density)
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        if self._drawn is not None and self._drawn[0] is value:
            return self._drawn[1]
        return self.whitened.log_prob(value)


def _ahead(value: Tensor, own: int, batch: int) -> Tensor:
    """Its last `own` dimensions first, and as many of draws and clusters after them."""
    shape = value.shape[: value.dim() - own]
    filled = value.reshape(*[1] * (batch - len(shape)), *value.shape)
    return filled.movedim(tuple(range(-own, 0)), tuple(range(own))) if own else filled


class _Draw(torch.autograd.Function):
    r"""u = L z and log q(u), matrices and vectors first, then draws and clusters.

    .. math:: z = S^{-1} b + R^{-\top} e, \quad S = I + \tau H H^\top = R R^\top, \quad
        b = \tau H F^\top m, \quad H = L^\top F

    With v the gradient by z and a = R^{-1} v, that by S is -R^{-\top} (sym(a y') +
    sym(\Phi(e a'))) R^{-1}, where y = R^{-1} b and \Phi takes the lower triangle and half the
    diagonal (Murray 2016, "Differentiation of the Cholesky decomposition").
    """

    @staticmethod
    def forward(
        ctx: Any,
        base: Float[Tensor, "terms terms ..."],
        trained: Float[Tensor, "terms terms ..."],
        location: Float[Tensor, "terms ..."],
        tau: Float[Tensor, "..."],
        scale: Float[Tensor, "terms terms ..."],
        noise: Float[Tensor, "terms ..."],
        moving: Float[Tensor, "terms ..."] | None,
    ) -> tuple[Tensor, Tensor]:
        root = _product(base, trained)
        half = _product(_t(scale), root)
        seen = _along(_t(root), location)
        inverse, pivots = _inverse_root(tau * _product(half, _t(half)))
        turned = _product(inverse, half)
        pulled = _along(turned, seen)
        z = _along(_t(inverse), tau * pulled + noise)
        constant = LOG_SQRT_2PI * len(noise)
        diagonal = scale.diagonal().movedim(-1, 0)
        log_det = (pivots / diagonal).log().sum(0)
        density = log_det - 0.5 * noise.square().sum(0) - constant
        kept = (base, root, location, tau, scale, noise, inverse, turned, seen, pulled, z)
        ctx.save_for_backward(*kept)
        ctx.shapes = trained.shape, location.shape, moving is not None
        return _along(scale, z), density

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_effects: Tensor, by_density: Tensor) -> tuple[Tensor | None, ...]:
        base, root, location, tau, scale, noise, inverse, turned, seen, pulled, z = (
            ctx.saved_tensors
        )
        score = _along(inverse, _along(_t(scale), by_effects))
        # What is trained moves the draw, whose density falls along it; the rest its scale, too.
        stuck = score - by_density * noise

        def by_half(score: Tensor, log_det: Tensor | None) -> Tensor:
            """R'/tau times the gradient by H."""
            crossed = score[:, None] * (tau * pulled)[None] + _halved(noise[:, None] * score[None])
            twice = crossed + _t(crossed)
            if log_det is not None:
                twice = twice - log_det * _identity(twice)
            return score[:, None] * seen[None] - _product(twice, turned)

        own = by_half(score, by_density)
        by_tau = 0.5 * ((turned * own).sum((0, 1)) + (score * pulled).sum(0))
        by_scale = tau * _product(root, _t(_product(_t(inverse), own)))
        by_scale = by_scale + by_effects[:, None] * z[None]
        by_scale = by_scale - by_density * _identity(scale) / scale.diagonal().movedim(-1, 0)
        by_seen = tau * _along(_t(turned), stuck)
        by_root = tau * _product(scale, _product(_t(inverse), by_half(stuck, None)))
        by_root = by_root + location[:, None] * by_seen[None]
        by_trained, by_location = _product(_t(base), by_root), _along(root, by_seen)
        trained_shape, location_shape, moving = ctx.shapes
        by_moving = None
        if moving:
            by_moving = _along(root, tau * _along(_t(turned), score)).sum_to_size(location_shape)
        return (
            None,
            by_trained.sum_to_size(trained_shape),
            by_location.sum_to_size(location_shape),
            by_tau.sum_to_size(tau.shape),
            by_scale.sum_to_size(scale.shape),
            None,
            by_moving,
        )


def _inverse_root(
    whitened: Float[Tensor, "n n ..."],
) -> tuple[Float[Tensor, "n n ..."], Float[Tensor, "n ..."]]:
    """R^{-1} and R's diagonal, with R R' = I + L'AL: see `conditionals.precision_root`."""
    n = len(whitened)
    identity = _identity(whitened)
    rest = torch.cat([whitened + identity, identity.expand_as(whitened)], 1)
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


def _product(a: Float[Tensor, "n k ..."], b: Float[Tensor, "k m ..."]) -> Float[Tensor, "n m ..."]:
    if a.shape[1] <= SMALL:
        return (a[:, :, None] * b[None]).sum(1)
    behind = (one.movedim((0, 1), (-2, -1)) for one in (a, b))
    return torch.matmul(*behind).movedim((-2, -1), (0, 1))


def _along(matrix: Float[Tensor, "n k ..."], vector: Float[Tensor, "k ..."]) -> Tensor:
    return (matrix * vector[None]).sum(1)


def _t(matrix: Float[Tensor, "n m ..."]) -> Float[Tensor, "m n ..."]:
    return matrix.transpose(0, 1)


def _identity(like: Float[Tensor, "n n ..."]) -> Tensor:
    identity = torch.eye(len(like), dtype=like.dtype, device=like.device)
    return identity.reshape(*identity.shape, *[1] * (like.dim() - 2))


def _halved(matrix: Float[Tensor, "n n ..."]) -> Float[Tensor, "n n ..."]:
    """The lower triangle, with half the diagonal."""
    ones = torch.ones_like(_identity(matrix))
    mask = ones.flatten(2)[..., 0].tril() if ones.dim() > 2 else ones.tril()
    lower = mask.reshape(ones.shape) - 0.5 * _identity(matrix)
    return matrix * lower
