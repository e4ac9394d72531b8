"""`ArrayInputs`: arrays side by side as a network's inputs, not copied until a batch needs them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from armed_pyro.rows.inputs import InputSpec, LazyInputs, Structure

__all__ = ["ArrayInputs"]


@dataclass(frozen=True, eq=False)
class ArrayInputs(LazyInputs):
    """Rows `index` of arrays in a structure, which may be memory maps and of any type."""

    arrays: Any  # arrays or tensors with rows first, in tuples and dicts
    index: Int[Tensor, " rows"]

    @classmethod
    def of(cls, arrays: Any) -> ArrayInputs:
        """All rows of arrays in a structure; ValueError if they differ in length."""
        lengths: set[int] = set()
        held = _held(arrays, lengths)
        if len(lengths) != 1:
            raise ValueError(
                f"The arrays of the features have {sorted(lengths) or 'no'} rows; all need the "
                "same number."
            )
        return cls(held, torch.arange(lengths.pop()))

    def __len__(self) -> int:
        return len(self.index)

    def take(self, index: Int[Tensor, " taken"]) -> ArrayInputs:
        return replace(self, index=self.index[index.cpu()])

    def plain(self) -> ArrayInputs:
        return self

    def load(self) -> Structure:
        return _rows(self.arrays, self.index)

    def blocks(self, size: int) -> Iterator[Structure]:
        for index in self.index.split(size):
            yield _rows(self.arrays, index)

    def training_batches(
        self, batches: Sequence[Int[Tensor, " batch"]], seed: int
    ) -> Iterator[Structure]:
        for batch in batches:
            yield _rows(self.arrays, self.index[batch.cpu()])

    def fingerprint(self) -> Iterator[bytes]:
        yield str(InputSpec.of(self.load() if len(self) < 3 else self.spec.example(1))).encode()
        for block in self.blocks(1024):
            yield from _bytes(block)


def _held(arrays: Any, lengths: set[int]) -> Any:
    """The structure with its arrays checked, and their numbers of rows added to `lengths`."""
    if isinstance(arrays, Mapping):
        return {str(name): _held(part, lengths) for name, part in arrays.items()}
    if isinstance(arrays, tuple):
        return tuple(_held(part, lengths) for part in arrays)
    held = arrays if isinstance(arrays, (Tensor, np.ndarray)) else np.asarray(arrays)
    numbers = isinstance(held, Tensor) or held.dtype.kind in "biuf"
    if not held.ndim or not numbers:
        raise ValueError(
            f"features in a tuple or dict must be arrays of numbers with rows first, found "
            f"{type(arrays).__name__} of shape {tuple(held.shape)} and type {held.dtype}."
        )
    lengths.add(len(held))
    return held


def _rows(arrays: Any, index: Tensor) -> Any:
    """These rows of every array, as tensors."""
    if isinstance(arrays, dict):
        return {name: _rows(part, index) for name, part in arrays.items()}
    if isinstance(arrays, tuple):
        return tuple(_rows(part, index) for part in arrays)
    if isinstance(arrays, Tensor):
        return arrays[index]
    # Fancy indexing copies the rows, so torch never sees a read-only array.
    return torch.from_numpy(np.asarray(arrays)[index.numpy()])


def _bytes(structure: Any) -> Iterator[bytes]:
    if isinstance(structure, dict):
        for part in structure.values():
            yield from _bytes(part)
    elif isinstance(structure, tuple):
        for part in structure:
            yield from _bytes(part)
    else:
        yield structure.contiguous().view(torch.uint8).numpy().tobytes()
