"""All that the rows of a gaussian program with nested grouping factors say, as sums."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from armed_pyro.program.linearize import sensitivities
from armed_pyro.program.model import MixedEffects
from armed_pyro.program.predictor import modulates
from armed_pyro.random_effects.grouping_factor import Factor
from armed_pyro.rows.batch import Rows
from armed_pyro.rows.source import RowSource

__all__ = ["BLOCK_VALUES", "GaussianColumns", "GaussianSums", "inside_out", "nesting"]

# Values in a block of rows.
BLOCK_VALUES = 2**22
# A direction of a cluster's effects about which the rows say less than this share of the most that
# they say of any is taken for unknown: it is rounding.
ROUNDING = 16 * torch.finfo(torch.float64).eps
# A GPU's library decomposes at most this many matrices in one call.
MOST_AT_ONCE = 2**13

Parents = Int[Tensor, " clusters"]


@dataclass(frozen=True)
class GaussianColumns:
    """Columns of a block of rows in double precision, and the clusters of its rows."""

    z: list[Float[Tensor, "rows terms"]]  # by factor, the innermost first
    x: Float[Tensor, "rows fixed"]
    y: Float[Tensor, "rows 1"]
    weight: Float[Tensor, "rows 1"]
    position: list[Int[Tensor, " rows"]]

    @classmethod
    def of(cls, model: MixedEffects, factors: Sequence[Factor], rows: Rows) -> GaussianColumns:
        """Z, X and y of rows, in standardised units; y is without centre, offset and network."""
        _, activations = model.run_network(rows)
        latents = {}
        if model.has_fixed_effects:
            latents["fixed_effect"] = model.reference().new_zeros(len(model.fixed_terms()))
        fixed = model.fixed_predictor(rows, activations[""], activations, latents)[..., 0]
        y = (rows.outcome().double() - fixed.double()) / model.data_facts().spread
        known = model.has_fixed_effects
        head = model.fixed_inputs(rows, activations) if known else y.new_zeros(len(y), 0)
        weight = torch.ones_like(y) if rows.weights is None else rows.weights.double()
        # Outcomes of rows of weight 0 may be anything.
        y = torch.where(weight == 0, 0.0, y)
        z = [sensitivities(model, rows, f, activations, {})[..., 0].double() for f in factors]
        position = [rows.memberships[factor.name].clusters() for factor in factors]
        return cls(z, head.double(), y[:, None], weight[:, None], position)


class GaussianSums(nn.Module):
    r"""Sums over the rows of a gaussian program whose grouping factors are nested in each other.

    The program is :math:`y = X \beta + \sum_m Z_m u_m + W^{-1/2} e / \sqrt\tau`, in standardised
    units, with m = 1 for the innermost factor. Its rows enter the density through products of the
    columns :math:`C = (Z_2, \dots, X, \epsilon)`, :math:`\epsilon = y - X \beta_0` only. For each
    cluster k of the innermost factor they are split into what its effects can and cannot explain:

    .. math:: Z_{1k}' W Z_{1k} = R_k R_k', \quad \rho_k = R_k^{+} Z_{1k}' W C_k, \quad
        \tilde C_k = C_k - Z_{1k} R_k'^{+} \rho_k

    `root` and `projected` are R and rho. `outer` are, for each outer factor m, the sums of
    :math:`\tilde Z_m' W (\tilde Z_m, \dots, \tilde X, \tilde\epsilon)` over the rows of its
    clusters, and `square` is the sum of :math:`(\tilde X, \tilde\epsilon)' W (\tilde X,
    \tilde\epsilon)` over all rows. Squares of what is left are summed, instead of a difference of
    large squares, and `reference` (:math:`\beta_0`) keeps the rest small: nothing cancels, however
    small the residual sd. The rows are therefore read twice.

    `parents` give each cluster's cluster in the next factor. `count` is the number of rows or the
    sum of their frequencies, and `constant` the part of the log-density without parameters. All
    sums are in double precision, with the matrices' dimensions first and the clusters last.
    """

    root: Float[Tensor, "terms terms clusters"]
    projected: Float[Tensor, "terms columns clusters"]
    square: Float[Tensor, "fixed_and_1 fixed_and_1"]
    reference: Float[Tensor, " fixed"]
    count: Float[Tensor, ""]
    constant: Float[Tensor, ""]

    def __init__(self, model: MixedEffects, factors: Sequence[Factor]) -> None:
        super().__init__()
        levels, device = model.data_facts().levels, model.reference().device
        self.factors = tuple(factors)
        self.clusters = [len(levels[factor.name]) for factor in factors]
        self.terms = [len(factor.terms) for factor in factors]
        self.fixed = len(model.fixed_terms()) if model.has_fixed_effects else 0
        like = torch.zeros((), dtype=torch.float64, device=device)
        k, t = (self.clusters[0], self.terms[0]) if factors else (0, 0)
        last = self.fixed + 1
        self.register_buffer("root", like.new_zeros(t, t, k))
        self.register_buffer("projected", like.new_zeros(t, sum(self.terms[1:]) + last, k))
        for m in range(1, len(factors)):
            shape = self.terms[m], sum(self.terms[m:]) + last, self.clusters[m]
            self.register_buffer(f"outer_{m}", like.new_zeros(shape))
            codes = torch.zeros(self.clusters[m - 1], dtype=torch.long, device=device)
            self.register_buffer(f"parents_{m}", codes)
        self.register_buffer("square", like.new_zeros(last, last))
        self.register_buffer("reference", like.new_zeros(self.fixed))
        self.register_buffer("count", like.clone())
        self.register_buffer("constant", like.clone())

    @property
    def outer(self) -> list[Float[Tensor, "terms columns clusters"]]:
        """Sums of the outer factors, beginning with the one around the innermost."""
        return [getattr(self, f"outer_{m}") for m in range(1, len(self.factors))]

    @property
    def parents(self) -> list[Parents]:
        """For each factor but the outermost, its clusters' clusters in the next factor."""
        return [getattr(self, f"parents_{m}") for m in range(1, len(self.factors))]

    @torch.no_grad()
    def observe(self, model: MixedEffects, source: RowSource, parents: Sequence[Parents]) -> None:
        """Set all sums from the rows, in place."""
        training = model.training
        model.eval()
        for own, values in zip(self.parents, parents, strict=True):
            own.copy_(values)
        self.constant.zero_()
        self.count.zero_()
        coefficients = self._project(model, source)
        self._leave(model, source, coefficients)
        model.train(training)

    def _blocks(
        self, model: MixedEffects, source: RowSource
    ) -> Iterator[tuple[Rows, GaussianColumns]]:
        columns = sum(t * t for t in self.terms) + (sum(self.terms) + self.fixed + 1) ** 2
        for rows in source.chunks(max(1, BLOCK_VALUES // columns)):
            yield rows, GaussianColumns.of(model, self.factors, rows)

    def _project(
        self, model: MixedEffects, source: RowSource
    ) -> Float[Tensor, "clusters terms columns"]:
        """Set R, rho and the reference; the coefficients of each column on its cluster's Z."""
        t, columns, k = self.projected.shape
        square, cross = self.root.new_zeros(k, t, t), self.root.new_zeros(k, t, columns)
        totals = torch.zeros_like(self.square)
        facts = model.data_facts()
        for rows, block in self._blocks(model, source):
            ends = torch.cat([block.x, block.y], 1)
            totals += ends.mT @ (block.weight * ends)
            if self.factors:
                z = block.z[0]
                weighted, all_columns = z * block.weight, torch.cat([*block.z[1:], ends], 1)
                square.index_add_(0, block.position[0], weighted[:, :, None] * z[:, None, :])
                products = weighted[:, :, None] * all_columns[:, None, :]
                cross.index_add_(0, block.position[0], products)
            frequency = model.frequencies(rows)
            self.count += len(rows) if frequency is None else frequency.double().sum()
            if frequency is None and rows.weights is not None:
                self.constant += 0.5 * block.weight.log().sum()
        for sums in (square, cross, totals, self.count, self.constant):
            sums.copy_(source.total(sums))
        self.constant -= self.count * (0.5 * math.log(2 * math.pi) + math.log(facts.spread))
        p = self.fixed
        self.reference.copy_(torch.linalg.pinv(totals[:p, :p], hermitian=True) @ totals[:p, p])
        # Pivoting by the eigenvalues leaves out what the rows do not say.
        pieces = [torch.linalg.eigh(piece) for piece in square.split(MOST_AT_ONCE)]
        values, vectors = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        known = values > ROUNDING * values.amax(-1, keepdim=True) if t else values > 0
        sizes = torch.where(known, values, 0.0).sqrt()
        inverse = torch.where(known, values.rsqrt(), 0.0)
        projected = inverse[..., None] * (vectors.mT @ cross)
        projected[..., -1] -= projected[..., -1 - p : -1] @ self.reference
        self.root.copy_((vectors * sizes[..., None, :]).movedim(0, -1))
        self.projected.copy_(projected.movedim(0, -1))
        return (vectors * inverse[..., None, :]) @ projected

    def _leave(
        self,
        model: MixedEffects,
        source: RowSource,
        coefficients: Float[Tensor, "clusters terms columns"],
    ) -> None:
        """Set the sums of what the innermost effects cannot explain."""
        for sums in (self.square, *self.outer):
            sums.zero_()
        for _, block in self._blocks(model, source):
            epsilon = block.y - (block.x @ self.reference)[:, None]
            left = torch.cat([*block.z[1:], block.x, epsilon], 1)
            if self.factors:
                explained = block.z[0][:, None, :] @ coefficients[block.position[0]]
                left = left - explained[:, 0]
            ends = left[:, -1 - self.fixed :]
            self.square += ends.mT @ (block.weight * ends)
            start = 0
            for sums, position in zip(self.outer, block.position[1:], strict=True):
                z = left[:, start : start + len(sums)] * block.weight
                products = z[:, :, None] * left[:, None, start:]
                sums.index_add_(-1, position, products.movedim(0, -1))
                start += len(sums)
        for sums in (self.square, *self.outer):
            sums.copy_(source.total(sums))


def inside_out(model: MixedEffects) -> list[Factor]:
    """The grouping factors, those with most clusters first."""
    levels = model.data_facts().levels
    return sorted(model.factors, key=lambda factor: -len(levels[factor.name]))


def nesting(model: MixedEffects, source: RowSource) -> tuple[list[Factor], list[Parents]] | None:
    """The grouping factors from the inside out, and each cluster's cluster in the next one.

    None if the rows of any cluster lie in several clusters of the next factor: factors are crossed.
    """
    if modulates(model) or source.reduce is not None:
        return None
    levels, factors = model.data_facts().levels, inside_out(model)
    pairs = list(pairwise(factors))
    if not pairs:
        return factors, []
    device = model.reference().device
    sizes = [len(levels[inner.name]) for inner, _ in pairs]
    least = [torch.full((k,), torch.iinfo(torch.long).max, device=device) for k in sizes]
    most = [torch.zeros(k, dtype=torch.long, device=device) for k in sizes]
    for rows in source.chunks(BLOCK_VALUES):
        codes = {name: part.clusters() for name, part in rows.memberships.items()}
        for (inner, outer), low, high in zip(pairs, least, most, strict=True):
            low.scatter_reduce_(0, codes[inner.name], codes[outer.name], "amin")
            high.scatter_reduce_(0, codes[inner.name], codes[outer.name], "amax")
        # A cluster without rows has a least above its most.
        if any((low < high).any() for low, high in zip(least, most, strict=True)):
            return None
    return factors, most
