"""Linear predictors of rows, with random effects on the predictor and inside the network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor

from armed_pyro.networks.taps import modulated
from armed_pyro.program.plan import Plan
from armed_pyro.random_effects.grouping_factor import Factor
from armed_pyro.rows.batch import Rows

__all__ = [
    "Predictor",
    "effects_at",
    "filter_effects",
    "linear_predictor",
    "modulates",
    "predict_rows",
    "row_cost",
]


Latents = Mapping[str, Tensor]


@dataclass(frozen=True)
class Predictor:
    """Linear predictors of rows, on the original scale.

    "Inside" are the effects on filters. A pass of the network without them is left out where
    nobody asked for it and effects inside change the predictor.

    Attributes
    ----------
    eta : Float[Tensor, "... rows columns"]
        Fixed and random effects, centre and offset.
    fixed : Float[Tensor, "... rows columns"] or None
        The same without random effects; None if the pass without effects inside was left out.
    output : Float[Tensor, "rows ..."] or None
        The network's output without effects inside; None as for `fixed`.
    activations : mapping of str to Tensor
        Tapped activations without effects inside, by module path. If that pass was left out, they
        are those that effects inside cannot reach.
    others : mapping of str to Float[Tensor, "... rows ..."]
        Means of the program's other outcomes, by name; empty unless requested.

    Examples
    --------
    ``MixedEffects.predictor`` and calling the program return it:
    ``model.predictor(rows, latents).eta``
    """

    eta: Float[Tensor, "... rows columns"]
    fixed: Float[Tensor, "... rows columns"] | None
    output: Tensor | None
    activations: Mapping[str, Tensor]
    others: Mapping[str, Tensor] = field(default_factory=dict)


def linear_predictor(
    model: Plan,
    rows: Rows,
    output: Tensor,
    activations: Mapping[str, Tensor],
    latents: Latents,
) -> Float[Tensor, "... rows columns"]:
    """Fixed and random effects, from the network's output and activations.

    Factors without a site in `latents` count as zero.
    """
    eta = model.fixed_predictor(rows, output, activations, latents)
    for factor in model.factors:
        if factor.effect_site in latents:
            membership = rows.memberships[factor.name]
            phi = factor.design(rows.x, activations)
            part = factor.contribution(phi, membership, latents[factor.effect_site])
            eta = eta + model.data_facts().spread * part
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


def predict_rows(
    model: Plan, rows: Rows, latents: Latents, *, return_fixed: bool, others: bool
) -> Predictor:
    """`MixedEffects.predictor`, with as few passes of the network as possible.

    Layers that the filter effects cannot reach give the same output with and without them, so
    one pass serves both. If the effects reach nothing that was requested, it is a pass without
    them.
    """
    inside = [
        factor for factor in model.factors if factor.filters and factor.effect_site in latents
    ]
    reached = bool(inside) and reaches_predictor(model)
    rebuilt = any(other.at not in model.unreached for other in model.others) if others else False
    if not (reached or (inside and rebuilt)):
        output, activations = model.run_network(rows)
        fixed = model.fixed_predictor(rows, output, activations, latents)
        eta = linear_predictor(model, rows, output, activations, latents)
        means = {other.name: activations[other.at] for other in model.others} if others else {}
        return Predictor(eta, fixed, output, activations, means)
    runs = _modulated_runs(model, rows, latents, inside, others)
    if return_fixed:
        output, activations = model.run_network(rows)
    elif reached:
        return Predictor(runs.eta, None, None, runs.activations, runs.others)
    else:
        output, activations = runs.output, runs.activations
    fixed = model.fixed_predictor(rows, output, activations, latents)
    return Predictor(runs.eta, fixed, output, activations, runs.others)


@dataclass(frozen=True)
class _Runs:
    """Results of one modulated pass per draw.

    Attributes
    ----------
    eta : Float[Tensor, "... rows columns"]
        Linear predictors.
    others : mapping of str to Float[Tensor, "... rows ..."]
        Means of the other outcomes.
    output : Tensor
        The network's output in the last draw, which is of use if no effect reaches it.
    activations : mapping of str to Tensor
        The tapped activations that no effect reaches.
    """

    eta: Float[Tensor, "... rows columns"]
    others: Mapping[str, Tensor]
    output: Tensor
    activations: Mapping[str, Tensor]


def _modulated_runs(
    model: Plan, rows: Rows, latents: Latents, inside: Sequence[Factor], others: bool
) -> _Runs:
    """Run the network once per draw, with the effects of the factors `inside`."""
    effects = {factor.effect_site: latents[factor.effect_site] for factor in inside}
    lead = torch.broadcast_shapes(*(value.shape[:-2] for value in effects.values()))
    effects = {site: value.expand(*lead, *value.shape[-2:]) for site, value in effects.items()}
    rebuilt, known = (model.others if others else ()), model.known()
    etas: list[Tensor] = []
    means: dict[str, list[Tensor]] = {other.name: [] for other in rebuilt}
    rows, activations = replace(rows, computed=None), dict[str, Tensor]()
    for index in product(*map(range, lead)):
        drawn = {
            name: value if name in known else _at(effects.get(name, value), index)
            for name, value in latents.items()
        }
        blocks = [
            pair
            for factor in inside
            for pair in effects_at(factor, filter_effects(factor, drawn[factor.effect_site], rows))
        ]
        with modulated(model.network, blocks):
            output, tapped = model.run_network(rows, whole=True)
        etas.append(linear_predictor(model, rows, output, tapped, drawn))
        for other in rebuilt:
            means[other.name].append(tapped[other.at])
        activations = dict(tapped)

    def stacked(values: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(values)).reshape(*lead, *values[0].shape)

    unreached = {path: value for path, value in activations.items() if path in model.unreached}
    rebuilt_means = {name: stacked(values) for name, values in means.items()}
    return _Runs(stacked(etas), rebuilt_means, activations[""], unreached)


def _at(value: Tensor, index: tuple[int, ...]) -> Tensor:
    """The draw at this index of the leading dimensions, which may have size 1."""
    if value.dim() <= len(index):
        return value
    return value[tuple(min(i, size - 1) for i, size in zip(index, value.shape, strict=False))]


def filter_effects(
    factor: Factor, effects: Float[Tensor, "clusters terms"], rows: Rows
) -> Float[Tensor, "rows filter_terms"]:
    """Each row's effects on filters: those of its cluster."""
    return effects[rows.memberships[factor.name].position, factor.n_linear :]


def effects_at(
    factor: Factor, effects: Float[Tensor, "rows filter_terms"]
) -> list[tuple[str, Tensor]]:
    """Module paths of the layers that the factor's effects change, each with its effects.

    The result is what `armed_pyro.networks.taps.modulated` takes.
    """
    widths = [len(block.names) for block in factor.filters]
    paths = [block.path for block in factor.filters]
    return list(zip(paths, effects.split(widths, -1), strict=True))
