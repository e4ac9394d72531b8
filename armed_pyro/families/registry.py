"""Families by name."""

from __future__ import annotations

from armed_pyro.families.counts import NegativeBinomial, Poisson
from armed_pyro.families.family import Family
from armed_pyro.families.gaussian import Gaussian
from armed_pyro.families.logistic import Bernoulli, Binomial, Categorical

__all__ = ["FAMILIES", "family_named"]

_KINDS = (Gaussian, Bernoulli, Binomial, Categorical, Poisson, NegativeBinomial)
FAMILIES: dict[str, type[Family]] = {family.name: family for family in _KINDS}


def family_named(name: str | Family) -> Family:
    """The family with this name and default settings; a `Family` is returned as it is."""
    if isinstance(name, Family):
        return name
    if name not in FAMILIES:
        raise ValueError(f"unknown family {name!r}: choose one of {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name]()
