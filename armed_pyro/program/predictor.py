"""Linear predictors of rows, with random effects on the predictor and inside the network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from armed_pyro.distributions.shapes import broadcast_shape
from armed_pyro.families.family import Eta
from armed_pyro.networks.taps import modulated
from armed_pyro.program.plan import Plan
from armed_pyro.random_effects.covariance import Latents
from armed_pyro.random_effects.grouping_factor import Factor
from armed_pyro.rows.batch import Rows

__all__ = [
    "Predictor",
    "linear_predictor",
    "modulated_runs",
    "modulates",
    "reaches_predictor",
    "row_cost",
]


@dataclass(frozen=True)
class Predictor:
    """Linear predictors of rows, on the original scale, from `MixedEffects.predictor`.

    "Inside" are the effects on filters. A pass of the network without them is left out where
    nobody asked for it and effects inside change the predictor. `fixed` and `output` are then None.
    """

    eta: Eta  # fixed and random effects, centre and offset
    fixed: Eta | None  # the same without random effects
    output: Tensor | None  # the network's output without effects inside
    # Tapped activations without effects inside, by module path. If that pass was left out, they are
    # those that effects inside cannot reach.
    activations: Mapping[str, Tensor]
    others: Mapping[str, Tensor]  # means of the other outcomes, if requested, by name


def linear_predictor(
    model: Plan, rows: Rows, output: Tensor, activations: Mapping[str, Tensor], latents: Latents
) -> Eta:
    """Fixed and random effects, from the network's output and activations.

    Factors without a site in `latents` count as zero.
    """
    eta = model.fixed_predictor(rows, output, activations, latents)
    spreads = model.data_facts().spreads(model.reference())
    for factor in model.factors:
        if factor.effect_site in latents:
            membership = rows.memberships[factor.name]
            phi = factor.design(rows.slope_inputs(), activations)
            part = factor.contribution(phi, membership, latents[factor.effect_site])
            eta = eta + spreads * part
    return eta


def modulates(model: Plan) -> bool:
    """Whether there are effects inside the network, which then runs once per draw."""
    return any(factor.filters for factor in model.factors)


def reaches_predictor(model: Plan) -> bool:
    """Whether effects inside the network change the linear predictor."""
    read = {"", *(path for f in model.factors for block in f.linear for path in block.paths())}
    return modulates(model) and not read <= model.unreached


def row_cost(model: Plan) -> int:
    """Values of a row that every draw works on: its features if the network runs, else 1."""
    return max(1, math.prod(model.data_facts().feature_shape)) if modulates(model) else 1


def modulated_runs(
    model: Plan, rows: Rows, latents: Latents, inside: Sequence[Factor], *, others: bool
) -> Predictor:
    """Run the network once per draw, with the effects of the factors `inside`.

    `fixed` is None, `output` is that of the last draw, which is of use if no effect reaches it, and
    the activations are those that no effect reaches.
    """
    effects = {factor.effect_site: latents[factor.effect_site] for factor in inside}
    lead = broadcast_shape(*(value.shape[:-2] for value in effects.values()))
    effects = {site: value.expand(*lead, *value.shape[-2:]) for site, value in effects.items()}
    rebuilt, known = (model.others if others else ()), model.known()
    etas: list[Tensor] = []
    means: dict[str, list[Tensor]] = {other.name: [] for other in rebuilt}
    rows = replace(rows, computed=None).loaded()
    activations: Latents = {}
    for index in product(*map(range, lead)):
        drawn = {
            name: value if name in known else _at(effects.get(name, value), index)
            for name, value in latents.items()
        }
        blocks = [
            pair
            for factor in inside
            for pair in factor.by_layer(factor.filter_effects(drawn, rows))
        ]
        with modulated(model.network, blocks):
            output, activations = model.run_network(rows, whole=True)
        etas.append(linear_predictor(model, rows, output, activations, drawn))
        for other in rebuilt:
            means[other.name].append(activations[other.tap])

    def stacked(values: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(values)).reshape(*lead, *values[0].shape)

    unreached = {path: value for path, value in activations.items() if path in model.unreached}
    rebuilt_means = {name: stacked(values) for name, values in means.items()}
    return Predictor(stacked(etas), None, activations[""], unreached, rebuilt_means)


def _at(value: Tensor, index: tuple[int, ...]) -> Tensor:
    """The draw at this index of the leading dimensions, which may have size 1."""
    if value.dim() <= len(index):
        return value
    return value[tuple(min(i, size - 1) for i, size in zip(index, value.shape, strict=False))]
