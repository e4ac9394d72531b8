"""A batch of rows as tensors, and the clusters of its rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["Membership", "Rows"]


@dataclass(frozen=True)
class Membership:
    """The clusters of one grouping factor to which the rows of a batch belong.

    Row i belongs to cluster ``index[position[i]]``. The log-density of cluster ``index[j]``'s
    random effects enters the program times ``weight[j]``, so that its expectation over
    mini-batches is the sum over all clusters.

    Attributes
    ----------
    index : Int[Tensor, "clusters"]
        Clusters whose random effects are drawn; ``0, 1, ..., K - 1`` if they are all drawn.
    position : Int[Tensor, "rows"]
        Each row's place in `index`.
    weight : Float[Tensor, "clusters"] or None
        Weight of each cluster's prior and entropy; None stands for 1.
    complete : bool
        Whether `index` holds every cluster of the factor in the guide, in order.
    labels : Int[Tensor, "rows"] or None
        Each row's cluster, if `index` does not number the clusters as the data do.
    """

    index: Int[Tensor, " clusters"]
    position: Int[Tensor, " rows"]
    weight: Float[Tensor, " clusters"] | None = None
    complete: bool = True
    labels: Int[Tensor, " rows"] | None = None

    def clusters(self) -> Int[Tensor, " rows"]:
        """Each row's cluster."""
        return self.index[self.position] if self.labels is None else self.labels


@dataclass(frozen=True)
class Rows:
    """Inputs, outcomes and cluster memberships of n rows out of N.

    Attributes
    ----------
    x : Float[Tensor, "rows ..."]
        Standardised features.
    y : Tensor or None
        Outcomes on their original scale (class codes for categorical outcomes).
    memberships : mapping of str to Membership
        By grouping factor.
    scale : float
        N / n, the factor by which the rows' log-likelihood is multiplied.
    trials, offset, weights : Float[Tensor, "rows"] or None
        Binomial denominators, terms added to the linear predictor, and multipliers of the rows'
        log-likelihoods.
    computed : mapping of str to Tensor, or None
        Results of a frozen network for x, so that it need not run again: the tapped activations
        by name, and the output under the empty name.
    """

    x: Tensor
    y: Tensor | None
    memberships: Mapping[str, Membership]
    scale: float = 1.0
    trials: Float[Tensor, " rows"] | None = None
    offset: Float[Tensor, " rows"] | None = None
    weights: Float[Tensor, " rows"] | None = None
    computed: Mapping[str, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.x)

    def outcome(self) -> Tensor:
        """The outcomes; ValueError if they are not known."""
        if self.y is None:
            raise ValueError("the rows have no outcome, which their log-likelihood needs")
        return self.y

    def fingerprint(self) -> Iterator[bytes]:
        """The values as bytes, which differ between different rows."""
        positions = [membership.position for membership in self.memberships.values()]
        for values in (self.x, self.y, self.trials, self.offset, self.weights, *positions):
            yield b"none" if values is None else values.double().cpu().numpy().tobytes()
