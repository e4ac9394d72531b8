"""Batches read ahead by a thread, and an endless sequence of passes over the rows."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from armed_pyro.rows.batch import Rows

__all__ = ["Passes", "ahead"]

T = TypeVar("T")


def ahead(items: Iterable[T], depth: int = 2) -> Iterator[T]:
    """Yield the items, which a thread makes up to `depth` items ahead.

    An error in the thread is raised in place of its item. The thread ends when the loop over the
    items ends, also by an error.
    """
    iterator, end = iter(items), object()
    pool = ThreadPoolExecutor(1, "read-ahead")
    try:
        pending = deque(pool.submit(next, iterator, end) for _ in range(depth))
        while (item := pending.popleft().result()) is not end:
            pending.append(pool.submit(next, iterator, end))
            yield item  # type: ignore[misc]
    finally:
        pool.shutdown(cancel_futures=True)


class Passes:
    """Mini-batches of pass after pass, each in a new random order; can be saved and resumed.

    Torch's global generator draws the orders. Its state before a pass stands for the order of the
    rows, so a checkpoint need not hold the order. `begin` starts a pass and returns its batches.
    It must use the generator only before the first batch; otherwise a restored pass differs.

    Examples
    --------
    >>> from armed_pyro.rows.in_memory import HeldRows
    >>> rows = HeldRows(torch.zeros(4, 1), torch.arange(4.0), {}, {})
    >>> passes = Passes(lambda generator: rows.batches(2, generator))
    >>> sorted([*next(passes).y.tolist(), *next(passes).y.tolist()])
    [0.0, 1.0, 2.0, 3.0]
    """

    def __init__(self, begin: Callable[[torch.Generator], Iterator[Rows]]) -> None:
        self.begin = begin
        self._batches: Iterator[Rows] = iter(())
        self._state, self._taken = torch.empty(0, dtype=torch.uint8), 0

    def __next__(self) -> Rows:
        rows = next(self._batches, None)
        if rows is None:
            self._state, self._taken = torch.get_rng_state(), 0
            self._batches = self.begin(torch.default_generator)
            rows = next(self._batches)
        self._taken += 1
        return rows

    def state(self) -> dict[str, Tensor]:
        """The state of the generator before this pass, and the number of batches taken from it."""
        return {"pass": self._state, "batches_taken": torch.tensor(self._taken)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from a `state`; batches already taken are read again and skipped."""
        self._state, self._taken = tensors["pass"], int(tensors["batches_taken"])
        if len(self._state):
            generator = torch.Generator()
            generator.set_state(self._state)
            self._batches = islice(self.begin(generator), self._taken, None)
