"""Sizes of the blocks of rows and draws that are predicted at once."""

from __future__ import annotations

import math

from armed_pyro.program.model import MixedEffects

__all__ = ["BLOCK_VALUES", "values_per_row"]

# Values per row times rows times draws in a block: about 100 MB.
BLOCK_VALUES = 2**24


def values_per_row(model: MixedEffects, *, others: bool = False) -> int:
    """Approximate number of values in the prediction of one row in one draw."""
    facts = model.data_facts()
    terms = sum(len(factor.terms) for factor in model.factors) + len(facts.columns)
    return terms + len(model.others) * others * math.prod(facts.feature_shape)
