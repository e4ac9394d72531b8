"""Mixed-effects deep learning as a probabilistic program."""

from armed_pyro.checks.calibration import SimulationCalibration, simulation_calibration
from armed_pyro.checks.diagnostics import Diagnostics
from armed_pyro.checks.inference_checks import Check
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.data.files import read_table, write_table
from armed_pyro.engine.schedule import Schedule
from armed_pyro.explain.attributed import Attribution
from armed_pyro.explain.boundaries import Boundaries
from armed_pyro.explain.decode import DecodedEffects
from armed_pyro.explain.invariance import Invariance
from armed_pyro.explain.probe_test import ProbeTest, probe_test
from armed_pyro.families.reconstruction import Reconstruction
from armed_pyro.fitting import DivergenceError, Fit, compare_modes, fit, score_mode
from armed_pyro.guides.base import Guide
from armed_pyro.guides.structured import StructuredGuide
from armed_pyro.networks.adversary import Adversary
from armed_pyro.prediction.adapt import Adapted
from armed_pyro.prediction.result import Prediction
from armed_pyro.priors import Exponential, HalfNormal, HalfStudentT, Known, Priors
from armed_pyro.program.model import MixedEffects
from armed_pyro.random_effects.terms import FilterScaleBias, RandomEffects, Slopes
from armed_pyro.streaming.streamed_data import StreamedData

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
