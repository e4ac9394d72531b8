"""Fits on disk as tensors, JSON and NetCDF in a folder; reading a fit never executes code."""

from __future__ import annotations

import json
import re
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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from armed_pyro._free_space import check_free
from armed_pyro._memory import release
from armed_pyro._messages import cause
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.data.files import without_formulas
from armed_pyro.engine.checkpoint import module_tensors, restore_module
from armed_pyro.engine.schedule import History, Schedule
from armed_pyro.guides.base import Guide, n_draws
from armed_pyro.guides.crossed import CrossedGuide
from armed_pyro.guides.nested import NestedGuide
from armed_pyro.guides.process import ProcessGuide
from armed_pyro.guides.structured import StructuredGuide
from armed_pyro.inference.importance_sampling import n_effects
from armed_pyro.inference.posterior import METHODS, Posterior, RefinedDraws
from armed_pyro.prediction.cluster_classifier import Classifiers, ClusterClassifier
from armed_pyro.program.data_spec import Facts
from armed_pyro.program.model import MixedEffects
from armed_pyro.program.names import cluster_columns
from armed_pyro.program.probe import check_probe, probe
from armed_pyro.storage.checksums import check_sums, sealed
from armed_pyro.storage.manifest import (
    MANIFEST,
    cross_fit,
    describe,
    program,
    read_manifest,
    reading,
)
from armed_pyro.storage.rows import describe_rows, read_rows, training_rows, with_inputs
from armed_pyro.storage.run_lock import DRAFT, REPLACED, is_temporary, locked
from armed_pyro.summaries.datatree import GROUPS

