"""What the rows tell of outcomes that were not observed exactly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["EVENT", "INTERVAL", "LEFT", "RIGHT", "Censoring"]

# The outcome is above y, equal to y, below y, or between y and `upper`.
RIGHT, EVENT, LEFT, INTERVAL = 0.0, 1.0, 2.0, 3.0

RowValues = Float[Tensor, " rows"]


@dataclass(frozen=True)
class Censoring:
    """Status, upper end and entry of the rows, the columns of `Rows.censoring`.

    `upper` is y unless the status is `INTERVAL`. A row entered observation only because its outcome
    was above `entry`, which is -inf if all outcomes could be observed. Without a third column,
    `entry` is None.
    """

    status: RowValues
    upper: RowValues
    entry: RowValues | None

    @classmethod
    def of(cls, columns: Float[Tensor, "rows columns"]) -> Censoring:
        """The parts of `Rows.censoring`."""
        parts = columns.unbind(-1)
        return cls(parts[0], parts[1], parts[2] if len(parts) > 2 else None)

    @staticmethod
    def columns(
        outcome: RowValues | None,
        status: RowValues | None,
        upper: RowValues | None,
        entry: RowValues | None,
    ) -> Float[Tensor, "rows columns"] | None:
        """`Rows.censoring`; None if all outcomes are exact, or unknown."""
        if outcome is None or (status is None and entry is None):
            return None
        status = torch.full_like(outcome, EVENT) if status is None else status
        parts = [status, outcome if upper is None else upper]
        return torch.stack(parts if entry is None else [*parts, entry], -1)

    @staticmethod
    def exact(
        outcome: RowValues, like: Float[Tensor, "rows columns"]
    ) -> Float[Tensor, "rows columns"]:
        """The columns of rows with exact outcomes, as many as `like` has."""
        parts = [torch.full_like(outcome, EVENT), outcome, torch.full_like(outcome, -torch.inf)]
        return torch.stack(parts[: like.shape[-1]], -1)

    @property
    def is_event(self) -> Bool[Tensor, " rows"]:
        """Whether the outcome is exact."""
        return self.status == EVENT

    @property
    def has_lower(self) -> Bool[Tensor, " rows"]:
        """Whether the outcome is known to be above y: censored from the right, or an interval."""
        return (self.status == RIGHT) | (self.status == INTERVAL)

    @property
    def has_upper(self) -> Bool[Tensor, " rows"]:
        """Whether the outcome is known to be below `upper`: censored from the left, or interval."""
        return (self.status == LEFT) | (self.status == INTERVAL)
