"""`Tap`: a place in a network by module path, and the axis of its channels."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from armed_pyro._messages import listing

__all__ = [
    "POOLS",
    "Pool",
    "Tap",
    "channel_axis",
    "chosen_tensor",
    "mask_of",
    "module_at",
    "with_pool",
]

# How an activation with tokens, time or space becomes one vector per row.
Pool = Literal["mean", "max", "first", "last", "masked", "whole"]
POOLS: tuple[Pool, ...] = get_args(Pool)
# Arguments by which networks take the mask of their tokens.
MASKS = ("attention_mask", "mask", "padding_mask")

_TAP = re.compile(r"(?P<path>.*?)(?P<element>(\[[^\]]*\])*)(#(?P<call>\d+))?(:(?P<pool>\w+))?")


@dataclass(frozen=True)
class Tap:
    """A module's output: which of its calls, which tensor of it, and how it is pooled.

    As text: ``path[element]#call:pool``, of which all but the path may be left out. The element is
    by default the first tensor of a tuple or dict, the call the last, and the pool the mean.

    Examples
    --------
    >>> Tap.of("encoder.lstm[0]#2:last")
    Tap(path='encoder.lstm', element=(0,), call=2, pool='last')
    """

    path: str
    element: tuple[int | str, ...] = ()
    call: int | None = None
    pool: Pool = "mean"

    @classmethod
    def of(cls, text: str) -> Tap:
        """The tap that a text describes; ValueError for an unknown pool."""
        match = _TAP.fullmatch(text)
        if match is None:
            return cls(text)
        pool = match["pool"] or "mean"
        if pool not in POOLS:
            raise ValueError(
                f"the tap {text!r} is pooled by {pool!r}, but must be one of {', '.join(POOLS)}"
            )
        parts = re.findall(r"\[([^\]]*)\]", match["element"])
        element = tuple(int(part) if part.lstrip("-").isdigit() else part for part in parts)
        call = int(match["call"]) if match["call"] else None
        return cls(match["path"], element, call, cast("Pool", pool))

    def pooled(
        self, activation: Float[Tensor, "rows ..."], axis: int, mask: Tensor | None = None
    ) -> Float[Tensor, "rows width"]:
        """One vector per row of an activation whose channels lie along `axis`.

        "first" and "last" take one token or moment, and "masked" averages the tokens that the mask
        "rows tokens" keeps. ValueError where these have no meaning.
        """
        if activation.dim() <= 2 or self.pool == "whole":
            return activation if activation.dim() != 1 else activation[:, None]
        channels_last = activation.movedim(axis, -1).flatten(1, -2)
        if self.pool == "mean":
            return channels_last.mean(1)
        if self.pool == "max":
            return channels_last.amax(1)
        if activation.dim() != 3:
            raise ValueError(
                f"the tap {self.path!r} has the shape {tuple(activation.shape)}, without a single "
                f"axis of tokens or time that {self.pool!r} could choose from: pool its 'mean'"
            )
        if self.pool in ("first", "last"):
            return channels_last[:, 0 if self.pool == "first" else -1]
        if mask is None or mask.shape != channels_last.shape[:2]:
            shape = None if mask is None else tuple(mask.shape)
            raise ValueError(
                f"the tap {self.path!r} is averaged over the tokens of a mask, an input called "
                f"{listing(MASKS)} of shape {tuple(channels_last.shape[:2])}; found {shape}"
            )
        kept = mask.to(channels_last.dtype)[..., None]
        return (kept * channels_last).sum(1) / kept.sum(1).clamp(min=1)


def with_pool(path: str, pool: Pool | None) -> str:
    """The text of a tap with this pool; the path as it is without one.

    >>> with_pool("encoder", "last"), with_pool("encoder:first", None)
    ('encoder:last', 'encoder:first')
    """
    return path if pool is None else f"{path}:{pool}"


def module_at(net: nn.Module, path: str) -> nn.Module:
    """The sub-module at a dotted path, such as ``"encoder.3"``; ``""`` is the network.

    Raises ValueError with the nearest path if there is no such module, and for TorchScript, whose
    modules take no hooks.
    """
    if isinstance(net, torch.jit.ScriptModule):
        raise ValueError(
            "the network is compiled by TorchScript, whose modules cannot be read by hooks: pass "
            "the module that was scripted or traced, with its weights"
        )
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


def chosen_tensor(value: Any, element: Sequence[int | str] = (), what: str = "output") -> Tensor:
    """A tensor of a tuple or dict: that of `element`, and below it the first.

    Raises ValueError if there is no such element, or no tensor.
    """
    for key in element:
        try:
            inside = isinstance(value, (Mapping, tuple, list))
            value = value[key] if inside else getattr(value, str(key))
        except (KeyError, IndexError, AttributeError, TypeError) as error:
            raise ValueError(f"{what} has no element {key!r}: {_described(value)}") from error
    found = next(_tensors(value), None)
    if found is None:
        raise ValueError(f"{what} has no tensor: {_described(value)}")
    return found


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested tuples, lists and dicts, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


def _described(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"it is a dict of {listing(list(value))}"
    if isinstance(value, (tuple, list)):
        return f"it is a {type(value).__name__} of {len(value)}"
    return f"it is a {type(value).__name__}"


def mask_of(inputs: Any) -> Tensor | None:
    """The mask of tokens among named inputs; None without one."""
    named = inputs if isinstance(inputs, Mapping) else {}
    return next((named[name] for name in MASKS if name in named), None)


def channel_axis(net: nn.Module, path: str, output: Float[Tensor, "rows ..."]) -> int:
    """The axis of an output's channels: 1 after convolutions, the last after linear layers.

    A module whose kind does not tell, such as an activation function, has the convention of the
    last layer in it or, without one, before it. The width of that layer decides where it is the
    size of only one of the two axes.
    """
    if output.dim() <= 2:
        return 1
    known = _last_layer(net, path)
    if known is None:
        return 1
    axis, width = known
    fitting = [place for place in (1, -1) if output.shape[place] == width]
    return fitting[0] if len(fitting) == 1 else axis


def _last_layer(net: nn.Module, path: str) -> tuple[int, int] | None:
    """Axis and width of the last layer of a known kind in a module or, without one, before it."""
    before, inside = None, None
    for name, module in net.named_modules():
        within = path == "" or name == path or name.startswith(f"{path}.")
        if inside is not None and not within:
            break
        found = _convention(module)
        if within and found is not None:
            inside = found
        elif within and name == path:
            # Layers after this module are not read: only those inside it, or else before it.
            inside = None
            if not any(_convention(part) for part in module.modules()):
                return before
        elif not within and found is not None:
            before = found
    return inside if inside is not None else before


def _convention(module: nn.Module) -> tuple[int, int] | None:
    """Axis and number of channels of a layer's output; None if its kind does not tell."""
    if isinstance(module, _ConvNd):
        return 1, module.out_channels
    if isinstance(module, _NormBase):  # batch and instance normalisation
        return 1, module.num_features
    if isinstance(module, nn.GroupNorm):
        return 1, module.num_channels
    if isinstance(module, nn.Linear):
        return -1, module.out_features
    if isinstance(module, nn.Embedding):
        return -1, module.embedding_dim
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return -1, module.normalized_shape[-1]
    if isinstance(module, nn.MultiheadAttention):
        return -1, module.embed_dim
    if isinstance(module, nn.RNNBase):
        return -1, (module.proj_size or module.hidden_size) * (1 + module.bidirectional)
    return None
