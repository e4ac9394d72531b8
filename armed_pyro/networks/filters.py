"""Hooks that scale and shift the filters of a layer by cluster."""

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
    r"""Inside the context, layers output :math:`(1 + a_{ic}) h_{ic} + b_{ic}` for row i, filter c.

    The hooks are removed when the context ends.

    Parameters
    ----------
    net : nn.Module
        The network.
    effects_at : sequence of (str, Float[Tensor, "rows 2*filters"])
        Module paths of layers, with the scales a, then the biases b, of their filters.

    Examples
    --------
    >>> import torch
    >>> net, effects = nn.Identity(), torch.tensor([[0.5, 2.0]])
    >>> with modulated(nn.Sequential(net), [("0", effects)]):
    ...     net(torch.ones(1, 1))
    tensor([[3.5000]])
    """

    def scale_and_shift(effects: Tensor) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            over_space = (...,) + (None,) * (output.dim() - 2)
            scale, bias = effects.chunk(2, -1)
            return (1 + scale[over_space]) * output + bias[over_space]

        return hook

    with ExitStack() as hooks:
        for path, effects in effects_at:
            handle = module_at(net, path).register_forward_hook(scale_and_shift(effects))
            hooks.callback(handle.remove)
        yield
