"""The training loss and its parts."""

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
        ``-elbo + lambda_F * fixed + adversarial``, which training minimises.
    elbo : Float[Tensor, ""]
        Estimate of the evidence lower bound, divided by the number of rows.
    fixed : Float[Tensor, ""]
        -log p(y | fixed effects alone).
    adversarial : Float[Tensor, ""]
        Sum of the adversaries' cross-entropies.
    accuracy : Float[Tensor, "adversaries"]
        Fraction of rows whose cluster each adversary predicts.
    """

    total: Float[Tensor, ""]
    elbo: Float[Tensor, ""]
    fixed: Float[Tensor, ""]
    adversarial: Float[Tensor, ""]
    accuracy: Float[Tensor, " adversaries"]
