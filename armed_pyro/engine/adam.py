"""Adam as tensor operations, so that a captured training step includes it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["BETAS", "Adam", "Gradients", "Update", "adam_change"]

BETAS = (0.9, 0.99)

Gradients = Mapping[str, Tensor | None]


def adam_change(
    gradient: Tensor, mean: Tensor, square: Tensor, count: Tensor, rate: Tensor, eps: float
) -> Tensor:
    r"""The change of the parameters in step t of Adam; moments and count change in place.

    .. math:: m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
        \Delta w = - \rho \, \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    The count t broadcasts against the moments m (`mean`) and v (`square`).
    """
    mean.lerp_(gradient, 1 - BETAS[0])
    square.lerp_(gradient.square(), 1 - BETAS[1])
    count.add_(1)
    # By exp, because a power would not be vectorised.
    first, second = (1 - torch.exp(math.log(beta) * count) for beta in BETAS)
    size = (square / second).sqrt_().add_(eps).mul_(first)
    return (mean / size).mul_(-rate)


class Update(nn.Module, ABC):
    """The update of parameters by one optimizer, from their gradients joined into one tensor.

    The parameters are `names`, with `widths` values in each of `rows` rows (``()`` for no rows).
    The update's first buffer has their type.
    """

    def __init__(
        self, names: Sequence[str], widths: Sequence[int], rows: tuple[int, ...] = ()
    ) -> None:
        super().__init__()
        self.names, self.widths, self._rows = tuple(names), tuple(widths), rows

    def joined(self, gradients: Gradients) -> Float[Tensor, "*rows width"]:
        """The parameters' gradients in one tensor; zeros for parameters without a gradient."""
        zeros = next(self.buffers()).new_zeros
        parts = [zeros(*self._rows, 0)]
        for name, width in zip(self.names, self.widths, strict=True):
            gradient, shape = gradients[name], (*self._rows, width)
            parts.append(zeros(shape) if gradient is None else gradient.reshape(shape))
        return torch.cat(parts, -1)

    @abstractmethod
    def forward(
        self, parameters: Mapping[str, Tensor], gradient: Tensor, rate: Float[Tensor, ""]
    ) -> None:
        """Change the parameters in place, by a step along the joined gradient."""


class Adam(Update):
    """Adam, with the values of all parameters joined into one vector.

    The joined vector takes a dozen operations for any number of parameters. In an eager step, the
    fused `torch.optim.Adam` is as fast, but torch's compiler cannot compile it. In a compiled step,
    `torch.optim.Adam` took 0.46 ms instead of 0.13 ms for the 17 parameters of a small network,
    longer than the rest of the step.

    The parameters `decayed` first shrink by the fraction `decay` of the rate (AdamW; Loshchilov and
    Hutter 2019).
    """

    mean: Float[Tensor, " width"]
    square: Float[Tensor, " width"]
    count: Float[Tensor, ""]

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        eps: float = 1e-8,
        *,
        decay: float = 0.0,
        decayed: Collection[str] = (),
    ) -> None:
        super().__init__(tuple(parameters), [values.numel() for values in parameters.values()])
        self.eps, self.decay, self.decayed = eps, decay, frozenset(decayed if decay else ())
        like = next(iter(parameters.values()), torch.empty(0)).detach()
        for name in ("mean", "square"):
            self.register_buffer(name, like.new_zeros(sum(self.widths)))
        self.register_buffer("count", like.new_zeros(()))

    @torch.no_grad()
    def forward(
        self,
        parameters: Mapping[str, Tensor],
        gradient: Float[Tensor, " width"],
        rate: Float[Tensor, ""],
    ) -> None:
        change = adam_change(gradient, self.mean, self.square, self.count, rate, self.eps)
        for name in self.decayed:
            parameters[name].mul_(1 - self.decay * rate)
        for name, part in zip(self.names, change.split(self.widths), strict=True):
            parameters[name].add_(part.reshape(parameters[name].shape))
