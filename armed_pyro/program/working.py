"""First and second derivatives of the rows' log-likelihood in their predictor."""

from __future__ import annotations

import torch
from torch import Tensor

from armed_pyro.families.family import Eta
from armed_pyro.program.plan import Plan
from armed_pyro.random_effects.covariance import Latents
from armed_pyro.rows.batch import Rows

__all__ = ["derivatives", "gradients"]


def derivatives(model: Plan, eta: Eta, latents: Latents, rows: Rows) -> tuple[Tensor, Tensor]:
    """d log p(y | eta) / d eta, and minus the second derivative in each column of eta.

    Where log p(y | eta) is not concave, its expectation, the Fisher information, takes the place of
    the second derivative, which may be negative.
    """
    with torch.enable_grad():
        eta = eta.detach().requires_grad_(True)
        log_prob = model.density(eta, latents, rows).log_prob(rows.outcome())
        concave = model.family.is_log_concave
        (slope,) = torch.autograd.grad(log_prob.sum(), eta, create_graph=concave)
        if not concave:
            return slope, _information(model, eta.detach(), latents, rows)
        second = gradients(slope, eta)
    # The Hessian's diagonal: each column's derivative of its own slope.
    diagonal = torch.stack([part[..., column] for column, part in enumerate(second)], -1)
    return slope.detach(), -diagonal


def _information(model: Plan, eta: Eta, latents: Latents, rows: Rows) -> Tensor:
    """Fisher information of eta, "... rows columns"."""
    parameters = model.row_parameters(model.family_parameters(latents), rows)
    information = model.family.information(eta, parameters, rows)
    if information is None:
        raise ValueError(
            f"family {model.family.name!r} is not log-concave and must define `information`"
        )
    # Draws that only the parameters have are summed, as they are in the slope.
    shape = torch.broadcast_shapes(information.shape, eta.shape)
    return information.expand(shape).sum_to_size(eta.shape)


def gradients(columns: Tensor, inputs: Tensor, *, create_graph: bool = False) -> list[Tensor]:
    """Gradient in the inputs of the sum of each column."""
    return [
        torch.autograd.grad(values.sum(), inputs, retain_graph=True, create_graph=create_graph)[0]
        for values in columns.unbind(-1)
    ]
