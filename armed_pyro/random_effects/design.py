"""Columns of the random effects' design: one block per term."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from armed_pyro.data.feature_scaling import FeatureScaling
from armed_pyro.networks.taps import pooled
from armed_pyro.random_effects.covariance import Covariance, Independent

__all__ = [
    *("Block", "FilterBlock", "InputBlock", "LayerBlock", "LinearBlock", "ProcessBlock"),
    "by_column",
]

Columns = Float[Tensor, "rows columns"]

# Most terms of a block whose independent effects are centred.
MOST_CENTRED = 16


def by_column(
    phi: Float[Tensor, "rows q"], columns: int
) -> Float[Tensor, "rows q*columns columns"]:
    """Z, the map from a cluster's effects to the predictor's columns.

    An effect belongs to one column of phi and to one column of the predictor.
    """
    identity = torch.eye(columns, dtype=phi.dtype, device=phi.device)
    return torch.einsum("nq,pr->nqpr", phi, identity).flatten(1, 2)


class Block(nn.Module, ABC):
    """Effects of one term, one per name, laid out for the features of one data set.

    u_original = to_original @ u_internal, up to the outcome's spread. `width` is the number of
    effects that are interpreted together, as those of the units of a hidden layer. `shared` has,
    by effect, the name of the sd that it shares with the others of that name; empty if each effect
    has its own. `parameter` is that of the family whose predictor has the effects, empty for the
    outcome's own predictor. Blocks with the same `group`, unless it is empty, are correlated with
    each other.
    """

    width: int = 1
    shared: tuple[str, ...] = ()
    parameter: str = ""
    group: str = ""
    to_original: Tensor

    def __init__(
        self, names: Iterable[str], covariance: Covariance, to_original: Float[Tensor, "q q"]
    ) -> None:
        super().__init__()
        self.names = tuple(names)
        self.covariance = covariance if len(self.names) > 1 else Independent()
        self.register_buffer("to_original", to_original, persistent=False)


class LinearBlock(Block, ABC):
    """Effects that multiply columns phi in the linear predictor."""

    shifted: tuple[str, ...] = ()  # features whose mean is not zero

    def from_zero(self) -> Float[Tensor, "q q"] | None:
        """Takes effects at x = 0 to the block's effects; None, the default, if they are the same.

        Both are in standardised units.
        """
        return None

    @abstractmethod
    def columns(self, x: Tensor, activations: Mapping[str, Tensor]) -> Columns:
        """phi of the rows with standardised features x."""

    def paths(self) -> tuple[str, ...]:
        """Module paths of the activations that phi depends on; none by default."""
        return ()


class InputBlock(LinearBlock):
    """Intercept and (standardised) input features.

    The first column is 1, or the indicator of the level that the contrasts `columns[:contrasts]` of
    a factor leave out, or there is no such column.

    With an intercept the features are centred: cluster effects at x = 0 would be nearly collinear
    if x is far from zero. `from_zero` takes effects (u0, u1) at x = 0 to those at the features'
    means, (u0 + shift u1, u1). Features are only scaled without an intercept, beyond `MOST_CENTRED`
    independent terms, whose guide knows no correlations, and in fits that were saved when
    independent terms were not centred.
    """

    shift: Tensor
    index: Tensor

    def __init__(
        self,
        features: FeatureScaling,
        columns: list[int],
        names: Sequence[str],
        covariance: Covariance,
        *,
        intercept: bool,
        contrasts: int = 0,
    ) -> None:
        few = len(columns) < MOST_CENTRED and bool(features.average)
        centred = intercept and (covariance.any_origin or few)
        index = torch.tensor(columns, dtype=torch.long)
        slope = torch.diag(1 / torch.tensor(features.scale, dtype=torch.float64)[index])
        shift = torch.tensor(features.mean, dtype=torch.float64)[index] @ slope
        first = intercept or contrasts > 0
        to_original = torch.block_diag(slope.new_ones(1, 1), slope) if first else slope
        if centred:
            to_original[0, 1:] = -shift
        super().__init__(names, covariance, to_original)
        self.intercept, self.contrasts = intercept, contrasts
        slopes = names[len(names) - len(columns) :]
        self.shifted = tuple(n for n, s in zip(slopes, shift.tolist(), strict=True) if s)
        self._zero_shift = shift if centred and self.shifted and features.average else None
        self.register_buffer("shift", torch.zeros_like(shift) if centred else shift, False)
        self.register_buffer("index", index, False)

    @property
    def has_constant(self) -> bool:
        """Whether the columns can make a constant: an intercept, or indicators of all levels."""
        return self.intercept or self.contrasts > 0

    def from_zero(self) -> Float[Tensor, "q q"] | None:
        if self._zero_shift is None:
            return None
        matrix = torch.eye(len(self.names), dtype=torch.float64)
        matrix[0, 1:] = self._zero_shift
        return matrix

    def columns(self, x: Tensor, activations: Mapping[str, Tensor]) -> Columns:
        # Images have no columns to choose from.
        slopes = x[:, self.index] + self.shift if len(self.index) else x.new_zeros(x.shape[0], 0)
        if self.intercept:
            return torch.cat([x.new_ones(x.shape[0], 1), slopes], -1)
        if self.contrasts:
            left_out = 1 - slopes[:, : self.contrasts].sum(-1, keepdim=True)
            return torch.cat([left_out, slopes], -1)
        return slopes


class LayerBlock(LinearBlock):
    """Slopes on the activations of a hidden layer."""

    def __init__(self, path: str, width: int, covariance: Covariance, label: str) -> None:
        names = [f"{label}[{unit}]" for unit in range(width)]
        super().__init__(names, covariance, torch.eye(width, dtype=torch.float64))
        self.path, self.width = path, width

    def columns(self, x: Tensor, activations: Mapping[str, Tensor]) -> Columns:
        return pooled(activations[self.path])

    def paths(self) -> tuple[str, ...]:
        return (self.path,)


class ProcessBlock(LinearBlock):
    """The value of a process at the row's time, added to the predictor; `kind` is its kernel."""

    def __init__(self, kind: str, name: str) -> None:
        super().__init__([name], Independent(), torch.eye(1, dtype=torch.float64))
        self.kind = kind

    def columns(self, x: Tensor, activations: Mapping[str, Tensor]) -> Columns:
        return x.new_ones(len(x), 1)


class FilterBlock(Block):
    """Scales, then biases, of a layer's filters."""

    def __init__(self, path: str, filters: int) -> None:
        names = [f"{path}.{kind}[{c}]" for kind in ("scale", "bias") for c in range(filters)]
        super().__init__(names, Independent(), torch.eye(2 * filters, dtype=torch.float64))
        self.path, self.width = path, 2 * filters
