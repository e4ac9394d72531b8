"""log p(y | theta) of a gaussian program with crossed grouping factors, from sums of its rows."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from armed_pyro.distributions.small_matrices import precision_root, solve
from armed_pyro.guides.block_scale import BlockScale
from armed_pyro.guides.closed_form import MarginalLikelihood
from armed_pyro.guides.cross_products import CrossProducts, cross_products
from armed_pyro.guides.gaussian_sums import (
    BLOCK_VALUES,
    GaussianColumns,
    GaussianSums,
    inside_out,
)
from armed_pyro.program.model import MixedEffects
from armed_pyro.random_effects.covariance import Latents
from armed_pyro.random_effects.grouping_factor import Factor
from armed_pyro.rows.source import RowSource

__all__ = ["CrossedForm", "crossed_form"]

# Values of all matrices of the draws that are made at once.
MOST_VALUES = 2**19


@dataclass(frozen=True)
class _Others:
    r"""Sums over the rows of all factors but the largest, in double precision.

    `projected` is :math:`\rho_k = R_k^{+} Z_{1k}' W Z_2`, `square` is :math:`\tilde Z_2' W \tilde
    Z_2`, and `ends` is :math:`\tilde Z_2' W (\tilde X, \tilde\epsilon)`.
    """

    projected: CrossProducts
    square: Float[Tensor, "effects effects"]
    ends: Float[Tensor, "effects fixed_and_1"]


@torch.no_grad()
def crossed_form(model: MixedEffects, source: RowSource) -> CrossedForm:
    """log p(y | theta) of the rows of a gaussian program, given its frozen network.

    The grouping factors may be crossed. Time per draw is cubic in the random effects of all
    factors but the largest.
    """
    levels = model.data_facts().levels
    largest, *others = sorted(
        inside_out(model), key=lambda factor: -len(levels[factor.name]) * len(factor.terms)
    )
    sums = GaussianSums(model, [largest])
    sums.observe(model, source, [])
    return CrossedForm(model, sums, others, _observed(model, sums, others, source))


class CrossedForm(MarginalLikelihood):
    r"""log p(y | theta) with the random effects of crossed factors integrated out.

    .. math::
        \log p(y \mid \theta) = c + \tfrac{n}{2} \log \tau - \sum_k \log |C_k|
        - \tfrac{1}{2} \log |S| - \tfrac{\tau}{2} (E_1 - \tau\, v' S^{-1} v)

    The factor with most effects is eliminated cluster by cluster, as the innermost factor of
    `armed_pyro.guides.closed_form.ClosedForm` is, with the same :math:`R_k`, :math:`\rho_k`,
    :math:`C_k` and :math:`E_1`. All other effects, with :math:`L_2` as the Cholesky factor of
    their covariance, keep the dense Schur complement

    .. math::
        S &= I + \tau L_2' \Big(\tilde Z_2' W \tilde Z_2 + \sum_k F_k' F_k\Big) L_2, \quad
            F_k = C_k^{-1} \rho_k \\
        v &= L_2' \Big(\tilde Z_2' W \tilde\epsilon + \sum_k F_k' C_k^{-1} \rho_{k,\epsilon}\Big)

    where a tilde marks columns without their projections on :math:`Z_1`. Only sums of squares are
    added, so S is positive definite at every theta. No row is read and no effect is drawn.

    Examples
    --------
    >>> from torch import nn
    >>> from armed_pyro import ClusteredData
    >>> groups = {"g": [0, 0, 1, 1], "h": [0, 1, 0, 1]}
    >>> data = ClusteredData.from_arrays([[0.0], [1.0], [3.0], [4.0]], [1, 2, 5, 6], groups)
    >>> net, terms = nn.Linear(1, 1).double(), "(1 | g) + (1 | h)"
    >>> model = MixedEffects(net, terms, bayesian_head=True).bind(data)
    >>> sds = {name: torch.ones(1) for name in ("g_sd", "h_sd", "residual_sd")}
    >>> closed = crossed_form(model, model.encode(data))
    >>> closed.log_likelihood(sds | {"fixed_effect": torch.zeros(2)}).shape
    torch.Size([1])
    """

    def __init__(
        self, model: MixedEffects, sums: GaussianSums, others: list[Factor], rest: _Others
    ) -> None:
        levels = model.data_facts().levels
        self.sums, self.others, self.rest = sums, others, rest
        self._precision = model.precision
        self._clusters = [len(levels[factor.name]) for factor in others]

    @property
    def size(self) -> int:
        """Values that one draw needs for the matrices of all clusters."""
        return self.sums.projected.numel() + 3 * self.rest.square.numel()

    @property
    def work(self) -> int:
        """Multiplications of the Cholesky factor of S of one draw."""
        return len(self.rest.square) ** 3 // 3

    def most_draws(self) -> int:
        """Number of draws that are fastest at once; at least 1."""
        return max(1, MOST_VALUES // self.size)

    def log_likelihood(self, latents: Latents) -> Float[Tensor, " draws"]:
        """log p(y | theta) of draws of the hyperparameters; one value without draws."""
        return self._eliminated(latents).log_likelihood(self.sums)

    def with_effects(self, latents: Latents) -> tuple[Float[Tensor, " draws"], dict[str, Tensor]]:
        r"""log p(y | theta), and a draw of all random effects, "draws clusters terms", per draw.

        .. math::
            L_2^{-1} u_2 \sim N\big(\tau S^{-1} v, S^{-1}\big), \quad
            L_1^{-1} u_{1,k} \sim N\big(\tau Q_k^{-1} L_1' R_k (\rho_{k,\epsilon} - \rho_k u_2),
            Q_k^{-1}\big), \quad Q_k = I + \tau L_1' R_k R_k' L_1
        """
        eliminated = self._eliminated(latents)
        u_2, u_1 = eliminated.effects(self.rest.projected)
        widths = [len(factor.terms) for factor in self.others]
        sizes = [count * width for count, width in zip(self._clusters, widths, strict=True)]
        effects = {self.sums.factors[0].effect_site: u_1}
        for factor, part in zip(self.others, u_2.split(sizes, -1), strict=True):
            effects[factor.effect_site] = part.unflatten(-1, (-1, len(factor.terms)))
        return eliminated.log_likelihood(self.sums), effects

    def _eliminated(self, latents: Latents) -> _Eliminated:
        """The equations of the class, in their order."""
        sums, rest = self.sums, self.rest
        tau = self._precision(latents).double().reshape(-1, 1, 1)
        ends = self._ends(latents)
        (largest,) = sums.factors
        scale, blocks = _scale(largest, latents), [_scale(f, latents) for f in self.others]
        root = sums.root.movedim(-1, 0)
        half = root.mT @ scale[:, None]
        factor = precision_root(tau[..., None] * (half @ half.mT))
        inverse = solve(factor, torch.eye(root.shape[-1]).to(root), upper=False)
        epsilon = sums.projected.movedim(-1, 0) @ ends[:, None, :, None]
        explained = inverse @ epsilon
        squares = (ends @ sums.square * ends).sum(-1) + explained.square().sum((1, 2, 3))
        scale_2 = BlockScale(blocks, self._clusters)
        pull = rest.projected.transpose_times((inverse.mT @ explained)[..., 0])
        v = scale_2.transpose_times(ends @ rest.ends.mT + pull)
        seen = scale_2.both(rest.square + rest.projected.gram(inverse))
        schur = torch.linalg.cholesky(tau * seen + torch.eye(seen.shape[-1]).to(seen))
        gain = torch.linalg.solve_triangular(schur, v[..., None], upper=False)
        squares = squares - tau[:, 0, 0] * gain.square().sum((1, 2))
        return _Eliminated(tau, scale, half, factor, epsilon, squares, scale_2, schur, gain)

    def _ends(self, latents: Latents) -> Float[Tensor, "draws fixed_and_1"]:
        """Coefficients of (X, epsilon) in y - X beta."""
        delta = self.sums.reference[None]
        if "fixed_effect" in latents:
            fixed = latents["fixed_effect"].double()
            delta = fixed.reshape(-1, fixed.shape[-1]) - self.sums.reference
        return torch.cat([-delta, delta.new_ones(len(delta), 1)], 1)


@dataclass(frozen=True)
class _Eliminated:
    """C, S^1/2 and E of `CrossedForm` at draws of the hyperparameters, and their parts."""

    tau: Float[Tensor, "draws 1 1"]
    scale: Float[Tensor, "draws terms terms"]  # L_1
    half: Float[Tensor, "draws clusters terms terms"]  # R' L_1
    factor: Float[Tensor, "draws clusters terms terms"]  # C
    epsilon: Float[Tensor, "draws clusters terms 1"]  # rho of epsilon
    squares: Float[Tensor, " draws"]
    scale_2: BlockScale
    schur: Float[Tensor, "draws effects effects"]  # the Cholesky factor of S
    gain: Float[Tensor, "draws effects 1"]  # S^-1/2 v

    def log_likelihood(self, sums: GaussianSums) -> Float[Tensor, " draws"]:
        log_det = self.factor.diagonal(dim1=-2, dim2=-1).log().sum((1, 2))
        log_det = log_det + self.schur.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        tau = self.tau[:, 0, 0]
        return sums.constant + 0.5 * sums.count * tau.log() - log_det - 0.5 * tau * self.squares

    def effects(
        self, projected: CrossProducts
    ) -> tuple[Float[Tensor, "draws effects"], Float[Tensor, "draws clusters terms"]]:
        """A draw of u_2, and of u_1 given u_2."""
        whitened = self.tau * self.gain + torch.randn_like(self.gain)
        z = torch.linalg.solve_triangular(self.schur.mT, whitened, upper=True)[..., 0]
        u_2, tau = self.scale_2.times(z), self.tau[..., None]
        left = self.epsilon - projected.times(u_2)[..., None]
        root = precision_root(tau * (self.half.mT @ self.half))
        whitened = solve(root, tau * (self.half.mT @ left), upper=False)
        z_1 = solve(root.mT, whitened + torch.randn_like(whitened), upper=True)
        return u_2, (self.scale[:, None] @ z_1)[..., 0]


def _scale(factor: Factor, latents: Latents) -> Float[Tensor, "draws terms terms"]:
    scale = factor.scale_matrix(latents).double()
    return scale.reshape(-1, *scale.shape[-2:])


def _observed(
    model: MixedEffects, sums: GaussianSums, others: list[Factor], source: RowSource
) -> _Others:
    """Read the rows once more, for the columns of the other factors."""
    training = model.training
    model.eval()
    totals = _Totals(model, sums, others)
    for rows in source.chunks(max(1, BLOCK_VALUES // totals.columns)):
        totals.add(GaussianColumns.of(model, [*sums.factors, *others], rows))
    model.train(training)
    return totals.projected()


class _Totals:
    """Sums of products of the other factors' columns, by pairs of clusters."""

    def __init__(self, model: MixedEffects, sums: GaussianSums, others: list[Factor]) -> None:
        levels = model.data_facts().levels
        self.sums, self.root = sums, sums.root.movedim(-1, 0)
        # R = V s with orthonormal V, so V / s is the transpose of the pseudo-inverse.
        sizes = self.root.square().sum(1)
        self.inverse = self.root * torch.where(sizes > 0, 1 / sizes, 0.0)[:, None]
        self.coefficients = self.inverse @ sums.projected.movedim(-1, 0)
        k, t, _ = self.root.shape
        widths = [len(factor.terms) for factor in others]
        self.columns = (t + sum(widths) + sums.fixed + 1) ** 2
        self.counts = [len(levels[factor.name]) for factor in others]
        by_factor, zeros = list(zip(self.counts, widths, strict=True)), self.root.new_zeros
        self.between = [zeros(k * c, t, w) for c, w in by_factor]
        self.ends = [zeros(c, w, sums.fixed + 1) for c, w in by_factor]
        self.square = {
            (a, b): zeros(by_factor[a][0] * by_factor[b][0], widths[a], widths[b])
            for a, b in itertools.combinations_with_replacement(range(len(others)), 2)
        }
        self.stops = [0, *itertools.accumulate(c * w for c, w in by_factor)]

    def add(self, block: GaussianColumns) -> None:
        """Add a block of rows, in place."""
        first, *positions = block.position
        left = torch.cat([block.x, block.y - (block.x @ self.sums.reference)[:, None]], 1)
        left = left - (block.z[0][:, None] @ self.coefficients[first])[:, 0]
        weighted = [z * block.weight for z in block.z]
        for m, position in enumerate(positions):
            place = first * self.counts[m] + position
            self.between[m].index_add_(0, place, _products(weighted[0], block.z[m + 1]))
            self.ends[m].index_add_(0, position, _products(weighted[m + 1], left))
        for (a, b), square in self.square.items():
            place = positions[a] * self.counts[b] + positions[b]
            square.index_add_(0, place, _products(weighted[a + 1], block.z[b + 1]))

    def projected(self) -> _Others:
        """The sums, without what the largest factor explains."""
        k, t, _ = self.root.shape
        parts = zip(self.between, self.counts, strict=True)
        between = torch.cat([_matrix(part, k, count) for part, count in parts], 1)
        square = self.root.new_zeros(self.stops[-1], self.stops[-1])
        places = [slice(start, stop) for start, stop in itertools.pairwise(self.stops)]
        for (a, b), part in self.square.items():
            block = _matrix(part, self.counts[a], self.counts[b])
            square[places[a], places[b]], square[places[b], places[a]] = block, block.mT
        products = cross_products(self.inverse.mT @ between.unflatten(0, (k, t)))
        identity = torch.eye(t, dtype=square.dtype, device=square.device).expand(k, t, t)
        ends = torch.cat([part.flatten(0, 1) for part in self.ends])
        return _Others(products, square - products.gram(identity), ends)


def _products(
    left: Float[Tensor, "rows terms"], right: Float[Tensor, "rows columns"]
) -> Float[Tensor, "rows terms columns"]:
    return left[:, :, None] * right[:, None, :]


def _matrix(
    blocks: Float[Tensor, "pairs terms columns"], rows: int, columns: int
) -> Float[Tensor, "all_terms all_columns"]:
    """The blocks of all pairs of clusters as one matrix."""
    return blocks.unflatten(0, (rows, columns)).transpose(1, 2).flatten(2).flatten(0, 1)
