"""`ProcessGuide`: a process in time, and random effects of its clusters and of groups of these."""

from __future__ import annotations

import math

import pyro
import torch
from torch import Tensor

from armed_pyro.distributions.chains import ChainNormal
from armed_pyro.guides.base import Guide, ParticleGroups
from armed_pyro.guides.closed_form import MarginalLikelihood
from armed_pyro.guides.hyperparameters import Hyperparameters
from armed_pyro.guides.nested import outside_in
from armed_pyro.guides.process_likelihood import ProcessLikelihood
from armed_pyro.guides.process_sums import ProcessSums
from armed_pyro.program.model import MixedEffects
from armed_pyro.random_effects.covariance import Latents
from armed_pyro.random_effects.grouping_factor import Factor
from armed_pyro.rows.batch import Rows
from armed_pyro.rows.source import RowSource

__all__ = ["ProcessGuide"]

# Draws over which a refresh averages the likelihood's slope and curvature, and most draws times
# cells in them.
REFRESH_DRAWS, MOST_REFRESH_VALUES = 32, 2**24
# Values of all arrays of the draws that are made at once.
MOST_VALUES = 2**22


class ProcessGuide(Guide):
    r"""Random effects and a process f given the hyperparameters, in time linear in the rows.

    .. math:: q(u, f \mid \theta) = \prod_m p(u_m \mid u_{m+1}, \dots, \theta, y) \,
        \prod_c p(f_c \mid f_{c+1}, u, \theta, y)

    Random effects are drawn with the process integrated out by a Kalman filter, from the outside
    in; then the process backwards in time. For gaussian outcomes y this is exact for every theta.
    For others y are working responses at the present state (see
    `armed_pyro.guides.process_sums.ProcessSums`), which every refresh sets anew, and importance
    sampling weighs particles of u and f cluster by cluster. Every step draws all clusters. Nothing
    is trained in q(u, f | theta).

    Examples
    --------
    >>> import pandas as pd
    >>> from torch import nn
    >>> from armed_pyro import ClusteredData
    >>> table = pd.DataFrame({"id": list("aabb"), "t": [0, 1, 0, 2], "y": [1.0, 2.0, 5.0, 6.0]})
    >>> data = ClusteredData.from_frame(
    ...     table, outcome="y", clusters=["id"], times=["t"], features="1"
    ... )
    >>> terms = "(1 | id) + ou(t | id)"
    >>> model = MixedEffects(nn.Linear(0, 1).double(), terms, bayesian_head=True).bind(data)
    >>> guide = ProcessGuide(model, model.encode(data))
    >>> guide.draws(model.clusters(), 3)["id:t_effect"].shape  # draws, cells, terms
    torch.Size([3, 4, 1])
    """

    def __init__(self, model: MixedEffects, source: RowSource | None = None) -> None:
        super().__init__()
        self.hyperparameters = Hyperparameters(model)
        self._exact = model.family.is_quadratic
        self.sums = ProcessSums(model)
        self.likelihood, self._precision = ProcessLikelihood(model, self.sums), model.precision
        if source is not None:
            with torch.no_grad():
                latents = self.hyperparameters.center()
            self.sums.place(model, source)
            self.sums.observe(model, source, latents)

    def refresh(self, model: MixedEffects, source: RowSource) -> None:
        most = MOST_REFRESH_VALUES // len(self.sums.information)
        n = 1 if self.exact(model) else max(4, min(REFRESH_DRAWS, most))
        self.sums.observe(model, source, self.draws(model.clusters(), n))

    def exact(self, model: MixedEffects) -> bool:
        return model.family.is_quadratic

    def particles(self) -> ParticleGroups | None:
        sums = self.sums
        if self._exact:
            return None
        chain = sums.process.timeline.cluster
        count = int(chain.max()) + 1
        sites = {sums.factor.effect_site: chain}
        if sums.factors and sums.clusters[0] == count:
            # Each cluster of the innermost factor has one chain.
            of_cluster = torch.zeros_like(chain[:count]).scatter(0, sums.inside, chain)
            if len(of_cluster.unique()) == count:
                sites[sums.factors[0].effect_site] = of_cluster
        return ParticleGroups(sums.factor, sites, count)

    def closed_form(self, model: MixedEffects, source: RowSource) -> MarginalLikelihood | None:
        if not self._exact:
            return None
        sums = ProcessSums(model)
        sums.place(model, source)
        with torch.no_grad():
            sums.observe(model, source, self.hyperparameters.center())
        return ProcessLikelihood(model, sums)

    def noise_shapes(self, rows: Rows) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {"_theta": (self.hyperparameters.size,)}
        for factor in (*self.sums.factors, self.sums.factor):
            clusters = len(rows.memberships[factor.name].index)
            shapes[factor.effect_site] = (clusters, len(factor.terms))
        return {site: shape for site, shape in shapes.items() if shape != (0,)}

    def nested(self) -> Factor | None:
        return None

    def every_cluster(self) -> bool:
        return True

    def most_draws(self) -> int:
        return max(1, MOST_VALUES // self.likelihood.size)

    def forward(self, rows: Rows) -> dict[str, Tensor]:
        return self.effects_given(self.hyperparameters(), rows)

    def effects_given(self, latents: dict[str, Tensor], rows: Rows) -> dict[str, Tensor]:
        latents, sums = dict(latents), self.sums
        conditionals, lead = self.likelihood.conditionals(latents), self._lead(latents)
        parts = (sums.factors, sums.parents, conditionals, latents, rows, lead)
        for factor, conditional in outside_in(*parts):
            with factor.plate(rows.memberships[factor.name]):
                latents[factor.effect_site] = pyro.sample(factor.effect_site, conditional)
        factor = sums.factor
        with factor.plate(rows.memberships[factor.name]):
            process = self._process(latents)
            latents[factor.effect_site] = pyro.sample(factor.effect_site, process)
        return latents

    def center(self, rows: Rows) -> dict[str, Tensor]:
        latents, sums = self.hyperparameters.center(), self.sums
        conditionals, lead = self.likelihood.conditionals(latents), self._lead(latents)
        parts = (sums.factors, sums.parents, conditionals, latents, rows, lead)
        for factor, conditional in outside_in(*parts):
            latents[factor.effect_site] = conditional.mean
        latents[sums.factor.effect_site] = self._process(latents).mean
        return latents

    def _process(self, latents: Latents) -> ChainNormal:
        """The process given theta and the random effects, backwards in time."""
        sums, filtered = self.sums, self.likelihood.filtered(latents)
        lead = self._lead(latents)
        draws, cells = math.prod(lead), len(sums.information)
        rest = self.likelihood.outcome(latents).expand(draws, cells)
        start = 0
        index = sums.in_order(sums.inside)
        all_z = sums.in_order(sums.z)
        for place, factor in enumerate(sums.factors):
            index = sums.parents[place - 1][index] if place else index
            z = all_z[start : start + sums.terms[place]]
            effects = latents[factor.effect_site].double().index_select(-2, index)
            part = (effects * z.mT).sum(-1)
            # Particles, of which theta has one, come before all draws.
            several = len(lead) > 1 and lead[-1] == 1 and part.shape[-2] > 1
            part = part.movedim(-2, 0) if several else part
            rest = rest - part.reshape(*part.shape[:1] * several, draws, cells)
            start += sums.terms[place]
        chains = filtered.chains
        left = filtered.variance / filtered.pivot  # given the cell's own rows, too
        decay, innovation = chains.after(filtered.decay), chains.after(filtered.innovation)
        total = decay.square() * left + innovation
        inner = chains.following < cells
        gain = torch.where(inner, decay * left / torch.where(inner, total, 1.0), 0.0)
        kept = torch.where(inner, innovation / torch.where(inner, total, 1.0), 1.0)
        base = filtered.sd * (1 - gain * decay) * filtered.means(rest)
        scale = filtered.sd * (left * kept).sqrt()
        parts = (gain, scale, base)
        chains = sums.process.timeline.chains
        gain, scale, base = (part.index_select(-1, chains.place) for part in parts)
        shaped = [part.expand(draws, cells).reshape(*lead, cells) for part in (gain, scale)]
        if base.dim() > 2:
            base = base.movedim(0, -2).reshape(*lead[:-1], -1, cells)
        else:
            base = base.expand(draws, cells).reshape(*lead, cells)
        shaped.append(base)
        gain, scale, base = (part.to(latents[sums.factor.sd_site]) for part in shaped)
        return ChainNormal(chains, gain, scale, base, reverse=True)

    def _lead(self, latents: Latents) -> torch.Size:
        """The dimensions of the draws, before that of the clusters."""
        factors = (*self.sums.factors, self.sums.factor)
        shapes = [latents[factor.sd_site].shape[:-2] for factor in factors]
        sites = (self.sums.process.kernel.site, "fixed_effect")
        shapes += [
            latents[name].shape[:-2] for name in sites if name is not None and name in latents
        ]
        shapes.append(self._precision(latents).shape[:-1])
        return torch.broadcast_shapes(*shapes)
