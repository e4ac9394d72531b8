"""`EffectColumns`: the columns of the predictor on which a factor's random effects act."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from armed_pyro.distributions.small_matrices import FEW
from armed_pyro.random_effects.design import Block, FilterBlock, LinearBlock, by_column
from armed_pyro.rows.batch import Membership

__all__ = ["EffectColumns"]

# Prior scale of the sds of effects on filters, relative scales and biases; and of effects on the
# links of parameters.
FILTER_SCALE, PARAMETER_SCALE = 0.3, 2.5

# Name without the predictor's column, label, and default scale of the prior of the sd.
Label = tuple[str, str, float]


class EffectColumns:
    """Blocks of a factor in their order: on the outcome's columns, on parameters, on filters.

    `columns` are those of the predictor. The last ones are those of `parameters`, each with the
    effects of its own blocks; all other blocks act on all of the outcome's columns.
    """

    def __init__(
        self, blocks: Sequence[Block], columns: Sequence[str], parameters: Sequence[str]
    ) -> None:
        order = ["", *parameters]
        self.blocks: list[Block] = sorted(
            blocks, key=lambda b: (isinstance(b, FilterBlock), order.index(b.parameter))
        )
        self.count = len(columns)
        self._outcome = tuple(columns[: len(columns) - len(parameters)])
        linear = [block for block in self.blocks if isinstance(block, LinearBlock)]
        self._sections = [
            (1 if name else len(self._outcome), [b for b in linear if b.parameter == name])
            for name in order
        ]

    def width(self, block: Block) -> int:
        """Number of columns of the predictor that a linear block acts on."""
        return 1 if block.parameter else len(self._outcome)

    def check_single(self, what: str) -> None:
        """Raise a ValueError that `what` needs a single column, if the predictor has several."""
        if self.count > 1:
            raise ValueError(
                f"{what} needs a predictor of a single column, found {self.count}: choose a family "
                "such as ordinal, and parameters without predictors"
            )

    def labels(self, block: Block, default: float) -> list[Label]:
        """Names, labels and default scales of a block's effects, in their order."""
        if isinstance(block, FilterBlock):
            return [(term, term, FILTER_SCALE) for term in block.names]
        if block.parameter:
            names = [f"{block.parameter}_{term}" for term in block.names]
            return [(name, name, PARAMETER_SCALE) for name in names]
        # Dividing by sqrt(width) keeps the variance of phi'u independent of a layer's width. Mean
        # squares of columns that share an sd add up to 1 already.
        scale = default if block.shared else default / block.width**0.5
        return [
            (term, f"{term}[{column}]" if column else term, scale)
            for term in block.names
            for column in self._outcome
        ]

    def sds(
        self, labels: Sequence[Label]
    ) -> tuple[list[int], tuple[str, ...], list[str], Int[Tensor, " effects"]]:
        """First effect, label and name of every sd, and the place of every effect's sd.

        `labels` are those of all blocks. An effect has its own sd, unless its block shares some.
        """
        shared: list[tuple[str, str]] = []
        for block in self.blocks:
            pairs = [(n, f"[{c}]" if c else "") for n in block.shared for c in self._outcome]
            shared += pairs or [("", "")] * len(self.labels(block, 1.0))
        whole = [
            f"{name}{column}" if name else label
            for (name, column), (_, label, _) in zip(shared, labels, strict=True)
        ]
        names = [name or own for (name, _), (own, *_) in zip(shared, labels, strict=True)]
        distinct = tuple(dict.fromkeys(whole))
        first = [whole.index(label) for label in distinct]
        places = torch.tensor([distinct.index(label) for label in whole])
        return first, distinct, [names[place] for place in first], places

    def to_original(self, block: Block, spread: float) -> Float[Tensor, "effects effects"]:
        """Takes a block's effects to units of the data."""
        if isinstance(block, FilterBlock):
            return block.to_original
        identity = torch.eye(self.width(block), dtype=torch.float64)
        return torch.kron(block.to_original, identity) * (1.0 if block.parameter else spread)

    def by_column(
        self, phi: Float[Tensor, "rows phi_columns"]
    ) -> Float[Tensor, "rows linear_terms columns"]:
        """Z, the map from a cluster's linear effects to the columns of the predictor."""
        if len(self._sections) == 1:
            return by_column(phi, self.count)
        parts, first, column = [], 0, 0
        for width, blocks in self._sections:
            q = sum(len(block.names) for block in blocks)
            part = by_column(phi[:, first : first + q], width)
            parts.append(pad(part, (column, self.count - column - width)))
            first, column = first + q, column + width
        return torch.cat(parts, 1)

    def contribution(
        self,
        phi: Float[Tensor, "rows phi_columns"],
        membership: Membership,
        effects: Float[Tensor, "... clusters linear_terms"],
    ) -> Float[Tensor, "... rows columns"]:
        """phi_i' u_{g(i)} for every row and column of the predictor."""
        parts, first, start = [], 0, 0
        for width, blocks in self._sections:
            q = sum(len(block.names) for block in blocks)
            chosen = effects[..., start : start + q * width]
            parts.append(_products(phi[:, first : first + q], membership, chosen, width))
            first, start = first + q, start + q * width
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _products(
    phi: Float[Tensor, "rows q"],
    membership: Membership,
    effects: Float[Tensor, "... clusters q*columns"],
    columns: int,
) -> Float[Tensor, "... rows columns"]:
    """phi_i' u_{g(i)} of effects that all act on the same columns."""
    if not phi.shape[-1]:
        return effects.new_zeros(*effects.shape[:-2], len(phi), columns)
    if phi.shape[-1] > FEW:
        by_row = effects[..., membership.position, :].unflatten(-1, (-1, columns))
        return torch.einsum("nq,...nqp->...np", phi, by_row)
    # Term by term: a gather and a sum over a short last dimension are slow.
    by_term = effects.unflatten(-1, (-1, columns)).unbind(-2)
    products = (
        column[:, None] * effect.index_select(-2, membership.position)
        for column, effect in zip(phi.unbind(-1), by_term, strict=True)
    )
    return reduce(torch.add, products)
