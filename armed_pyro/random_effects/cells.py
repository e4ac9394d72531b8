"""Cells of a process: the points in time of every cluster, read from labels ``"cluster:time"``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from armed_pyro._messages import listing
from armed_pyro.data.label_matching import label_key

__all__ = ["Cells"]


@dataclass(frozen=True, eq=False)
class Cells:
    """Cluster and time of every cell of a grouping factor ``"cluster:time"``.

    `cluster` are positions in `clusters`, the clusters' labels as `label_key` writes them.

    >>> cells = Cells.of(pd.Index(["a:1", "a:2.5", "b:1"]), "id:week")
    >>> cells.cluster.tolist(), cells.time.tolist(), cells.shortest_gap()
    ([0, 0, 1], [1.0, 2.5, 1.0], 1.5)
    """

    factor: str
    clusters: tuple[str, ...]
    cluster: Int[np.ndarray, " cells"]
    time: Float[np.ndarray, " cells"]

    @classmethod
    def of(cls, labels: pd.Index, factor: str, clusters: Sequence[str] = ()) -> Cells:
        """The cells with these labels; clusters that are not among `clusters` follow these.

        Raises
        ------
        ValueError
            If a time is no number.
        """
        outer, time = list[str](), np.empty(len(labels))
        wrong = list[str]()
        for place, label in enumerate(labels):
            cluster, _, text = str(label).rpartition(":")
            outer.append(label_key(cluster))
            try:
                time[place] = float(text)
            except ValueError:
                time[place] = math.nan
            if not math.isfinite(time[place]):
                wrong.append(text)
        if wrong:
            raise ValueError(
                f"the times of {factor!r} must be numbers, found {listing(wrong[:3])}: turn dates "
                "into numbers, such as days or years since the first one"
            )
        known = {name: place for place, name in enumerate(clusters)}
        for name in outer:
            known.setdefault(name, len(known))
        codes = np.array([known[name] for name in outer], dtype=np.int64)
        return cls(factor, tuple(known), codes, time)

    def __len__(self) -> int:
        return len(self.time)

    def take(self, chosen: Bool[np.ndarray, " cells"]) -> Cells:
        """The chosen cells, with the same numbers of clusters."""
        return Cells(self.factor, self.clusters, self.cluster[chosen], self.time[chosen])

    def joined(self, other: Cells) -> Cells:
        """These cells, followed by others whose clusters begin with these clusters."""
        cluster = np.concatenate([self.cluster, other.cluster])
        time = np.concatenate([self.time, other.time])
        return Cells(self.factor, other.clusters, cluster, time)

    def shortest_gap(self) -> float:
        """Shortest positive time between two cells of a cluster; 1 if no cluster has two times."""
        return float(self._gaps().min())

    def median_gap(self) -> float:
        """Median time between neighbouring cells of a cluster."""
        return float(np.median(self._gaps()))

    def _gaps(self) -> Float[np.ndarray, " gaps"]:
        order = np.lexsort((self.time, self.cluster))
        gaps = np.diff(self.time[order])[np.diff(self.cluster[order]) == 0]
        gaps = gaps[gaps > 0]
        return gaps if len(gaps) else np.ones(1)
