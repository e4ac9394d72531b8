"""`CrossedGuide`: the random effects of several grouping factors, known jointly."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor, nn

from armed_pyro.distributions.small_matrices import multiply, precision_root, solve
from armed_pyro.distributions.whitened import PrecisionNormal, WhitenedNormal
from armed_pyro.guides.base import Guide
from armed_pyro.guides.block_scale import BlockScale
from armed_pyro.guides.closed_form import MarginalLikelihood, is_gaussian
from armed_pyro.guides.cross_products import CrossProducts, cross_products
from armed_pyro.guides.crossed_form import crossed_form
from armed_pyro.guides.gaussian_sums import nesting
from armed_pyro.guides.hyperparameters import Hyperparameters
from armed_pyro.guides.nested import NestedGuide
from armed_pyro.guides.process import ProcessGuide
from armed_pyro.guides.pseudo_observations import has_full_precision
from armed_pyro.guides.row_sums import joint_sums
from armed_pyro.guides.structured import REFRESH_DRAWS, StructuredGuide
from armed_pyro.program.model import MixedEffects, trains_network
from armed_pyro.random_effects.covariance import Latents
from armed_pyro.random_effects.grouping_factor import Factor
from armed_pyro.rows.batch import Membership, Rows
from armed_pyro.rows.source import RowSource

__all__ = ["CrossedGuide", "choose_guide"]


# The joint conditional needs a dense matrix over the effects of all factors but the largest, whose
# decomposition is cubic work, and their cross-products with the largest factor's effects.
MOST_DENSE = 2_500
MOST_CROSS_PRODUCTS = 50_000_000
# Elements in the matrices of the draws that are made at once.
MOST_VALUES = 4_000_000


def choose_guide(model: MixedEffects, source: RowSource | None = None) -> Guide:
    """`ProcessGuide`, `NestedGuide`, `CrossedGuide` or `StructuredGuide`, by program and rows.

    `ProcessGuide` serves programs with a process in time.

    `NestedGuide` serves gaussian outcomes without weights of a network to train, if several factors
    are nested in each other in the rows of `source`. Otherwise several factors get `CrossedGuide`
    where it is affordable, and one factor gets `StructuredGuide`.

    `CrossedGuide` is affordable with at most 16 terms per factor, no terms on filters, at most
    2,500 random effects in all factors but the largest, and at most 5e7 pairs of one of these
    effects and one of the largest factor's. The guide starts from the training rows in `source`.
    """
    if any(factor.process is not None for factor in model.factors):
        return ProcessGuide(model, source)
    sizes = sorted(_size(model, factor) for factor in model.factors)
    dense = sum(sizes[:-1])
    if len(sizes) > 1 and source is not None and is_gaussian(model) and not trains_network(model):
        nested = nesting(model, source)
        if nested is not None:
            return NestedGuide(model, source, nested[1])
    narrow = all(has_full_precision(f) and not f.filters for f in model.factors)
    affordable = dense <= MOST_DENSE and dense * max(sizes, default=0) <= MOST_CROSS_PRODUCTS
    if len(sizes) > 1 and narrow and affordable:
        return CrossedGuide(model, source)
    return StructuredGuide(model, source)


def _size(model: MixedEffects, factor: Factor) -> int:
    return len(model.data_facts().levels[factor.name]) * len(factor.terms)


class CrossedGuide(Guide):
    r"""Random effects of all factors jointly normal given the hyperparameters.

    .. math::
        z \mid \theta &\sim N(P^{-1} L^\top \tau b, P^{-1}), \quad u = L z, \quad
            P = I + L^\top \tau A L \\
        A &= e A_0 e, \quad b = b_0 - H_0 \beta + A (\delta - \Gamma \beta)

    z are the effects of all clusters of all factors in the coordinates in which their prior is
    standard normal; q(theta) is that of `Hyperparameters`. A_0, b_0 and H_0 are sums over all
    rows, as in `armed_pyro.guides.pseudo_observations.observe`, so the conditional is exact for
    gaussian outcomes with linear fixed effects. The diagonal e, delta and Gamma are trained; they
    start at 1, 0 and 0.

    The factor with most effects (index 1) is eliminated cluster by cluster, which leaves a dense
    Schur complement S for all other factors (index 2):

    .. math::
        C_k C_k^\top &= I + \tau L_1^\top A_{11,k} L_1, \quad
            H_k = C_k^{-1} L_1^\top e_{1,k}, \quad
            r_k = C_k^{-1} L_1^\top \tau b_{1,k} \\
        S &= I + \tau L_2^\top e_2 \Big(A_{0,22} - \tau \sum_k B_k^\top H_k^\top H_k B_k\Big)
            e_2 L_2 \\
        z_2 \mid \theta &\sim N(S^{-1} r_2, S^{-1}), \quad
            r_2 = L_2^\top \tau \Big(b_2 - e_2 \sum_k B_k^\top H_k^\top r_k\Big) \\
        z_{1,k} \mid z_2, \theta &\sim N\big(C_k^{-\top} (r_k - \tau H_k B_k e_2 L_2 z_2),
            (C_k C_k^\top)^{-1}\big)

    with B = A_{0,12}, dense or sparse: see `armed_pyro.guides.cross_products`. Memory is
    O(effects of the largest factor x effects of the others). Every step draws all clusters.

    The bound program has several factors. A_0, b_0 and H_0 are set from the rows of `source`;
    without them q(u | theta) starts at the prior.

    `within` is A_0 within each cluster of the largest factor, `between` is B, and `rest` is A_0 of
    all other factors. `pull` and `slope` are b_0 and H_0, the largest factor first. `log_scale`,
    `shift` and `shift_slope` are log e, delta and Gamma, in the same order.

    Examples
    --------
    >>> from armed_pyro import ClusteredData
    >>> groups = {"g": [0, 0, 1, 1], "h": [0, 1, 0, 1]}
    >>> data = ClusteredData.from_arrays([[0.0], [1.0], [3.0], [4.0]], [1, 2, 5, 6], groups)
    >>> model = MixedEffects(nn.Linear(1, 1).double(), "(1 | g) + (1 | h)").bind(data)
    >>> guide = CrossedGuide(model, model.encode(data))
    >>> guide.draws(model.clusters(), 3)["h_effect"].shape  # draws, clusters, terms
    torch.Size([3, 2, 1])
    """

    within: Float[Tensor, "clusters terms terms"]
    between: Float[Tensor, "clusters terms effects"]
    rest: Float[Tensor, "effects effects"]
    pull: Float[Tensor, " all_effects"]
    slope: Float[Tensor, "all_effects fixed"]

    def __init__(self, model: MixedEffects, source: RowSource | None = None) -> None:
        super().__init__()
        self._cache: tuple[Tensor, int, CrossProducts] | None = None
        like = model.reference()
        self.hyperparameters = Hyperparameters(model)
        self.model_precision = model.precision
        *others, self.largest = sorted(model.factors, key=lambda factor: _size(model, factor))
        self.others = tuple(others)
        levels = model.data_facts().levels
        self.clusters = {factor.name: len(levels[factor.name]) for factor in model.factors}
        k, t = self.clusters[self.largest.name], len(self.largest.terms)
        m = sum(_size(model, factor) for factor in self.others)
        fixed = len(model.fixed_terms()) if model.has_fixed_effects else 0
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

    def closed_form(self, model: MixedEffects, source: RowSource) -> MarginalLikelihood | None:
        nested = super().closed_form(model, source)
        process = any(factor.process is not None for factor in model.factors)
        summed = is_gaussian(model) and source.reduce is None and not process
        return crossed_form(model, source) if nested is None and summed else nested

    def noise_shapes(self, rows: Rows) -> dict[str, tuple[int, ...]]:
        _, t, m = self.between.shape
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
        # Matrices that do not fit into a processor's cache are faster draw by draw.
        return max(1, MOST_VALUES // (self.between.numel() + self.rest.numel()))

    def forward(self, rows: Rows) -> dict[str, Tensor]:
        return self.effects_given(self.hyperparameters(), rows)

    def effects_given(self, latents: dict[str, Tensor], rows: Rows) -> dict[str, Tensor]:
        latents = dict(latents)
        others, largest = self._joint(latents)
        z = pyro.sample("_crossed", others, infer={"is_auxiliary": True})
        effects = self._effects(latents, z)
        for factor, value in self._by_factor(effects).items():
            with factor.plate(rows.memberships[factor.name]):
                log_det = -factor.log_det_scale(latents).expand(value.shape[:-1])
                point = dist.Delta(value, log_det, event_dim=1)
                latents[factor.effect_site] = pyro.sample(factor.effect_site, point)
        membership = rows.memberships[self.largest.name]
        with self.largest.plate(membership):
            site = self.largest.effect_site
            latents[site] = pyro.sample(site, largest.at(effects, membership))
        return latents

    def center(self, rows: Rows) -> dict[str, Tensor]:
        latents = self.hyperparameters.center()
        others, largest = self._joint(latents)
        effects = self._effects(latents, others.mean)
        for factor, value in self._by_factor(effects).items():
            latents[factor.effect_site] = value
        membership = rows.memberships[self.largest.name]
        latents[self.largest.effect_site] = largest.at(effects, membership).mean
        return latents

    def _joint(
        self, latents: Latents, *, detach: bool = False
    ) -> tuple[PrecisionNormal, LargestGivenOthers]:
        """q(z_2 | theta), and q(u_1 | u_2, theta): the equations of the class in their order.

        With `detach`, the trained parameters get no gradients.
        """
        detached: tuple[PrecisionNormal | None, LargestGivenOthers | None] = (None, None)
        if torch.is_grad_enabled() and self.shift.requires_grad and not detach:
            detached = self._joint(latents, detach=True)
        k, t, _ = self.between.shape
        products, tau = self._cross_products(), self.model_precision(latents)
        e1, e2, within, b = self._natural(products, latents.get("fixed_effect"), detach)
        tau_b = tau[..., None] * b
        tau_b1 = tau_b[..., : k * t].reshape(*tau_b.shape[:-2], k, t)
        scale, scale_2 = self.largest.scale_matrix(latents), self._scale_of_others(latents)
        root = precision_root(tau[..., None, None] * (scale.mT @ within @ scale))
        r = solve(root, scale.mT @ tau_b1[..., None], upper=False)[..., 0]
        half = solve(root, scale.mT * e1[..., None, :], upper=False)
        # H and r have the clusters where tau, S and r_2 have a 1.
        gram = products.gram(tau.sqrt()[..., None, None] * half)
        gram = gram.unsqueeze(-3) if gram.dim() > 2 else gram
        eliminated = products.transpose_times(multiply(half.mT, r))
        eliminated = eliminated.unsqueeze(-2) if eliminated.dim() > 1 else eliminated
        r2 = scale_2.transpose_times(tau_b[..., k * t :] - tau[..., None] * e2 * eliminated)
        # Where sds are drawn far too large, the difference of two large numbers is not positive.
        bound = 1 + tau[..., None] * scale_2.diagonal_bound(e2**2 * self.rest.diagonal())
        ridge = 1e3 * torch.finfo(gram.dtype).eps * bound
        seen = tau[..., None, None] * (e2[:, None] * e2) * (self.rest - gram)
        schur = scale_2.both(seen) + torch.diag_embed(1 + ridge)
        tau_half = tau[..., None, None] * half
        largest = LargestGivenOthers(scale, root, r, tau_half, products, e2, detached[1])
        return PrecisionNormal(schur, r2, detached[0]), largest

    def _cross_products(self) -> CrossProducts:
        """B in its dense or sparse form, made anew whenever `between` has changed."""
        between = self.between
        if self._cache is not None:
            tensor, version, products = self._cache
            if tensor is between and version == between._version:
                return products
            if tensor is not between and tensor.device == between.device:
                # This is the input of a step that is being captured as a graph. Its values must
                # not be read, so the last form and nonzero places are used.
                return products.of(between)
        products = cross_products(between)
        # torch raises the version with every change in place.
        self._cache = between, between._version, products
        return products

    def _natural(
        self, products: CrossProducts, fixed: Tensor | None, detach: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """e_1 ("clusters terms"), e_2 ("effects"), A_11 by cluster, and b ("... all_effects")."""
        k, t, _ = self.between.shape
        trained: tuple[Tensor, ...] = (self.log_scale.exp(), self.shift, self.shift_slope)
        e, shift, shift_slope = (part.detach() for part in trained) if detach else trained
        e1, e2 = e[: k * t].reshape(k, t), e[k * t :]
        within = self.within * e1[:, :, None] * e1[:, None, :]
        b = self.pull
        if fixed is not None:
            shift = shift - (shift_slope @ fixed[..., None])[..., 0]
            b = b - (self.slope @ fixed[..., None])[..., 0]
        shift1 = shift[..., : k * t].unflatten(-1, (k, t))
        scaled2 = e2 * shift[..., k * t :]
        first = torch.einsum("kts,...ks->...kt", within, shift1)
        first = first + e1 * products.times(scaled2)
        second = e2 * (products.transpose_times(e1 * shift1) + scaled2 @ self.rest)
        return e1, e2, within, b + torch.cat([first.flatten(-2), second], -1)

    def _scale_of_others(self, latents: Latents) -> BlockScale:
        """L_2."""
        blocks = [factor.scale_matrix(latents) for factor in self.others]
        return BlockScale(blocks, [self.clusters[factor.name] for factor in self.others])

    def _effects(
        self, latents: Latents, z: Float[Tensor, "... 1 effects"]
    ) -> Float[Tensor, "... effects"]:
        """u_2 = L_2 z_2."""
        effects = self._scale_of_others(latents).times(z)
        return effects.squeeze(-2) if effects.dim() > 1 else effects

    def _by_factor(self, values: Float[Tensor, "... effects"]) -> dict[Factor, Tensor]:
        """The part of each factor but the largest, "... clusters terms"."""
        shapes = [(self.clusters[factor.name], len(factor.terms)) for factor in self.others]
        parts = values.split([k * t for k, t in shapes], -1)
        return {
            factor: part.unflatten(-1, shape)
            for factor, part, shape in zip(self.others, parts, shapes, strict=True)
        }

    @torch.no_grad()
    def _observe(self, model: MixedEffects, latents: Latents, source: RowSource) -> None:
        """Set A_0, b_0 and H_0 from all rows, and e, delta and Gamma back to 1, 0 and 0."""
        sums, blocks = joint_sums(model, [self.largest, *self.others], latents, source)
        for trained in (self.log_scale, self.shift, self.shift_slope):
            trained.zero_()
        self.within.copy_(sums[0].precision)
        self.pull.copy_(torch.cat([part.pull.flatten() for part in sums]))
        self.slope.copy_(torch.cat([part.cross.flatten(0, 1) for part in sums]))
        self.rest.copy_(torch.block_diag(*(one for part in sums[1:] for one in part.precision)))
        stops = [0, *itertools.accumulate(part.pull.numel() for part in sums[1:])]
        places = [slice(start, stop) for start, stop in itertools.pairwise(stops)]
        for (a, b), block in blocks.items():
            if a == 0:
                self.between[..., places[b - 1]] = block
            else:
                block = block.flatten(0, 1)
                self.rest[places[a - 1], places[b - 1]] = block
                self.rest[places[b - 1], places[a - 1]] = block.mT


@dataclass(frozen=True)
class LargestGivenOthers:
    r"""q(u_1 | u_2, theta) of the largest factor: independent between clusters.

    .. math:: u_{1,k} = L_1 z_{1,k}, \quad
        z_{1,k} \sim N\big(C_k^{-\top} (r_k - \tau H_k B_k e_2 u_2), (C_k C_k^\top)^{-1}\big)

    `scale` is L_1, `root` C, `pull` r, `half` tau H, `products` B and `multipliers` e_2. `detached`
    is the same without gradients of trained parameters: see `Whitened`.
    """

    scale: Float[Tensor, "... terms terms"]
    root: Float[Tensor, "... clusters terms terms"]
    pull: Float[Tensor, "... clusters terms"]
    half: Float[Tensor, "... clusters terms terms"]
    products: CrossProducts
    multipliers: Float[Tensor, " effects"]
    detached: LargestGivenOthers | None

    def at(self, effects: Float[Tensor, "... effects"], membership: Membership) -> WhitenedNormal:
        """The distribution for the membership's clusters, given all effects u_2."""
        moved = multiply(self.half, self.products.times(self.multipliers * effects))
        root, pull = self.root, self.pull - moved
        if not membership.complete:
            root, pull = root[..., membership.index, :, :], pull[..., membership.index, :]
        mean = solve(root.mT, pull[..., None], upper=True)[..., 0]
        detached = None if self.detached is None else self.detached.at(effects, membership)
        return WhitenedNormal(self.scale, mean, root, detached)
