"""Outcome models: p(y | predictor, parameters of the family), one file for each kind."""

from armed_pyro.families.family import Family, Parameter, Parameters
from armed_pyro.families.reconstruction import Reconstruction
from armed_pyro.families.registry import FAMILIES, family_named

__all__ = [
    "FAMILIES",
    "Family",
    "Parameter",
    "Parameters",
    "Reconstruction",
    "family_named",
]
