"""`ClusteredRows`: features, outcome and the other columns of rows in clusters, as tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from armed_pyro.data import censoring
from armed_pyro.data.cluster_means import ClusterMeans
from armed_pyro.data.columns import (
    check_trials,
)
from armed_pyro.data.divisible import DivisibleRows
from armed_pyro.data.grouping import Grouping, grouping_by
from armed_pyro.data.schema import Schema, WeightsKind
from armed_pyro.data.training_checks import PER_ROW, check_magnitudes, check_training
from armed_pyro.data.weights import check_weights
from armed_pyro.rows.inputs import LazyInputs

__all__ = ["ClusteredRows"]


@dataclass(frozen=True, eq=False)
class ClusteredRows(DivisibleRows):
    """Abstract: the fields, checks and selections of `ClusteredData`, which documents them."""

    features: Tensor
    feature_names: tuple[str, ...]
    sources: tuple[str, ...]
    continuous: tuple[bool, ...]
    outcome_name: str
    outcome: Tensor | None
    classes: tuple[Any, ...] | None
    groupings: Mapping[str, Grouping]
    trials: Tensor | None
    offset: Tensor | None
    weights: Tensor | None
    row_labels: pd.Index
    schema: Schema | None
    slopes: Tensor | None = None
    slope_names: tuple[str, ...] = ()
    slope_sources: tuple[str, ...] = ()
    slope_continuous: tuple[bool, ...] = ()
    weights_kind: WeightsKind = "frequency"
    table: pd.DataFrame | None = None
    cluster_means: Mapping[str, ClusterMeans] = field(default_factory=dict)
    fold: Tensor | None = None
    inputs: LazyInputs | None = None
    status: Tensor | None = None
    upper: Tensor | None = None
    entry: Tensor | None = None

    def __post_init__(self) -> None:
        lengths = {name: len(grouping.codes) for name, grouping in self.groupings.items()}
        lengths |= {name: len(tensor) for name, tensor in self._row_tensors().items()}
        lengths |= {} if self.inputs is None else {"inputs": len(self.inputs)}
        for name, length in lengths.items():
            if length != self.n_rows:
                raise ValueError(f"{name!r} has {length} rows, the features have {self.n_rows}.")
        check_magnitudes(self._row_tensors(), self._columns())
        if self.trials is not None:
            check_trials(self.trials, self.row_labels)
        if self.weights is not None:
            check_weights(self.weights, self.weights_kind, self.row_labels)
        if self.outcome is not None:
            known = (self.status, self.upper, self.entry)
            censoring.check_censoring(self.outcome, *known, self.row_labels)

    def _row_tensors(self) -> dict[str, Tensor]:
        names = ("features", "outcome", *PER_ROW, "slopes", "fold")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def _columns(self) -> dict[str, Sequence[str]]:
        named = {"features": self.feature_names, "slopes": self.slope_names}
        named["outcome"] = (self.outcome_name,)
        return named | {role: (getattr(self.schema, role, None) or role,) for role in PER_ROW}

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(self.features)

    @property
    def intercept(self) -> bool:
        """Whether the fixed effects have an intercept, which ``0 +`` in the features removes."""
        return self.schema is None or self.schema.intercept

    @property
    def n_features(self) -> int:
        """Number of encoded feature columns; for images, the number of values per row."""
        return int(np.prod(self.features.shape[1:]))

    def __len__(self) -> int:
        return self.n_rows

    def take(self, rows: Any) -> Self:
        """The rows at these positions, mask or slice, with the clusters that occur in them."""
        if not isinstance(rows, slice):
            rows = np.asarray(rows, dtype=None if np.size(rows) else np.int64)
        chosen = np.arange(self.n_rows)[rows]
        tensors: dict[str, Any] = {k: v[chosen] for k, v in self._row_tensors().items()}
        return replace(
            self,
            groupings={name: grouping.take(chosen) for name, grouping in self.groupings.items()},
            row_labels=self.row_labels.take(chosen),
            table=None if self.table is None else self.table.iloc[chosen],
            inputs=None if self.inputs is None else self.inputs.take(torch.from_numpy(chosen)),
            **tensors,
        )

    def grouping(self, factor: str) -> Grouping:
        """The grouping by a factor, or by cells, ``"school:class"``; ValueError without one."""
        return grouping_by(self.groupings, factor, self.n_rows)

    def check_training(self) -> None:
        """Check that there are rows, an outcome and variation, as training needs.

        ValueError also for numbers too large or too small, and for labels that files cannot hold.
        """
        values, varying = self._row_tensors(), self.trials is None
        check_training(values, self._columns(), varying, self.groupings, self.row_labels)
