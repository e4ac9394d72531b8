"""Fits on disk as tensors, JSON and NetCDF in a folder; reading a fit never executes code."""

from __future__ import annotations

import json
import shutil
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from armed_pyro._memory import release
from armed_pyro._messages import cause
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.data.grouping import Grouping, index_from_json, index_to_json
from armed_pyro.data.xarray_names import label_values, variable_name
from armed_pyro.engine.checkpoint import module_tensors, restore_module
from armed_pyro.engine.schedule import History, Schedule
from armed_pyro.guides.base import Guide
from armed_pyro.guides.crossed import CrossedGuide
from armed_pyro.guides.nested import NestedGuide
from armed_pyro.guides.structured import StructuredGuide
from armed_pyro.inference.posterior import Posterior, RefinedDraws
from armed_pyro.prediction.cluster_classifier import Classifiers, ClusterClassifier
from armed_pyro.program.data_spec import Facts
from armed_pyro.program.model import MixedEffects
from armed_pyro.program.names import cluster_columns
from armed_pyro.storage.manifest import (
    MANIFEST,
    cross_fit,
    describe,
    program,
    read_manifest,
    reading,
)
from armed_pyro.summaries.datatree import GROUPS

MODEL, POSTERIOR = "model.safetensors", "posterior.nc"
VARIANCE, FIXED = "variance_components.csv", "fixed_effects.csv"
DIAGNOSTICS = "diagnostics.json"
# Files that training may leave in the folder to which its fit is then saved.
CHECKPOINTS = {"checkpoint.safetensors", "checkpoint.partial"}
# Bytes beyond which a group of draws is left out of posterior.nc; it is drawn again on demand.
LARGEST_GROUP = 4e6
# Bytes of random effects in posterior.nc; beyond it fewer draws are written.
LARGEST_POSTERIOR = 100e6
# Groups of draws, which are stored in single precision where that is exact enough.
DRAWN = ("posterior", "posterior_predictive", "log_likelihood", "prior", "prior_predictive")
# Largest rounding error, in sds over the draws, of a variable in single precision.
ROUNDING = 1e-3
# Fields of a classifier in the manifest.
CLASSIFIER = ("factor", "temperature", "pooling", "report")
# Guides that can be saved, by their names in the manifest.
GUIDES: Mapping[str, Callable[[MixedEffects], Guide]] = {
    "CrossedGuide": CrossedGuide,
    "NestedGuide": NestedGuide,
    "StructuredGuide": StructuredGuide,
}


def check_saveable(posterior: Posterior, folder: str | Path) -> None:
    """Raise the errors of `save` without writing, before tables and verdict are computed."""
    _check_target(Path(folder).resolve())
    _guide_name(posterior)
    describe(posterior)


