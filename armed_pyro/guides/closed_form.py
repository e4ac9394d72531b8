"""log p(y | theta) of a gaussian program with nested grouping factors, from sums of its rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from armed_pyro.distributions.leading_matrices import inverse_root, product, transposed
from armed_pyro.guides.gaussian_sums import GaussianSums, nesting
from armed_pyro.guides.pseudo_observations import has_full_precision
from armed_pyro.program.model import MixedEffects
from armed_pyro.random_effects.covariance import Latents
from armed_pyro.rows.source import RowSource

__all__ = [
    *("ClosedForm", "Conditional", "MarginalLikelihood", "OuterLevel"),
    *("by_parent", "closed_form", "cost", "is_gaussian"),
]

# Values of all matrices of the draws that are made at once: more do not fit into a processor's
# cache, and fewer spend the time on calls.
MOST_VALUES = 2**19
# Multiplications of a Cholesky factor that take as long as one value of `size`: 25 ns (1,721 and 60
# clusters with two terms, 4,000 draws).
PER_VALUE = 2**8

Matrices = Float[Tensor, "terms columns draws clusters"]
Scale = Float[Tensor, "terms terms draws 1"]


def is_gaussian(model: MixedEffects) -> bool:
    """Whether all that the rows say of a program with a frozen network is in sums over them."""
    narrow = all(has_full_precision(f) and not f.filters for f in model.factors)
    return model.family.is_quadratic and narrow and not model.others


def cost(likelihood: MarginalLikelihood) -> int:
    """Multiplications that take as long as one draw."""
    return likelihood.work + PER_VALUE * likelihood.size


def closed_form(model: MixedEffects, source: RowSource) -> ClosedForm | None:
    """log p(y | theta) of the rows of nested factors, given the frozen network.

    None if the outcome is not gaussian, an effect is inside the network or of a wide layer, the
    grouping factors are crossed, or a factor's clusters are cells of a process.
    """
    if any(factor.process is not None for factor in model.factors):
        return None
    nested = nesting(model, source) if is_gaussian(model) else None
    if nested is None:
        return None
    factors, parents = nested
    sums = GaussianSums(model, factors)
    sums.observe(model, source, parents)
    return ClosedForm(model, sums)


@dataclass(frozen=True)
class Conditional:
    r"""u = L z of one factor given the outer effects v, in the coordinates of `Whitened`.

    .. math:: z \mid v, \theta \sim N\big(Q^{-1} (p - P v), Q^{-1}\big), \quad Q = I + W

    `whitened`, `pull` and `cross` are W, p and P; the outer effects are those of the cluster of
    every outer factor, side by side.
    """

    scale: Scale
    whitened: Float[Tensor, "terms terms draws clusters"]
    pull: Float[Tensor, "terms draws clusters"]
    cross: Float[Tensor, "terms outer_terms draws clusters"]

    def of(self, index: Int[Tensor, " chosen"]) -> Conditional:
        """The effects of these clusters."""
        parts = (part[..., index] for part in (self.whitened, self.pull, self.cross))
        return Conditional(self.scale, *parts)


class MarginalLikelihood(ABC):
    """log p(y | theta) of all rows, with the random effects integrated out exactly.

    Examples
    --------
    The methods that a closed form has to define:

    >>> sorted(MarginalLikelihood.__abstractmethods__)
    ['log_likelihood', 'most_draws', 'size']
    """

    @property
    @abstractmethod
    def size(self) -> int:
        """Values that one draw needs."""

    @property
    def work(self) -> int:
        """Multiplications of one draw beyond those that are linear in `size`."""
        return 0

    @abstractmethod
    def most_draws(self) -> int:
        """Number of draws that are fastest at once; at least 1."""

    @abstractmethod
    def log_likelihood(self, latents: Latents) -> Float[Tensor, " draws"]:
        """log p(y | theta) of draws of the hyperparameters; one value without draws."""

    def with_effects(self, latents: Latents) -> tuple[Float[Tensor, " draws"], dict[str, Tensor]]:
        """log p(y | theta), and a draw of all random effects for each draw, if that costs nothing.

        The effects have shape "draws clusters terms". By default none are drawn.
        """
        return self.log_likelihood(latents), {}


class ClosedForm(MarginalLikelihood):
    r"""log p(y | theta) with all random effects integrated out, from `GaussianSums`.

    .. math::
        \log p(y \mid \theta) = c + \tfrac{n}{2} \log \tau - \sum_m \sum_k \log |C_{mk}|
        - \tfrac{\tau}{2} E

    The factors are eliminated from the inside out, in time and memory that grow linearly with the
    clusters. The innermost effects turn the rows of cluster k into one row per term, and leave
    what they cannot explain:

    .. math::
        C_{1k} C_{1k}' &= I + \tau R_k' D_1 R_k, \quad F_{1k} = C_{1k}^{-1} \rho_k(\beta) \\
        E_1 &= (\beta_0 - \beta, 1) S (\beta_0 - \beta, 1)' + \sum_k |F_{1k, \epsilon}|^2

    Cluster k of an outer factor m gets the products of the rows inside it, A of its own columns
    and B of these with the columns of the factors around it and :math:`\epsilon`:

    .. math::
        C_{mk} C_{mk}' = I + \tau L_m' A_{mk} L_m, \quad F_{mk} = C_{mk}^{-1} L_m' B_{mk}, \quad
        E_m = E_{m-1} - \tau \sum_k |F_{mk, \epsilon}|^2

    A and B contain :math:`F_{1}' F_{1}`, then :math:`-\tau F_m' F_m`, summed over the clusters
    inside.

    Examples
    --------
    >>> from torch import nn
    >>> from armed_pyro import ClusteredData
    >>> x, y, g = [[0.0], [1.0], [3.0], [4.0]], [1, 2, 5, 6], [0, 0, 1, 1]
    >>> data = ClusteredData.from_arrays(x, y, {"g": g})
    >>> model = MixedEffects(nn.Linear(1, 1).double(), "(1 | g)", bayesian_head=True).bind(data)
    >>> closed = closed_form(model, model.encode(data))
    >>> sds = {"g_sd": torch.ones(1), "residual_sd": torch.ones(1), "fixed_effect": torch.zeros(2)}
    >>> closed.log_likelihood(sds).shape
    torch.Size([1])
    """

    def __init__(self, model: MixedEffects, sums: GaussianSums) -> None:
        self.sums, self._precision = sums, model.precision

    @property
    def size(self) -> int:
        columns = [sum(self.sums.terms[m:]) + 1 for m in range(len(self.sums.terms))]
        each = zip(self.sums.terms, columns, self.sums.clusters, strict=True)
        return max(1, sum(t * c * k for t, c, k in each))

    def most_draws(self) -> int:
        return max(1, MOST_VALUES // self.size)

    def log_likelihood(self, latents: Latents) -> Float[Tensor, " draws"]:
        sums, tau = self.sums, self._tau(latents)[:, 0]
        delta = self._moved(latents)
        ends = torch.cat([-delta, delta.new_ones(len(delta), 1)], 1)
        squares = ((ends @ sums.square) * ends).sum(1)
        log_det = torch.zeros_like(squares)
        for level in self._levels(latents):
            log_det = log_det + level.log_det
            squares = squares + level.squares
        return sums.constant + 0.5 * sums.count * tau.log() - log_det - 0.5 * tau * squares

    def conditionals(self, latents: Latents) -> list[Conditional]:
        """Each factor's effects given the outer ones, the innermost first."""
        return [level.conditional() for level in self._levels(latents)]

    def _tau(self, latents: Latents) -> Float[Tensor, "draws 1"]:
        return self._precision(latents).double().reshape(-1, 1)

    def _moved(self, latents: Latents) -> Float[Tensor, "draws fixed"]:
        """beta - beta_0."""
        if "fixed_effect" not in latents:
            return self.sums.reference[None]
        fixed = latents["fixed_effect"].double()
        return fixed.reshape(-1, fixed.shape[-1]) - self.sums.reference

    def _scale(self, place: int, latents: Latents) -> Scale:
        scale = self.sums.factors[place].scale_matrix(latents).double()
        return scale.reshape(-1, *scale.shape[-2:]).movedim(0, -1)[..., None]

    def _levels(self, latents: Latents) -> Iterator[_Level]:
        """The factors as they are eliminated, the innermost first."""
        sums, tau, delta = self.sums, self._tau(latents), self._moved(latents)
        if not sums.factors:
            return
        level: _Level = _Inner(tau, self._scale(0, latents), sums.root, _at(sums.projected, delta))
        yield level
        for place, (own, parents) in enumerate(zip(sums.outer, sums.parents, strict=True), 1):
            inside = by_parent(level.left, parents, own.shape[-1])
            t = own.shape[0]
            columns = inside[:t] + _at(own, delta)
            level = OuterLevel(tau, self._scale(place, latents), columns, inside[t:, t:])
            yield level


