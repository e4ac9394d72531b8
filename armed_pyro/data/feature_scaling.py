"""Names and scales of features as they enter a network."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from armed_pyro.data.clustered import ClusteredData


@dataclass(frozen=True)
class FeatureScaling:
    """(x - mean) / scale, with mean 0 and scale 1 for dummies and for columns of 0 and 1.

    Names, table columns (`sources`), mean and standard deviation over the training rows are those
    of the encoded columns; all are empty for images, which are not scaled. `average` are the means
    of all columns, dummies included; empty in fits that were saved before it was kept.

    >>> scaling = FeatureScaling(("age",), ("age",), (50.0,), (10.0,))
    >>> scaling.standardise(torch.tensor([[60.0]])).tolist()
    [[1.0]]
    """

    names: tuple[str, ...]
    sources: tuple[str, ...]
    mean: tuple[float, ...]
    scale: tuple[float, ...]
    average: tuple[float, ...] = ()

    @classmethod
    def of(cls, data: ClusteredData) -> FeatureScaling:
        """The scaling that gives continuous features mean 0 and variance 1 in these rows."""
        continuous = torch.tensor(data.continuous, dtype=torch.bool)
        if not len(continuous):
            return cls(data.feature_names, data.sources, (), ())
        mean, scale = data.features.mean(0), data.features.std(0)
        average = tuple(mean.tolist())
        mean = torch.where(continuous, mean, torch.zeros_like(mean))
        scale = torch.where(continuous, scale, torch.ones_like(scale))
        names, sources = data.feature_names, data.sources
        return cls(names, sources, tuple(mean.tolist()), tuple(scale.tolist()), average)

    def standardise(self, features: Float[Tensor, "rows ..."]) -> Float[Tensor, "rows ..."]:
        """(x - mean) / scale, in double precision; images are returned as they are."""
        if not self.mean:
            return features
        mean = torch.tensor(self.mean, dtype=torch.float64)
        scale = torch.tensor(self.scale, dtype=torch.float64)
        return (features.to(torch.float64) - mean) / scale
