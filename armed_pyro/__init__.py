"""Mixed-effects deep learning as a probabilistic program."""

from armed_pyro.adaptation import Adapted
from armed_pyro.adversary import Adversary
from armed_pyro.attributed import Attribution
from armed_pyro.boundaries import Boundaries
from armed_pyro.calibration import SimulationCalibration, simulation_calibration
from armed_pyro.checks import Check
from armed_pyro.data import ClusteredData
from armed_pyro.decoded import DecodedEffects
from armed_pyro.diagnostics import Diagnostics
from armed_pyro.families import Reconstruction
from armed_pyro.fitted import Fit
from armed_pyro.fitting import DivergenceError, fit
from armed_pyro.guides import Guide, StructuredGuide
from armed_pyro.invariance import Invariance
from armed_pyro.prediction import Prediction
from armed_pyro.priors import Exponential, HalfNormal, HalfStudentT, Known, Priors
from armed_pyro.probetest import ProbeTest, probe_test
from armed_pyro.program import MixedEffects
from armed_pyro.schedule import Schedule
from armed_pyro.scores import compare_modes, score_mode
from armed_pyro.streameddata import StreamedData
from armed_pyro.tables import read_table, write_table
from armed_pyro.terms import FilterScaleBias, RandomEffects, Slopes

__all__ = [
    "Adapted",
    "Adversary",
    "Attribution",
    "Boundaries",
    "Check",
    "ClusteredData",
    "DecodedEffects",
    "Diagnostics",
    "DivergenceError",
    "Exponential",
    "FilterScaleBias",
    "Fit",
    "Guide",
    "HalfNormal",
    "HalfStudentT",
    "Invariance",
    "Known",
    "MixedEffects",
    "Prediction",
    "Priors",
    "ProbeTest",
    "RandomEffects",
    "Reconstruction",
    "Schedule",
    "SimulationCalibration",
    "Slopes",
    "StreamedData",
    "StructuredGuide",
    "compare_modes",
    "fit",
    "probe_test",
    "read_table",
    "score_mode",
    "simulation_calibration",
    "write_table",
]
