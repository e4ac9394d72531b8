"""`Between`: clusters' means of features as further fixed effects, beside the network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from armed_pyro.data.cluster_means import ClusterMeans, ClusterSums
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.data.label_matching import match_labels

__all__ = ["Between", "BetweenChoice", "feature_sums"]

# None stands for False in a linear program, and for "auto" in a network.
BetweenChoice = Literal["auto"] | bool | None


@dataclass(frozen=True, eq=False)
class Between:
    r"""m_g of encoded features by factor, as columns :math:`(m_g - center) / scale`.

    `means` are those of `armed_pyro.data.cluster_means`; without any, `note` says why. Centers and
    scales, over the training rows, are those of the columns of all factors.
    """

    means: Mapping[str, ClusterMeans]
    center: tuple[float, ...]
    scale: tuple[float, ...]
    note: str

    @classmethod
    def of(
        cls, sums: Mapping[str, ClusterSums], chosen: Mapping[str, tuple[str, ...]], note: str
    ) -> Between:
        """Means of the chosen features, from sums of these over the training rows."""
        means = {factor: ClusterMeans.of(chosen[factor], part) for factor, part in sums.items()}
        center, scale = list[float](), list[float]()
        for factor, part in sums.items():
            share = part.count[:, None] / part.count.sum()
            average = (share * means[factor].means).sum(0)
            spread = np.sqrt((share * (means[factor].means - average) ** 2).sum(0))
            center += average.tolist()
            scale += np.where(spread > 0, spread, 1.0).tolist()
        return cls(means, tuple(center), tuple(scale), note)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the columns, ``between(x | g)``."""
        pairs = self.means.items()
        return tuple(f"between({x} | {factor})" for factor, m in pairs for x in m.columns)

    def known(self, data: ClusteredData) -> Mapping[str, ClusterMeans]:
        """The means, with those of new clusters that the data bring with them."""
        pairs = ((data.cluster_means.get(factor), own) for factor, own in self.means.items())
        if all(means is not None and means.extends(own) for means, own in pairs):
            return data.cluster_means
        return self.means

    def extended(self, data: ClusteredData) -> dict[str, ClusterMeans]:
        """The means, with those of the new clusters of these rows."""
        known = self.known(data)
        if not data.n_rows:
            return dict(known)
        return {
            factor: means.extended(feature_sums(data, factor, means.columns))
            for factor, means in known.items()
        }

    def columns(self, data: ClusteredData) -> Float[Tensor, "rows columns"]:
        """The standardised columns of these rows."""
        extended = self.extended(data)
        parts = [np.zeros((data.n_rows, 0))]
        for factor, means in extended.items():
            grouping = data.grouping(factor)
            places = match_labels(grouping.levels, means.levels, f"grouping factor {factor!r}")
            parts.append(means.means[places[grouping.codes.numpy()]])
        return self._standardised(np.concatenate(parts, 1))

    def by_cluster(self, levels: Mapping[str, pd.Index]) -> dict[str, Float[Tensor, "clusters x"]]:
        """The standardised columns of the clusters with these labels, by factor."""
        tables, start = dict[str, Tensor](), 0
        for factor, means in self.means.items():
            stop, what = start + len(means.columns), f"grouping factor {factor!r}"
            places = match_labels(levels[factor], means.levels, what)
            whole = np.zeros((len(places), len(self.center)))
            whole[:, start:stop] = means.means[places]
            tables[factor] = self._standardised(whole)[:, start:stop]
            start = stop
        return tables

    def _standardised(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy((values - np.array(self.center)) / np.array(self.scale))

    def to_json(self) -> dict[str, Any]:
        """The means as JSON values; `from_json` reads them back."""
        means = {factor: means.to_json() for factor, means in self.means.items()}
        return {
            "means": means,
            "center": list(self.center),
            "scale": list(self.scale),
            "note": self.note,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Between:
        """Read means that `to_json` wrote."""
        means = {k: ClusterMeans.from_json(v) for k, v in content["means"].items()}
        return cls(means, tuple(content["center"]), tuple(content["scale"]), content["note"])


def feature_sums(
    data: ClusteredData, factor: str, names: tuple[str, ...], like: ClusterSums | None = None
) -> ClusterSums:
    """Sums of encoded features by cluster; rows count as often as their frequency.

    Sums that are to be added to others, `like`, have their origin.
    """
    places = [data.feature_names.index(name) for name in names]
    counts = data.weights is not None and data.weights_kind == "frequency"
    weights = data.weights.double().numpy() if counts and data.weights is not None else None
    x = data.features[:, places].double().numpy()
    origin = None if like is None else like.origin
    return ClusterSums.of(x, data.grouping(factor), weights, origin)
