"""Filters of convolutions scaled and shifted by cluster, by hook."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from armed_pyro.networks.taps import module_at

__all__ = ["modulated"]


@contextmanager
def modulated(
    net: nn.Module, effects_at: Sequence[tuple[str, Float[Tensor, "rows 2*filters"]]]
) -> Iterator[None]:
    r"""The network's filters scaled and shifted, :math:`(1 + a_{ic}) h_{ic} + b_{ic}`, row by row.

    Hooks are removed on leaving.

    Parameters
    ----------
    effects_at : sequence of (str, Float[Tensor, "rows 2*filters"])
        Module paths of layers, with the scales a and the biases b of their filters.
    """

    def changed(effects: Tensor) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            over = (...,) + (None,) * (output.dim() - 2)
            scale, bias = effects.chunk(2, -1)
            return (1 + scale[over]) * output + bias[over]

        return hook

    with ExitStack() as hooks:
        for path, effects in effects_at:
            handle = module_at(net, path).register_forward_hook(changed(effects))
            hooks.callback(handle.remove)
        yield
