"""Uncertainty of a cross-fitted network, by the delete-a-group jackknife over its parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from armed_pyro._messages import check_known
from armed_pyro.inference.posterior import Posterior
from armed_pyro.networks.taps import run
from armed_pyro.program.fold_networks import FoldNetworks
from armed_pyro.program.model import MixedEffects, trains_network
from armed_pyro.rows.batch import Rows

__all__ = ["NetworkJackknife", "NetworkUncertainty"]

NetworkUncertainty = Literal["none", "jackknife"]


@dataclass(frozen=True, eq=False)
class NetworkJackknife:
    r"""Draws of a network's error, :math:`\sum_m w_m (f_m(x) - \bar f(x))`.

    The networks :math:`f_1, \dots, f_g` were each trained without one of g groups of clusters or
    rows. The weights w are t-distributed with g - 1 degrees of freedom and scale
    :math:`\sqrt{(g - 1) / g}`, so that any quantity that is linear in the network has the
    jackknife's variance :math:`\frac{g - 1}{g} \sum_m (\theta_m - \bar\theta)^2`.

    Features with latent linear effects beside the network are settled on the outputs of all
    networks, with a posterior. The straight lines in the errors, by least squares over the training
    rows, are therefore left out (`trends`).

    References
    ----------
    Kott (2001), "The delete-a-group jackknife", Journal of Official Statistics 17(4).
    """

    folds: FoldNetworks
    weights: Float[Tensor, "draws networks"]
    center: Float[Tensor, " features"]
    trends: Float[Tensor, "networks features columns"] | None

    @classmethod
    def of(
        cls, posterior: Posterior, kind: NetworkUncertainty, draws: int, seed: int
    ) -> NetworkJackknife | None:
        """The jackknife of a fit's networks; None if it is not asked for, or not needed."""
        model = posterior.model
        check_known("value of network_uncertainty=", [kind], get_args(NetworkUncertainty))
        if kind == "none" or not trains_network(model):
            return None
        folds = model.fold_networks
        if folds is None:
            raise ValueError(
                "network_uncertainty='jackknife' needs networks that were each trained without a "
                "part of the rows, but this fit has a single network: fit with validation='auto' "
                "and Schedule(folds=5), the defaults, without adversary or effects on layers"
            )
        groups = len(folds)
        generator = torch.Generator().manual_seed(seed)
        normal = torch.randn(draws, groups, generator=generator, dtype=torch.float64)
        squares = torch.randn(draws, groups - 1, generator=generator, dtype=torch.float64).square()
        scale = (squares.mean(1, keepdim=True) * groups / (groups - 1)).rsqrt()
        rows = model.encode(posterior.data).all()
        x = rows.x.double()
        center, trends = x.mean(0), None
        if model.data_facts().linear_names:
            with torch.no_grad():
                errors = _errors(model, folds, rows).double()
            trends = torch.linalg.pinv(x - center) @ errors
        return cls(folds, normal * scale, center, trends)

    def shift(self, model: MixedEffects, rows: Rows) -> Float[Tensor, "draws rows columns"]:
        """The error of the predictor in every draw."""
        errors = _errors(model, self.folds, rows)
        if self.trends is not None:
            errors = errors - (rows.x.to(errors) - self.center.to(errors)) @ self.trends.to(errors)
        weights, facts = self.weights.to(errors), model.data_facts()
        shift = facts.spread * torch.einsum("dm,mnp->dnp", weights, errors)
        return pad(shift, (0, len(facts.columns) - shift.shape[-1]))  # parameters have no network


def _errors(
    model: MixedEffects, folds: FoldNetworks, rows: Rows
) -> Float[Tensor, "networks rows columns"]:
    """Outputs of the networks less their mean, in standardised units."""
    x = rows.x.to(model.network_reference().dtype)
    outputs = [run(network, x)[0].reshape(len(x), -1) for network in folds.networks]
    each = torch.stack([model.family.contrasts(output) for output in outputs])
    return (each - each.mean(0)).to(model.reference())
