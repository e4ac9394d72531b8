"""The adversary: a classifier that tries to read the cluster from the network's features."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from armed_pyro._pyro_module import LocalModule
from armed_pyro.networks.taps import pooled

__all__ = ["Adversary", "Round", "reverse_gradient"]


class _ReverseGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: Tensor) -> Tensor:
        ctx.save_for_backward(strength)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (strength,) = ctx.saved_tensors
        return -strength * grads[0], None


def reverse_gradient(x: Tensor, strength: Tensor) -> Tensor:
    """x forward, ``-strength`` times the gradient backward (Ganin et al., JMLR 2016).

    Examples
    --------
    >>> x = torch.ones(1, requires_grad=True)
    >>> reverse_gradient(x, torch.tensor(2.0)).sum().backward()
    >>> x.grad
    tensor([-2.])
    """
    return _ReverseGradient.apply(x, strength)  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Round:
    """One round of the game: the adversary's mean cross-entropy and its accuracy."""

    cross_entropy: Float[Tensor, ""]
    accuracy: Float[Tensor, ""]


class Adversary(LocalModule):
    r"""Cluster classifier on tapped activations, played against by gradient reversal.

    The adversary minimises the cross-entropy of the cluster given the activations; the network
    receives that gradient times :math:`-w(t)`, where the strength rises linearly from 0 to
    `weight` over the first `warmup` share of the steps. It is no part of the probability density.

    Parameters
    ----------
    factor : str
        Grouping factor whose clusters are to be unreadable.
    taps : sequence of str
        Module paths of the network whose outputs the adversary sees; feature maps are averaged
        over space.
    weight : float
        Strength of the reversed gradient, relative to the mean log-likelihood of a row.
    hidden : sequence of int
        Widths of the classifier's hidden layers.
    warmup : float
        Share of the training steps over which the strength rises from 0.

    References
    ----------
    Nguyen, Treacher, Montillo (2023), IEEE TPAMI 45(7), section 3; Ganin et al. (2016), JMLR 17.

    Examples
    --------
    >>> Adversary("site", taps=["1", "3"], weight=5.0).strength(progress=0.05)
    tensor(2.5000)
    """

    def __init__(
        self,
        factor: str,
        taps: Sequence[str],
        *,
        weight: float = 1.0,
        hidden: Sequence[int] = (32,),
        warmup: float = 0.1,
    ) -> None:
        super().__init__()
        if not taps:
            raise ValueError("an adversary needs at least one module path in `taps`")
        if weight < 0:
            raise ValueError(f"the adversary's weight must not be negative, not {weight}")
        if not 0 <= warmup <= 1:
            raise ValueError(f"`warmup` is a share of the steps, from 0 to 1, not {warmup}")
        self.factor = factor
        self.taps = tuple(taps)
        self.weight = float(weight)
        self.hidden = tuple(hidden)
        self.warmup = float(warmup)
        self.classifier: nn.Module | None = None

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, for the manifest."""
        return {
            "factor": self.factor,
            "taps": list(self.taps),
            "weight": self.weight,
            "hidden": list(self.hidden),
            "warmup": self.warmup,
        }

    def strength(self, progress: float | Tensor) -> Float[Tensor, ""]:
        """Strength of the reversed gradient after this share of the training steps."""
        share = torch.as_tensor(progress)
        share = share / self.warmup if self.warmup else torch.ones_like(share)
        return self.weight * share.clamp(max=1.0)

    def build(self, widths: Mapping[str, int], n_clusters: int) -> None:
        """Lay the classifier out for activations of these widths and this many clusters."""
        sizes = [sum(widths[path] for path in self.taps), *self.hidden, n_clusters]
        layers: list[nn.Module] = []
        for one, other in itertools.pairwise(sizes):
            layers += [nn.Linear(one, other), nn.ReLU()]
        self.classifier = nn.Sequential(*layers[:-1])

    def logits(
        self, activations: Mapping[str, Tensor], strength: Tensor
    ) -> Float[Tensor, "rows clusters"]:
        """Scores of every cluster; gradients into the activations are reversed."""
        if self.classifier is None:
            raise ValueError("the adversary is laid out when its model is bound to data")
        seen = torch.cat([pooled(activations[path]) for path in self.taps], -1)
        return self.classifier(reverse_gradient(seen, strength))

    def forward(
        self,
        activations: Mapping[str, Tensor],
        codes: Int[Tensor, " rows"],
        strength: Tensor,
    ) -> Round:
        """Mean cross-entropy of the rows' clusters, to be added to the loss, and the accuracy."""
        logits = self.logits(activations, strength)
        accuracy = (logits.detach().argmax(-1) == codes).to(logits.dtype).mean()
        return Round(cross_entropy(logits, codes), accuracy)
