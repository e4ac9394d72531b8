"""Activations of a network recorded or modulated by hooks, without editing the network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["head_path", "modulated", "module_at", "pooled", "run", "tapped"]

# Limits on the rows, and on the feature values, of one forward pass without gradients: the feature
# maps of thousands of images would take gigabytes.
MOST_ROWS, MOST_VALUES = 4096, 2**21


def module_at(net: nn.Module, path: str) -> nn.Module:
    """The sub-module at a dotted path, such as ``"encoder.3"``; ``""`` is the network.

    Raises ValueError with the nearest path if there is no such module.
    """
    try:
        return net.get_submodule(path)
    except AttributeError as error:
        paths = [name for name, _ in net.named_modules() if name]
        near = get_close_matches(path, paths, n=1)
        hint = f" (nearest: {near[0]!r})" if near else ""
        raise ValueError(
            f"the network has no module {path!r}{hint}; its module paths are: "
            f"{', '.join(paths) or 'none, as it is a single module'}"
        ) from error


def pooled(activation: Float[Tensor, "rows width ..."]) -> Float[Tensor, "rows width"]:
    """One vector per row: feature maps are averaged over space."""
    return activation if activation.dim() == 2 else activation.flatten(2).mean(-1)


@contextmanager
def tapped(
    net: nn.Module, outputs: Sequence[str] = (), inputs: Sequence[str] = ()
) -> Iterator[dict[str, Tensor]]:
    """Record the outputs (or inputs) of modules while the network runs inside this context.

    The yielded mapping fills as the network runs: the key ``path`` holds an output, the key
    ``"<path"`` an input. The hooks are removed when the context ends.
    """
    record: dict[str, Tensor] = {}

    def keep_output(path: str) -> Any:
        return lambda module, args, output: record.update({path: output})

    def keep_input(path: str) -> Any:
        return lambda module, args: record.update({f"<{path}": args[0]})

    with ExitStack() as hooks:
        for path in dict.fromkeys(outputs):
            handle = module_at(net, path).register_forward_hook(keep_output(path))
            hooks.callback(handle.remove)
        for path in dict.fromkeys(inputs):
            handle = module_at(net, path).register_forward_pre_hook(keep_input(path))
            hooks.callback(handle.remove)
        yield record


@contextmanager
def modulated(
    net: nn.Module, effects_at: Sequence[tuple[str, Float[Tensor, "rows 2*filters"]]]
) -> Iterator[None]:
    r"""Inside the context, layers output :math:`(1 + a_{ic}) h_{ic} + b_{ic}` for row i, filter c.

    The effects of each layer are its scales a, then its biases b.
    """

    def scale_and_shift(effects: Tensor) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            over_space = (...,) + (None,) * (output.dim() - 2)
            scale, bias = effects.to(output.dtype).chunk(2, -1)
            return (1 + scale[over_space]) * output + bias[over_space]

        return hook

    with ExitStack() as hooks:
        for path, effects in effects_at:
            handle = module_at(net, path).register_forward_hook(scale_and_shift(effects))
            hooks.callback(handle.remove)
        yield


def run(
    net: nn.Module,
    x: Float[Tensor, "rows ..."],
    outputs: Sequence[str] = (),
    inputs: Sequence[str] = (),
    *,
    whole: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The network's output, and outputs (or inputs) of its modules, as `tapped` records them.

    The record holds the network's output too, under the empty path. Without gradients, a large
    number of rows runs in blocks, which bounds the memory of the feature maps, unless `whole`:
    hooks with one value per row need all rows at once.
    """
    size = min(MOST_ROWS, max(1, MOST_VALUES // max(1, x[:1].numel())))
    blocks = [x] if whole or torch.is_grad_enabled() or len(x) <= size else x.split(size)
    pieces = []
    for block in blocks:
        with tapped(net, outputs, inputs) as record:
            output = net(block)
        pieces.append({**record, "": output})
    joined = pieces[0]
    if len(pieces) > 1:
        joined = {name: torch.cat([piece[name] for piece in pieces]) for name in joined}
    return joined[""], joined


def head_path(net: nn.Module) -> str:
    """Module path of the network's last linear layer; empty if that layer is the network itself."""
    paths = [path for path, module in net.named_modules() if isinstance(module, nn.Linear)]
    if not paths:
        raise ValueError("a Bayesian head needs a network with a torch.nn.Linear layer")
    return paths[-1]
