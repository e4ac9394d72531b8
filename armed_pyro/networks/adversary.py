"""The adversary: a classifier that tries to read the cluster from the network's features."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from armed_pyro._pyro_module import LocalModule
from armed_pyro.networks.tap import Pool, Tap, with_pool
from armed_pyro.networks.taps import pooled

__all__ = ["Adversary", "Round", "reverse_gradient"]


def reverse_gradient(x: Tensor, strength: Tensor) -> Tensor:
    """x forward, ``-strength`` times the gradient backward (Ganin et al., JMLR 2016)."""
    same = x.view_as(x)
    if same.requires_grad:
        same.register_hook(lambda gradient: -strength * gradient)
    return same


@dataclass(frozen=True)
class Round:
    """The adversarial loss of one batch: the mean cross-entropy, and the classifier's accuracy."""

    cross_entropy: Float[Tensor, ""]
    accuracy: Float[Tensor, ""]


class Adversary(LocalModule):
    r"""Cluster classifier on tapped activations, with its gradient into the network reversed.

    The classifier minimises the cross-entropy of the cluster given the activations. The network
    receives that gradient times :math:`-w(t)`, where :math:`w(t)` rises linearly from 0 to
    `weight` during the warm-up. The network that a fit keeps was trained at the full weight. The
    adversary is not part of the probability density.

    Whether the adversary succeeds is measured by a fresh probe: see
    `armed_pyro.networks.fresh_probe.FreshProbe`. The adversary's own accuracy is too low to tell,
    as its classifier lags behind features that keep changing.

    Parameters
    ----------
    factor : str
        Grouping factor whose clusters the activations should not reveal.
    taps : sequence of str
        Paths of the modules whose outputs the classifier sees; elements and calls as in `Slopes`.
    weight : float or "auto"
        Strength of the reversed gradient, relative to the mean log-likelihood of a row. Weights
        from 0.3 to 3 are usual; much larger ones cost accuracy, as the network then gives up
        features of the outcome. With "auto", `fit` raises the weight in steps until a fresh probe
        cannot read the cluster, and stops before predictions of held-out clusters suffer; see
        `armed_pyro.automatic_weight`. It trains the network up to five times more.
    hidden : sequence of int
        Widths of the classifier's hidden layers.
    warmup : float
        Largest share of the schedule's steps that the warm-up may take; 0 for no warm-up.
    warmup_epochs : float
        Length of the warm-up in passes over the training rows.
    pool : {"mean", "max", "first", "last", "masked"}, optional
        How tokens, time or space become one vector per row, as in `Slopes`.

    Raises
    ------
    ValueError
        If there are no taps, or a number is out of range.

    References
    ----------
    Nguyen, Treacher, Montillo (2023), IEEE TPAMI 45(7), section 3; Ganin et al. (2016), JMLR 17.

    Examples
    --------
    >>> game = Adversary("site", taps=["1", "3"], weight=5.0)
    >>> game.warmup_steps(epoch=20, steps=20_000)  # 20 steps make an epoch
    100
    >>> game.strength(progress=0.5)
    tensor(2.5000)
    """

    def __init__(
        self,
        factor: str,
        taps: Sequence[str],
        *,
        weight: float | Literal["auto"] = 1.0,
        hidden: Sequence[int] = (32,),
        warmup: float = 0.1,
        warmup_epochs: float = 5.0,
        pool: Pool | None = None,
    ) -> None:
        super().__init__()
        if not taps:
            raise ValueError("an adversary needs at least one module path in `taps`")
        if isinstance(weight, str) and weight != "auto":
            raise ValueError(f"the adversary's weight is a number or 'auto', not {weight!r}")
        if not isinstance(weight, str) and not 0 <= weight < math.inf:
            raise ValueError(f"the adversary's weight must not be negative, not {weight}")
        if not 0 <= warmup <= 1:
            raise ValueError(f"`warmup` is a share of the steps, from 0 to 1, not {warmup}")
        if not 0 <= warmup_epochs < math.inf:
            raise ValueError(f"`warmup_epochs` must be at least 0, not {warmup_epochs}")
        self.factor, self.hidden = factor, tuple(hidden)
        self.taps = tuple(with_pool(tap, pool) for tap in taps)
        for tap in self.taps:
            Tap.of(tap)  # which refuses an unknown pool
        self.weight = weight if isinstance(weight, str) else float(weight)
        self.warmup, self.warmup_epochs = float(warmup), float(warmup_epochs)
        self.classifier: nn.Module | None = None

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, as the manifest of a saved fit holds them."""
        names = ("factor", "taps", "weight", "hidden", "warmup", "warmup_epochs")
        values = {name: getattr(self, name) for name in names}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}

    def warmup_steps(self, epoch: int, steps: int) -> int:
        """Steps of the warm-up, where `epoch` steps pass over the rows and at most `steps` follow.

        It ends after `warmup_epochs` epochs, or after the share `warmup` of the steps if that is
        earlier.
        """
        return min(math.ceil(self.warmup_epochs * epoch), math.floor(self.warmup * steps))

    def strength(self, progress: float | Tensor) -> Float[Tensor, ""]:
        """w(t), the strength of the reversed gradient after this share of the warm-up.

        ValueError if the weight is still to be chosen.
        """
        if isinstance(self.weight, str):
            raise ValueError(
                f"the weight of the adversary of {self.factor!r} is 'auto', which fit() replaces "
                "by a number: call fit(model, data), or give a number"
            )
        return self.weight * torch.as_tensor(progress).clamp(max=1.0)

    def build(self, widths: Mapping[str, int], n_clusters: int) -> None:
        """Make the classifier for activations of these widths and this number of clusters."""
        sizes = [sum(widths[path] for path in self.taps), *self.hidden, n_clusters]
        layers: list[nn.Module] = []
        for width, next_width in itertools.pairwise(sizes):
            layers += [nn.Linear(width, next_width), nn.ReLU()]
        self.classifier = nn.Sequential(*layers[:-1])

    def logits(
        self, activations: Mapping[str, Tensor], strength: Tensor
    ) -> Float[Tensor, "rows clusters"]:
        """Logits of every cluster; gradients into the activations are reversed."""
        if self.classifier is None:
            raise ValueError("the adversary is laid out when its model is bound to data")
        seen = torch.cat([pooled(activations[path]) for path in self.taps], -1)
        return self.classifier(reverse_gradient(seen, strength))

    def forward(
        self, activations: Mapping[str, Tensor], codes: Int[Tensor, " rows"], strength: Tensor
    ) -> Round:
        """The mean cross-entropy of the rows' clusters, a term of the loss, and the accuracy."""
        logits = self.logits(activations, strength)
        accuracy = (logits.detach().argmax(-1) == codes).to(logits.dtype).mean()
        return Round(cross_entropy(logits, codes), accuracy)