class _Level(Protocol):
    """One factor, eliminated: see `ClosedForm`."""

    @property
    def log_det(self) -> Float[Tensor, " draws"]:
        """log |C| of all clusters."""

    @property
    def squares(self) -> Float[Tensor, " draws"]:
        """What the factor adds to E."""

    @property
    def left(self) -> Matrices:
        """Products of the outer columns with these and epsilon, as this factor leaves them."""

    def conditional(self) -> Conditional:
        """The factor's effects given the outer ones."""


class _Inner:
    """The innermost factor; `columns` are rho of the outer columns and of epsilon."""

    def __init__(
        self,
        tau: Float[Tensor, "draws 1"],
        scale: Scale,
        root: Float[Tensor, "terms terms clusters"],
        columns: Matrices,
    ) -> None:
        self.tau, self.scale, self.columns = tau, scale, columns
        self.half = product(transposed(root)[:, :, None], scale)
        inverse, pivots = inverse_root(tau * product(self.half, transposed(self.half)))
        self.log_det = pivots.log().sum((0, -1))
        self.explained = product(inverse, columns)
        self.squares = self.explained[:, -1].square().sum((0, -1))

    @cached_property
    def left(self) -> Matrices:
        return product(transposed(self.explained[:, :-1]), self.explained)

    def conditional(self) -> Conditional:
        half = transposed(self.half)
        pulls = self.tau * product(half, self.columns)
        whitened = self.tau * product(half, self.half)
        return Conditional(self.scale, whitened, pulls[:, -1], pulls[:, :-1])


