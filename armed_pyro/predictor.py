"""Linear predictors of rows, and what the network made of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from armed_pyro.program import MixedEffects
    from armed_pyro.rows import Rows

__all__ = ["Predictor", "linear_predictor"]

Latents = Mapping[str, Tensor]


@dataclass(frozen=True)
class Predictor:
    """Linear predictors of some rows, on the original scale.

    Attributes
    ----------
    eta : Float[Tensor, "... rows columns"]
        Fixed and random effects, centre and offset.
    fixed : Float[Tensor, "... rows columns"] or None
        The same without random effects; None where the network was spared a run without them.
    output : Float[Tensor, "rows ..."] or None
        The network's output without effects inside; None as for `fixed`.
    activations : mapping of str to Tensor
        Tapped activations of the network without effects inside, by module path; where it was
        spared that run, those that these effects do not reach.
    others : mapping of str to Float[Tensor, "... rows ..."]
        Means of the program's other outcomes, by name, where they were asked for.
    """

    eta: Float[Tensor, "... rows columns"]
    fixed: Float[Tensor, "... rows columns"] | None
    output: Tensor | None
    activations: Mapping[str, Tensor]
    others: Mapping[str, Tensor] = field(default_factory=dict)


def linear_predictor(
    model: MixedEffects,
    rows: Rows,
    output: Tensor,
    activations: Mapping[str, Tensor],
    latents: Latents,
) -> Float[Tensor, "... rows columns"]:
    """Fixed and random effects, from the network's output and activations."""
    eta = model.fixed_predictor(rows, output, activations, latents)
    for factor in model.factors:
        if factor.effect_site in latents:
            membership = rows.memberships[factor.name]
            phi = factor.design(rows.x, activations)
            part = factor.contribution(phi, membership, latents[factor.effect_site])
            eta = eta + model.data_facts().spread * part
    return eta
