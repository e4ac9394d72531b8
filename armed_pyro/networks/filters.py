"""Filters of convolutions scaled and shifted by cluster, by hook."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from armed_pyro.networks.taps import module_at
from armed_pyro.random_effects.design import FilterBlock

__all__ = ["modulated"]


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
