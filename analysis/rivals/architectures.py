"""Networks that models are compared around, and the layers that models attach to."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from armed_pyro import FilterScaleBias, Reconstruction
from armed_pyro.models.autoencoder import AutoencoderClassifier
from armed_pyro.models.convolutional import convolutional

__all__ = ["Architecture", "Autoencoder", "Convolution", "Decoder", "Dense"]


@dataclass(frozen=True)
class Decoder:
    """The part of a network that rebuilds its features.

    Attributes
    ----------
    at : str
        Module path; the module's output has the features' shape.
    filters : tuple of str
        Module paths within it whose filters random effects scale and shift.

    Examples
    --------
    >>> [str(term) for term in Decoder("decoder", ("decoder.norm1",)).terms("batch")]
    ["FilterScaleBias('batch', at='decoder.norm1')"]
    """

    at: str
    filters: tuple[str, ...] = ()

    def outcome(self, feature_shape: Sequence[int]) -> Reconstruction:
        """The features as a second outcome that weighs as much as the label."""
        return Reconstruction(self.at, weight=1 / math.prod(feature_shape))

    def terms(self, factor: str) -> tuple[FilterScaleBias, ...]:
        """Random effects on the filters."""
        return tuple(FilterScaleBias(factor, at=path) for path in self.filters)


class Architecture(ABC):
    """A recipe for a network, for features of any shape, and the layers that models attach to."""

    @property
    @abstractmethod
    def taps(self) -> tuple[str, ...]:
        """Module paths that an adversary reads."""

    @property
    @abstractmethod
    def last(self) -> str:
        """Module path of the layer whose activations random slopes multiply."""

    @property
    @abstractmethod
    def decoder(self) -> Decoder | None:
        """The part that rebuilds the features; None if there is none."""

    @abstractmethod
    def build(self, feature_shape: Sequence[int]) -> nn.Module:
        """The network for features of this shape per row; weights come from torch's generator."""


@dataclass(frozen=True)
class Dense(Architecture):
    """Hidden layers of ELU units and one output; Glorot's first weights, first biases of zero.

    Attributes
    ----------
    hidden : tuple of int
        Widths; the layers' activations are the modules ``"1"``, ``"3"``, ...

    Examples
    --------
    >>> Dense((8, 8)).taps
    ('1', '3')
    """

    hidden: tuple[int, ...]

    @property
    def taps(self) -> tuple[str, ...]:
        return tuple(str(2 * layer + 1) for layer in range(len(self.hidden)))

    @property
    def last(self) -> str:
        return self.taps[-1]

    @property
    def decoder(self) -> None:
        return None

    def build(self, feature_shape: Sequence[int]) -> nn.Sequential:
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise([*feature_shape, *self.hidden]):
            layers += [nn.Linear(before, after), nn.ELU()]
        net = nn.Sequential(*layers, nn.Linear(self.hidden[-1], 1))
        for layer in net:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        return net


@dataclass(frozen=True)
class Convolution(Architecture):
    """The paper's convolutional network; see `armed_pyro.models.convolutional`.

    Attributes
    ----------
    widths : tuple of int
        Filters of each block.
    units : int
        Width of the dense layer.

    Examples
    --------
    >>> Convolution((4, 8), 6).taps
    ('block1', 'block2')
    """

    widths: tuple[int, ...]
    units: int

    @property
    def taps(self) -> tuple[str, ...]:
        return tuple(f"block{number + 1}" for number in range(len(self.widths)))

    @property
    def last(self) -> str:
        return "hidden"

    @property
    def decoder(self) -> None:
        return None

    def build(self, feature_shape: Sequence[int]) -> nn.Module:
        return convolutional(feature_shape, widths=self.widths, units=self.units)


@dataclass(frozen=True)
class Autoencoder(Architecture):
    """The paper's autoencoder-classifier; see `armed_pyro.models.autoencoder`.

    Attributes
    ----------
    widths : tuple of int
        Filters of each of the encoder's convolutions.
    latents : int
        Dimensions of the latent space, whose values random slopes multiply.
    units : int
        Width of the classifier's hidden layer.

    Examples
    --------
    >>> Autoencoder((4, 8), latents=3, units=4).decoder.filters
    ('decoder.norm1',)
    """

    widths: tuple[int, ...]
    latents: int
    units: int

    @property
    def taps(self) -> tuple[str, ...]:
        return tuple(f"encoder.conv{number + 1}" for number in range(len(self.widths)))

    @property
    def last(self) -> str:
        return "latents"

    @property
    def decoder(self) -> Decoder:
        # The last convolution makes the image and has no normalisation.
        return Decoder("decoder", tuple(f"decoder.norm{k}" for k in range(1, len(self.widths))))

    def build(self, feature_shape: Sequence[int]) -> nn.Module:
        return AutoencoderClassifier(
            feature_shape, widths=self.widths, latents=self.latents, units=self.units
        )
