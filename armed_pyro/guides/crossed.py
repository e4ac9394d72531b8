"""Variational family for several grouping factors, whose random effects are known jointly."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor, nn

from armed_pyro.distributions.precision_normal import JointNormal
from armed_pyro.distributions.small_matrices import multiply, precision_root, solve
from armed_pyro.distributions.whitened import WhitenedNormal
from armed_pyro.guides.base import Guide
from armed_pyro.guides.block_scale import BlockScale
from armed_pyro.guides.cross_products import Couplings, Known, coupled
from armed_pyro.guides.hyperparameters import Hyperparameters
from armed_pyro.guides.pseudo_observations import FULL_TERMS, overshoot
from armed_pyro.guides.structured import REFRESH_DRAWS, StructuredGuide
from armed_pyro.program.linearize import curvature, mean_draws
from armed_pyro.program.model import MixedEffects
from armed_pyro.random_effects.design import by_column
from armed_pyro.random_effects.grouping_factor import Factor
from armed_pyro.rows.batch import Membership, Rows
from armed_pyro.rows.source import RowSource

__all__ = ["CrossedGuide", "choose_guide"]


# Effects known jointly need a dense matrix over all factors but the largest, and its couplings.
MOST_DENSE = 2_500
MOST_COUPLINGS = 50_000_000
MOST_VALUES = 4_000_000  # in the matrices of draws made at once

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
    rows as in `armed_pyro.guides.pseudo_observations.observe`, so that the conditional is exact
    for gaussian outcomes
    with linear fixed effects; the diagonal e, delta and Gamma are trained. The factor with most
    effects is eliminated cluster by cluster; the others share a dense Schur complement, to which
    every pair of effects that share a cluster adds, or a matrix product where nearly all do: see
    `armed_pyro.guides.cross_products`. Memory is O(effects of the largest factor x effects of the
    others).

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
        self._known: Known | None = None
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
        return model.family.is_quadratic

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
        # Matrices that do not fit into a processor's cache are slower one by one.
        return max(1, MOST_VALUES // (self.between.numel() + self.rest.numel()))

    def forward(self, rows: Rows) -> dict[str, Tensor]:
        latents = self.hyperparameters()
        rest, condition = self._joint(latents)
        z = pyro.sample("_crossed", rest, infer={"is_auxiliary": True})
        effects = self._effects(latents, z)
        for factor, own in effects.items():
            with factor.plate(rows.memberships[factor.name]):
                log_det = -factor.log_det_scale(latents).expand(own.shape[:-1])
                point = dist.Delta(own, log_det, event_dim=1)
                latents[factor.effect_site] = pyro.sample(factor.effect_site, point)
        membership = rows.memberships[self.largest.name]
        with self.largest.plate(membership):
            site = self.largest.effect_site
            latents[site] = pyro.sample(site, condition(_flat(effects), membership))
        return latents

    def center(self, rows: Rows) -> dict[str, Tensor]:
        latents = self.hyperparameters.center()
        rest, condition = self._joint(latents)
        effects = self._effects(latents, rest.mean)
        for factor, own in effects.items():
            latents[factor.effect_site] = own
        membership = rows.memberships[self.largest.name]
        latents[self.largest.effect_site] = condition(_flat(effects), membership).mean
        return latents

    def _joint(self, latents: Latents, *, held: bool = False) -> tuple[JointNormal, Conditional]:
        """q(z of the dense factors | theta), and q(u of the largest | u of these, theta)."""
        judges: tuple[JointNormal | None, Conditional | None] = (None, None)
        if torch.is_grad_enabled() and self.shift.requires_grad and not held:
            judges = self._joint(latents, held=True)
        tau = self.model_precision(latents)
        couplings = self._couplings()
        largest, others, within, pull = self._natural(couplings, latents.get("fixed_effect"), held)
        scale = self.largest.scale_matrix(latents)
        pull = tau[..., None] * pull
        k, t, _ = self.between.shape
        own = pull[..., : k * t].reshape(*pull.shape[:-2], k, t)
        size = tau.sqrt()[..., None]
        root = precision_root(tau[..., None, None] * (scale.mT @ within @ scale))
        r = solve(root, scale.mT @ own[..., None], upper=False)[..., 0]
        # Of the largest factor's clusters, what is to be taken off the others' precision.
        half = size[..., None] * solve(root, scale.mT * largest[..., None, :], upper=False)
        taken = couplings.gram(half)
        taken = taken.unsqueeze(-3) if taken.dim() > 2 else taken
        moved = others * couplings.across(multiply(half.mT, r))
        moved = moved.unsqueeze(-2) if moved.dim() > 1 else moved
        blocks = BlockScale(
            [factor.scale_matrix(latents) for factor in self.dense],
            [self.clusters[factor.name] for factor in self.dense],
        )
        reduced = blocks.right((pull[..., k * t :] - size * moved)[..., None, :])[..., 0, :]
        blocks = replace(blocks, rows=size * others)
        # Where sds are drawn far too large, the difference of two large numbers is not positive.
        ridge = 1e3 * torch.finfo(taken.dtype).eps * (1 + blocks.largest(self.rest.diagonal()))
        schur = blocks.both(self.rest - taken) + torch.diag_embed(1 + ridge)
        along = size[..., None] * half
        conditional = Conditional(scale, root, along, others, couplings, r, judges[1])
        return JointNormal.of(schur, reduced, judges[0]), conditional

    def _couplings(self) -> Couplings:
        """Those of the rows, gathered anew whenever the rows have said something new."""
        between, known = self.between, self._known
        if known is not None and known.between is between and known.version == between._version:
            return known.couplings
        if known is not None and known.between is not between and known.on(between.device):
            # An input of a step that is captured as a graph, whose values are not to be looked at.
            return coupled(between, known.pattern)
        self._known = Known.of(between)
        return self._known.couplings

    def _natural(
        self, couplings: Couplings, fixed: Tensor | None, held: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """e of the largest factor's effects and of the others', A within the former, and b."""
        k, t, _ = self.between.shape
        e: Tensor = self.log_scale.exp()
        shift: Tensor = self.shift
        shift_slope: Tensor = self.shift_slope
        if held:
            e, shift, shift_slope = e.detach(), shift.detach(), shift_slope.detach()
        largest, others = e[: k * t].reshape(k, t), e[k * t :]
        within = self.within * largest[:, :, None] * largest[:, None, :]
        pull = self.pull
        if fixed is not None:
            shift = shift - (shift_slope @ fixed[..., None])[..., 0]
            pull = pull - (self.slope @ fixed[..., None])[..., 0]
        first = shift[..., : k * t].unflatten(-1, (k, t))
        second = others * shift[..., k * t :]
        along = torch.einsum("kts,...ks->...kt", within, first)
        along = along + largest * couplings.along(second)
        across = others * (couplings.across(largest * first) + second @ self.rest)
        return largest, others, within, pull + torch.cat([along.flatten(-2), across], -1)

    def _effects(self, latents: Latents, z: Float[Tensor, "... effects"]) -> dict[Factor, Tensor]:
        """u = L z of the dense factors."""
        effects, start = {}, 0
        for factor in self.dense:
            k, t = self.clusters[factor.name], len(factor.terms)
            own = z[..., start : start + k * t].reshape(*z.shape[:-2], k, t)
            effects[factor] = multiply(factor.scale_matrix(latents), own)
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
        if not model.family.is_quadratic:
            # Of all clusters together: parts of a joint step would not lead in its direction.
            own = [within, *(squares[a, a][:: k + 1] for a, (k, _) in enumerate(counts) if a)]
            moves = [
                overshoot(factor, latents, means.get(factor.effect_site), square, push)
                for factor, square, push in zip(factors, own, pushes, strict=True)
            ]
            most = max(float(excess.max()) for _, excess in moves)
            pulls = [pull - most * move for pull, (move, _) in zip(pulls, moves, strict=True)]
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


def _flat(effects: Mapping[Factor, Tensor]) -> Float[Tensor, "... effects"]:
    return torch.cat([own.flatten(-2) for own in effects.values()], -1)


class Conditional:
    """q(u of the largest factor | u of the others, theta): independent between clusters."""

    def __init__(
        self,
        scale: Tensor,
        root: Tensor,
        half: Tensor,
        others: Tensor,
        couplings: Couplings,
        pull: Tensor,
        held: Conditional | None,
    ) -> None:
        self.scale, self.root, self.half, self.others = scale, root, half, others
        self.couplings, self.pull, self.held = couplings, pull, held

    def __call__(self, effects: Float[Tensor, "... m"], membership: Membership) -> WhitenedNormal:
        along = self.couplings.along(self.others * effects)
        root, moved = self.root, self.pull - multiply(self.half, along)
        if not membership.complete:
            root, moved = root[..., membership.index, :, :], moved[..., membership.index, :]
        mean = solve(root.mT, moved[..., None], upper=True)[..., 0]
        held = None if self.held is None else self.held(effects, membership)
        return WhitenedNormal(self.scale, mean, root, held)
