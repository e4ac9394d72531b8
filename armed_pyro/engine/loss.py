"""The training loss and its parts."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

__all__ = ["Loss"]


@dataclass(frozen=True)
class Loss:
    """Parts of the objective, each a mean over rows; training minimises `total`."""

    total: Float[Tensor, ""]  # -elbo + lambda_F * fixed + adversarial
    elbo: Float[Tensor, ""]  # estimate of the evidence lower bound, divided by the number of rows
    fixed: Float[Tensor, ""]  # -log p(y | fixed effects alone)
    adversarial: Float[Tensor, ""]  # sum of the adversaries' cross-entropies
    accuracy: Float[Tensor, " adversaries"]  # fraction of rows whose cluster each one predicts