MODEL, POSTERIOR = "model.safetensors", "posterior.nc"
VARIANCE, FIXED = "variance_components.csv", "fixed_effects.csv"
DIAGNOSTICS = "diagnostics.json"
FILES = {MANIFEST, MODEL, POSTERIOR, VARIANCE, FIXED, DIAGNOSTICS}
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
    "ProcessGuide": ProcessGuide,
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
    quote_formulas: bool = False,
) -> None:
    """Write a fit to a folder, completely or not at all.

    The folder gets ``model.safetensors`` (weights of network, adversaries and guide),
    ``manifest.json`` (program, training and labels), ``posterior.nc`` (`Fit.to_datatree`, with
    the training rows; draws are compressed, in single precision where rounding stays below a
    thousandth of their sd, and groups of more than 4 MB are left out: a loaded fit draws them
    again),
    ``variance_components.csv``, ``fixed_effects.csv`` and ``diagnostics.json`` (the verdict). A
    fit in the folder is replaced; other files in it are kept. `prob`, the probability of the
    intervals in both tables, is kept for reports. `quote_formulas` is that of `write_table`, for
    both.

    Raises
    ------
    ValueError
        If another process writes to the folder, it holds other files but no fit, or the program has
        a user-defined guide, term, family or prior, which could not be read again. Nothing is
        written then.
    OSError
        If the disk has too little space. Nothing is left of what was written.
    """
    check_saveable(posterior, folder)
    if draws < 2:
        raise ValueError(f"`draws` must be at least 2, not {draws}")
    target = Path(folder).resolve()
    manifest, tensors = _contents(posterior, classifiers)
    manifest["prob"] = prob
    with locked(target):
        check_free(target, sum(tensor.nbytes for tensor in tensors.values()), "the fit")
        partial = target / f"{DRAFT}{uuid.uuid4().hex}"
        partial.mkdir()
        try:
            save_file({k: t.cpu().contiguous() for k, t in tensors.items()}, partial / MODEL)
            del tensors
            _write_groups(posterior, partial / POSTERIOR, draws)
            for name, table in {VARIANCE: variance_components, FIXED: fixed_effects}.items():
                table = without_formulas(table) if quote_formulas else table
                table.to_csv(partial / name, index=False)
            _write_json(partial / DIAGNOSTICS, {**verdict, **_training_end(posterior)})
            # Only the owner can read the file that save_file makes.
            shutil.copymode(partial / DIAGNOSTICS, partial / MODEL)
            files = sorted(path.name for path in partial.iterdir())
            _write_json(partial / MANIFEST, sealed(manifest, MANIFEST, partial, files))
            _put(partial, target)
        except (SafetensorError, RuntimeError) as error:
            # What safetensors and HDF5 raise if the disk is full.
            raise OSError(f"the fit could not be written to {target}: {cause(error)}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _contents(
    posterior: Posterior, classifiers: Classifiers
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The manifest, and all tensors by name."""
    manifest = {
        **describe(posterior),
        "guide": _guide_name(posterior),
        "data": describe_rows(posterior.data),
        "probe": probe(posterior.model),
    }
    tensors = module_tensors("model", posterior.model) | module_tensors("guide", posterior.guide)
    if posterior.refined is not None:
        refined = posterior.refined
        manifest["refined"] = {"method": refined.method, "quality": dict(refined.quality)}
        tensors |= {f"refined.{name}": value for name, value in refined.stored().items()}
    manifest["classifiers"] = []
    for number, classifier in enumerate(classifiers.values()):
        manifest["classifiers"].append({name: getattr(classifier, name) for name in CLASSIFIER})
        tensors |= {f"classifier{number}.{k}": v for k, v in classifier.tensors().items()}
    return manifest, tensors


def load(
    folder: str | Path,
    net: nn.Module | None = None,
    *,
    data: ClusteredData | None = None,
    verify: bool = True,
) -> tuple[Posterior, Classifiers]:
    """Read a fit that `save` wrote; on the CPU its predictions are equal to the bit.

    `net` is a network of the fit's architecture; a copy of it gets the weights of the fit. It is
    not needed for networks from functions registered as ``armed_pyro.models`` (``linear``,
    ``dense``). The classifiers of clusters are those that were saved. `data` are the training rows
    with the inputs of a dataset. With `verify`, no file may have changed, and the network must have
    the fit's outputs at fixed inputs.

    Raises
    ------
    ValueError
        If the folder holds no fit, a file is missing, changed, damaged or of a newer version, or
        the network is unknown or another one.
    """
    path = Path(folder)
    manifest = read_manifest(path)
    for name in (MODEL, POSTERIOR):
        if not (path / name).is_file():
            raise ValueError(f"{path} holds no {name}: the fit is incomplete; save it again")
    if verify:
        check_sums(manifest, MANIFEST, path)
    with reading(path / MODEL):
        tensors = load_file(path / MODEL)
        _check_numbers(tensors, diverged=manifest["training"]["stopped"] == "diverged")
    with reading(path / MANIFEST, "facts"):
        facts = Facts.from_json(manifest["facts"])
    with reading(path / MANIFEST, "guide"):
        make_guide = GUIDES[manifest["guide"]]
    training = manifest["training"]
    with reading(path / MANIFEST, "training"):
        schedule, history = Schedule(**training["schedule"]), History(**training["history"])
    seed, stopped = training["seed"], training["stopped"]
    with reading(path / POSTERIOR):
        # Before the program is bound, as the sizes in the manifest are only claims until then.
        arrays = read_rows(path / POSTERIOR, manifest["data"], facts)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # Warnings about the data were given when the model was fitted.
        warnings.simplefilter("ignore", UserWarning)
        model = program(manifest, path / MANIFEST, net).bind(facts)
    guide = make_guide(model)
    with reading(path / MODEL):
        cross_fit(model, manifest)
        for name, module in {"model": model, "guide": guide}.items():
            _check_types(name, module, tensors)
            restore_module(name, module, tensors)
        refined = _refined(model.eval(), guide, manifest.get("refined"), tensors)
        classifiers = _classifiers(model, manifest.get("classifiers", []), tensors)
    if verify:
        check_probe(model, manifest.get("probe"), f"the fit in {path}")
    with reading(path / POSTERIOR):
        names = cluster_columns(model, manifest["data"]["levels"])
        rows = training_rows(arrays, manifest["data"], facts, names)
    if data is not None:
        rows = with_inputs(rows, data)
    parts = (model, guide, rows, history, schedule, seed, stopped)
    return Posterior(*parts, refined=refined), classifiers


# --- the folder -------------------------------------------------------------------------------


def _check_target(target: Path) -> None:
    """Raise ValueError if saving would replace anything but a fit."""
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file, expected a folder to save the fit to")
    names = {path.name for path in target.iterdir()} if target.exists() else set()
    files = {name for name in names if not is_temporary(name)}
    killed = any(name.startswith(DRAFT) for name in names)
    if files <= (CHECKPOINTS | FILES if killed else CHECKPOINTS):
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
    """Move new files to their folder, the manifest last.

    The folder is without a manifest while files of two fits are in it: if the process is killed
    then, no half of a fit can be loaded, and `locked` moves the other files.
    """
    names = sorted((path.name for path in partial.iterdir()), key=lambda name: name == MANIFEST)
    replaced = partial / REPLACED
    replaced.mkdir()
    moved: list[tuple[Path, Path]] = []

    def move(source: Path, destination: Path) -> None:
        if source.exists():
            source.rename(destination)
            moved.append((source, destination))

    try:
        for name in reversed(names):
            move(target / name, replaced / name)
        for name in names:
            move(partial / name, target / name)
    except BaseException:  # an interrupt, too
        for source, destination in reversed(moved):
            destination.rename(source)
        raise


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _write_groups(posterior: Posterior, path: Path, draws: int) -> None:
    """Write the groups of `Fit.to_datatree` one at a time, as all at once need much memory.

    There are at most as many draws as have random effects that fit into `LARGEST_POSTERIOR`.
    """
    most = max(2, int(LARGEST_POSTERIOR / (4 * max(1, n_effects(posterior.model)))))
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


def _groups(posterior: Posterior, draws: int) -> list[str]:
    """Groups of the tree that are not too large for the file."""
    by_row = ("posterior_predictive", "log_likelihood", "prior_predictive")
    numbers = {**dict.fromkeys(by_row, posterior.data.n_rows), "prior": n_effects(posterior.model)}
    return [name for name in GROUPS if 4 * draws * numbers.get(name, 0) <= LARGEST_GROUP]


def _within(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with the prefix, by the rest of the name."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _check_numbers(tensors: Mapping[str, Tensor], *, diverged: bool) -> None:
    """Raise ValueError for a tensor of an unknown part, or with values that are not numbers.

    Such values are in a fit that `diverged` at its first step.
    """
    for name, tensor in tensors.items():
        if re.fullmatch(r"(model|guide|refined|classifier\d+)\..*", name) is None:
            raise ValueError(f"{name!r} is no tensor of a fit")
        if not diverged and tensor.is_floating_point() and bool(tensor.isnan().any()):
            raise ValueError(f"{name!r} has values that are not numbers")


def _check_types(prefix: str, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError if a module's tensors have other types, which torch would convert."""
    for name, tensor in module.state_dict().items():
        saved = tensors.get(f"{prefix}.{name}", tensor)
        if saved.dtype != tensor.dtype:
            raise ValueError(f"'{prefix}.{name}' is {saved.dtype}, expected {tensor.dtype}")


def _refined(
    model: MixedEffects,
    guide: Guide,
    record: Mapping[str, Any] | None,
    tensors: Mapping[str, Tensor],
) -> RefinedDraws | None:
    """The draws that replace the guide's; ValueError unless they have the shapes of its draws."""
    draws = _within(tensors, "refined.")
    if record is None:
        if draws:
            raise ValueError(f"there are refined draws, of which {MANIFEST} does not know")
        return None
    if record["method"] not in METHODS:
        raise ValueError(f"refined.method is {record['method']!r}, expected one of {[*METHODS]}")
    with model.seeded(0):
        drawn = guide.draws(model.clusters(), 2)
    count = n_draws(draws)
    # Random effects may be drawn for the first draws only.
    effects = {factor.effect_site for factor in model.factors}
    joint = min((len(draws[site]) for site in effects & draws.keys()), default=count)
    for name in sorted({*drawn, *draws}):
        if name not in draws or name not in drawn:
            raise ValueError(
                f"the draws of {name!r} are {'unknown' if name in draws else 'missing'}"
            )
        lead = () if drawn[name].dim() <= 1 else (joint if name in effects else count,)
        shape = (*lead, *drawn[name].shape[len(lead) :])
        if tuple(draws[name].shape) != shape or not 0 < joint <= count:
            raise ValueError(
                f"the draws of {name!r} have the shape {tuple(draws[name].shape)}, expected {shape}"
            )
        if draws[name].dtype != drawn[name].dtype or not bool(draws[name].isfinite().all()):
            raise ValueError(f"the draws of {name!r} are not all finite {drawn[name].dtype}")
    return RefinedDraws(record["method"], draws, record["quality"])


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
