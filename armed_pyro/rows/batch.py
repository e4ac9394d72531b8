"""Rows as tensors: one batch and its clusters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["Membership", "Rows"]


@dataclass(frozen=True)
class Membership:
    """Which clusters of one grouping factor some rows belong to.

    Row i belongs to cluster ``index[position[i]]``. The log-density of cluster ``index[j]``'s
    random effects enters the program times ``weight[j]``, so that its expectation over
    mini-batches is the sum over all clusters.

    Attributes
    ----------
    index : Int[Tensor, "clusters"]
        Clusters whose random effects are drawn; with all clusters, ``0, 1, ..., K - 1``.
    position : Int[Tensor, "rows"]
        Each row's place in `index`.
    weight : Float[Tensor, "clusters"] or None
        Weight of each cluster's prior and entropy; None stands for 1.
    complete : bool
        Whether `index` holds every cluster that the guide holds of the factor, in order.
    labels : Int[Tensor, "rows"] or None
        Each row's cluster, where `index` numbers the clusters drawn in another way.
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
    x : Float[Tensor, "rows features"] or Float[Tensor, "rows ..."]
        Standardised features.
    y : Tensor or None
        Outcomes on their original scale (class codes for categorical outcomes).
    memberships : mapping of str to Membership
        One entry a grouping factor.
    scale : float
        N / n, the factor by which the rows' log-likelihood is multiplied.
    trials, offset, weights : Float[Tensor, "rows"] or None
        Binomial denominators; a term added to the linear predictor; multipliers of each row's
        log-likelihood.
    computed : mapping of str to Tensor, or None
        What a settled network makes of x, so that it need not run again: its tapped activations
        by name, and its output under the empty name.
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
        """The outcomes.

        Raises
        ------
        ValueError
            If they are not known.
        """
        if self.y is None:
            raise ValueError("the rows have no outcome, which their log-likelihood needs")
        return self.y

    def fingerprint(self) -> Iterator[bytes]:
        """Their values, by which other rows can be told from them."""
        codes = [one.position for one in self.memberships.values()]
        for one in (self.x, self.y, self.trials, self.offset, self.weights, *codes):
            yield b"none" if one is None else one.double().cpu().numpy().tobytes()
