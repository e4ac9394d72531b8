"""The error of a training run that has run away, and what is to blame."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from armed_pyro.engine.loss import Loss
from armed_pyro.inference.posterior import Posterior

__all__ = ["TrainingDiverged", "blame", "not_finite"]


class TrainingDiverged(RuntimeError):  # noqa: N818
    """The loss or its gradient is no longer finite, or has run away.

    Attributes
    ----------
    posterior : Posterior
        What was known at the start of the window of steps with the lowest mean loss.
    """

    def __init__(self, message: str, posterior: Posterior) -> None:
        super().__init__(message)
        self.posterior = posterior


def blame(loss: Loss) -> str:
    """Which parts of a loss are not finite, in words."""
    parts = {
        "the evidence lower bound": loss.elbo,
        "the likelihood under fixed effects alone": loss.fixed,
        "the adversaries' cross-entropy": loss.adversarial,
    }
    bad = [name for name, value in parts.items() if not math.isfinite(float(value))]
    return f"{' and '.join(bad) or 'the total'} is not finite"


def not_finite(state: Mapping[str, Tensor]) -> str:
    """Which parameters are not finite, to follow another sentence; empty if all are."""
    bad = [name for name, one in state.items() if not torch.isfinite(one).all()]
    return f"; parameters not finite: {', '.join(bad[:3])}" if bad else ""
