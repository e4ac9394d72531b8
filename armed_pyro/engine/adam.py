"""Adam as operations on tensors, of parameters whose numbers are joined."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["BETAS", "Adam", "Gradients"]


BETAS = (0.9, 0.99)

Gradients = Mapping[str, Tensor | None]


class Adam(nn.Module):
    r"""Adam of some parameters, whose numbers are joined: into one column, or one a cluster.

    .. math:: m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
        w \leftarrow w - \rho \, \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    On joined numbers it takes a dozen operations, however many the parameters are.

    Parameters
    ----------
    parameters : mapping of str to Tensor
        By name; their leading dimension has `columns` entries if there are several columns.
    columns : int
        Columns, each with a number t of steps of its own.
    eps : float

    Attributes
    ----------
    mean, square : Float[Tensor, "width columns"]
        m and v.
    count : Float[Tensor, "1 columns"]
        t.

    Examples
    --------
    >>> w = {"w": torch.tensor([1.0, 2.0])}
    >>> adam = Adam(w)
    >>> adam(w, adam.joined({"w": torch.tensor([3.0, -1.0])}), torch.tensor(0.1))
    >>> w["w"]
    tensor([0.9000, 2.1000])
    """

    mean: Tensor
    square: Tensor
    count: Tensor

    def __init__(
        self, parameters: Mapping[str, Tensor], columns: int = 1, eps: float = 1e-8
    ) -> None:
        super().__init__()
        self.columns, self.eps = columns, eps
        self.names = tuple(parameters)
        self._widths = [one.numel() // columns for one in parameters.values()]
        like = next(iter(parameters.values()), torch.empty(0)).detach()
        for name in ("mean", "square"):
            self.register_buffer(name, like.new_zeros(sum(self._widths), columns))
        self.register_buffer("count", like.new_zeros(1, columns))

    def joined(self, gradients: Gradients) -> Float[Tensor, "width columns"]:
        """Gradients one below the other; zeros where there are none."""
        found = [gradients[name] for name in self.names]
        parts = [
            self.count.new_zeros(width, self.columns) if one is None else self._column(one)
            for one, width in zip(found, self._widths, strict=True)
        ]
        if len(parts) == 1:  # a copy of a large gradient takes as long as the step
            return parts[0]
        return torch.cat(parts) if parts else self.count.new_zeros(0, self.columns)

    def _column(self, value: Tensor) -> Float[Tensor, "width columns"]:
        return value.reshape(self.columns, -1).T

    @torch.no_grad()
    def forward(
        self,
        parameters: Mapping[str, Tensor],
        gradient: Float[Tensor, "width columns"],
        rate: Float[Tensor, ""],
    ) -> None:
        """Change the parameters, and what is kept of their gradients."""
        # In place: of large networks copies would take much memory.
        self.mean.lerp_(gradient, 1 - BETAS[0])
        self.square.lerp_(gradient.square(), 1 - BETAS[1])
        self.count.add_(1)
        first, second = (1 - torch.exp(math.log(beta) * self.count) for beta in BETAS)
        size = (self.square / second).sqrt_().add_(self.eps).mul_(first)
        change = (self.mean / size).mul_(-rate).split(self._widths)
        for name, part in zip(self.names, change, strict=True):
            parameters[name].add_(part.T.reshape(parameters[name].shape))
