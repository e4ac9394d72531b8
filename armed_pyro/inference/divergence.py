"""The error of a training run that diverged, and the words for its cause."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from armed_pyro.engine.loss import Loss
from armed_pyro.inference.posterior import Posterior

__all__ = ["TrainingDiverged", "blame", "not_finite"]


class TrainingDiverged(RuntimeError):  # noqa: N818
    """The loss or its gradient is no longer finite, or the loss grew beyond all bounds.

    Attributes
    ----------
    posterior : Posterior
        The posterior at the start of the window of steps with the lowest mean loss.

    Examples
    --------
    >>> issubclass(TrainingDiverged, RuntimeError)
    True
    """

    def __init__(self, message: str, posterior: Posterior) -> None:
        super().__init__(message)
        self.posterior = posterior


def blame(loss: Loss) -> str:
    """Name the parts of a loss that are not finite."""
    parts = {
        "the evidence lower bound": loss.elbo,
        "the likelihood under fixed effects alone": loss.fixed,
        "the adversaries' cross-entropy": loss.adversarial,
    }
    bad = [name for name, value in parts.items() if not math.isfinite(float(value))]
    return f"{' and '.join(bad) or 'the total'} is not finite"


def not_finite(state: Mapping[str, Tensor]) -> str:
    """Clause that names up to three parameters that are not finite; empty if all are finite."""
    bad = [name for name, value in state.items() if not torch.isfinite(value).all()]
    return f"; parameters not finite: {', '.join(bad[:3])}" if bad else ""
