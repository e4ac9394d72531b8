"""Random effects inside a network: filters scaled and shifted by cluster."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from armed_pyro.factors import by_column
from armed_pyro.taps import module_at
from armed_pyro.terms import FilterBlock

if TYPE_CHECKING:
    from armed_pyro.factors import Factor
    from armed_pyro.program import MixedEffects
    from armed_pyro.rows import Rows

__all__ = ["modulated", "modulated_predictor", "modulates", "sensitivities"]

Latents = Mapping[str, Tensor]


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


def modulated_predictor(
    model: MixedEffects, rows: Rows, latents: Latents
) -> Float[Tensor, "... rows columns"]:
    """Linear predictor with the filters of every draw; the network runs once a draw."""
    own = [factor for factor in model.factors if factor.filters and factor.effect_site in latents]
    effects = {one.effect_site: latents[one.effect_site] for one in own}
    lead = torch.broadcast_shapes(*(value.shape[:-2] for value in effects.values()))
    effects = {site: value.expand(*lead, *value.shape[-2:]) for site, value in effects.items()}
    known, etas = model.known(), []
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
            etas.append(model.linear_predictor(rows, *model.run_network(rows), drawn))
    return torch.stack(etas).reshape(*lead, *etas[0].shape)


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
    mine = linear.new_zeros(len(rows), len(factor.terms) - factor.n_linear)
    if factor.effect_site in point:
        mine = _by_row(factor, point[factor.effect_site], rows)
    fixed = {name: value for name, value in point.items() if name == "fixed_effect"}
    with torch.enable_grad():
        mine = mine.detach().clone().requires_grad_(True)
        with modulated(model.network, _by_block(factor, mine)):
            eta = model.linear_predictor(rows, *model.run_network(rows), fixed)
        slopes = [
            torch.autograd.grad(
                eta[..., column].sum(), mine, retain_graph=True, create_graph=rows.x.requires_grad
            )[0]
            for column in range(columns)
        ]
    spread = model.data_facts().spread
    return torch.cat([linear, torch.stack(slopes, -1) / spread], 1)
