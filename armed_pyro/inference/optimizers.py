"""Optimizers of a run: of network and guide, each at its own rate."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from armed_pyro.engine.adam import Adam, Gradients
from armed_pyro.engine.schedule import Schedule
from armed_pyro.inference.cluster_adam import LazyAdam
from armed_pyro.program.model import MixedEffects

__all__ = ["Optimizers"]


# Numbers from which on a parameter has steps of its own, and how many parameters have them at most:
# each makes the graph larger.
LARGE, MOST_APART = 2**14, 8


class Optimizers(nn.Module):
    r"""Adam of the network and of the guide, each at its own rate, with gradients clipped.

    .. math:: g \leftarrow g \min(1, c / \lVert g \rVert), \quad
        w \leftarrow w - \rho \, \mathrm{Adam}(g)

    Operations on tensors and nothing else, so that a compiled step holds them too; apart for
    network and guide, so that a strong adversary does not slow the guide down.

    Parameters
    ----------
    model, lazy : MixedEffects, LazyAdam
        The program, and the guide with what it keeps of clusters.
    schedule : Schedule
        Rates, and where gradients are clipped (c).
    eps : float
        Adam's epsilon for the guide.
    """

    def __init__(self, model: MixedEffects, lazy: LazyAdam, schedule: Schedule, eps: float) -> None:
        super().__init__()
        self.clip = schedule.clip
        apart = {name for one in lazy.adams for name in one.names}
        guided = _trained("guide", lazy.guide)
        together = {name: one for name, one in guided.items() if name not in apart}
        self._groups = (
            ([Adam(together, eps=eps), *lazy.adams], schedule.learning_rate),
            ([Adam(one) for one in _parts(_trained("model", model))], schedule.net_learning_rate),
        )
        self.adams = nn.ModuleList(adam for group, _ in self._groups for adam in group)
        self.adams.to(model.reference().device)  # where nothing is trained, too
        self.tables, self._lazy = lazy.tables, lazy

    @torch.no_grad()
    def forward(
        self, parameters: Mapping[str, Tensor], gradients: Gradients, factor: Float[Tensor, ""]
    ) -> Float[Tensor, ""]:
        """One step at so many times the scheduled rates: the length of the gradient.

        If it is not finite, no parameter changes.

        Parameters
        ----------
        parameters : mapping of str to Tensor
            Those that are trained: "model." or "guide.", and the parameter's name there.
        gradients : mapping of str to Tensor or None
        factor : Float[Tensor, ""]
        """
        joined = [[one.joined(gradients) for one in group] for group, _ in self._groups]
        squares = [torch.stack([one.square().sum() for one in some]).sum() for some in joined]
        norm = torch.stack(squares).sum().sqrt()
        finite = norm.isfinite()
        for (group, rate), some, square in zip(self._groups, joined, squares, strict=True):
            scale = (self.clip / (square.sqrt() + 1e-6)).clamp(max=1.0)
            for adam, one in zip(group, some, strict=True):
                gradient = one.mul_(scale).masked_fill_(~finite, 0.0)
                adam(parameters, gradient, torch.where(finite, rate * factor, 0.0))
        self._lazy.write()
        return norm


def _trained(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    named = module.named_parameters(prefix)
    return {name: one for name, one in named if one.requires_grad}


def _parts(parameters: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Parameters whose numbers are joined: the largest few are too large to be copied."""
    large = sorted(parameters, key=lambda name: -parameters[name].numel())[:MOST_APART]
    apart = [{name: parameters[name]} for name in large if parameters[name].numel() >= LARGE]
    names = {name for part in apart for name in part}
    rest = {name: one for name, one in parameters.items() if name not in names}
    return [*apart, rest]
