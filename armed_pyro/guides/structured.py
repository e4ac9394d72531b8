"""`StructuredGuide`: clusters are independent given the hyperparameters."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import cast

import pyro
import torch
from torch import Tensor, nn

from armed_pyro.distributions.observed_normal import ObservedNormal
from armed_pyro.distributions.whitened import Whitened, WhitenedDiagonal
from armed_pyro.guides.base import Guide
from armed_pyro.guides.hyperparameters import Hyperparameters
from armed_pyro.guides.pseudo_observations import PseudoObservations, observe
from armed_pyro.program.model import MixedEffects
from armed_pyro.program.predictor import modulates
from armed_pyro.random_effects.grouping_factor import Factor, weighted
from armed_pyro.rows.batch import Membership, Rows
from armed_pyro.rows.source import RowSource

__all__ = ["StructuredGuide"]


# Draws over which a refresh averages the likelihood's slope and curvature. There are fewer, but at
# least FEWEST_REFRESH_DRAWS, if draws times the largest factor's precisions, or draws times rows,
# would exceed these limits of memory and time.
REFRESH_DRAWS, FEWEST_REFRESH_DRAWS = 32, 4
MOST_REFRESH_VALUES, MOST_REFRESH_ROWS = 2**23, 2**25


class StructuredGuide(Guide):
    r"""Hyperparameters known jointly; effects of each cluster normal given them.

    .. math::
        \theta &\sim \text{AutoregressiveNormal}, \quad
            \theta = (\log sd, \text{unconstrained } R, \log \text{family}, \beta) \\
        u_k \mid \theta &\sim N\big(L Q_k^{-1} L^\top \tau A_k (m_k - G_k \beta),
            L Q_k^{-1} L^\top\big), \quad Q_k = I + L^\top \tau A_k L

    with L the scale of the random effects given theta (u = L z with z standard normal a priori)
    and tau the sampled residual precision (1 if the family has none). A_k, m_k and G_k are
    cluster k's pseudo-observation. For gaussian outcomes with linear fixed effects and terms on
    inputs, it is a sum over the cluster's rows, and the conditional is exact for every theta.
    Otherwise it follows the likelihood's slope and curvature, and is trained as long as the
    network is. A_k is full for at most 16 terms per factor, and diagonal beyond. Random effects
    of different factors are independent given theta, so the variance components of crossed
    factors come out too certain.

    Memory is O(clusters x terms^2), or O(clusters x terms) beyond 16 terms. The pseudo-observations
    of the bound program start from the rows of `source`, and without them at the prior.

    Examples
    --------
    >>> from armed_pyro import ClusteredData
    >>> x, y, g = [[0.0], [1.0], [3.0], [4.0]], [1, 2, 5, 6], [0, 0, 1, 1]
    >>> data = ClusteredData.from_arrays(x, y, {"g": g})
    >>> model = MixedEffects(nn.Linear(1, 1).double(), "(1 | g)").bind(data)
    >>> guide = StructuredGuide(model, model.encode(data))
    >>> guide.draws(model.clusters(), 3)["g_effect"].shape  # draws, clusters, terms
    torch.Size([3, 2, 1])
    """

    def __init__(self, model: MixedEffects, source: RowSource | None = None) -> None:
        super().__init__()
        facts = model.data_facts()
        self.hyperparameters = Hyperparameters(model)
        self.model_precision = model.precision
        self.factors: tuple[Factor, ...] = model.factors
        fixed = len(model.fixed_terms()) if model.has_fixed_effects else 0
        self._pseudo = nn.ModuleList(
            PseudoObservations(factor, len(facts.counts[factor.name]), fixed, model.reference())
            for factor in self.factors
        )
        if source is not None and self.factors:
            with torch.no_grad():
                latents = self.hyperparameters.center()
            observe(model, self.pseudo, latents, source)

    @property
    def pseudo(self) -> tuple[PseudoObservations, ...]:
        """Pseudo-observations, one module per factor of the program."""
        return cast("tuple[PseudoObservations, ...]", tuple(self._pseudo))

    def refresh(self, model: MixedEffects, source: RowSource) -> None:
        if not any(part.conjugate for part in self.pseudo):
            return
        most = MOST_REFRESH_VALUES // max(part.base.numel() for part in self.pseudo)
        most = min(REFRESH_DRAWS, most, MOST_REFRESH_ROWS // len(source))
        n = 1 if self.exact(model) else max(FEWEST_REFRESH_DRAWS, most)
        observe(model, self.pseudo, self.draws(model.clusters(), n), source)

    def exact(self, model: MixedEffects) -> bool:
        # With a quadratic likelihood and a linear predictor, a refresh gives the same wherever the
        # latent sites are; with several factors, it depends on the other factors' means.
        quadratic = model.family.is_quadratic and not modulates(model)
        return quadratic and len(self.factors) == 1

    def settle(self) -> None:
        super().settle()
        # A refresh sets only conjugate ones; the others go on being trained.
        for part in self.pseudo:
            part.requires_grad_(not part.conjugate)

    def noise_shapes(self, rows: Rows) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {"_theta": (self.hyperparameters.size,)}
        for factor in self.factors:
            clusters = len(rows.memberships[factor.name].index)
            shapes[factor.effect_site] = (clusters, len(factor.terms))
        return {site: shape for site, shape in shapes.items() if shape != (0,)}

    def nested(self) -> Factor | None:
        sizes = [part.location.numel() * part.conjugate for part in self.pseudo]
        return self.factors[sizes.index(max(sizes))] if any(sizes) else None

    def every_cluster(self) -> bool:
        return False

    def clusterwise(self) -> Mapping[str, PseudoObservations]:
        return {factor.name: part for factor, part in zip(self.factors, self.pseudo, strict=True)}

    def narrowed(self, sizes: Mapping[str, int]) -> StructuredGuide:
        small = copy.copy(self)
        pseudo = [
            part.narrowed(factor, sizes[factor.name]) if factor.name in sizes else part
            for factor, part in zip(self.factors, self.pseudo, strict=True)
        ]
        # The copy shares all other parameters.
        small._modules = {**self._modules, "_pseudo": nn.ModuleList(pseudo)}
        return small

    def most_draws(self) -> int:
        return max(1, 10_000_000 // max([1, *(part.base.numel() for part in self.pseudo)]))

    def forward(self, rows: Rows) -> dict[str, Tensor]:
        return self.effects_given(self.hyperparameters(), rows)

    def effects_given(self, latents: dict[str, Tensor], rows: Rows) -> dict[str, Tensor]:
        latents = dict(latents)
        for factor, pseudo in zip(self.factors, self.pseudo, strict=True):
            membership = rows.memberships[factor.name]
            conditional = self._conditional(factor, pseudo, latents, membership)
            with factor.plate(membership), weighted(membership):
                latents[factor.effect_site] = pyro.sample(factor.effect_site, conditional)
        return latents

    def center(self, rows: Rows) -> dict[str, Tensor]:
        latents = self.hyperparameters.center()
        for factor, pseudo in zip(self.factors, self.pseudo, strict=True):
            membership = rows.memberships[factor.name]
            conditional = self._conditional(factor, pseudo, latents, membership)
            latents[factor.effect_site] = conditional.mean
        return latents

    def _conditional(
        self,
        factor: Factor,
        pseudo: PseudoObservations,
        latents: Mapping[str, Tensor],
        membership: Membership,
        *,
        detach: bool = False,
    ) -> Whitened | ObservedNormal:
        """q(u | theta) for the clusters drawn; with `detach`, without gradients of A, m and G."""
        tau, fixed = self.model_precision(latents), latents.get("fixed_effect")
        training = torch.is_grad_enabled() and pseudo.location.requires_grad
        if pseudo.full:
            scale = factor.scale_matrix(latents)
            if not training:
                return ObservedNormal(scale, tau, *pseudo(membership, fixed)).whitened
            moving = None if fixed is None else pseudo(membership, fixed, detach=True)[-1]
            constant_fixed = None if fixed is None else fixed.detach()
            base, trained, location = pseudo(membership, constant_fixed)
            return ObservedNormal(scale, tau, base, trained, location, moving)
        base, trained, location = pseudo(membership, fixed, detach=detach)
        detached = None
        if training and not detach:
            detached = self._conditional(factor, pseudo, latents, membership, detach=True)
        precision, sd = (base * trained) ** 2, factor.effect_sd(latents)
        q = 1 + sd**2 * tau[..., None] * precision
        mean = sd * tau[..., None] * precision * location / q
        return WhitenedDiagonal(sd, mean, q.sqrt(), detached)
