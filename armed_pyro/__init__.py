"""Mixed-effects deep learning as a probabilistic program."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from armed_pyro.checks.calibration import (
        SimulationCalibration as SimulationCalibration,
        simulation_calibration as simulation_calibration,
    )
    from armed_pyro.checks.verdict import Diagnostics as Diagnostics
    from armed_pyro.checks.check import Check as Check
    from armed_pyro.data.clustered import ClusteredData as ClusteredData
    from armed_pyro.data.files import read_table as read_table, write_table as write_table
    from armed_pyro.effects.result import Effects as Effects, Hypothesis as Hypothesis
    from armed_pyro.engine.schedule import Schedule as Schedule
    from armed_pyro.estimators import (
        MixedEffectsClassifier as MixedEffectsClassifier,
        MixedEffectsRegressor as MixedEffectsRegressor,
    )
    from armed_pyro.explain.attribution import Attribution as Attribution
    from armed_pyro.explain.boundaries import Boundaries as Boundaries
    from armed_pyro.explain.decode import DecodedEffects as DecodedEffects
    from armed_pyro.explain.invariance import Invariance as Invariance
    from armed_pyro.explain.probe_test import ProbeTest as ProbeTest, probe_test as probe_test
    from armed_pyro.families.reconstruction import Reconstruction as Reconstruction
    from armed_pyro.families.registry import FAMILIES as FAMILIES
    from armed_pyro.fit_result import (
        Fit as Fit,
        compare as compare,
        compare_modes as compare_modes,
        score_mode as score_mode,
    )
    from armed_pyro.fitting import (
        DivergenceError as DivergenceError,
        FitInterrupted as FitInterrupted,
        fit as fit,
    )
    from armed_pyro.formula_model import Model as Model, model as model
    from armed_pyro.guides.base import Guide as Guide
    from armed_pyro.guides.structured import StructuredGuide as StructuredGuide
    from armed_pyro.inference.network_training import (
        CsvLog as CsvLog,
        TensorBoardLog as TensorBoardLog,
        TrainingRecord as TrainingRecord,
    )
    from armed_pyro.networks.adversary import Adversary as Adversary
    from armed_pyro.prediction.adapt import Adapted as Adapted
    from armed_pyro.prediction.result import Prediction as Prediction
    from armed_pyro.prediction.scores import crps as crps
    from armed_pyro.priors import (
        Exponential as Exponential,
        HalfNormal as HalfNormal,
        HalfStudentT as HalfStudentT,
        Known as Known,
        Priors as Priors,
    )
    from armed_pyro.program.model import MixedEffects as MixedEffects
    from armed_pyro.random_effects.terms import (
        FilterScaleBias as FilterScaleBias,
        Process as Process,
        RandomEffects as RandomEffects,
        Slopes as Slopes,
    )
    from armed_pyro.report.word import to_word as to_word
    from armed_pyro.streaming.streamed_data import StreamedData as StreamedData
    from armed_pyro.tuning.result import Tuning as Tuning
    from armed_pyro.tuning.tune import tune as tune

# The public names of every module. A module is imported when one of its names is first asked for,
# so that `import armed_pyro` and the command line's help do not wait for torch.
_NAMES = {
    "checks.calibration": "SimulationCalibration simulation_calibration",
    "checks.check": "Check",
    "checks.verdict": "Diagnostics",
    "data.clustered": "ClusteredData",
    "data.files": "read_table write_table",
    "effects.result": "Effects Hypothesis",
    "engine.schedule": "Schedule",
    "estimators": "MixedEffectsClassifier MixedEffectsRegressor",
    "explain.attribution": "Attribution",
    "explain.boundaries": "Boundaries",
    "explain.decode": "DecodedEffects",
    "explain.invariance": "Invariance",
    "explain.probe_test": "ProbeTest probe_test",
    "families.reconstruction": "Reconstruction",
    "families.registry": "FAMILIES",
    "fit_result": "Fit compare compare_modes score_mode",
    "fitting": "DivergenceError FitInterrupted fit",
    "formula_model": "Model model",
    "guides.base": "Guide",
    "guides.structured": "StructuredGuide",
    "inference.network_training": "CsvLog TensorBoardLog TrainingRecord",
    "networks.adversary": "Adversary",
    "prediction.adapt": "Adapted",
    "prediction.result": "Prediction",
    "prediction.scores": "crps",
    "priors": "Exponential HalfNormal HalfStudentT Known Priors",
    "program.model": "MixedEffects",
    "report.word": "to_word",
    "random_effects.terms": "FilterScaleBias Process RandomEffects Slopes",
    "streaming.streamed_data": "StreamedData",
    "tuning.result": "Tuning",
    "tuning.tune": "tune",
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}
# Names that `from armed_pyro import *` leaves out, as they would load scikit-learn.
_SLOW = {"MixedEffectsClassifier", "MixedEffectsRegressor"}
# Constants, classes, functions.
__all__ = sorted(
    {*_MODULES} - _SLOW, key=lambda name: (not name.isupper(), name[0].islower(), name)
)


if not TYPE_CHECKING:  # a type checker would take it for a promise that any name exists

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
