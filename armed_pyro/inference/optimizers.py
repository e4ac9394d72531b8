"""Optimizers of a run: Adam of the network and of the guide, each at its own rate."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from armed_pyro.engine.adam import Adam, Gradients, Update
from armed_pyro.engine.schedule import Schedule
from armed_pyro.inference.cluster_adam import LazyAdam
from armed_pyro.program.model import MixedEffects

__all__ = ["Optimizers"]


class Optimizers(nn.Module):
    r"""Adam of the network and of the guide, each at its own rate, with gradients clipped.

    .. math:: g \leftarrow g \min(1, c / \lVert g \rVert), \quad
        w \leftarrow w - \rho \, \mathrm{Adam}(g)

    The norm is taken for the network and for the guide separately, so that a strong adversary
    does not slow the guide down. All of it are operations on tensors, which a captured step holds.
    `eps` is Adam's for the guide.
    """

    def __init__(self, model: MixedEffects, lazy: LazyAdam, schedule: Schedule, eps: float) -> None:
        super().__init__()
        self.clip = schedule.clip
        by_cluster = {name for table in lazy.tables.values() for name in table.names}
        guided = _trained("guide", lazy.guide)
        shared = {name: p for name, p in guided.items() if name not in by_cluster}
        of_guide: list[Update] = [Adam(shared, eps=eps), *lazy.tables.values()]
        of_network: list[Update] = [Adam(_trained("model", model))]
        rates = schedule.learning_rate, schedule.net_learning_rate
        self._groups = tuple(zip((of_guide, of_network), rates, strict=True))
        self.updates = nn.ModuleList([*of_guide, *of_network])
        self.updates.to(model.reference().device)  # also where nothing is trained

    @torch.no_grad()
    def forward(
        self, parameters: Mapping[str, Tensor], gradients: Gradients, factor: Float[Tensor, ""]
    ) -> Float[Tensor, ""]:
        """One step: the norm of the gradient. If it is not finite, no parameter changes.

        Parameters and gradients are named "model..." and "guide...". `factor` multiplies the rates.
        """
        joined = [[update.joined(gradients) for update in group] for group, _ in self._groups]
        squares = [torch.stack([part.square().sum() for part in parts]).sum() for parts in joined]
        norm = torch.stack(squares).sum().sqrt()
        finite = norm.isfinite()
        for (group, rate), parts, square in zip(self._groups, joined, squares, strict=True):
            scale = (self.clip / (square.sqrt() + 1e-6)).clamp(max=1.0)
            for update, part in zip(group, parts, strict=True):
                gradient = part.mul_(scale).masked_fill_(~finite, 0.0)
                update(parameters, gradient, torch.where(finite, rate * factor, 0.0))
        return norm


def _trained(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    named = module.named_parameters(prefix)
    return {name: p for name, p in named if p.requires_grad}
