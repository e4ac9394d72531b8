"""Values apart from the tensors in them, so that equal structures can be told from others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["filled", "skeleton"]


@dataclass(frozen=True)
class _Slot:
    """The place of a tensor among the inputs, and what of it is compiled in."""

    place: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class _Record:
    """A dataclass whose fields are skeletons."""

    kind: type
    values: tuple[Any, ...]


@dataclass(frozen=True)
class _Table:
    """A mapping whose values are skeletons."""

    items: tuple[tuple[str, Any], ...]


def skeleton(value: Any, tensors: list[Tensor]) -> Any:
    """The value with its tensors, which are appended to the list, replaced by slots."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return _Slot(len(tensors) - 1, value.shape, value.dtype, value.device)
    if isinstance(value, Mapping):
        return _Table(tuple((name, skeleton(one, tensors)) for name, one in value.items()))
    if is_dataclass(value) and not isinstance(value, type):
        values = (skeleton(getattr(value, one.name), tensors) for one in fields(value))
        return _Record(type(value), tuple(values))
    return value


def filled(skeleton: Any, tensors: Sequence[Tensor]) -> Any:
    """What the skeleton was made of, with these tensors."""
    if isinstance(skeleton, _Slot):
        return tensors[skeleton.place]
    if isinstance(skeleton, _Table):
        return {name: filled(one, tensors) for name, one in skeleton.items}
    if isinstance(skeleton, _Record):
        return skeleton.kind(*(filled(one, tensors) for one in skeleton.values))
    return skeleton
