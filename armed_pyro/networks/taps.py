"""Activations of a network recorded or modulated by hooks, without editing the network."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from armed_pyro.networks.tap import Tap, channel_axis, chosen_tensor, mask_of, module_at
from armed_pyro.rows.inputs import LazyInputs, Structure, leaves, mapped

__all__ = ["as_type", "call", "head_path", "modulated", "module_at", "pooled", "run", "tapped"]

# Limits on the rows, and on the feature values, of one forward pass without gradients: the feature
# maps of thousands of images would take gigabytes.
MOST_ROWS, MOST_VALUES = 4096, 2**21


def pooled(activation: Float[Tensor, "rows width ..."]) -> Float[Tensor, "rows width"]:
    """One vector per row of feature maps whose channels come first; vectors as they are."""
    return Tap("").pooled(activation, 1)


@contextmanager
def tapped(
    net: nn.Module, outputs: Sequence[str] = (), inputs: Sequence[str] = ()
) -> Iterator[dict[str, Tensor]]:
    """Record the outputs (or inputs) of modules while the network runs inside this context.

    The yielded mapping fills as the network runs: the text of a `Tap` is the key of its output,
    which is not pooled, and ``"<path"`` that of an input. The hooks are removed when the context
    ends.
    """
    record: dict[str, Tensor] = {}

    def keep_output(text: str) -> Any:
        tap, calls = _tap_of(net, text), itertools.count(1)

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if tap.call in (None, next(calls)):
                record[text] = chosen_tensor(output, tap.element, f"the module {tap.path!r}")

        return hook

    def keep_input(path: str) -> Any:
        return lambda module, args: record.update({f"<{path}": args[0]})

    with ExitStack() as hooks:
        for text in dict.fromkeys(outputs):
            module = module_at(net, _tap_of(net, text).path)
            handle = module.register_forward_hook(keep_output(text))
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

    The effects of each layer are its scales a, then its biases b. The filters lie along
    `channel_axis`.
    """

    def scale_and_shift(path: str, effects: Tensor) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            shape = [len(effects), *[1] * (output.dim() - 1)]
            shape[channel_axis(net, path, output)] = effects.shape[-1] // 2
            scale, bias = effects.to(output.dtype).chunk(2, -1)
            return (1 + scale.reshape(shape)) * output + bias.reshape(shape)

        return hook

    with ExitStack() as hooks:
        for path, effects in effects_at:
            handle = module_at(net, path).register_forward_hook(scale_and_shift(path, effects))
            hooks.callback(handle.remove)
        yield


def run(
    net: nn.Module,
    x: LazyInputs | Structure,
    outputs: Sequence[str] = (),
    inputs: Sequence[str] = (),
    *,
    element: Sequence[int | str] = (),
    like: Tensor | None = None,
    whole: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The network's output, and outputs (or inputs) of its modules, as `tapped` records them.

    The inputs x are a tensor "rows ...", or tuples and dicts of tensors, which become the network's
    arguments. Floating types get the type of `like`, and all its device. Outputs of modules are
    pooled to one vector per row, unless their `Tap` says otherwise. The record holds the network's
    output too, under the empty path; `element` chooses a tensor of it. Without gradients, a large
    number of rows runs in blocks, which bounds the memory of the feature maps, unless `whole`:
    hooks with one value per row need all rows at once.
    """
    pieces = []
    for block in _blocks(x, whole=whole or torch.is_grad_enabled()):
        block = block if like is None else mapped(partial(as_type, like), block)
        with tapped(net, outputs, inputs) as record:
            output = chosen_tensor(call(net, block), element, "the network's output")
        for text in set(outputs) & record.keys():
            tap = _tap_of(net, text)
            axis = channel_axis(net, tap.path, record[text])
            record[text] = tap.pooled(record[text], axis, mask_of(block))
        pieces.append({**record, "": output})
    joined = pieces[0]
    if len(pieces) > 1:
        joined = {name: torch.cat([piece[name] for piece in pieces]) for name in joined}
    return joined[""], joined


def call(net: nn.Module, inputs: Structure) -> Any:
    """The network's output for a tensor, a tuple of arguments, or a dict of named arguments."""
    if isinstance(inputs, dict):
        return net(**inputs)
    return net(*inputs) if isinstance(inputs, tuple) else net(inputs)


def as_type(like: Tensor, values: Tensor) -> Tensor:
    """Values on the device of `like`, and in its type unless they are whole numbers."""
    return values.to(like.device, like.dtype if values.is_floating_point() else values.dtype)


def _blocks(x: LazyInputs | Structure, *, whole: bool) -> Iterator[Structure]:
    """Yield the inputs in blocks of bounded size, or all at once if they are to be `whole`."""
    lazy = isinstance(x, LazyInputs)
    tensors = [] if lazy else leaves(x)
    n = len(x) if isinstance(x, LazyInputs) else len(tensors[0])
    if isinstance(x, LazyInputs):
        values = x.spec.values
    else:
        values = sum(tensor[:1].numel() for tensor in tensors)
    size = min(MOST_ROWS, max(1, MOST_VALUES // max(1, values)))
    if isinstance(x, LazyInputs):
        yield from [x.load()] if whole or n <= size else x.blocks(size)
    elif whole or n <= size:
        yield x
    else:
        for start in range(0, n, size):
            yield mapped(partial(_part, start, start + size), x)


def _part(start: int, stop: int, values: Tensor) -> Tensor:
    return values[start:stop]


def _tap_of(net: nn.Module, text: str) -> Tap:
    """The tap that a text describes; a module of that very path has precedence."""
    return Tap(text) if any(name == text for name, _ in net.named_modules()) else Tap.of(text)


def head_path(net: nn.Module) -> str:
    """Module path of the network's last linear layer; empty if that layer is the network itself."""
    paths = [path for path, module in net.named_modules() if isinstance(module, nn.Linear)]
    if not paths:
        raise ValueError("a Bayesian head needs a network with a torch.nn.Linear layer")
    return paths[-1]
