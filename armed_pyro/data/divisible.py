"""`DivisibleRows`: rows that are divided into training and validation rows, folds and clusters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, Self

import numpy as np
from torch import Tensor

from armed_pyro._messages import INTEGER, check_type
from armed_pyro.data.grouping import Grouping
from armed_pyro.data.stratify import held_clusters, held_rows, stratified_order

__all__ = ["DivisibleRows"]


class DivisibleRows(ABC):
    """Rows in clusters, with an outcome, of which some can be taken."""

    groupings: Mapping[str, Grouping]
    outcome: Tensor | None
    status: Tensor | None
    classes: tuple[Any, ...] | None

    @property
    @abstractmethod
    def n_rows(self) -> int:
        """Number of rows."""

    @abstractmethod
    def take(self, rows: Any) -> Self:
        """The rows at these positions, mask or slice, with the clusters that occur in them."""

    @abstractmethod
    def grouping(self, factor: str) -> Grouping:
        """The grouping by a factor, or by cells; ValueError without one."""

    def split_rows(self, fraction: float, *, by: str | None = None, seed: int) -> tuple[Self, Self]:
        """Training and validation rows, stratified by cluster and outcome.

        Every cluster of the factor `by` (by default the first) gives `fraction` of its rows, to
        within one row, to validation. These are spread over the classes of the outcome, or over
        its values if there are at most ten. Every cluster of every factor keeps a training row.

        Raises
        ------
        ValueError
            If `fraction` is not between 0 and 1, or leaves no validation rows.
        """
        held = held_rows(self._order(by, seed), self.groupings.values(), fraction, seed)
        return self.take(~held), self.take(held)

    def folds(self, n: int, *, seed: int) -> Iterator[tuple[Self, Self]]:
        """Training and test rows of n-fold cross-validation, stratified as in `split_rows`.

        Every row is a test row in exactly one fold. A cluster with a single row is unseen in the
        fold that tests it.

        Raises
        ------
        ValueError
            If `n` is below 2 or above the number of rows.
        """
        check_type(n, INTEGER, "n")
        if not 2 <= n <= self.n_rows:
            raise ValueError(f"n must be between 2 and the {self.n_rows} rows, found {n}.")
        fold = np.empty(self.n_rows, dtype=np.int64)
        fold[self._order(None, seed)] = np.arange(self.n_rows) % n
        return ((self.take(fold != k), self.take(fold == k)) for k in range(n))

    def _order(self, by: str | None, seed: int) -> np.ndarray:
        """`stratified_order` of the rows, by a factor (or the first), and outcome or status."""
        factor = by or next(iter(self.groupings), None)
        none = np.zeros(self.n_rows, np.int64)
        clusters = none if factor is None else self.grouping(factor).codes.numpy()
        known = self.outcome if self.status is None else self.status
        outcome = None if known is None else known.numpy()
        return stratified_order(clusters, outcome, seed, categorical=self.classes is not None)

    def hold_out_clusters(
        self, factor: str, *, fraction: float | None = None, labels: Any = None, seed: int = 0
    ) -> tuple[Self, Self]:
        """Rows of the other clusters, and of the clusters held out: a random fraction, or `labels`.

        Raises
        ------
        ValueError
            If a label is unknown, or either side would have no rows.
        """
        held = held_clusters(self.grouping(factor), factor, fraction, labels, seed)
        return self.take(~held), self.take(held)
