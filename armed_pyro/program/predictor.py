"""Linear predictors of rows, and what the network made of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor

from armed_pyro.networks.filters import modulated
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
    model: Plan,
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


def modulates(model: Plan) -> bool:
    """Whether there are effects inside the network, so that it runs once a draw."""
    return any(factor.filters for factor in model.factors)


def reaches_predictor(model: Plan) -> bool:
    """Whether the linear predictor is another with effects inside the network."""
    read = {"", *(path for f in model.factors for one in f.linear for path in one.paths())}
    return modulates(model) and not read <= model.unreached


def row_cost(model: Plan) -> int:
    """Values of a row that are worked on in every draw: of its features, where the network runs."""
    return max(1, math.prod(model.data_facts().feature_shape)) if modulates(model) else 1


def predict_rows(
    model: Plan, rows: Rows, latents: Latents, *, alone: bool, others: bool
) -> Predictor:
    """See `MixedEffects.predictor`; the network runs as rarely as it can.

    What effects inside do not reach is the same with and without them, so that one run gives
    both; where they reach nothing that is asked for, it is a run without them.
    """
    own = [factor for factor in model.factors if factor.filters and factor.effect_site in latents]
    reached = bool(own) and reaches_predictor(model)
    rebuilt = any(one.at not in model.unreached for one in model.others) if others else False
    if not (reached or (own and rebuilt)):
        output, activations = model.run_network(rows)
        fixed = model.fixed_predictor(rows, output, activations, latents)
        eta = linear_predictor(model, rows, output, activations, latents)
        means = {one.name: activations[one.at] for one in model.others} if others else {}
        return Predictor(eta, fixed, output, activations, means)
    runs = _modulated_runs(model, rows, latents, own, others)
    if alone:
        output, activations = model.run_network(rows)
    elif reached:
        return Predictor(runs.eta, None, None, runs.activations, runs.others)
    else:
        output, activations = runs.output, runs.activations
    fixed = model.fixed_predictor(rows, output, activations, latents)
    return Predictor(runs.eta, fixed, output, activations, runs.others)


@dataclass(frozen=True)
class _Runs:
    """Predictions with the filters of every draw, and what all draws share."""

    eta: Tensor
    others: Mapping[str, Tensor]
    output: Tensor
    activations: Mapping[str, Tensor]


def _modulated_runs(
    model: Plan, rows: Rows, latents: Latents, own: Sequence[Factor], others: bool
) -> _Runs:
    """The network runs once a draw."""
    effects = {one.effect_site: latents[one.effect_site] for one in own}
    lead = torch.broadcast_shapes(*(value.shape[:-2] for value in effects.values()))
    effects = {site: value.expand(*lead, *value.shape[-2:]) for site, value in effects.items()}
    rebuilt, known = (model.others if others else ()), model.known()
    etas: list[Tensor] = []
    means: dict[str, list[Tensor]] = {one.name: [] for one in rebuilt}
    rows, activations = replace(rows, computed=None), dict[str, Tensor]()
    for index in product(*map(range, lead)):
        drawn = {
            name: value if name in known else _at(effects.get(name, value), index)
            for name, value in latents.items()
        }
        blocks = [
            pair
            for factor in own
            for pair in effects_at(factor, filter_effects(factor, drawn[factor.effect_site], rows))
        ]
        with modulated(model.network, blocks):
            output, found = model.run_network(rows, whole=True)
        etas.append(linear_predictor(model, rows, output, found, drawn))
        for one in rebuilt:
            means[one.name].append(found[one.at])
        activations = dict(found)

    def joined(values: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(values)).reshape(*lead, *values[0].shape)

    same = {path: one for path, one in activations.items() if path in model.unreached}
    stacked = {name: joined(values) for name, values in means.items()}
    return _Runs(joined(etas), stacked, activations[""], same)


def _at(value: Tensor, index: tuple[int, ...]) -> Tensor:
    """One of the draws in the leading dimensions, which may have size 1."""
    if value.dim() <= len(index):
        return value
    return value[tuple(min(i, size - 1) for i, size in zip(index, value.shape, strict=False))]


def filter_effects(
    factor: Factor, effects: Float[Tensor, "clusters terms"], rows: Rows
) -> Float[Tensor, "rows filter_terms"]:
    """The effects on filters of every row's cluster."""
    return effects[rows.memberships[factor.name].position, factor.n_linear :]


def effects_at(
    factor: Factor, effects: Float[Tensor, "rows filter_terms"]
) -> list[tuple[str, Tensor]]:
    """Module paths of the layers that the factor's effects change, with the effects there."""
    widths = [len(block.names) for block in factor.filters]
    paths = [block.path for block in factor.filters]
    return list(zip(paths, effects.split(widths, -1), strict=True))
