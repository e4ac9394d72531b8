"""`NestedGuide`: the random effects of nested grouping factors, from the outside in."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import pyro
import torch
from torch import Tensor

from armed_pyro.distributions.shapes import broadcast_shape
from armed_pyro.distributions.small_matrices import precision_root, solve
from armed_pyro.distributions.whitened import WhitenedNormal
from armed_pyro.guides.base import Guide
from armed_pyro.guides.closed_form import ClosedForm, Conditional
from armed_pyro.guides.gaussian_sums import GaussianSums, Parents, inside_out
from armed_pyro.guides.hyperparameters import Hyperparameters
from armed_pyro.program.model import MixedEffects
from armed_pyro.random_effects.covariance import Latents
from armed_pyro.random_effects.grouping_factor import Factor
from armed_pyro.rows.batch import Rows
from armed_pyro.rows.source import RowSource

__all__ = ["NestedGuide", "outside_in"]


class NestedGuide(Guide):
    r"""Gaussian outcomes with nested factors: random effects exactly, in linear time.

    .. math:: q(u \mid \theta) = p(u_M \mid \theta, y) \prod_{m < M}
        p(u_m \mid u_{m+1}, \dots, u_M, \theta, y)

    for the factors m = 1, ..., M from the inside out, with the conditionals of
    `armed_pyro.guides.closed_form.ClosedForm`. q(theta) is that of `Hyperparameters`. Nothing is
    trained in q(u | theta), so the guide is for programs whose network has nothing to train. Time
    and memory grow linearly with the clusters of all factors. Every step draws all clusters.

    `parents` are each cluster's cluster in the next factor, as
    `armed_pyro.guides.gaussian_sums.nesting` finds them in the rows of `source`. Without rows the
    guide waits for the state of a saved fit.

    Examples
    --------
    >>> from torch import nn
    >>> from armed_pyro import ClusteredData
    >>> from armed_pyro.guides.crossed import choose_guide
    >>> groups = {"pupil": [0, 0, 1, 1, 2, 2, 3, 3], "school": [0, 0, 0, 0, 1, 1, 1, 1]}
    >>> data = ClusteredData.from_arrays(torch.zeros(8, 0), [1, 2, 5, 6, 2, 1, 3, 3], groups)
    >>> terms = "(1 | pupil) + (1 | school)"
    >>> model = MixedEffects(nn.Linear(0, 1).double(), terms, bayesian_head=True).bind(data)
    >>> guide = choose_guide(model, model.encode(data))
    >>> type(guide).__name__, guide.draws(model.clusters(), 3)["pupil_effect"].shape
    ('NestedGuide', torch.Size([3, 4, 1]))
    """

    def __init__(
        self,
        model: MixedEffects,
        source: RowSource | None = None,
        parents: Sequence[Parents] = (),
    ) -> None:
        super().__init__()
        self.hyperparameters = Hyperparameters(model)
        self.sums = GaussianSums(model, inside_out(model))
        self.closed, self._precision = ClosedForm(model, self.sums), model.precision
        if source is not None:
            self.sums.observe(model, source, parents)

    def refresh(self, model: MixedEffects, source: RowSource) -> None:
        self.sums.observe(model, source, self.sums.parents)

    def exact(self, model: MixedEffects) -> bool:
        return True

    def noise_shapes(self, rows: Rows) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {"_theta": (self.hyperparameters.size,)}
        for factor in self.sums.factors:
            clusters = len(rows.memberships[factor.name].index)
            shapes[factor.effect_site] = (clusters, len(factor.terms))
        return {site: shape for site, shape in shapes.items() if shape != (0,)}

    def nested(self) -> Factor | None:
        return self.sums.factors[0]

    def every_cluster(self) -> bool:
        return True

    def most_draws(self) -> int:
        return self.closed.most_draws()

    def forward(self, rows: Rows) -> dict[str, Tensor]:
        return self.effects_given(self.hyperparameters(), rows)

    def effects_given(self, latents: dict[str, Tensor], rows: Rows) -> dict[str, Tensor]:
        latents = dict(latents)
        for factor, conditional in self._outside_in(latents, rows):
            with factor.plate(rows.memberships[factor.name]):
                latents[factor.effect_site] = pyro.sample(factor.effect_site, conditional)
        return latents

    def center(self, rows: Rows) -> dict[str, Tensor]:
        latents = self.hyperparameters.center()
        for factor, conditional in self._outside_in(latents, rows):
            latents[factor.effect_site] = conditional.mean
        return latents

    def _outside_in(
        self, latents: dict[str, Tensor], rows: Rows
    ) -> Iterator[tuple[Factor, WhitenedNormal]]:
        conditionals, lead = self.closed.conditionals(latents), self._lead(latents)
        factors, parents = self.sums.factors, self.sums.parents
        return outside_in(factors, parents, conditionals, latents, rows, lead)

    def _lead(self, latents: Latents) -> torch.Size:
        """The dimensions of the draws, before that of the clusters."""
        shapes = [latents[factor.sd_site].shape[:-2] for factor in self.sums.factors]
        if "fixed_effect" in latents:
            shapes.append(latents["fixed_effect"].shape[:-2])
        shapes.append(self._precision(latents).shape[:-1])
        return broadcast_shape(*shapes)


def outside_in(
    factors: Sequence[Factor],
    parents: Sequence[Parents],
    conditionals: Sequence[Conditional],
    latents: dict[str, Tensor],
    rows: Rows,
    lead: torch.Size,
) -> Iterator[tuple[Factor, WhitenedNormal]]:
    """Each factor's effects given those of the factors around it, which `latents` then hold.

    The factors are from the inside out, and `lead` are the dimensions of the draws.
    """
    for place in reversed(range(len(factors))):
        factor, membership = factors[place], rows.memberships[factors[place].name]
        conditional, index = conditionals[place], membership.index
        if not membership.complete:
            conditional = conditional.of(index)
        outer = list[Tensor]()
        for codes, around in zip(parents[place:], factors[place + 1 :], strict=True):
            index = codes[index]
            outer.append(latents[around.effect_site].index_select(-2, index))
        yield factor, _given(conditional, outer, factor.scale_matrix(latents), lead)


def _given(
    conditional: Conditional, outer: Sequence[Tensor], scale: Tensor, lead: torch.Size
) -> WhitenedNormal:
    """The conditional at these effects of the outer factors, "... clusters terms"."""
    draws = math.prod(lead)

    def trailing(value: Tensor, dims: int) -> Tensor:
        """The `dims` leading dimensions last, and all draws before the clusters."""
        value = value.expand(*value.shape[:dims], draws, -1)
        moved = value.movedim(tuple(range(dims)), tuple(range(-dims, 0)))
        return moved.reshape(*lead, *moved.shape[1:])

    root = precision_root(trailing(conditional.whitened, 2))
    pull = trailing(conditional.pull, 1)
    if outer:
        cross = trailing(conditional.cross, 2)
        pull = pull - (cross @ torch.cat(list(outer), -1).to(cross)[..., None])[..., 0]
    half = solve(root, pull[..., None], upper=False)
    mean = solve(root.mT, half, upper=True)[..., 0]
    return WhitenedNormal(scale, mean.to(scale), root.to(scale))
