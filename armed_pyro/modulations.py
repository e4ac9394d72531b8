"""Random effects inside a network: filters scaled and shifted by cluster."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
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

__all__ = ["modulated", "modulates", "predict_rows", "reconstruction_slopes", "sensitivities"]

Latents = Mapping[str, Tensor]
# Random combinations of a row's values that stand for all of them in a curvature.
COMBINATIONS = 8


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


def predict_rows(
    model: MixedEffects, rows: Rows, latents: Latents, *, alone: bool, others: bool
) -> Predictor:
    """See `MixedEffects.predictor`; the network runs as rarely as it can.

    What effects inside do not reach is the same with and without them, so that one run gives
    both; where they reach nothing that is asked for, it is a run without them.
    """
    own = [factor for factor in model.factors if factor.filters and factor.effect_site in latents]
    reached = bool(own) and "" not in model.unreached
    rebuilt = any(one.at not in model.unreached for one in model.others) if others else False
    if not (reached or (own and rebuilt)):
        output, activations = model.run_network(rows)
        fixed = model.fixed_predictor(rows, output, activations, latents)
        eta = linear_predictor(model, rows, output, activations, latents)
        means = {one.name: activations[one.at] for one in model.others} if others else {}
        return Predictor(eta, fixed, output, activations, means)
    runs = _modulated_runs(model, rows, latents, own, others)
    if not reached:
        runs = replace(
            runs, fixed=model.fixed_predictor(rows, runs.output, runs.activations, latents)
        )
    if not alone:
        return runs if not reached else replace(runs, output=None)
    output, activations = model.run_network(rows)
    fixed = model.fixed_predictor(rows, output, activations, latents)
    return Predictor(runs.eta, fixed, output, activations, runs.others)


def _modulated_runs(
    model: MixedEffects, rows: Rows, latents: Latents, own: Sequence[Factor], others: bool
) -> Predictor:
    """Predictions with the filters of every draw; the network runs once a draw."""
    effects = {one.effect_site: latents[one.effect_site] for one in own}
    lead = torch.broadcast_shapes(*(value.shape[:-2] for value in effects.values()))
    effects = {site: value.expand(*lead, *value.shape[-2:]) for site, value in effects.items()}
    known, etas, means = model.known(), [], {one.name: [] for one in model.others if others}
    rows = replace(rows, computed=None)
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
            output, activations = model.run_network(rows, whole=True)
        etas.append(linear_predictor(model, rows, output, activations, drawn))
        for one in model.others if others else ():
            means[one.name].append(activations[one.at])
    same = {path: one for path, one in activations.items() if path in model.unreached}

    def joined(values: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(values)).reshape(*lead, *values[0].shape) if lead else values[0]

    stacked = {name: joined(values) for name, values in means.items()}
    return Predictor(joined(etas), None, output, same, stacked)


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
    if "" in model.unreached:
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
            torch.autograd.grad(eta[..., column].sum(), mine, retain_graph=True)[0]
            for column in range(columns)
        ]
    spread = model.data_facts().spread
    return torch.cat([linear, torch.stack(slopes, -1) / spread], 1)


def reconstruction_slopes(
    model: MixedEffects, rows: Rows, point: Latents
) -> Iterator[tuple[Factor, Float[Tensor, "rows terms"], Float[Tensor, "rows combinations terms"]]]:
    r"""What the other outcomes' log-likelihoods say of the effects inside the network.

    For each factor with such effects their slope :math:`J^\top r`, and combinations v of a row's
    values with random signs, for which :math:`\sum v v^\top` has the expectation
    :math:`J^\top W J`, the Gauss-Newton curvature: J itself has a row for every value of an image.
    Both by derivatives where the latent sites are those of `point`, and divided by tau.
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
        blocks = [
            pair
            for factor, one in zip(own, mine, strict=True)
            for pair in _by_block(factor, one)
        ]
        with modulated(model.network, blocks):
            _, activations = model.run_network(replace(rows, computed=None), whole=True)
        slopes, roots = [torch.zeros_like(one) for one in mine], []
        for one in rebuilt:
            mean = activations[one.at]
            sd = facts.feature_spread * point[one.sd_site].mean()
            residual, root = one.information(mean.detach(), sd, rows)
            over = (...,) + (None,) * (mean.dim() - 1)
            found = _pulled(mean, counts[over] * residual / tau, mine)
            slopes = [a + b for a, b in zip(slopes, found, strict=True)]
            scale = (counts / (tau * COMBINATIONS)).sqrt()[over] * root
            for _ in range(COMBINATIONS):
                signs = 2.0 * torch.randint_like(mean, 2) - 1
                roots.append(_pulled(mean, scale * signs, mine))
    for place, factor in enumerate(own):
        padding = (factor.n_linear, 0)
        combined = torch.stack([one[place] for one in roots], 1)
        yield factor, pad(slopes[place], padding), pad(combined, padding)


def _pulled(
    mean: Tensor, cotangent: Tensor, mine: Sequence[Tensor]
) -> list[Float[Tensor, "rows filter_terms"]]:
    found = torch.autograd.grad(
        mean, list(mine), cotangent, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return list(found)
