"""Names and scales of features as they enter a network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from armed_pyro.data.clustered import ClusteredData

# Root mean square of an image's values beyond which a network would start far from its outcome.
FAR = 10.0
# Channels of images, at most; a longer second axis is one of space.
MOST_CHANNELS = 64


@dataclass(frozen=True)
class FeatureScaling:
    """(x - mean) / scale, with mean 0 and scale 1 for dummies and for columns of 0 and 1.

    Names, table columns (`sources`), mean and standard deviation over the training rows are those
    of the encoded columns; all are empty for images, which are not scaled. `indicators` has, by
    categorical column, the names of the indicators of all its levels. `average` are the means of
    all columns, dummies included; empty in fits that were saved before it was kept.

    >>> scaling = FeatureScaling(("age",), ("age",), (50.0,), (10.0,))
    >>> scaling.standardise(torch.tensor([[60.0]])).tolist()
    [[1.0]]
    """

    names: tuple[str, ...]
    sources: tuple[str, ...]
    mean: tuple[float, ...]
    scale: tuple[float, ...]
    indicators: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    average: tuple[float, ...] = ()

    @classmethod
    def of(cls, data: ClusteredData) -> FeatureScaling:
        """The scaling that gives continuous features mean 0 and variance 1 in these rows.

        Without an intercept or columns that sum to 1 in its place, features keep their origin, and
        have mean square 1.
        """
        if not len(data.continuous):
            return cls(data.feature_names, data.sources, (), ())
        centred = data.intercept or bool(intercept_columns(data))
        mean, scale = moments(data.features, data.continuous, centred=centred)
        average = tuple(data.features.mean(0).tolist())
        return cls(data.feature_names, data.sources, mean, scale, average=average)

    @classmethod
    def of_slopes(cls, data: ClusteredData) -> FeatureScaling:
        """The scaling of the columns that only random slopes use."""
        if data.slopes is None:
            return cls((), (), (), ())
        mean, scale = moments(data.slopes, data.slope_continuous)
        average = tuple(data.slopes.mean(0).tolist())
        return cls(data.slope_names, data.slope_sources, mean, scale, average=average)

    def joined(
        self, other: FeatureScaling, indicators: Mapping[str, tuple[str, ...]]
    ) -> FeatureScaling:
        """The scaling of these columns, followed by those of another."""
        return FeatureScaling(
            self.names + other.names,
            self.sources + other.sources,
            self.mean + other.mean,
            self.scale + other.scale,
            indicators,
            self.average + other.average,
        )

    def standardise(self, features: Float[Tensor, "rows ..."]) -> Float[Tensor, "rows ..."]:
        """(x - mean) / scale, in double precision; images are returned as they are."""
        if not self.mean:
            return features
        mean = torch.tensor(self.mean, dtype=torch.float64)
        scale = torch.tensor(self.scale, dtype=torch.float64)
        return (features.to(torch.float64) - mean) / scale


@dataclass(frozen=True)
class ImageScaling:
    """(x - mean) / scale of the values of images, one of each for every channel or for all.

    Images of whole numbers, and those whose values have a root mean square above `FAR`, are
    standardised by the training rows. Others are left as they are: mean and scale are empty.
    """

    mean: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()

    @classmethod
    def of(cls, features: Tensor) -> ImageScaling:
        """The scaling of images "rows channels ..." or "rows ..."; of tables, none."""
        if features.dim() < 3 or not features.numel():
            return cls()
        mean, square = image_moments(features)
        plain = features.is_floating_point() and float((square + mean**2).mean().sqrt()) <= FAR
        if plain:
            return cls()
        scale = square.sqrt()
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        return cls(tuple(mean.tolist()), tuple(scale.tolist()))

    def standardise(self, features: Tensor) -> Tensor:
        """(x - mean) / scale in single precision, or doubles as doubles; else x itself."""
        if not self.mean:
            return features
        dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
        shape = (len(self.mean), *[1] * (features.dim() - 2))
        mean, scale = (torch.tensor(v, dtype=dtype).reshape(shape) for v in (self.mean, self.scale))
        return (features.to(dtype) - mean) / scale


def image_moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of images, by channel if they have up to `MOST_CHANNELS`; else of all."""
    by_channel = features.dim() > 3 and features.shape[1] <= MOST_CHANNELS
    channels = features.shape[1] if by_channel else 1
    count, total = 0, torch.zeros(channels, dtype=torch.float64)
    square = total.clone()
    for part in features.split(256):
        values = part.double().reshape(len(part), channels, -1)
        count += values.shape[0] * values.shape[2]
        total += values.sum((0, 2))
        square += values.square().sum((0, 2))
    mean = total / count
    return mean, (square / count - mean**2).clamp(min=0)


def moments(
    values: Float[Tensor, "rows columns"], continuous: tuple[bool, ...], *, centred: bool = True
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Means and sds of the continuous columns, 0 and 1 of others; roots of mean squares at 0."""
    scaled = torch.tensor(continuous, dtype=torch.bool)
    mean, scale = values.mean(0), values.std(0)
    # The rounding errors of a constant column's mean must not become its scale.
    constant = (values == values[:1]).all(0)
    mean, scale = torch.where(constant, values[0], mean), scale.masked_fill(constant, 0.0)
    if not centred:
        mean, scale = torch.zeros_like(mean), values.square().mean(0).sqrt()
    mean = torch.where(scaled, mean, torch.zeros_like(mean))
    scale = torch.where(scaled & (scale > 0), scale, torch.ones_like(scale))
    return tuple(mean.tolist()), tuple(scale.tolist())


def intercept_columns(data: ClusteredData) -> tuple[int, ...]:
    """Positions of the columns of the first term that sum to 1 in every row; none without one.

    These are the indicators of all levels of a factor in ``0 + factor``, or a column of ones.
    """
    for source in dict.fromkeys(data.sources):
        places = [place for place, name in enumerate(data.sources) if name == source]
        if bool((data.features[:, places].sum(1) == 1).all()):
            return tuple(places)
    return ()
