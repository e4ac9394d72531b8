"""Variational family for several grouping factors, whose random effects are known jointly."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor, nn

from armed_pyro.conditionals import WhitenedNormal, precision_root, solve
from armed_pyro.factors import Factor, by_column
from armed_pyro.guides import REFRESH_DRAWS, Guide, StructuredGuide
from armed_pyro.hyperparameters import Hyperparameters
from armed_pyro.program import MixedEffects
from armed_pyro.pseudo import FULL_TERMS, curvature, mean_draws, overshoot
from armed_pyro.rows import Membership, Rows, RowSource

__all__ = ["CrossedGuide", "choose_guide"]

# Effects known jointly need a dense matrix over all factors but the largest, and its couplings.
MOST_DENSE = 2_500
MOST_COUPLINGS = 50_000_000
# Multiplications of a matrix product in the time of one scattered sum.
SPARSE = 30

Latents = Mapping[str, Tensor]


def choose_guide(model: MixedEffects, source: RowSource | None = None) -> Guide:
    """`CrossedGuide` where there are several factors and it is affordable, else `StructuredGuide`.

    Affordable: at most 16 terms a factor and none on filters, 2,500 random effects in all factors
    but the largest, and 5e7 pairs of one of these and one of the largest factor's.
    """
    sizes = sorted(_size(model, factor) for factor in model.factors)
    dense = sum(sizes[:-1])
    narrow = all(len(factor.terms) <= FULL_TERMS and not factor.filters for factor in model.factors)
    if len(sizes) > 1 and narrow and dense <= MOST_DENSE and dense * sizes[-1] <= MOST_COUPLINGS:
        return CrossedGuide(model, source)
    return StructuredGuide(model, source)


def _size(model: MixedEffects, factor: Factor) -> int:
    return len(model.data_facts().levels[factor.name]) * len(factor.terms)


class CrossedGuide(Guide):
    r"""Random effects of all factors jointly normal given the hyperparameters.

    .. math::
        \theta &\sim N(\mu, \Lambda \Lambda^\top) \\
        z \mid \theta &\sim N(P^{-1} L^\top \tau b, P^{-1}), \quad P = I + L^\top \tau A L, \quad
        b = b_0 - H_0 \beta + A (\delta - \Gamma \beta), \quad A = e A_0 e, \quad u = L z

    over the whitened effects z of all clusters of all factors. A_0, b_0 and H_0 are sums over all
    rows as in `armed_pyro.pseudo.observe`, so that the conditional is exact for gaussian outcomes
    with linear fixed effects; the diagonal e, delta and Gamma are trained. The factor with most
    effects is eliminated cluster by cluster; the others share a dense Schur complement: memory is
    O(effects of the largest factor x effects of the others).

    All clusters are drawn in every step.

    Parameters
    ----------
    model : MixedEffects
        A bound program with several factors.
    source : RowSource, optional
        Training rows, from which the pseudo-observations start.
    """

    within: Tensor
    between: Tensor
    rest: Tensor
    pull: Tensor
    slope: Tensor

    def __init__(self, model: MixedEffects, source: RowSource | None = None) -> None:
        super().__init__()
        self._pairs: tuple[Tensor, ...] | None = None
        like = model.reference()
        self.hyperparameters = Hyperparameters(model)
        self.model_precision = model.precision
        *dense, self.largest = sorted(model.factors, key=lambda factor: _size(model, factor))
        self.dense = tuple(dense)
        levels = model.data_facts().levels
        self.clusters = {factor.name: len(levels[factor.name]) for factor in model.factors}
        k, t = self.clusters[self.largest.name], len(self.largest.terms)
        m = sum(_size(model, factor) for factor in self.dense)
        fixed = len(model.fixed_terms()) if model.bayesian_head else 0
        self.register_buffer("within", like.new_zeros(k, t, t))
        self.register_buffer("between", like.new_zeros(k, t, m))
        self.register_buffer("rest", like.new_zeros(m, m))
        self.register_buffer("pull", like.new_zeros(k * t + m))
        self.register_buffer("slope", like.new_zeros(k * t + m, fixed))
        self.log_scale = nn.Parameter(like.new_zeros(k * t + m))
        self.shift = nn.Parameter(like.new_zeros(k * t + m))
        self.shift_slope = nn.Parameter(like.new_zeros(k * t + m, fixed))
        if source is not None:
            with torch.no_grad():
                latents = self.hyperparameters.center()
            self._observe(model, latents, source)

    def refresh(self, model: MixedEffects, source: RowSource) -> None:
        n = 1 if self.exact(model) else REFRESH_DRAWS
        self._observe(model, self.draws(model.clusters(), n), source)

    def exact(self, model: MixedEffects) -> bool:
        return model.family.dispersion_name == "residual_sd"

    def noise_shapes(self, rows: Rows) -> dict[str, tuple[int, ...]]:
        k, t, m = self.between.shape
        k = len(rows.memberships[self.largest.name].index)
        shapes = {"_theta": (self.hyperparameters.size,), "_crossed": (m,)}
        return {s: n for s, n in shapes.items() if n != (0,)} | {self.largest.effect_site: (k, t)}

    def nested(self) -> Factor | None:
        return self.largest

    def every_cluster(self) -> bool:
        return True

    def work(self) -> int:
        k, t, m = self.between.shape
        return k * t * m**2 + m**3 // 3

    def most_draws(self) -> int:
        return max(1, 20_000_000 // (self.between.numel() + self.rest.numel()))

    def forward(self, rows: Rows) -> dict[str, Tensor]:
        latents = self.hyperparameters()
        rest, condition = self._joint(latents)
        z = pyro.sample("_crossed", rest, infer={"is_auxiliary": True})
        for factor, effects in self._effects(latents, z).items():
            with factor.plate(rows.memberships[factor.name]):
                log_det = -factor.log_det_scale(latents).expand(effects.shape[:-1])
                point = dist.Delta(effects, log_det, event_dim=1)
                latents[factor.effect_site] = pyro.sample(factor.effect_site, point)
        membership = rows.memberships[self.largest.name]
        with self.largest.plate(membership):
            site = self.largest.effect_site
            latents[site] = pyro.sample(site, condition(z, membership))
        return latents

    def center(self, rows: Rows) -> dict[str, Tensor]:
        latents = self.hyperparameters.center()
        rest, condition = self._joint(latents)
        for factor, effects in self._effects(latents, rest.mean).items():
            latents[factor.effect_site] = effects
        membership = rows.memberships[self.largest.name]
        latents[self.largest.effect_site] = condition(rest.mean, membership).mean
        return latents

    def _joint(self, latents: Latents, *, held: bool = False) -> tuple[WhitenedNormal, Conditional]:
        """q(z of the dense factors | theta), and q(u of the largest | these z, theta)."""
        judges: tuple[WhitenedNormal | None, Conditional | None] = (None, None)
        if torch.is_grad_enabled() and self.shift.requires_grad and not held:
            judges = self._joint(latents, held=True)
        tau = self.model_precision(latents)
        within, between, rest, pull = self._natural(latents.get("fixed_effect"), held)
        scale = self.largest.scale_matrix(latents)
        scales = [factor.scale_matrix(latents) for factor in self.dense]
        pull = tau[..., None] * pull
        k, t, _ = between.shape
        pull_largest = pull[..., : k * t].reshape(*pull.shape[:-2], k, t)
        pull_rest = self._whiten(pull[..., None, k * t :], scales)[..., 0, :]
        tau = tau[..., None, None]
        root = precision_root(tau * (scale.mT @ within @ scale))
        # Rows: (cluster, term) of the largest factor; columns: effects of the others.
        p_between = scale.mT @ (tau * self._whiten(between, scales))
        right = self._whiten(self._whiten(rest, scales).mT, scales).mT
        p_rest = torch.eye(len(rest)).to(rest) + tau * right
        y = solve(root, p_between, upper=False)
        r = solve(root, scale.mT @ pull_largest[..., None], upper=False)
        flat, flat_r = y.flatten(-3, -2), r.flatten(-3, -2)
        schur = p_rest - self._gram(flat).reshape(p_rest.shape)
        # Where sds are drawn far too large, the difference of two large numbers is not positive.
        ridge = 1e3 * torch.finfo(schur.dtype).eps * p_rest.diagonal(dim1=-2, dim2=-1)
        rest_root = torch.linalg.cholesky(schur + torch.diag_embed(ridge))
        reduced = pull_rest - (flat.mT @ flat_r)[..., 0].reshape(pull_rest.shape)
        mean = torch.cholesky_solve(reduced[..., None], rest_root)[..., 0]
        identity = torch.eye(len(rest)).to(rest)
        return (
            WhitenedNormal(identity, mean, rest_root, judges[0]),
            Conditional(scale, root, y, r, judges[1]),
        )

    def _gram(
        self, flat: Float[Tensor, "... rows effects"]
    ) -> Float[Tensor, "... effects effects"]:
        """flat' flat: by the pairs of effects that share a cluster, where these are few."""
        if self._pairs is None:
            self._pairs = _pairs(self.between)
        if not self._pairs:
            return flat.mT @ flat
        places, one, other, cells = self._pairs
        m = flat.shape[-1]
        values = flat.flatten(-2)[..., places]
        product = values[..., one] * values[..., other]
        gram = flat.new_zeros(*flat.shape[:-2], m * m).index_add(-1, cells, product)
        return gram.unflatten(-1, (m, m))

    def _natural(self, fixed: Tensor | None, held: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A in its three blocks, and b."""
        k, t, _ = self.between.shape
        e: Tensor = self.log_scale.exp()
        shift: Tensor = self.shift
        shift_slope: Tensor = self.shift_slope
        if held:
            e, shift, shift_slope = e.detach(), shift.detach(), shift_slope.detach()
        largest, others = e[: k * t].reshape(k, t), e[k * t :]
        within = self.within * largest[:, :, None] * largest[:, None, :]
        between = self.between * largest[:, :, None] * others
        rest = self.rest * others[:, None] * others
        pull = self.pull
        if fixed is not None:
            shift = shift - (shift_slope @ fixed[..., None])[..., 0]
            pull = pull - (self.slope @ fixed[..., None])[..., 0]
        first = shift[..., : k * t].unflatten(-1, (k, t))
        second = shift[..., k * t :]
        along = torch.einsum("kts,...ks->...kt", within, first)
        along = along + torch.einsum("ktm,...m->...kt", between, second)
        across = torch.einsum("ktm,...kt->...m", between, first) + second @ rest
        return within, between, rest, pull + torch.cat([along.flatten(-2), across], -1)

    def _whiten(
        self, matrix: Float[Tensor, "... rows effects"], scales: Sequence[Tensor]
    ) -> Float[Tensor, "... rows effects"]:
        """matrix @ L, over the effects of the dense factors."""
        pieces, start = [], 0
        for factor, scale in zip(self.dense, scales, strict=True):
            k, t = self.clusters[factor.name], len(factor.terms)
            piece = matrix[..., start : start + k * t].unflatten(-1, (k, t))
            pieces.append((piece @ scale.unsqueeze(-3)).flatten(-2))
            start += k * t
        return torch.cat(pieces, -1)

    def _effects(self, latents: Latents, z: Float[Tensor, "... effects"]) -> dict[Factor, Tensor]:
        """u = L z of the dense factors."""
        effects, start = {}, 0
        for factor in self.dense:
            k, t = self.clusters[factor.name], len(factor.terms)
            own = z[..., start : start + k * t].reshape(*z.shape[:-2], k, t)
            effects[factor] = (factor.scale_matrix(latents) @ own[..., None])[..., 0]
            start += k * t
        return effects

    @torch.no_grad()
    def _observe(self, model: MixedEffects, latents: Latents, source: RowSource) -> None:
        """Set A_0, b_0 and H_0 to sums over the rows, as `pseudo.observe` does by cluster."""
        factors = [self.largest, *self.dense]
        means = mean_draws(model, latents)
        like = self.pull
        counts = [(self.clusters[one.name], len(one.terms)) for one in factors]
        squares = {
            (a, b): like.new_zeros(counts[a][0] * counts[b][0], counts[a][1], counts[b][1])
            for a, b in itertools.combinations_with_replacement(range(len(factors)), 2)
            if (a, b) != (0, 0)
        }
        within = torch.zeros_like(self.within)
        pulls, pushes = ([like.new_zeros(k, t) for k, t in counts] for _ in range(2))
        slopes = [like.new_zeros(k, t, self.slope.shape[-1]) for k, t in counts]
        for rows, weight, residual, activations in curvature(model, source, latents, 2**16):
            positions = [rows.memberships[one.name].position for one in factors]
            columns = weight.shape[-1]
            phi = [one.design(rows.x, activations) for one in factors]
            z = [by_column(one, columns) for one in phi]
            response = residual
            for factor, one in zip(factors, phi, strict=True):
                if factor.effect_site in means:
                    membership, effects = rows.memberships[factor.name], means[factor.effect_site]
                    response = response + weight * factor.contribution(one, membership, effects)
            weighted = [one * weight[:, None, :] for one in z]
            within.index_add_(0, positions[0], weighted[0] @ z[0].mT)
            for (a, b), square in squares.items():
                cell = positions[a] * counts[b][0] + positions[b]
                square.index_add_(0, cell, weighted[a] @ z[b].mT)
            if model.bayesian_head:
                x = by_column(model.head_inputs(activations), columns)
                response = response + weight * (x * means["fixed_effect"][:, None]).sum(1)
                for position, one, slope in zip(positions, weighted, slopes, strict=True):
                    slope.index_add_(0, position, one @ x.mT)
            for position, one, pull, push in zip(positions, z, pulls, pushes, strict=True):
                pull.index_add_(0, position, (one * response[:, None, :]).sum(-1))
                push.index_add_(0, position, (one * residual[:, None, :]).sum(-1))
        within, squares = source.total(within), {k: source.total(v) for k, v in squares.items()}
        pulls, pushes, slopes = ([source.total(one) for one in s] for s in (pulls, pushes, slopes))
        if model.family.dispersion_name != "residual_sd":
            # Of all clusters together: parts of a joint step would not lead in its direction.
            own = [within, *(squares[a, a][:: k + 1] for a, (k, _) in enumerate(counts) if a)]
            moves = [
                overshoot(factor, latents, means.get(factor.effect_site), square, push)
                for factor, square, push in zip(factors, own, pushes, strict=True)
            ]
            most = max(float(excess.max()) for _, excess in moves)
            pulls = [pull - most * move for pull, (move, _) in zip(pulls, moves, strict=True)]
        self._pairs = None
        for trained in (self.log_scale, self.shift, self.shift_slope):
            trained.zero_()
        self.within.copy_(within)
        self.pull.copy_(torch.cat([one.flatten() for one in pulls]))
        self.slope.copy_(torch.cat([one.flatten(0, 1) for one in slopes]))
        starts = [0, 0, *itertools.accumulate(k * t for k, t in counts[1:])]
        for (a, b), square in squares.items():
            (ka, ta), (kb, tb) = counts[a], counts[b]
            block = square.reshape(ka, kb, ta, tb).permute(0, 2, 1, 3)
            columns_b = slice(starts[b], starts[b] + kb * tb)
            if a == 0:
                self.between[..., columns_b] = block.reshape(ka, ta, kb * tb)
            else:
                block = block.reshape(ka * ta, kb * tb)
                rows_a = slice(starts[a], starts[a] + ka * ta)
                self.rest[rows_a, columns_b] = block
                self.rest[columns_b, rows_a] = block.mT


def _pairs(between: Float[Tensor, "clusters terms effects"]) -> tuple[Tensor, ...]:
    """Places of couplings that are not zero, all pairs of those in one row, and their cells.

    Whitening mixes the terms of a cluster, so that an effect coupled with one is with all. Nothing
    where the pairs are not few.
    """
    k, t, m = between.shape
    coupled = (between != 0).any(1, keepdim=True).expand(k, t, m).reshape(k * t, m)
    counts = coupled.sum(1)
    if int((counts**2).sum()) * SPARSE > k * t * m**2:
        return ()
    places = coupled.flatten().nonzero()[:, 0]
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    sizes = counts.repeat_interleave(counts)
    one = torch.arange(len(places), device=places.device).repeat_interleave(sizes)
    first = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    within = torch.arange(len(one), device=places.device) - first
    other, columns = starts[one] + within, places % m
    return places, one, other, columns[one] * m + columns[other]


class Conditional:
    """q(u of the largest factor | z of the others, theta): independent between clusters."""

    def __init__(
        self, scale: Tensor, root: Tensor, coupling: Tensor, pull: Tensor, held: Conditional | None
    ) -> None:
        self.scale, self.root, self.coupling, self.pull = scale, root, coupling, pull
        self.held = held

    def __call__(self, z: Float[Tensor, "... effects"], membership: Membership) -> WhitenedNormal:
        root, coupling, pull = self.root, self.coupling, self.pull
        if not membership.complete:
            of_rows = (root, coupling, pull)
            root, coupling, pull = (one[..., membership.index, :, :] for one in of_rows)
        moved = pull - coupling @ z[..., None]
        mean = solve(root.mT, moved, upper=True)[..., 0]
        held = None if self.held is None else self.held(z, membership)
        return WhitenedNormal(self.scale, mean, root, held)
