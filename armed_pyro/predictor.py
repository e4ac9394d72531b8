"""Linear predictors of rows, and what the network made of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

__all__ = ["Predictor"]


@dataclass(frozen=True)
class Predictor:
    """Linear predictors of some rows, on the original scale.

    Attributes
    ----------
    eta : Float[Tensor, "... rows columns"]
        Fixed and random effects, centre and offset.
    fixed : Float[Tensor, "... rows columns"]
        The same without random effects.
    output : Float[Tensor, "rows ..."]
        The network's output.
    activations : mapping of str to Tensor
        Tapped activations of the network, by module path.
    """

    eta: Float[Tensor, "... rows columns"]
    fixed: Float[Tensor, "... rows columns"]
    output: Tensor
    activations: Mapping[str, Tensor]
