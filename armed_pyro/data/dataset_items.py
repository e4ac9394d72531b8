"""A torch dataset as inputs of a network, and the columns of its rows as a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from armed_pyro._messages import check_known
from armed_pyro.data.files import as_pandas
from armed_pyro.rows.dataset_inputs import DatasetInputs, ItemReader, Items, chosen

__all__ = ["DatasetItems"]

ROLES = ("trials", "offset", "weights", "se")


@dataclass(frozen=True, eq=False)
class DatasetItems:
    """Items of a dataset: their inputs, and a table with a row for each item.

    `names` has the columns of the outcome and of `ROLES`, and `clusters` those of the factors.
    """

    inputs: DatasetInputs
    table: pd.DataFrame
    labels: pd.Index
    names: Mapping[str, str]
    clusters: tuple[str, ...]

    @classmethod
    def of(
        cls,
        dataset: Any,
        table: Any,
        outcome: Any,
        clusters: Any,
        roles: Mapping[str, Any],
        *,
        inputs: Any = None,
        collate: Callable[[list[Any]], Any] | None = None,
        augment: Callable[[Any], Any] | None = None,
        workers: int | None = None,
    ) -> DatasetItems:
        """Items of a dataset or loader; `ClusteredData.from_dataset` documents the parameters."""
        if isinstance(dataset, DataLoader):
            own = None if dataset.collate_fn is default_collate else dataset.collate_fn
            collate = own if collate is None else collate
            workers = dataset.num_workers if workers is None else workers
            dataset = dataset.dataset
        _check_map_style(dataset)
        reader = ItemReader(collate, inputs, augment)
        source = DatasetInputs(dataset, torch.arange(len(dataset)), reader, workers or 0)
        frame, labels = _frame(table, len(dataset))
        named = {"outcome": outcome, **roles}
        by_name = clusters if isinstance(clusters, Mapping) else {name: name for name in clusters}
        if repeated := sorted(set(by_name) & {"outcome", *ROLES}):
            raise ValueError(f"A grouping factor cannot be called {repeated[0]!r}: rename it.")
        wanted = {**{k: v for k, v in named.items() if v is not None}, **by_name}
        columns, choices = dict[str, str](), dict[str, Any]()
        for role, value in wanted.items():
            if isinstance(value, str) and table is not None:
                check_known("column", [value], frame.columns)
                columns[role] = value
            elif callable(value) or isinstance(value, (int, str)):
                choices[role], columns[role] = value, role
            else:
                frame[role], columns[role] = _column(value, len(dataset), role), role
        for role, values in _read_once(dataset, choices, workers or 0).items():
            frame[role] = values
        factors = tuple(columns.pop(name) for name in by_name)
        return cls(source, frame, labels, columns, factors)


def _check_map_style(dataset: Any) -> None:
    """Raise TypeError for anything but a dataset with numbered items, and ValueError for none."""
    iterable = isinstance(dataset, IterableDataset)
    if iterable or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        kind = type(dataset).__name__
        raise TypeError(
            f"dataset must be map-style, with dataset[i] and len(dataset), as mini-batches draw "
            f"its items at random; found {kind}. Give an iterable dataset numbered items, such as "
            "files by position, or list(dataset) if it fits into memory."
        )
    if not len(dataset):
        raise ValueError("The dataset has no items; at least one is needed.")


def _frame(table: Any, n: int) -> tuple[pd.DataFrame, pd.Index]:
    """A copy of the table, its rows numbered, and their labels."""
    if table is None:
        return pd.DataFrame(index=pd.RangeIndex(n)), pd.RangeIndex(n)
    frame = as_pandas(table)
    if len(frame) != n:
        raise ValueError(
            f"The table has {len(frame)} rows and the dataset {n} items; row i must describe "
            "dataset[i]."
        )
    return frame.reset_index(drop=True), frame.index


def _column(value: Any, n: int, role: str) -> Any:
    """An array or list as a column."""
    values = np.asarray(value)
    if values.shape != (n,):
        raise ValueError(
            f"{role} must be one value for each of the {n} items, found the shape {values.shape}."
        )
    return values


def _read_once(dataset: Items, choices: Mapping[str, Any], workers: int) -> dict[str, list[Any]]:
    """Values of the items by role, from one pass over all of them."""
    if not choices:
        return {}
    parts = _Chosen(dataset, tuple(choices.values()))
    loader = DataLoader(parts, batch_size=None, num_workers=workers, collate_fn=_as_it_is)
    columns = zip(*loader, strict=True)
    return {role: list(values) for role, values in zip(choices, columns, strict=True)}


@dataclass(frozen=True, eq=False)
class _Chosen(Dataset[tuple[Any, ...]]):
    """Single values of the items of a dataset."""

    dataset: Items
    choices: Sequence[Any]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> tuple[Any, ...]:
        item = self.dataset[number]
        return tuple(_scalar(chosen(item, choice), number) for choice in self.choices)


def _scalar(value: Any, number: int) -> Any:
    """A number or text of an item."""
    if isinstance(value, (bool, int, float, str)):
        return value
    array = np.asarray(value)
    if array.size != 1:
        raise ValueError(
            f"Item {number} of the dataset has the shape {array.shape}, where one value is "
            "needed, as an outcome or cluster: choose one with a function of the item."
        )
    return array.reshape(()).item()


def _as_it_is(value: Any) -> Any:
    return value
