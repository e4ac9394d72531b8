"""A loss by its parts."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

__all__ = ["Loss"]


@dataclass(frozen=True)
class Loss:
    """Parts of the objective, each a mean over rows.

    Attributes
    ----------
    total : Float[Tensor, ""]
        ``-elbo + lambda_F * fixed + game``: what is minimised.
    elbo : Float[Tensor, ""]
        Estimate of the evidence lower bound, divided by the number of rows.
    fixed : Float[Tensor, ""]
        -log p(y | fixed effects alone).
    game : Float[Tensor, ""]
        Cross-entropy of all adversaries together.
    accuracy : Float[Tensor, "adversaries"]
        Share of rows whose cluster each adversary names.
    """

    total: Float[Tensor, ""]
    elbo: Float[Tensor, ""]
    fixed: Float[Tensor, ""]
    game: Float[Tensor, ""]
    accuracy: Float[Tensor, " adversaries"]
