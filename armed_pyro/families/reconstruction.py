"""The features as a second outcome, reconstructed by the network."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from pyro.distributions import TorchDistribution
from torch import Tensor

from armed_pyro.distributions.outcome_densities import IndependentNormal
from armed_pyro.priors import HalfStudentT, ScalePrior
from armed_pyro.rows.batch import Rows

__all__ = ["Reconstruction"]


@dataclass(frozen=True)
class Reconstruction:
    r"""The features as a second outcome, reconstructed by a module of the network.

    .. math:: \log p(x_i, y_i \mid \cdot) = \log p(y_i \mid \eta_i)
        + w \sum_j \log N(x_{ij}; g_j(x_i), sd^2)

    Here g is the output of a module, such as a decoder's last layer, with the cluster effects on
    filters of earlier layers. All values have the same residual sd, the latent site ``<name>_sd``.

    The values of a row are independent given g, although neighbouring pixels are correlated. With
    weight 1, an image of 4,096 pixels dominates the label, and the posterior of effects on filters
    is too narrow. A weight of 1 over the number of values counts each row as one observation.
    `Fit.adapt` uses the family's outcome of new clusters, and not this one.

    Attributes
    ----------
    at : str
        Module path of the layer whose output has the features' shape.
    name : str
        Name of this outcome in results.
    weight : float
        w, the weight of this likelihood; the family's outcome has weight 1.
    prior : ScalePrior
        Prior of the residual sd, in units of the features' sd.

    References
    ----------
    Nguyen, Treacher, Montillo (2023), IEEE TPAMI 45(7), section 3.4: image and label together.

    Examples
    --------
    >>> Reconstruction(at="decoder", weight=1 / 4096).sd_site
    'image_sd'
    """

    at: str
    name: str = "image"
    weight: float = 1.0
    prior: ScalePrior = field(default_factory=HalfStudentT)
    # Initial residual sd of the guide, in units of the features' sd.
    start: ClassVar[float] = 0.5

    def __post_init__(self) -> None:
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise ValueError(f"the weight of {self.name!r} must be positive, not {self.weight}")
        if not self.name:
            raise ValueError("a reconstruction needs a name, such as 'image'")

    @property
    def tap(self) -> str:
        """The text of the layer's tap, whose output is not pooled."""
        return f"{self.at}:whole"

    @property
    def sd_site(self) -> str:
        """Name of the residual sd's site."""
        return f"{self.name}_sd"

    def sample_sd(self, like: Tensor) -> Tensor:
        """Sample the residual sd, in units of the features' sd, in the precision of `like`."""
        return self.prior.sample(self.sd_site, self.prior_scale(like))

    def prior_scale(self, like: Tensor) -> Float[Tensor, ""]:
        """Scale of the residual sd's prior, in units of the features' sd."""
        return self.prior.scales([""], like.new_ones(1), 1.0)[0]

    def distribution(self, mean: Tensor, sd: Tensor, rows: Rows) -> TorchDistribution:
        """p(x | g = mean), batch shape "... rows"; `sd` has size 1 in the dimension of the rows."""
        return IndependentNormal(mean, sd, rows.x.dim() - 1)

    def information(
        self, mean: Float[Tensor, "rows ..."], sd: Float[Tensor, ""], rows: Rows
    ) -> tuple[Float[Tensor, "rows ..."], Float[Tensor, ""]]:
        """Gradient of the weighted log-likelihood in g, and the root of its negative curvature."""
        precision = self.weight / sd**2
        return precision * (rows.x - mean), torch.sqrt(precision)
