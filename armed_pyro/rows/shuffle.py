"""Mini-batches without end: one random pass over the rows after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice

import torch
from torch import Tensor

from armed_pyro.rows.batch import Rows

__all__ = ["Passes"]


class Passes:
    """Mini-batches of one pass after the other, each in a new order; can be saved and resumed.

    Orders come from torch's global generator. A pass is told by the state that the generator had
    before it, so that a checkpoint need not hold the order of the rows.

    Parameters
    ----------
    begin : callable
        Gives the batches of one pass; draws from the generator only before the first batch.

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
        """The next mini-batch."""
        rows = next(self._batches, None)
        if rows is None:
            self._state, self._taken = torch.get_rng_state(), 0
            self._batches = self.begin(torch.default_generator)
            rows = next(self._batches)
        self._taken += 1
        return rows

    def state(self) -> dict[str, Tensor]:
        """From where `restore` goes on."""
        return {"pass": self._state, "batches_taken": torch.tensor(self._taken)}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave; the batches taken before are read once more."""
        self._state, self._taken = tensors["pass"], int(tensors["batches_taken"])
        if len(self._state):
            generator = torch.Generator()
            generator.set_state(self._state)
            self._batches = islice(self.begin(generator), self._taken, None)
