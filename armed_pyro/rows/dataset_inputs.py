"""`DatasetInputs`: inputs that a torch dataset makes when they are needed, in worker processes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from armed_pyro.rows.inputs import InputSpec, LazyInputs, Structure, leaves, mapped

__all__ = ["DatasetInputs", "ItemReader", "Items"]

# Batches that each worker loads ahead.
AHEAD = 2


class Items(Protocol):
    """A map-style dataset: items by number, and how many there are."""

    def __getitem__(self, number: int) -> Any: ...

    def __len__(self) -> int: ...


Choice = int | str | Sequence[Any] | Callable[[Any], Any] | None


@dataclass(frozen=True, eq=False)
class ItemReader:
    """How items of a dataset become a network's inputs.

    `choose` names the inputs: a position or key, several of them, a function, or None for all. They
    are chosen from each item, and joined by `torch.utils.data.default_collate`; with another
    `collate`, they are chosen from its result. `augment` changes single items of training batches.
    """

    collate: Callable[[list[Any]], Any] | None = None
    choose: Choice = None
    augment: Callable[[Any], Any] | None = None

    def inputs(self, items: list[Any]) -> Structure:
        """The inputs of these items; ValueError if they cannot be joined or chosen."""
        try:
            if self.collate is None:
                joined = default_collate([chosen(item, self.choose) for item in items])
            else:
                joined = chosen(self.collate(items), self.choose)
        except (TypeError, RuntimeError) as error:
            raise ValueError(
                f"the items of the dataset cannot be joined into a batch ({error}): let the "
                "dataset return tensors of one shape, or give collate="
            ) from error
        structure = mapped(lambda tensor: tensor, joined)
        for tensor in leaves(structure):
            if tensor.dim() == 0 or len(tensor) != len(items):
                raise ValueError(
                    f"an input of {len(items)} items has the shape {tuple(tensor.shape)}, expected "
                    f"({len(items)}, ...): collate= must put the rows first"
                )
        return structure


def chosen(value: Any, choice: Choice) -> Any:
    """An element of a tuple or dict, several, the result of a function, or the value itself.

    >>> chosen({"image": 1, "age": 2, "y": 3}, ["image", "age"])
    {'image': 1, 'age': 2}
    """
    if choice is None:
        return value
    if callable(choice):
        return choice(value)
    if isinstance(choice, (int, str)):
        try:
            return value[choice]
        except (KeyError, IndexError, TypeError) as error:
            keys = f" with the keys {list(value)}" if isinstance(value, Mapping) else ""
            raise ValueError(
                f"an item of the dataset has no element {choice!r}: it is a "
                f"{type(value).__name__}{keys}"
            ) from error
    parts = [chosen(value, part) for part in choice]
    if isinstance(value, Mapping):
        return {str(name): part for name, part in zip(choice, parts, strict=True)}
    return tuple(parts)


@dataclass(frozen=True, eq=False)
class DatasetInputs(LazyInputs):
    """Items `index` of a dataset, read block by block, by `workers` processes if there are any.

    Random numbers of an item, as of its augmentation, follow from a seed and the item's number, so
    that they do not depend on the number of workers.
    """

    dataset: Items
    index: Int[Tensor, " rows"]
    reader: ItemReader
    workers: int = 0

    def __len__(self) -> int:
        return len(self.index)

    def take(self, index: Int[Tensor, " taken"]) -> DatasetInputs:
        return replace(self, index=self.index[index.cpu()])

    def plain(self) -> DatasetInputs:
        return replace(self, reader=replace(self.reader, augment=None))

    @cached_property
    def spec(self) -> InputSpec:
        return super().spec

    def load(self) -> Structure:
        return next(iter(self._read([self.index], None)))

    def blocks(self, size: int) -> Iterator[Structure]:
        yield from self._read(list(self.index.split(size)), None)

    def training_batches(
        self, batches: Sequence[Int[Tensor, " batch"]], seed: int
    ) -> Iterator[Structure]:
        yield from self._read([self.index[batch.cpu()] for batch in batches], seed)

    def _read(self, batches: list[Tensor], seed: int | None) -> Iterator[Structure]:
        parts = _Batches(self.dataset, batches, self.reader, seed)
        workers = min(self.workers, len(batches) - 1)
        if workers < 1:
            return (parts[n] for n in range(len(parts)))
        # The loader draws a seed of its own, which nothing here depends on.
        generator = torch.Generator().manual_seed(0)
        return iter(
            DataLoader(
                parts,
                batch_size=None,
                num_workers=workers,
                collate_fn=_same,
                prefetch_factor=AHEAD,
                generator=generator,
            )
        )

    def fingerprint(self) -> Iterator[bytes]:
        yield f"{type(self.dataset).__name__} {len(self.dataset)} {self.spec.content}".encode()
        yield self.index.numpy().tobytes()


@dataclass(frozen=True, eq=False)
class _Batches(Dataset[Structure]):
    """A dataset whose items are batches."""

    dataset: Items
    batches: list[Tensor]
    reader: ItemReader
    seed: int | None  # of training batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> Structure:
        return self.reader.inputs([self._item(row) for row in self.batches[number].tolist()])

    def _item(self, row: int) -> Any:
        with _seeded(0 if self.seed is None else self.seed, row):
            item = self.dataset[row]
            augment = None if self.seed is None else self.reader.augment
            return item if augment is None else augment(item)


def _same(batch: Any) -> Any:
    return batch


@contextmanager
def _seeded(*seed: int) -> Iterator[None]:
    """The global generators of Python, NumPy and torch, seeded and then put back.

    Datasets and augmentations of others draw from these.
    """
    before = random.getstate(), np.random.get_state()  # noqa: NPY002
    first, second, third = islice(map(int, np.random.SeedSequence(seed).generate_state(3)), 3)
    state = torch.get_rng_state()
    # `torch.manual_seed` also tells every kind of device, which takes longer than reading an item.
    torch.default_generator.manual_seed(first)
    random.seed(second)
    np.random.seed(third)  # noqa: NPY002
    try:
        yield
    finally:
        torch.set_rng_state(state)
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
