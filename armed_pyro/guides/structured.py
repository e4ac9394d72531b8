"""StructuredGuide: clusters are independent given the hyperparameters."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import cast

import pyro
import torch
from torch import Tensor, nn

from armed_pyro.distributions.observed_normal import TiltedNormal
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


# Draws over which the slope and curvature of the likelihood are averaged; fewer of very many
# clusters' effects, whose number makes up for it, or of very many rows, which take their time.
REFRESH_DRAWS, FEWEST_REFRESH_DRAWS = 32, 4
MOST_REFRESH_VALUES, MOST_REFRESH_ROWS = 2**23, 2**25


class StructuredGuide(Guide):
    r"""Hyperparameters known jointly; random effects conditionally normal given them.

    .. math::
        \theta &\sim \text{AutoregressiveNormal}, \quad
            \theta = (\log sd, \text{unconstrained } R, \log \text{family}, \beta) \\
        u_k \mid \theta &\sim N\big(L Q_k^{-1} L^\top \tau A_k (m_k - G_k \beta),
            L Q_k^{-1} L^\top\big), \quad Q_k = I + L^\top \tau A_k L

    with L the scale of the random effects given theta (u = L z with z standard normal a priori)
    and tau the sampled residual precision (1 where the family has none). A_k, m_k, G_k are
    pseudo-observations of cluster k. For gaussian outcomes with linear fixed effects and terms
    on inputs, they are what the rows say and the conditional is exact for every theta;
    elsewhere they follow the slope and curvature of the likelihood, and are trained as long as
    the network is. A_k is full for at most 16 terms a factor, and diagonal beyond. Random effects
    of different factors are independent given theta, which makes the variance components of
    crossed factors too certain.

    Memory is O(clusters x terms^2), or O(clusters x terms) beyond 16 terms.

    Parameters
    ----------
    model : MixedEffects
        A bound program.
    source : RowSource, optional
        Training rows, from which the pseudo-observations start; without them they start at the
        prior.

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
        fixed = len(model.fixed_terms()) if model.bayesian_head else 0
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
        """Pseudo-observations of every factor."""
        return cast("tuple[PseudoObservations, ...]", tuple(self._pseudo))

    def refresh(self, model: MixedEffects, source: RowSource) -> None:
        if not any(one.conjugate for one in self.pseudo):
            return
        most = MOST_REFRESH_VALUES // max(one.base.numel() for one in self.pseudo)
        most = min(REFRESH_DRAWS, most, MOST_REFRESH_ROWS // len(source))
        n = 1 if self.exact(model) else max(FEWEST_REFRESH_DRAWS, most)
        observe(model, self.pseudo, self.draws(model.clusters(), n), source)

    def exact(self, model: MixedEffects) -> bool:
        # With quadratic likelihoods and a linear predictor it makes no difference where the latent
        # sites are, unless the effects of other factors are taken as known at their means.
        quadratic = model.family.is_quadratic and not modulates(model)
        return quadratic and len(self.factors) == 1

    def settle(self) -> None:
        super().settle()
        for one in self.pseudo:
            one.requires_grad_(not one.conjugate)

    def noise_shapes(self, rows: Rows) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {"_theta": (self.hyperparameters.size,)}
        for factor in self.factors:
            clusters = len(rows.memberships[factor.name].index)
            shapes[factor.effect_site] = (clusters, len(factor.terms))
        return {site: shape for site, shape in shapes.items() if shape != (0,)}

    def nested(self) -> Factor | None:
        sizes = [one.location.numel() * one.conjugate for one in self.pseudo]
        return self.factors[sizes.index(max(sizes))] if any(sizes) else None

    def every_cluster(self) -> bool:
        return False

    def clusterwise(self) -> Mapping[str, PseudoObservations]:
        return {one.name: mine for one, mine in zip(self.factors, self.pseudo, strict=True)}

    def narrowed(self, sizes: Mapping[str, int]) -> StructuredGuide:
        small = copy.copy(self)
        pseudo = [
            mine.narrowed(factor, sizes[factor.name]) if factor.name in sizes else mine
            for factor, mine in zip(self.factors, self.pseudo, strict=True)
        ]
        # All other parameters are this guide's own.
        small._modules = {**self._modules, "_pseudo": nn.ModuleList(pseudo)}
        return small

    def most_draws(self) -> int:
        return max(1, 10_000_000 // max([1, *(one.base.numel() for one in self.pseudo)]))

    def forward(self, rows: Rows) -> dict[str, Tensor]:
        latents = self.hyperparameters()
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
        held: bool = False,
    ) -> Whitened | TiltedNormal:
        """q(u | theta) for the clusters drawn."""
        tau, fixed = self.model_precision(latents), latents.get("fixed_effect")
        training = torch.is_grad_enabled() and pseudo.location.requires_grad
        if pseudo.full:
            scale = factor.scale_matrix(latents)
            if not training:
                return TiltedNormal(scale, tau, *pseudo(membership, fixed)).whitened
            moving = None if fixed is None else pseudo(membership, fixed, held=True)[-1]
            held_fixed = None if fixed is None else fixed.detach()
            base, trained, location = pseudo(membership, held_fixed)
            return TiltedNormal(scale, tau, base, trained, location, moving)
        observed = pseudo(membership, fixed, held=held)
        judge = None
        if training and not held:
            judge = self._conditional(factor, pseudo, latents, membership, held=True)
        base, trained, location = observed
        precision, sd = (base * trained) ** 2, factor.sd(latents)
        q = 1 + sd**2 * tau[..., None] * precision
        mean = sd * tau[..., None] * precision * location / q
        return WhitenedDiagonal(sd, mean, q.sqrt(), judge)
