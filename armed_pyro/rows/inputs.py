"""Inputs of a network that are no table: nested tensors, and items of a dataset loaded on demand.

A structure is a tensor "rows ...", a tuple of structures, or a dict of structures.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

__all__ = ["InputSpec", "JoinedInputs", "LazyInputs", "Structure", "leaves", "mapped"]

# Types of tensors by their names in files.
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool),
        *(torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64),
    )
}

Structure: TypeAlias = "Tensor | tuple[Any, ...] | dict[str, Any]"


def mapped(change: Callable[[Tensor], Tensor], structure: Any) -> Any:
    """The structure with every tensor changed.

    >>> mapped(lambda t: 2 * t, {"a": (torch.ones(1), torch.zeros(1))})
    {'a': (tensor([2.]), tensor([0.]))}
    """
    if isinstance(structure, Tensor):
        return change(structure)
    if isinstance(structure, Mapping):
        return {str(name): mapped(change, part) for name, part in structure.items()}
    if isinstance(structure, (tuple, list)):
        return tuple(mapped(change, part) for part in structure)
    raise TypeError(
        f"a network's inputs must be tensors, or tuples and dicts of tensors, found "
        f"{type(structure).__name__}: convert it in the dataset, or choose others with inputs="
    )


def leaves(structure: Any) -> list[Tensor]:
    """The tensors of a structure, in order."""
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    mapped(keep, structure)
    return found


class LazyInputs(ABC):
    """Inputs of n rows, loaded block by block when a network needs them."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def take(self, index: Int[Tensor, " taken"]) -> LazyInputs:
        """The inputs of these rows, not loaded yet."""

    @abstractmethod
    def load(self) -> Structure:
        """The inputs of all rows."""

    @abstractmethod
    def blocks(self, size: int) -> Iterator[Structure]:
        """Yield the inputs in order, at most `size` rows at a time, loaded ahead."""

    @abstractmethod
    def training_batches(
        self, batches: Sequence[Int[Tensor, " batch"]], seed: int
    ) -> Iterator[Structure]:
        """Yield the inputs of these rows as they are in training, augmented, loaded ahead.

        The seed is that of everything random about them.
        """

    @abstractmethod
    def plain(self) -> LazyInputs:
        """The same inputs, whose training batches are not augmented."""

    @property
    def spec(self) -> InputSpec:
        """The specification of the first two rows."""
        index = torch.arange(min(2, len(self)))
        return InputSpec.of(self.take(index).load())

    @abstractmethod
    def fingerprint(self) -> Iterator[bytes]:
        """Bytes that differ between different rows."""


@dataclass(frozen=True, eq=False)
class JoinedInputs(LazyInputs):
    """The inputs of two sources, one below the other, at the rows `index`."""

    first: LazyInputs
    second: LazyInputs
    index: Int[Tensor, " rows"]

    @classmethod
    def of(cls, first: LazyInputs, second: LazyInputs) -> JoinedInputs:
        """All rows of the first source, then those of the second."""
        return cls(first, second, torch.arange(len(first) + len(second)))

    def __len__(self) -> int:
        return len(self.index)

    def take(self, index: Int[Tensor, " taken"]) -> JoinedInputs:
        return replace(self, index=self.index[index.cpu()])

    def plain(self) -> JoinedInputs:
        return replace(self, first=self.first.plain(), second=self.second.plain())

    def load(self) -> Structure:
        inside = self.index < len(self.first)
        pairs = (
            (self.first, self.index[inside]),
            (self.second, self.index[~inside] - len(self.first)),
        )
        loaded = [source.take(rows).load() for source, rows in pairs if len(rows)]
        if len(loaded) == 1:
            return loaded[0]
        order = torch.cat([inside.nonzero()[:, 0], (~inside).nonzero()[:, 0]]).argsort()
        others = iter(leaves(loaded[1]))
        return mapped(lambda tensor: torch.cat([tensor, next(others)])[order], loaded[0])

    def blocks(self, size: int) -> Iterator[Structure]:
        for index in torch.arange(len(self)).split(size):
            yield self.take(index).load()

    def training_batches(
        self, batches: Sequence[Int[Tensor, " batch"]], seed: int
    ) -> Iterator[Structure]:
        for batch in batches:
            yield self.take(batch).load()

    def fingerprint(self) -> Iterator[bytes]:
        yield from self.first.fingerprint()
        yield from self.second.fingerprint()
        yield self.index.numpy().tobytes()


@dataclass(frozen=True)
class InputSpec:
    """Shapes and types of one row's inputs, in their structure; see `InputSpec.of`.

    Examples
    --------
    >>> spec = InputSpec.of({"image": torch.zeros(2, 3, 8, 8), "tokens": torch.ones(2, 5).long()})
    >>> spec.example(4)["image"].shape
    torch.Size([4, 3, 8, 8])
    """

    content: Any  # JSON: {"tensor": [type, shape]}, {"tuple": [...]} or {"dict": {...}}

    @classmethod
    def of(cls, structure: Any) -> InputSpec:
        """The specification of a structure whose tensors have rows first."""
        return cls(_described(structure))

    @property
    def values(self) -> int:
        """Number of values of one row."""
        return sum(tensor[0].numel() for tensor in leaves(self.example(1)))

    def example(self, rows: int, fill: Callable[[tuple[int, ...]], Tensor] | None = None) -> Any:
        """A structure of this specification: `fill` for floating types, by default zeros, else 1.

        Whole numbers are 1, since a mask of zeros would leave nothing to average.
        """
        return _example(self.content, rows, torch.zeros if fill is None else fill)


def _described(structure: Any) -> dict[str, Any]:
    if isinstance(structure, Tensor):
        name = str(structure.dtype).removeprefix("torch.")
        return {"tensor": [name, list(structure.shape[1:])]}
    if isinstance(structure, Mapping):
        return {"dict": {str(name): _described(part) for name, part in structure.items()}}
    if isinstance(structure, (tuple, list)):
        return {"tuple": [_described(part) for part in structure]}
    return {"tensor": _described(mapped(lambda t: t, structure))["tensor"]}  # raises


def _example(content: Any, rows: int, fill: Callable[[tuple[int, ...]], Tensor]) -> Any:
    ((kind, value),) = content.items()
    if kind == "dict":
        return {name: _example(part, rows, fill) for name, part in value.items()}
    if kind == "tuple":
        return tuple(_example(part, rows, fill) for part in value)
    dtype, shape = DTYPES[value[0]], (rows, *map(int, value[1]))
    return fill(shape).to(dtype) if dtype.is_floating_point else torch.ones(shape, dtype=dtype)
