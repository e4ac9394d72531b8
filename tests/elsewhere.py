"""A device that is not there: tensors in main memory that pass for those of a GPU.

What mixes them with other tensors, or reads them without copying them, fails as it would with CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda:0")
# Functions that take tensors of several devices.
MIXED = {torch.Tensor.copy_, torch.Tensor.__getitem__, torch.Tensor.__setitem__, torch.Tensor.to}
MIXED |= {torch.Tensor.type_as, torch.Tensor.data.__set__}
# Functions that do not even take single numbers of another one.
STRICT = {torch.cat, torch.stack, torch.Tensor.index_copy_, torch.Tensor.index_add_}
STRICT |= {torch.Tensor.index_add, torch.Tensor.index_select, torch.Tensor.index_copy}
UNCHANGED = {torch.Tensor.untyped_storage, torch.Tensor.dim, torch._C._nn._parse_to}
UNCHANGED |= {torch._has_compatible_shallow_copy_type, torch.device}
READ = {torch.Tensor.numpy, torch.Tensor.__array__}


def there(value: Tensor) -> bool:
    """Whether a tensor passes for one of the GPU's."""
    return getattr(value.untyped_storage(), "there", False)


class Elsewhere(TorchFunctionMode):
    """While it is entered, there is one GPU.

    The autograd engine makes tensors of its own: what runs inside it is not held to be strict.
    """

    def __init__(self, *, strict: bool = True) -> None:
        super().__init__()
        self.strict = strict

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        if func is torch._C._nn._parse_to and tensors:
            return (tensors[0].device, tensors[0].dtype, False, None)
        if func in UNCHANGED:
            return func(*args, **kwargs)
        tags = [there(one) for one in tensors]
        if func in READ and tags[0]:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if func is torch.Tensor.cpu:
            return args[0].clone() if tags[0] else args[0]
        if self.strict and any(tags) and not all(tags) and func not in MIXED:
            alien = [one for one, tag in zip(tensors, tags, strict=True) if not tag]
            if func in STRICT or any(one.dim() for one in alien):
                raise RuntimeError(f"{func}: expected all tensors to be on the same device")
        target = self._target(func, args, kwargs, tensors, tags)
        args, kwargs = tree_map(_not_there, (tuple(args), kwargs), is_leaf=_is_size)
        if target and isinstance(kwargs.get("generator"), torch.Generator):
            raise RuntimeError("expected a 'cuda' device type for generator")
        found = func(*args, **kwargs)
        if func is torch.Tensor.__array__ or func is torch.Tensor.data.__set__:
            return found
        return tree_map(lambda one: self._put(one, target, tensors), found, is_leaf=_is_size)

    def _target(
        self, func: Any, args: Any, kwargs: Any, tensors: Sequence[Tensor], tags: Sequence[bool]
    ) -> bool:
        if func is torch.Tensor.to and len(args) > 1 and isinstance(args[1], Tensor):
            return there(args[1])
        for one in (kwargs.get("device"), *(args if func is torch.Tensor.to else ())):
            if isinstance(one, torch.device | str):
                return torch.device(one).type == "cuda"
        if func is torch.Tensor.copy_ or func is torch.Tensor.to:
            return tags[0]
        return any(tags)

    def _put(self, one: Any, target: bool, given: Sequence[Tensor]) -> Any:
        if not isinstance(one, Tensor) or there(one) == target:
            return one
        if any(one.untyped_storage() is other.untyped_storage() for other in given):
            one = one.clone()
        one.untyped_storage().there = target
        return one


def _is_size(value: Any) -> bool:
    return isinstance(value, torch.Size)


def _not_there(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return "cpu" if isinstance(value, str) and value.startswith("cuda") else value


@contextmanager
def a_gpu() -> Iterator[torch.device]:
    """One GPU, on which whatever asks for one runs."""
    engine = torch.autograd._engine_run_backward

    def backward(*args: Any, **kwargs: Any) -> Any:
        with Elsewhere(strict=False):
            return engine(*args, **kwargs)

    fork = torch.random.fork_rng

    @contextmanager
    def forked(*args: Any, **kwargs: Any) -> Iterator[None]:
        with fork(devices=[]):
            yield

    device, is_cuda = torch.Tensor.device, torch.Tensor.is_cuda
    with (
        mock.patch.object(
            torch.Tensor, "device", property(lambda x: GPU if there(x) else device.__get__(x))
        ),
        mock.patch.object(
            torch.Tensor, "is_cuda", property(lambda x: there(x) or is_cuda.__get__(x))
        ),
        mock.patch("torch.autograd._engine_run_backward", backward),
        mock.patch("torch.random.fork_rng", forked),
        mock.patch("torch.cuda.synchronize"),
        mock.patch("torch.cuda.get_rng_state", return_value=torch.get_rng_state()),
        mock.patch("torch.cuda.set_rng_state"),
        mock.patch("armed_pyro.fitting._device", lambda name: "cpu" if name == "cpu" else "cuda"),
        Elsewhere(),
    ):
        yield GPU
