"""Fits on disk: tensors, JSON and NetCDF in a folder; reading one never executes code."""

from __future__ import annotations

import copy
import json
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from armed_pyro.adversary import Adversary
from armed_pyro.checkpoint import module_tensors, restore_module
from armed_pyro.data import ClusteredData
from armed_pyro.datatree import GROUPS, label_values, to_datatree, variable_name
from armed_pyro.facts import Facts
from armed_pyro.families import FAMILIES
from armed_pyro.guides import Guide, StructuredGuide
from armed_pyro.labels import Grouping, index_from_json, index_to_json
from armed_pyro.networks import is_file, network
from armed_pyro.priors import Exponential, HalfNormal, HalfStudentT, Known, Priors
from armed_pyro.program import MixedEffects
from armed_pyro.schedule import History, Schedule
from armed_pyro.terms import RandomEffects, Slopes

if TYPE_CHECKING:
    from armed_pyro.fitted import Fit

__all__ = ["load", "save"]

FORMAT, VERSION = "armed_pyro fit", 1
MODEL, MANIFEST, POSTERIOR = "model.safetensors", "manifest.json", "posterior.nc"
VARIANCE, DIAGNOSTICS = "variance_components.csv", "diagnostics.json"
# What a training run may have left in the folder that the fit is then saved to.
CHECKPOINTS = {"checkpoint.safetensors", "checkpoint.partial"}
# Bytes beyond which a group of draws is left out of posterior.nc; it can be made again.
LARGEST_GROUP = 200e6

# What a manifest can name: nothing else is ever built from it.
GUIDES: Mapping[str, Callable[[MixedEffects], Guide]] = {"StructuredGuide": StructuredGuide}
TERMS = {one.__name__: one for one in (RandomEffects, Slopes)}
PRIORS = {one.__name__: one for one in (Exponential, HalfNormal, HalfStudentT, Known)}


def save(fit: Fit, folder: str | Path, *, draws: int = 1000) -> None:
    """Write a fit to a folder, whole or not at all.

    The folder holds ``model.safetensors`` (weights of network, adversaries and guide),
    ``manifest.json`` (everything else that `load` needs), ``posterior.nc`` (`Fit.to_datatree`),
    ``variance_components.csv`` and ``diagnostics.json``. A fit that is already there is replaced;
    other files beside it are kept.

    Parameters
    ----------
    fit : Fit
        The fit.
    folder : path
        Where to write; made if it does not exist.
    draws : int
        Draws in ``posterior.nc``. Groups of draws beyond 200 MB are left out, with a warning.

    Raises
    ------
    ValueError
        If the folder holds other files but no fit, or the fit has parts (a guide, term, family or
        prior of the user's own) that cannot be saved. Nothing is written then.
    """
    target = Path(folder).resolve()
    _check_target(target)
    manifest = json.dumps(_manifest(fit), indent=1)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, as a rename is atomic only within a file system.
    partial, old = (target.with_name(f".{target.name}.{uuid.uuid4().hex}") for _ in range(2))
    partial.mkdir()
    try:
        tensors = module_tensors("model", fit.model) | module_tensors("guide", fit.guide)
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, partial / MODEL)
        (partial / MANIFEST).write_text(manifest, encoding="utf-8")
        tree = to_datatree(fit, draws=draws, groups=_groups(fit, draws))
        tree.to_netcdf(partial / POSTERIOR, engine="h5netcdf")
        fit.variance_components().to_csv(partial / VARIANCE, index=False)
        diagnostics = json.dumps(_diagnostics(fit), indent=1)
        (partial / DIAGNOSTICS).write_text(diagnostics, encoding="utf-8")
        if target.exists():
            target.rename(old)
        try:
            partial.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if old.exists():
        for other in old.iterdir():
            if not (target / other.name).exists():
                other.rename(target / other.name)
        shutil.rmtree(old)