class OuterLevel:
    """An outer factor; `columns` are A and B side by side, `rest` the products of the others."""

    def __init__(
        self, tau: Float[Tensor, "draws 1"], scale: Scale, columns: Matrices, rest: Matrices
    ) -> None:
        self.tau, self.scale, self.rest = tau, scale, rest
        t = len(columns)
        turned = product(transposed(scale), columns)
        self.whitened, self.pulls = tau * product(turned[:, :t], scale), turned[:, t:]
        inverse, pivots = inverse_root(self.whitened)
        self.log_det = pivots.log().sum((0, -1))
        self.explained = product(inverse, self.pulls)
        self.squares = -(tau * self.explained[:, -1].square()).sum((0, -1))

    @cached_property
    def left(self) -> Matrices:
        gained = product(transposed(self.explained[:, :-1]), self.explained)
        return self.rest - self.tau * gained

    def conditional(self) -> Conditional:
        pulls = self.tau * self.pulls
        return Conditional(self.scale, self.whitened, pulls[:, -1], pulls[:, :-1])


def _at(
    sums: Float[Tensor, "terms columns clusters"], delta: Float[Tensor, "draws fixed"]
) -> Matrices:
    """Columns of outer effects and of y - X beta, from those of outer effects, X and epsilon."""
    fixed = delta.shape[1]
    outer = sums[:, : sums.shape[1] - fixed - 1, None]
    moved = [row[-1] - delta @ row[-1 - fixed : -1] for row in sums]
    epsilon = torch.stack(moved)[:, None]
    draws = len(delta)
    return torch.cat([outer.expand(-1, -1, draws, -1), epsilon], 1)


def by_parent(values: Matrices, parents: Int[Tensor, " clusters"], outer: int) -> Matrices:
    """Sums over the clusters inside each cluster of the next factor."""
    zeros = values.new_zeros(*values.shape[:-1], outer)
    return zeros.scatter_add(-1, parents.expand_as(values), values)
