"""Random effects inside a network: filters scaled and shifted by cluster."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad

from armed_pyro.factors import by_column
from armed_pyro.predictor import Predictor, linear_predictor
from armed_pyro.taps import module_at
from armed_pyro.terms import FilterBlock

if TYPE_CHECKING:
    from armed_pyro.factors import Factor
    from armed_pyro.program import MixedEffects
    from armed_pyro.rows import Rows

__all__ = [
    "modulated",
    "modulates",
    "predict_rows",
    "reconstruction_slopes",
    "row_cost",
    "sensitivities",
]

Latents = Mapping[str, Tensor]
# Effects up to which a curvature is exact, and beyond that the random combinations of a row's
# values that stand for all of them.
MOST_EXACT, COMBINATIONS = 16, 8


@contextmanager
def modulated(
    net: nn.Module, blocks: Sequence[tuple[FilterBlock, Float[Tensor, "rows 2*filters"]]]
) -> Iterator[None]:
    r"""The network's filters scaled and shifted, :math:`(1 + a_{ic}) h_{ic} + b_{ic}`, row by row.

    Hooks are removed on leaving.
    """

    def changed(effects: Tensor) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            over = (...,) + (None,) * (output.dim() - 2)
            scale, bias = effects.chunk(2, -1)
            return (1 + scale[over]) * output + bias[over]

        return hook

    with ExitStack() as hooks:
        for block, effects in blocks:
            handle = module_at(net, block.path).register_forward_hook(changed(effects))
            hooks.callback(handle.remove)
        yield


def modulates(model: MixedEffects) -> bool:
    """Whether there are effects inside the network, so that it runs once a draw."""
    return any(factor.filters for factor in model.factors)


def reaches_predictor(model: MixedEffects) -> bool:
    """Whether the linear predictor is another with effects inside the network."""
    read = {"", *(path for f in model.factors for one in f.linear for path in one.paths())}
    return modulates(model) and not read <= model.unreached


def row_cost(model: MixedEffects) -> int:
    """Values of a row that are worked on in every draw: of its features, where the network runs."""
    return max(1, math.prod(model.data_facts().feature_shape)) if modulates(model) else 1


def predict_rows(
    model: MixedEffects, rows: Rows, latents: Latents, *, alone: bool, others: bool
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
    model: MixedEffects, rows: Rows, latents: Latents, own: Sequence[Factor], others: bool
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
            for pair in _by_block(factor, _by_row(factor, drawn[factor.effect_site], rows))
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


def _by_row(
    factor: Factor, effects: Float[Tensor, "clusters terms"], rows: Rows
) -> Float[Tensor, "rows filter_terms"]:
    """The effects on filters of every row's cluster."""
    return effects[rows.memberships[factor.name].position, factor.n_linear :]


def _by_block(
    factor: Factor, mine: Float[Tensor, "rows filter_terms"]
) -> list[tuple[FilterBlock, Tensor]]:
    """Every filter block with its effects."""
    widths = [len(block.names) for block in factor.filters]
    return list(zip(factor.filters, mine.split(widths, -1), strict=True))


def sensitivities(
    model: MixedEffects,
    rows: Rows,
    factor: Factor,
    activations: Mapping[str, Tensor],
    point: Latents,
) -> Float[Tensor, "rows terms columns"]:
    r"""Z: what an effect of a row's cluster adds to the predictor, in units of the spread.

    phi for effects on the predictor. It is not linear in those on filters, which get its gradient
    where the latent sites are those of `point`: fixed effects, if there are any, and effects that
    may be left out for zero.
    """
    columns = len(model.data_facts().columns)
    linear = by_column(factor.design(rows.x, activations), columns)
    if not factor.filters:
        return linear
    if not reaches_predictor(model):
        return pad(linear, (0, 0, 0, len(factor.terms) - factor.n_linear))
    mine = linear.new_zeros(len(rows), len(factor.terms) - factor.n_linear)
    if factor.effect_site in point:
        mine = _by_row(factor, point[factor.effect_site], rows)
    fixed = {name: value for name, value in point.items() if name == "fixed_effect"}
    with torch.enable_grad():
        mine = mine.detach().clone().requires_grad_(True)
        with modulated(model.network, _by_block(factor, mine)):
            ran = model.run_network(replace(rows, computed=None), whole=True)
            eta = linear_predictor(model, rows, *ran, fixed)
        slopes = [
            torch.autograd.grad(
                eta[..., column].sum(), mine, retain_graph=True, create_graph=rows.x.requires_grad
            )[0]
            for column in range(columns)
        ]
    spread = model.data_facts().spread
    return torch.cat([linear, torch.stack(slopes, -1) / spread], 1)


