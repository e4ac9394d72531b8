"""`Snapshots`: a network's tensors at several windows of its training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Snapshots"]

State = dict[str, Tensor]


@dataclass
class Snapshots:
    """The tensors after multiples of s windows, at most `MOST`; the stride s doubles when needed.

    Examples
    --------
    >>> snapshots = Snapshots()
    >>> for window in range(100):
    ...     snapshots.add(window, {"weight": torch.tensor([float(window)])})
    >>> snapshots.stride, len(snapshots.states), snapshots.near(50)["weight"].item()
    (8, 13, 48.0)
    """

    states: dict[int, State] = field(default_factory=dict)
    stride: int = 1

    MOST = 24

    def add(self, window: int, state: State) -> None:
        """Keep the state after this window, if its turn has come."""
        if window % self.stride:
            return
        self.states[window] = state
        if len(self.states) > self.MOST:
            self.stride *= 2
            self.states = {k: v for k, v in self.states.items() if k % self.stride == 0}

    def near(self, window: int) -> State:
        """Mean of the state nearest to a window and of its neighbours.

        The mean takes the noise of single steps out of the weights, as falling learning rates
        would. Whole numbers, such as counts of batches, are those of the nearest state.
        """
        kept = sorted(self.states)
        place = min(range(len(kept)), key=lambda i: abs(kept[i] - window))
        around = [self.states[kept[i]] for i in range(max(0, place - 1), min(len(kept), place + 2))]
        nearest = self.states[kept[place]]
        return {
            name: torch.stack([state[name] for state in around]).mean(0)
            if value.is_floating_point()
            else value
            for name, value in nearest.items()
        }

    def tensors(self, prefix: str) -> State:
        """All tensors by name, for a checkpoint."""
        return {
            f"{prefix}.{window}.{name}": value
            for window, state in self.states.items()
            for name, value in state.items()
        }

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], prefix: str) -> Snapshots:
        """The snapshots whose `tensors` have this prefix."""
        snapshots = cls()
        for name, value in tensors.items():
            if name.startswith(f"{prefix}."):
                window, rest = name.removeprefix(f"{prefix}.").split(".", 1)
                snapshots.states.setdefault(int(window), {})[rest] = value
        kept = sorted(snapshots.states)
        snapshots.stride = kept[1] - kept[0] if len(kept) > 1 else 1
        return snapshots
