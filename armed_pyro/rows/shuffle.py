"""Mini-batches in random order, each row once a pass."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor

from armed_pyro.rows.batch import Rows
from armed_pyro.rows.source import RowSource

__all__ = ["Shuffle"]


@dataclass
class Shuffle:
    """Numbers below n in random order, a few at a time; shuffled anew when they run out.

    Attributes
    ----------
    order : Int[Tensor, "left"]
        Those that are left of this pass.
    """

    order: Int[Tensor, " left"] = field(default_factory=lambda: torch.empty(0, dtype=torch.long))

    def take(self, size: int, n: int) -> Int[Tensor, " size"]:
        """The next `size` of n numbers."""
        if len(self.order) < size:
            # The few that are left over would make a batch of another size.
            self.order = torch.randperm(n)
        taken, self.order = self.order[:size], self.order[size:]
        return taken

    def batch(self, source: RowSource, size: int, dense_up_to: int) -> Rows:
        """The next mini-batch of `size` rows: see `RowSource.batch`."""
        unit, device = source.unit(size), source.like.device
        count = size // unit
        taken = self.take(count, len(source) // unit).to(device)
        following = self.order[:count].to(device) if source.reads_ahead else None
        return source.batch(taken, unit=unit, dense_up_to=dense_up_to, following=following)