def load(folder: str | Path, net: nn.Module | None = None) -> Fit:
    """Read a fit that `save` wrote; it predicts what the saved one did, to the bit.

    Parameters
    ----------
    folder : path
        The folder.
    net : torch.nn.Module, optional
        A network of the same architecture as the fit's, whose weights do not matter: it is
        copied, and the copy's are overwritten. Not needed for networks made by the functions
        registered as ``armed_pyro.models``, such as ``linear`` and ``dense``.

    Raises
    ------
    ValueError
        If the folder holds no fit, one of its files is missing, damaged or of a newer version, or
        the network is not known or has other parameters.
    """
    from armed_pyro.fitted import Fit  # which imports this module

    path = Path(folder)
    manifest = _read_manifest(path)
    for name in (MODEL, POSTERIOR):
        if not (path / name).is_file():
            raise ValueError(f"{path} holds no {name}: the fit is incomplete; save it again")
    with _reading(path / MODEL):
        tensors = load_file(path / MODEL)
    with _reading(path / MANIFEST):
        facts = Facts.from_json(manifest["facts"])
        plan, training = dict(manifest["model"]), manifest["training"]
        schedule, history = Schedule(**training["schedule"]), History(**training["history"])
        seed, stopped = training["seed"], training["stopped"]
        make_guide = GUIDES[manifest["guide"]]
        settings = manifest["network"]
        parameters = {name: tuple(shape) for name, shape in settings["parameters"].items()}
        random = [_built(term, TERMS) for term in plan["random"]]
        priors = _built_priors(plan["priors"])
        games = [Adversary(**game) for game in plan["adversaries"]]
        family = FAMILIES[plan["family"]]()
        options = {name: plan[name] for name in ("bayesian_head", "fixed_weight")}
        dtype = getattr(torch, settings["dtype"])
    net = _network(settings["made_by"]) if net is None else copy.deepcopy(net)
    _check_network(net.to(dtype), parameters)
    with _reading(path / MANIFEST), warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # The warning of few rows was given when the fit was made.
        warnings.simplefilter("ignore", UserWarning)
        model = MixedEffects(net, random, family, games, priors=priors, **options).bind(facts)
        guide = make_guide(model)
    with _reading(path / MODEL):
        restore_module("model", model, tensors)
        restore_module("guide", guide, tensors)
    with _reading(path / POSTERIOR):
        data = _data(path / POSTERIOR, manifest["data"], facts)
    return Fit(model.eval(), guide, data, history, schedule, seed, stopped)


# --- the folder -------------------------------------------------------------------------------


def _check_target(target: Path) -> None:
    """Raise ValueError if saving would replace anything but a fit."""
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file, expected a folder to save the fit to")
    held = {path.name for path in target.iterdir()} if target.exists() else set()
    if held <= CHECKPOINTS:
        return
    try:
        _read_manifest(target)
    except ValueError as error:
        raise ValueError(
            f"{target} holds other files ({', '.join(sorted(held)[:3])}) and no fit, which could "
            f"be replaced: choose a new folder ({error})"
        ) from error


def _read_manifest(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: expected one that a fit was saved to")
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} holds no fit (no {MANIFEST}): expected a folder of Fit.save")
    with _reading(path):
        manifest = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path} was not written by armed_pyro: expected the format {FORMAT!r}")
    if not isinstance(manifest.get("version"), int) or manifest["version"] > VERSION:
        raise ValueError(
            f"{path} has version {manifest.get('version')!r} of the format, written by armed_pyro "
            f"{manifest.get('armed_pyro')}; this is armed_pyro {version('armed_pyro')}, which reads "
            f"up to version {VERSION}: update armed_pyro"
        )
    return manifest


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Errors met in a file's content as one that names the file."""
    try:
        yield
    except (SafetensorError, RuntimeError, OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged or was changed ({type(error).__name__}: {error}): save the fit "
            "again, or restore the file from a copy"
        ) from error


# --- what is written --------------------------------------------------------------------------


def _manifest(fit: Fit) -> dict[str, Any]:
    """All of a fit but its tensors and its rows, as JSON values."""
    model, net = fit.model, fit.model.net
    guide, family = type(fit.guide).__name__, model.family
    if GUIDES.get(guide) is not type(fit.guide):
        raise ValueError(f"a fit with the guide {guide} cannot be saved: list it in storage.GUIDES")
    if FAMILIES.get(family.name) is not type(family):
        raise ValueError(
            f"a fit with the family {family.name!r} cannot be saved: list it in families.FAMILIES"
        )
    return {
        "format": FORMAT,
        "version": VERSION,
        "armed_pyro": version("armed_pyro"),
        "model": {
            "random": [_named(term, TERMS) for term in model.terms],
            "family": family.name,
            "priors": _named_priors(model.priors),
            "bayesian_head": model.bayesian_head,
            "fixed_weight": model.fixed_weight,
            "adversaries": [game.settings() for game in model.adversaries],
        },
        "network": {
            "made_by": getattr(net, "armed_pyro_network", None),
            "dtype": str(model.reference().dtype).removeprefix("torch."),
            "parameters": {name: list(one.shape) for name, one in net.state_dict().items()},
        },
        "guide": guide,
        "training": {
            "schedule": fit.schedule.to_json(),
            "history": fit.history.to_json(),
            "seed": fit.seed,
            "stopped": fit.stopped,
        },
        "facts": model.data_facts().to_json(),
        "data": {
            "continuous": list(fit.data.continuous),
            "groupings": {k: index_to_json(one.levels) for k, one in fit.data.groupings.items()},
            "row_dtype": str(fit.data.row_labels.dtype),
        },
    }
