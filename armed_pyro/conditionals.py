"""Distributions of random effects in the coordinates in which their prior is standard normal."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import reduce
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import pad

__all__ = [
    "Pushforward",
    "WhitenedDiagonal",
    "WhitenedNormal",
    "precision_root",
    "solve",
    "substitute",
    "sum_last",
]

LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)
# Up to so many terms, element by element is several times faster than batched linear algebra.
FEW = 4


class Pushforward(dist.TorchDistribution, ABC):
    """Distribution of ``push(noise)`` for standard normal noise.

    The density of a value that `push` has just made is computed from what it was made of, which
    is cheaper than inverting the map, and exact where the map is hardly invertible.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector
    has_rsample = True
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def push(self, noise: Float[Tensor, "... size"]) -> Float[Tensor, "... size"]:
        """The value that this noise becomes."""

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        shape = torch.Size(sample_shape) + self.batch_shape + self.event_shape
        noise = torch.randn(shape, dtype=self.dtype, device=self.device)
        if noise.dim() > 1:  # one term of all clusters side by side, as they are computed
            noise = noise.mT.clone(memory_format=torch.contiguous_format).mT
        return self.push(noise)


class Whitened(Pushforward, ABC):
    r"""u = L z with z = m + C^{-\top} noise.

    No inverse of the prior's covariance L L' is needed, so a standard deviation near zero is safe.

    Parameters
    ----------
    scale : Tensor
        L.
    mean : Float[Tensor, "... terms"]
        m.
    root : Tensor
        C, with z's precision C C'.
    held : Whitened, optional
        A distribution of the same values and L, by whose density this one's draws are judged:
        with its trained parameters held fixed, gradients stick the landing.
    """

    def __init__(
        self, scale: Tensor, mean: Tensor, root: Tensor, held: Whitened | None = None
    ) -> None:
        self.scale, self.mean_whitened, self.root, self.held = scale, mean, root, held
        self.dtype, self.device = mean.dtype, mean.device
        self._drawn: tuple[Tensor, Tensor, Tensor] | None = None
        super().__init__(mean.shape[:-1], mean.shape[-1:], validate_args=False)

    @property
    def mean(self) -> Tensor:
        """L m."""
        return self._scaled(self.mean_whitened)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Whitened:
        shape = torch.Size(batch_shape)
        if shape == self.batch_shape:
            return self
        mean = self.mean_whitened.expand(shape + self.event_shape)
        held = None if self.held is None else self.held.expand(shape)
        return type(self)(self.scale, mean, self.root, held)

    def push(self, noise: Float[Tensor, "... terms"]) -> Float[Tensor, "... terms"]:
        z = self.mean_whitened + self._spread(noise)
        value = self._scaled(z)
        self._drawn = (value, z, noise)
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        if self._drawn is None or self._drawn[0] is not value:
            return self._log_prob(self._noise(self._whitened(value)))
        _, z, noise = self._drawn
        if self.held is None:
            return self._log_prob(noise)
        return self.held._log_prob(self.held._noise(z))

    def _log_prob(self, noise: Float[Tensor, "... terms"]) -> Float[Tensor, "..."]:
        """log-density of the value that this noise becomes."""
        constant = LOG_SQRT_2PI * noise.shape[-1]
        return self._log_det() - 0.5 * sum_last(noise**2) - constant

    @abstractmethod
    def _log_det(self) -> Float[Tensor, "..."]:
        """log |C| - log |L|."""

    @abstractmethod
    def _noise(self, z: Tensor) -> Tensor: ...

    @abstractmethod
    def _scaled(self, z: Tensor) -> Tensor: ...

    @abstractmethod
    def _whitened(self, value: Tensor) -> Tensor: ...

    @abstractmethod
    def _spread(self, noise: Tensor) -> Tensor: ...


class WhitenedNormal(Whitened):
    """Correlated effects: L and C lower triangular, of shape "... terms terms"."""

    def _log_det(self) -> Float[Tensor, "..."]:
        log_det = self.root.diagonal(dim1=-2, dim2=-1).log()
        return sum_last(log_det - self.scale.diagonal(dim1=-2, dim2=-1).log())

    def _noise(self, z: Tensor) -> Tensor:
        return multiply(self.root.mT, z - self.mean_whitened)

    def _scaled(self, z: Tensor) -> Tensor:
        return multiply(self.scale, z)

    def _whitened(self, value: Tensor) -> Tensor:
        return solve_lower(self.scale, value)

    def _spread(self, noise: Tensor) -> Tensor:
        return solve(self.root.mT, noise[..., None], upper=True)[..., 0]


class WhitenedDiagonal(Whitened):
    """Independent effects: L and C vectors of shape "... terms"."""

    def _log_det(self) -> Float[Tensor, "..."]:
        return sum_last((self.root / self.scale).log())

    def _noise(self, z: Tensor) -> Tensor:
        return self.root * (z - self.mean_whitened)

    def _scaled(self, z: Tensor) -> Tensor:
        return self.scale * z

    def _whitened(self, value: Tensor) -> Tensor:
        return value / self.scale

    def _spread(self, noise: Tensor) -> Tensor:
        return noise / self.root


def precision_root(whitened: Float[Tensor, "... n n"]) -> Float[Tensor, "... n n"]:
    """Cholesky factor of I + L'AL, also where an sd was drawn so large that rounding spoils it.

    Column by column for all matrices at once: they are many and small. What is left of the
    diagonal is at least 1, as L'AL is positive semi-definite, and is held there, and above what
    rounding leaves of a large one.
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


def sum_last(values: Float[Tensor, "... terms"]) -> Float[Tensor, "..."]:
    """Sum over the last dimension."""
    if not 0 < values.shape[-1] <= FEW:
        return values.sum(-1)
    return reduce(torch.add, values.unbind(-1))


def multiply(
    matrix: Float[Tensor, "... terms terms"], vector: Float[Tensor, "... terms"]
) -> Float[Tensor, "... terms"]:
    """Matrix times vector, for many small ones."""
    if vector.shape[-1] > FEW:
        return (matrix @ vector[..., None])[..., 0]
    columns = zip(matrix.unbind(-1), vector.unbind(-1), strict=True)
    return reduce(torch.add, (column * one[..., None] for column, one in columns))


def solve_lower(
    matrix: Float[Tensor, "... terms terms"], vector: Float[Tensor, "... terms"]
) -> Float[Tensor, "... terms"]:
    """x with matrix x = vector, for many small lower triangular matrices."""
    return solve(matrix, vector[..., None], upper=False)[..., 0]


def solve(
    matrix: Float[Tensor, "... n n"], right: Float[Tensor, "... n columns"], *, upper: bool
) -> Float[Tensor, "... n columns"]:
    """X with matrix X = right, for many triangular matrices."""
    if matrix.shape[-1] > FEW:
        return torch.linalg.solve_triangular(matrix, right, upper=upper)
    return substitute(matrix, right, upper=upper)


def substitute(
    matrix: Float[Tensor, "... n n"], right: Float[Tensor, "... n columns"], *, upper: bool
) -> Float[Tensor, "... n columns"]:
    """X with matrix X = right, for triangular matrices, unknown by unknown."""
    n = matrix.shape[-1]
    solved: dict[int, Tensor] = {}
    for i in reversed(range(n)) if upper else range(n):
        known = (matrix[..., i, j, None] * one for j, one in solved.items())
        rest = reduce(torch.sub, known, right[..., i, :])
        solved[i] = rest / matrix[..., i, i, None]
    return torch.stack([solved[i] for i in range(n)], -2)
