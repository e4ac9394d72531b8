"""Mixed-effects deep learning as a probabilistic program."""

from armed_pyro.adversary import Adversary
from armed_pyro.data import ClusteredData
from armed_pyro.fitted import Fit
from armed_pyro.fitting import DivergenceError, fit
from armed_pyro.guides import Guide, StructuredGuide
from armed_pyro.prediction import Prediction
from armed_pyro.priors import Exponential, HalfNormal, HalfStudentT, Known, Priors
from armed_pyro.program import MixedEffects
from armed_pyro.schedule import Schedule
from armed_pyro.tables import read_table, write_table
from armed_pyro.terms import RandomEffects, Slopes

__all__ = [
    "Adversary",
    "ClusteredData",
    "DivergenceError",
    "Exponential",
    "Fit",
    "Guide",
    "HalfNormal",
    "HalfStudentT",
    "Known",
    "MixedEffects",
    "Prediction",
    "Priors",
    "RandomEffects",
    "Schedule",
    "Slopes",
    "StructuredGuide",
    "fit",
    "read_table",
    "write_table",
]
