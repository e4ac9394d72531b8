"""How many draws and rows fit into a block."""

from __future__ import annotations

import math

from armed_pyro.program.model import MixedEffects

__all__ = ["width"]


# Values of the random effects' design times draws in a block of rows: about 100 MB.
BLOCK_VALUES = 2**24


def width(model: MixedEffects, *, others: bool = False) -> int:
    """Values that one row's prediction takes in one draw, about."""
    facts = model.data_facts()
    terms = sum(len(factor.terms) for factor in model.factors) + len(facts.columns)
    return terms + len(model.others) * others * math.prod(facts.feature_shape)
