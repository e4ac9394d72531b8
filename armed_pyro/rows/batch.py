"""A batch of rows as tensors, and the clusters of its rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from armed_pyro.rows.inputs import LazyInputs, Structure

__all__ = ["Membership", "Rows"]


@dataclass(frozen=True)
class Membership:
    """The clusters of one grouping factor to which the rows of a batch belong.

    Row i belongs to cluster ``index[position[i]]``. The log-density of cluster ``index[j]``'s
    random effects enters the program times ``weight[j]``, so that its expectation over
    mini-batches is the sum over all clusters.
    """

    index: Int[Tensor, " clusters"]  # clusters whose random effects are drawn
    position: Int[Tensor, " rows"]  # each row's place in `index`
    weight: Float[Tensor, " clusters"] | None = None  # None stands for 1
    complete: bool = True  # whether `index` holds every cluster of the guide: 0, 1, ..., K - 1
    # Each row's cluster, if `index` does not number the clusters as the data do.
    labels: Int[Tensor, " rows"] | None = None

    def clusters(self) -> Int[Tensor, " rows"]:
        """Each row's cluster."""
        return self.index[self.position] if self.labels is None else self.labels


@dataclass(frozen=True)
class Rows:
    """Inputs, outcomes and cluster memberships of n rows out of N."""

    x: Float[Tensor, "rows ..."]  # standardised features
    y: Tensor | None  # outcomes on their original scale; class codes for categorical outcomes
    memberships: Mapping[str, Membership]  # by grouping factor
    scale: float = 1.0  # N / n, the factor by which the rows' log-likelihood is multiplied
    trials: Float[Tensor, " rows"] | None = None  # binomial denominators
    offset: Float[Tensor, " rows"] | None = None  # terms added to the linear predictor
    weights: Float[Tensor, " rows"] | None = None  # multipliers of the rows' log-likelihoods
    # Results of a frozen network for x, so that it need not run again: the tapped activations by
    # name, and the output under the empty name.
    computed: Mapping[str, Tensor] | None = None
    # Standardised columns that random slopes use and that do not enter the network.
    slopes: Float[Tensor, "rows columns"] | None = None
    # Standardised means of features in the row's clusters, as further fixed effects.
    means: Float[Tensor, "rows columns"] | None = None
    # The network of `FoldNetworks` that was trained without the row; -1 where there is none.
    fold: Int[Tensor, " rows"] | None = None
    # What the network takes in place of x: loaded tensors, or items that are loaded when it runs.
    inputs: LazyInputs | Structure | None = None
    # Status, upper end and, if rows entered late, entry; see `armed_pyro.rows.censoring`.
    censoring: Float[Tensor, "rows columns"] | None = None

    def __len__(self) -> int:
        return len(self.x)

    @property
    def network_inputs(self) -> LazyInputs | Structure:
        """What the network takes: `inputs`, or x without any."""
        return self.x if self.inputs is None else self.inputs

    def loaded(self) -> Rows:
        """The rows with their inputs in memory, for several passes of a network."""
        if not isinstance(self.inputs, LazyInputs):
            return self
        return replace(self, inputs=self.inputs.load())

    def slope_inputs(self) -> Tensor:
        """The features, followed by the columns that only random slopes use."""
        return self.x if self.slopes is None else torch.cat([self.x, self.slopes], -1)

    def outcome(self) -> Tensor:
        """The outcomes; ValueError if they are not known."""
        if self.y is None:
            raise ValueError("the rows have no outcome, which their log-likelihood needs")
        return self.y

    def fingerprint(self) -> Iterator[bytes]:
        """The values as bytes, which differ between different rows."""
        positions = [membership.position for membership in self.memberships.values()]
        parts = [self.x, self.y, self.trials, self.offset, self.weights, *positions]
        # Without these, the bytes are those of checkpoints from before there were any.
        later = (self.slopes, self.means, self.censoring)
        parts += [values for values in later if values is not None]
        for values in parts:
            yield b"none" if values is None else values.double().cpu().numpy().tobytes()
        if isinstance(self.inputs, LazyInputs):
            yield from self.inputs.fingerprint()
