"""`ObservedNormal`: random effects given a noisy observation of them."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from armed_pyro.distributions.leading_matrices import (
    along,
    identity,
    inverse_root,
    product,
    transposed,
)
from armed_pyro.distributions.shapes import broadcast_shape
from armed_pyro.distributions.small_matrices import precision_root
from armed_pyro.distributions.whitened import LOG_SQRT_2PI, Pushforward, WhitenedNormal

__all__ = ["ObservedNormal"]


class ObservedNormal(Pushforward):
    r"""Posterior of each cluster's effects, from a normal prior and one normal observation.

    .. math:: q(u) \propto N(u; 0, L L^\top) \, N(m; u, (\tau A)^{-1}), \quad A = F F^\top, \quad
        F = B C

    The density of a draw that `push` has just made treats C and m as constants, so its gradients
    stick the landing (Roeder, Wu, Duvenaud 2017).

    Draws, density and gradients are hand-written, with the clusters in the last dimension: each
    operation then works on one matrix element of all clusters, whereas automatic differentiation
    would record the decomposition of many small matrices step by step. A compiled training step of
    10,000 clusters with 4 effects each took 1.55 times as long with it, of 1,000 clusters with 8
    effects 1.65 times.

    `scale` is L, lower triangular; `base` and `trained` are B and C, and B gets no gradient;
    `location` is m. The residual precision `tau` has a 1 in the place of the clusters, if there
    are draws. `moving` is m again, as a function of other latent quantities; its gradient is that
    of both the draw and its density. `batch` is the shape of draws and clusters, if it does not
    follow from the other arguments.
    """

    def __init__(
        self,
        scale: Float[Tensor, "... terms terms"],
        tau: Float[Tensor, "..."],
        base: Float[Tensor, "clusters terms terms"],
        trained: Float[Tensor, "clusters terms terms"],
        location: Float[Tensor, "... clusters terms"],
        moving: Float[Tensor, "... clusters terms"] | None = None,
        batch: torch.Size | None = None,
    ) -> None:
        self.scale, self.tau, self.location, self.moving = scale, tau, location, moving
        self.base, self.trained = base, trained
        self.dtype, self.device = location.dtype, location.device
        self._drawn: tuple[Tensor, Tensor] | None = None
        implied = broadcast_shape(scale.shape[:-2], tau.shape, location.shape[:-1])
        super().__init__(batch or implied, location.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> ObservedNormal:
        shape = torch.Size(batch_shape)
        arguments = (self.scale, self.tau, self.base, self.trained, self.location, self.moving)
        return self if shape == self.batch_shape else ObservedNormal(*arguments, shape)

    @cached_property
    def whitened(self) -> WhitenedNormal:
        """The same distribution by its mean and precision, with automatic differentiation."""
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

    def push(self, noise: Float[Tensor, "... terms"]) -> Float[Tensor, "... terms"]:
        batch = max(noise.dim() - 1, len(self.batch_shape))
        arguments = (
            _ahead(self.base, 2, batch),
            _ahead(self.trained, 2, batch),
            _ahead(self.location, 1, batch),
            _ahead(self.tau, 0, batch),
            _ahead(self.scale, 2, batch),
            _ahead(noise, 1, batch),
            None if self.moving is None else _ahead(self.moving, 1, batch),
        )
        effects, density = _Draw.apply(*arguments)  # type: ignore[no-untyped-call]
        value: Tensor = effects.movedim(0, -1)
        self._drawn = (value, density)
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        if self._drawn is not None and self._drawn[0] is value:
            return self._drawn[1]
        return self.whitened.log_prob(value)


def _ahead(value: Tensor, event: int, batch: int) -> Tensor:
    """The last `event` dimensions first, followed by `batch` dimensions of draws and clusters."""
    shape = value.shape[: value.dim() - event]
    filled = value.reshape(*[1] * (batch - len(shape)), *value.shape)
    return filled.movedim(tuple(range(-event, 0)), tuple(range(event))) if event else filled


class _Draw(torch.autograd.Function):
    r"""u = L z and log q(u), with the dimensions of matrices and vectors before draws and clusters.

    .. math:: z = S^{-1} b + R^{-\top} e, \quad S = I + \tau H H^\top = R R^\top, \quad
        b = \tau H F^\top m, \quad H = L^\top F

    With v the gradient in z, a = R^{-1} v and y = R^{-1} b, the gradient in S is

    .. math:: -R^{-\top} \big(\mathrm{sym}(a y^\top) + \mathrm{sym}(\Phi(e a^\top))\big) R^{-1}

    where Phi takes the lower triangle and half the diagonal (Murray 2016, "Differentiation of the
    Cholesky decomposition", arXiv:1602.07527).
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
        root = product(base, trained)
        half = product(transposed(scale), root)
        seen = along(transposed(root), location)
        inverse, pivots = inverse_root(tau * product(half, transposed(half)))
        turned = product(inverse, half)
        pulled = along(turned, seen)
        z = along(transposed(inverse), tau * pulled + noise)
        log_det = (pivots / scale.diagonal().movedim(-1, 0)).log().sum(0)
        density = log_det - 0.5 * noise.square().sum(0) - LOG_SQRT_2PI * len(noise)
        kept = (base, root, location, tau, scale, noise, inverse, turned, seen, pulled, z)
        ctx.save_for_backward(*kept)
        ctx.shapes = trained.shape, location.shape, moving is not None
        return along(scale, z), density

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_effects: Tensor, by_density: Tensor) -> tuple[Tensor | None, ...]:
        base, root, location, tau, scale, noise, inverse, turned, seen, pulled, z = (
            ctx.saved_tensors
        )
        score = along(inverse, along(transposed(scale), by_effects))
        # C and m move the draw only, whose density changes along it; L and tau also change the
        # density itself.
        stuck = score - by_density * noise

        def by_half(score: Tensor, log_det: Tensor | None) -> Tensor:
            """R' / tau times the gradient in H."""
            outer = score[:, None] * (tau * pulled)[None] + _halved(noise[:, None] * score[None])
            twice = outer + transposed(outer)
            if log_det is not None:
                twice = twice - log_det * identity(twice)
            return score[:, None] * seen[None] - product(twice, turned)

        half = by_half(score, by_density)
        by_tau = 0.5 * ((turned * half).sum((0, 1)) + (score * pulled).sum(0))
        by_scale = tau * product(root, transposed(product(transposed(inverse), half)))
        by_scale = by_scale + by_effects[:, None] * z[None]
        by_scale = by_scale - by_density * identity(scale) / scale.diagonal().movedim(-1, 0)
        by_seen = tau * along(transposed(turned), stuck)
        by_root = tau * product(scale, product(transposed(inverse), by_half(stuck, None)))
        by_root = by_root + location[:, None] * by_seen[None]
        by_trained, by_location = product(transposed(base), by_root), along(root, by_seen)
        trained_shape, location_shape, moving = ctx.shapes
        by_moving = None
        if moving:
            by_moving = along(root, tau * along(transposed(turned), score))
            by_moving = by_moving.sum_to_size(location_shape)
        return (
            None,
            by_trained.sum_to_size(trained_shape),
            by_location.sum_to_size(location_shape),
            by_tau.sum_to_size(tau.shape),
            by_scale.sum_to_size(scale.shape),
            None,
            by_moving,
        )


def _halved(matrix: Float[Tensor, "n n ..."]) -> Float[Tensor, "n n ..."]:
    """The lower triangle, with half the diagonal."""
    ones = identity(matrix)
    lower = torch.ones_like(ones).movedim((0, 1), (-2, -1)).tril().movedim((-2, -1), (0, 1))
    return matrix * (lower - 0.5 * ones)