def reconstruction_slopes(
    model: MixedEffects, rows: Rows, point: Latents
) -> Iterator[tuple[Factor, Float[Tensor, "rows terms"], Float[Tensor, "rows combinations terms"]]]:
    r"""What the other outcomes' log-likelihoods say of the effects inside the network.

    For each factor with such effects their slope :math:`J^\top r`, and vectors v with
    :math:`\sum v v^\top = J^\top W J`, the Gauss-Newton curvature, where the latent sites are those
    of `point`, divided by tau. With few effects there is a v for every value of a row; with more,
    a few combinations of the values with random signs have that sum as their expectation.
    """
    rebuilt = [one for one in model.others if one.at not in model.unreached]
    own = [factor for factor in model.factors if factor.filters] if rebuilt else []
    if not own:
        return
    facts, tau = model.data_facts(), model.precision(point).mean()
    counts = rows.x.new_ones(len(rows)) if rows.weights is None else rows.weights
    with torch.enable_grad():
        mine = [
            _by_row(factor, point[factor.effect_site], rows)
            if factor.effect_site in point
            else rows.x.new_zeros(len(rows), len(factor.terms) - factor.n_linear)
            for factor in own
        ]
        mine = [one.detach().clone().requires_grad_(True) for one in mine]
        pairs = zip(own, mine, strict=True)
        blocks = [pair for factor, one in pairs for pair in _by_block(factor, one)]
        with modulated(model.network, blocks):
            _, activations = model.run_network(replace(rows, computed=None), whole=True)
        # Side by side: those of every factor.
        slope, roots = rows.x.new_zeros(len(rows), sum(one.shape[1] for one in mine)), []
        for one in rebuilt:
            mean = activations[one.at]
            sd = facts.feature_spread * point[one.sd_site].mean()
            residual, root = one.information(mean.detach(), sd, rows)
            over = (...,) + (None,) * (mean.dim() - 1)
            slope = slope + _pulled(mean, mine, counts[over] * residual / tau)
            scale = (counts / tau).sqrt() * root
            every = slope.shape[1] <= MOST_EXACT
            found = _jacobian(mean, mine) if every else _combined(mean, mine)
            roots.append(scale[:, None, None] * found)
    widths = [one.shape[1] for one in mine]
    parts = zip(own, slope.split(widths, 1), torch.cat(roots, 1).split(widths, 2), strict=True)
    for factor, first, second in parts:
        yield factor, pad(first, (factor.n_linear, 0)), pad(second, (factor.n_linear, 0))


def _pulled(
    mean: Tensor, mine: Sequence[Tensor], cotangent: Tensor, *, again: bool = False
) -> Float[Tensor, "rows terms"]:
    """J' cotangent of every row."""
    found = torch.autograd.grad(
        mean, list(mine), cotangent, retain_graph=True, create_graph=again, materialize_grads=True
    )
    return torch.cat(found, 1)


def _jacobian(mean: Tensor, mine: Sequence[Tensor]) -> Float[Tensor, "rows values terms"]:
    """J, a column an effect: J'v is linear in v, and its derivatives by v are J's columns."""
    v = torch.zeros_like(mean).requires_grad_(True)
    pulled = _pulled(mean, mine, v, again=True)
    columns = [torch.autograd.grad(one.sum(), v, retain_graph=True)[0] for one in pulled.unbind(1)]
    return torch.stack([one.flatten(1) for one in columns], -1)


def _combined(mean: Tensor, mine: Sequence[Tensor]) -> Float[Tensor, "rows combinations terms"]:
    """Rows of J combined with random signs; the products of the results have mean J'J."""
    signs = [2.0 * torch.randint_like(mean, 2) - 1 for _ in range(COMBINATIONS)]
    return torch.stack([_pulled(mean, mine, one) for one in signs], 1) / COMBINATIONS**0.5