def save(
    posterior: Posterior,
    folder: str | Path,
    *,
    classifiers: Classifiers,
    variance_components: pd.DataFrame,
    fixed_effects: pd.DataFrame,
    verdict: Mapping[str, Any],
    draws: int = 1000,
    prob: float = 0.9,
) -> None:
    """Write a fit to a folder, completely or not at all.

    The folder gets ``model.safetensors`` (weights of network, adversaries and guide),
    ``manifest.json`` (program, training and labels), ``posterior.nc`` (`Fit.to_datatree`, with
    the training rows; draws are compressed, in single precision where rounding stays below a
    thousandth of their sd, and groups of more than 4 MB are left out: a loaded fit draws them
    again),
    ``variance_components.csv``, ``fixed_effects.csv`` and ``diagnostics.json`` (the verdict). A
    fit in the folder is replaced; other files in it are kept. `prob`, the probability of the
    intervals in both tables, is kept for reports.

    Raises
    ------
    ValueError
        If the folder holds other files but no fit, or the program has a user-defined guide, term,
        family or prior, which could not be read again. Nothing is written then.
    """
    check_saveable(posterior, folder)
    if draws < 2:
        raise ValueError(f"`draws` must be at least 2, not {draws}")
    target = Path(folder).resolve()
    manifest, tensors = _contents(posterior, classifiers)
    manifest["prob"] = prob
    target.parent.mkdir(parents=True, exist_ok=True)
    # In the same directory as the target, as renaming is atomic only within a file system.
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    partial.mkdir()
    try:
        _write_json(partial / MANIFEST, manifest)
        save_file({k: tensor.cpu().contiguous() for k, tensor in tensors.items()}, partial / MODEL)
        del tensors
        # Only the owner can read the file that save_file makes.
        shutil.copymode(partial / MANIFEST, partial / MODEL)
        _write_groups(posterior, partial / POSTERIOR, draws)
        variance_components.to_csv(partial / VARIANCE, index=False)
        fixed_effects.to_csv(partial / FIXED, index=False)
        _write_json(partial / DIAGNOSTICS, {**verdict, **_training_end(posterior)})
        _put(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _contents(
    posterior: Posterior, classifiers: Classifiers
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The manifest, and all tensors by name."""
    manifest = {
        **describe(posterior),
        "guide": _guide_name(posterior),
        "data": _describe_data(posterior.data),
    }
    tensors = module_tensors("model", posterior.model) | module_tensors("guide", posterior.guide)
    if posterior.refined is not None:
        refined = posterior.refined
        manifest["refined"] = {"method": refined.method, "quality": dict(refined.quality)}
        tensors |= {f"refined.{name}": value for name, value in refined.latents.items()}
    manifest["classifiers"] = []
    for number, classifier in enumerate(classifiers.values()):
        manifest["classifiers"].append({name: getattr(classifier, name) for name in CLASSIFIER})
        tensors |= {f"classifier{number}.{k}": v for k, v in classifier.tensors().items()}
    return manifest, tensors


def load(folder: str | Path, net: nn.Module | None = None) -> tuple[Posterior, Classifiers]:
    """Read a fit that `save` wrote; on the CPU its predictions are equal to the bit.

    `net` is a network of the fit's architecture; a copy of it gets the weights of the fit. It is
    not needed for networks from functions registered as ``armed_pyro.models`` (``linear``,
    ``dense``). The classifiers of clusters are those that were saved.

    Raises
    ------
    ValueError
        If the folder holds no fit, a file is missing, damaged or of a newer version, or the
        network is unknown or has other parameters.
    """
    path = Path(folder)
    manifest = read_manifest(path)
    for name in (MODEL, POSTERIOR):
        if not (path / name).is_file():
            raise ValueError(f"{path} holds no {name}: the fit is incomplete; save it again")
    with reading(path / MODEL):
        tensors = load_file(path / MODEL)
    with reading(path / MANIFEST):
        facts = Facts.from_json(manifest["facts"])
        make_guide, training = GUIDES[manifest["guide"]], manifest["training"]
        schedule, history = Schedule(**training["schedule"]), History(**training["history"])
        seed, stopped = training["seed"], training["stopped"]
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # Warnings about the data were given when the model was fitted.
        warnings.simplefilter("ignore", UserWarning)
        model = program(manifest, path / MANIFEST, net).bind(facts)
    guide = make_guide(model)
    with reading(path / MODEL):
        cross_fit(model, manifest)
        restore_module("model", model, tensors)
        restore_module("guide", guide, tensors)
        refined = None
        if (record := manifest.get("refined")) is not None:
            draws = _within(tensors, "refined.")
            refined = RefinedDraws(record["method"], draws, record["quality"])
        classifiers = _classifiers(model, manifest.get("classifiers", []), tensors)
    with reading(path / POSTERIOR):
        names = cluster_columns(model, manifest["data"]["levels"])
        data = _data(path / POSTERIOR, manifest["data"], facts, names)
    parts = (model.eval(), guide, data, history, schedule, seed, stopped)
    return Posterior(*parts, refined=refined), classifiers


# --- the folder -------------------------------------------------------------------------------


def _check_target(target: Path) -> None:
    """Raise ValueError if saving would replace anything but a fit."""
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file, expected a folder to save the fit to")
    files = {path.name for path in target.iterdir()} if target.exists() else set()
    if files <= CHECKPOINTS:
        return
    try:
        read_manifest(target)
    except ValueError as error:
        raise ValueError(
            f"{target} holds other files ({', '.join(sorted(files)[:3])}) and no fit that could be "
            f"replaced: choose a new folder ({error})"
        ) from error


def _guide_name(posterior: Posterior) -> str:
    """Name of the guide's class, by which `load` finds it."""
    name = type(posterior.guide).__name__
    if GUIDES.get(name) is not type(posterior.guide):
        raise ValueError(f"a fit with the guide {name} cannot be saved: list it in storage.GUIDES")
    return name


def _put(partial: Path, target: Path) -> None:
    """Rename the new folder to the target, and keep the target's other files."""
    old = partial.with_name(f"{partial.name}.old")
    if target.exists():
        target.rename(old)
    try:
        partial.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    if old.exists():
        for other in old.iterdir():
            if not (target / other.name).exists():
                other.rename(target / other.name)
        shutil.rmtree(old)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _write_groups(posterior: Posterior, path: Path, draws: int) -> None:
    """Write the groups of `Fit.to_datatree` one at a time, as all at once need much memory.

    There are at most as many draws as have random effects that fit into `LARGEST_POSTERIOR`.
    """
    most = max(2, int(LARGEST_POSTERIOR / (4 * max(1, _n_effects(posterior)))))
    if draws > most:
        warnings.warn(
            f"{POSTERIOR} has {most} draws instead of {draws}, whose random effects would exceed "
            f"{LARGEST_POSTERIOR / 1e6:.0f} MB",
            UserWarning,
            stacklevel=4,
        )
        draws = most
    for name in _groups(posterior, draws):
        try:
            group = GROUPS[name](posterior, draws, posterior.seed)
        except (ArithmeticError, ValueError, RuntimeError) as error:
            if name in ("observed_data", "constant_data"):
                raise  # the fit could not be loaded without them
            # Rates of a diverged fit may not be finite. What can be computed is kept.
            warnings.warn(
                f"{POSTERIOR} is without {name}, which could not be computed: {cause(error)}",
                UserWarning,
                stacklevel=4,
            )
            continue
        if group.data_vars:
            group = _narrow(group) if name in DRAWN else group
            packed = {"zlib": True, "complevel": 1, "shuffle": True}
            numeric = [k for k, array in group.variables.items() if array.dtype.kind in "fiub"]
            encoding = {k: packed for k in numeric if group[k].ndim}
            group.to_netcdf(path, mode="a", group=name, engine="h5netcdf", encoding=encoding)
        del group
        release()


# --- its contents -----------------------------------------------------------------------------


def _narrow(group: xr.Dataset) -> xr.Dataset:
    """The draws in single precision, except variables that would lose more than `ROUNDING`."""

    def narrow(array: xr.DataArray) -> xr.DataArray:
        if array.dtype != np.float64 or "draw" not in array.dims:
            return array
        short = array.astype(np.float32)
        lost = abs(array - short).max(("chain", "draw"))
        return short if bool((lost <= ROUNDING * array.std(("chain", "draw"))).all()) else array

    with np.errstate(all="ignore"):
        return group.map(narrow, keep_attrs=True)


def _n_effects(posterior: Posterior) -> int:
    """Number of random effects."""
    levels = posterior.model.data_facts().levels
    return sum(len(f.terms) * len(levels[f.name]) for f in posterior.model.factors)


def _groups(posterior: Posterior, draws: int) -> list[str]:
    """Groups of the tree that are not too large for the file."""
    by_row = ("posterior_predictive", "log_likelihood", "prior_predictive")
    numbers = {**dict.fromkeys(by_row, posterior.data.n_rows), "prior": _n_effects(posterior)}
    return [name for name in GROUPS if 4 * draws * numbers.get(name, 0) <= LARGEST_GROUP]


def _within(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with the prefix, by the rest of the name."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _classifiers(
    model: MixedEffects, records: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor]
) -> Classifiers:
    trained = {}
    for number, record in enumerate(records):
        settings = {name: record[name] for name in CLASSIFIER}
        weights = _within(tensors, f"classifier{number}.")
        trained[record["factor"]] = ClusterClassifier.restore(model, tensors=weights, **settings)
    return Classifiers(trained)


def _training_end(posterior: Posterior) -> dict[str, Any]:
    """How the training ended; the evidence lower bound is the sum over all rows."""
    history, facts = posterior.history, posterior.model.data_facts()
    adversaries = []
    for place, adversary in enumerate(posterior.model.adversaries):
        counts, windows = facts.counts[adversary.factor], history.adversary_accuracy
        accuracy = windows[-1][place] if windows else None
        chance = float(counts.max() / counts.sum())
        record = {"factor": adversary.factor, "accuracy": accuracy, "chance": chance}
        warmup = history.warmup[place] if place < len(history.warmup) else None
        adversaries.append({**record, "weight": adversary.weight, "warmup_steps": warmup})
    return {
        "converged": posterior.converged,
        "stopped": posterior.stopped,
        "steps": len(history.loss),
        "elbo": float(np.mean(history.elbo[-100:])) * facts.n_rows if history.elbo else None,
        "adversaries": adversaries,
        "fresh_probes": history.probes,
        "weights_tried": history.weights,
    }


def _describe_data(data: ClusteredData) -> dict[str, Any]:
    """Properties of the training rows that the tree in `POSTERIOR` does not hold."""
    try:
        row_dtype = index_to_json(data.row_labels)["dtype"]
    except TypeError:  # a composite index, whose labels are read back as text
        row_dtype = None
    return {
        "continuous": list(data.continuous),
        "slope_continuous": list(data.slope_continuous),
        "levels": {
            name: index_to_json(grouping.levels) for name, grouping in data.groupings.items()
        },
        "row_dtype": row_dtype,
        "row_name": data.row_labels.name if isinstance(data.row_labels.name, str) else None,
    }


def _data(
    path: Path, record: Mapping[str, Any], facts: Facts, names: Mapping[str, str]
) -> ClusteredData:
    """The training rows, from the tree's observed and constant data."""
    with (
        xr.open_dataset(path, group="observed_data", engine="h5netcdf") as observed,
        xr.open_dataset(path, group="constant_data", engine="h5netcdf") as constant,
    ):
        outcome = observed[variable_name(facts.outcome_name)].to_numpy()
        values = {str(name): array.to_numpy() for name, array in constant.data_vars.items()}
        labels = pd.Index(observed.indexes["row"])
    groupings = {}
    for name, content in record["levels"].items():
        levels = index_from_json(content)
        # Fits saved before all names were distinct have no other name than `variable_name`.
        stored = values.get(names[name], values.get(variable_name(name)))
        codes = pd.Index(label_values(levels)).get_indexer(pd.Index(stored))
        if (codes < 0).any():
            raise ValueError(f"clusters of {name!r} that {MANIFEST} does not know")
        groupings[name] = Grouping(torch.from_numpy(codes.astype(np.int64)), levels)
    if record["row_dtype"] is not None:
        labels = index_from_json({"dtype": record["row_dtype"], "values": labels.tolist()})

    def tensor(name: str) -> Tensor | None:
        return torch.from_numpy(values[name].copy()) if name in values else None

    features = tensor("features")
    if features is None:
        features = torch.zeros(len(outcome), *facts.feature_shape, dtype=torch.float64)
    return ClusteredData(
        features=features,
        feature_names=facts.feature_names,
        sources=facts.sources,
        continuous=tuple(record["continuous"]),
        outcome_name=facts.outcome_name,
        outcome=torch.from_numpy(outcome.astype(np.float64)),
        classes=facts.classes,
        groupings=groupings,
        trials=tensor("trials"),
        offset=tensor("offset"),
        weights=tensor("weights"),
        weights_kind=facts.weights_kind or "frequency",
        row_labels=labels.rename(record["row_name"]),
        schema=facts.schema,
        slopes=tensor("slopes"),
        slope_names=facts.slope_names,
        slope_sources=facts.slope_sources,
        slope_continuous=tuple(record.get("slope_continuous", ())),
        fold=tensor("fold"),
    )
