"""Fits on disk: tensors, JSON and NetCDF in a folder; reading one never executes code."""

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
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.data.grouping import Grouping, index_from_json, index_to_json
from armed_pyro.data.xarray_names import label_values, variable_name
from armed_pyro.engine.checkpoint import module_tensors, restore_module
from armed_pyro.engine.schedule import History, Schedule
from armed_pyro.guides.base import Guide
from armed_pyro.guides.crossed import CrossedGuide
from armed_pyro.guides.structured import StructuredGuide
from armed_pyro.inference.draws import RefinedDraws
from armed_pyro.inference.posterior import Posterior
from armed_pyro.prediction.cluster_classifier import Classifiers, ClusterClassifier
from armed_pyro.program.data_spec import Facts
from armed_pyro.program.model import MixedEffects
from armed_pyro.storage.manifest import MANIFEST, describe, program, read_manifest, reading
from armed_pyro.summaries.datatree import GROUPS

__all__ = ["GUIDES", "check_target", "load", "save"]


MODEL, POSTERIOR = "model.safetensors", "posterior.nc"
VARIANCE, DIAGNOSTICS = "variance_components.csv", "diagnostics.json"
# What training may leave in the folder that its fit is then saved to.
CHECKPOINTS = {"checkpoint.safetensors", "checkpoint.partial"}
# Bytes beyond which a group of draws is left out of posterior.nc: it can be drawn again.
LARGEST_GROUP = 200e6
# Bytes of the posterior, of which fewer draws are written then.
LARGEST_POSTERIOR = 100e6
# Variational families by the name that the manifest gives them.
GUIDES: Mapping[str, Callable[[MixedEffects], Guide]] = {
    "CrossedGuide": CrossedGuide,
    "StructuredGuide": StructuredGuide,
}


def check_target(posterior: Posterior, folder: str | Path) -> Path:
    """The folder as an absolute path.

    Raises
    ------
    ValueError
        If the folder holds other files but no fit, or the guide is of the user's own and could not
        be read again.
    """
    target = Path(folder).resolve()
    _check_target(target)
    guide = type(posterior.guide).__name__
    if GUIDES.get(guide) is not type(posterior.guide):
        raise ValueError(f"a fit with the guide {guide} cannot be saved: list it in storage.GUIDES")
    describe(posterior)
    return target


def save(
    posterior: Posterior,
    folder: str | Path,
    classifiers: Classifiers,
    components: pd.DataFrame,
    diagnostics: Mapping[str, Any],
    *,
    draws: int = 1000,
) -> None:
    """Write a fit to a folder, whole or not at all.

    The folder gets ``model.safetensors`` (weights of network, adversaries and guide),
    ``manifest.json`` (program, training and labels), ``posterior.nc`` (`Fit.to_datatree`, with
    the training rows), ``variance_components.csv`` and ``diagnostics.json``. A fit that is
    already there is replaced; other files beside it are kept.

    Parameters
    ----------
    posterior : Posterior
        The posterior.
    folder : path
        Where to write; made if it does not exist.
    classifiers : Classifiers
        The classifiers of clusters that have been trained.
    components : pandas.DataFrame
        The table of variance components.
    diagnostics : mapping
        The verdict and its checks, as JSON values.
    draws : int
        Draws in ``posterior.nc``. Groups of more than 200 MB are left out, with a warning.

    Raises
    ------
    ValueError
        If the folder holds other files but no fit, or the program has a part (a guide, term,
        family or prior of the user's own) that could not be read again. Nothing is written then.

    Examples
    --------
    ``fit.save("run"); Fit.load("run").predict(new_rows)``
    """
    target = check_target(posterior, folder)
    manifest, tensors = _contents(posterior, classifiers)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target: renaming is atomic only within a file system.
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    partial.mkdir()
    try:
        _write_json(partial / MANIFEST, manifest)
        save_file({k: tensor.cpu().contiguous() for k, tensor in tensors.items()}, partial / MODEL)
        del tensors
        # save_file makes a file that only its owner can read.
        shutil.copymode(partial / MANIFEST, partial / MODEL)
        _write_groups(posterior, partial / POSTERIOR, _fewer(posterior, draws))
        components.to_csv(partial / VARIANCE, index=False)
        _write_json(partial / DIAGNOSTICS, {**diagnostics, **_training(posterior)})
        _put(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _contents(
    posterior: Posterior, classifiers: Classifiers
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The manifest, and all tensors by name."""
    guide = type(posterior.guide).__name__
    manifest = {**describe(posterior), "guide": guide, "data": _describe_data(posterior.data)}
    tensors = module_tensors("model", posterior.model) | module_tensors("guide", posterior.guide)
    if posterior.refined is not None:
        refined = posterior.refined
        manifest["refined"] = {"method": refined.method, "quality": dict(refined.quality)}
        tensors |= {f"refined.{name}": value for name, value in refined.latents.items()}
    manifest["classifiers"] = []
    for number, classifier in enumerate(classifiers.values()):
        manifest["classifiers"].append(
            {
                "factor": classifier.factor,
                "temperature": classifier.temperature,
                "pooling": classifier.pooling,
                "report": classifier.report,
            }
        )
        tensors |= {f"classifier{number}.{k}": v for k, v in classifier.tensors().items()}
    return manifest, tensors


def load(folder: str | Path, net: nn.Module | None = None) -> tuple[Posterior, Classifiers]:
    """Read a fit that `save` wrote; on the CPU it predicts what that one did, to the bit.

    Parameters
    ----------
    folder : path
        The folder.
    net : torch.nn.Module, optional
        A network of the fit's architecture, whatever its weights: it is copied, and the copy gets
        the fit's. Not needed for networks from the functions registered as ``armed_pyro.models``
        (``linear``, ``dense``).

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
        # A warning of few rows was given when the fit was made.
        warnings.simplefilter("ignore", UserWarning)
        model = program(manifest, path / MANIFEST, net).bind(facts)
    guide = make_guide(model)
    with reading(path / MODEL):
        restore_module("model", model, tensors)
        restore_module("guide", guide, tensors)
        refined = _refined(manifest.get("refined"), tensors)
        classifiers = _classifiers(model, manifest.get("classifiers", []), tensors)
    with reading(path / POSTERIOR):
        data = _data(path / POSTERIOR, manifest["data"], facts)
    posterior = Posterior(
        model.eval(), guide, data, history, schedule, seed, stopped, refined=refined
    )
    return posterior, classifiers


# --- the folder -------------------------------------------------------------------------------


def _check_target(target: Path) -> None:
    """Raise ValueError if saving would replace anything but a fit."""
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file, expected a folder to save the fit to")
    held = {path.name for path in target.iterdir()} if target.exists() else set()
    if held <= CHECKPOINTS:
        return
    try:
        read_manifest(target)
    except ValueError as error:
        raise ValueError(
            f"{target} holds other files ({', '.join(sorted(held)[:3])}) and no fit that could be "
            f"replaced: choose a new folder ({error})"
        ) from error


def _put(partial: Path, target: Path) -> None:
    """Rename the new folder to the target, and move what is no part of a fit over to it."""
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
    """Write the groups of `Fit.to_datatree` one after the other: together they are large."""
    for name in _groups(posterior, draws):
        group = GROUPS[name](posterior, draws, posterior.seed)
        if group.data_vars:
            group.to_netcdf(path, mode="a", group=name, engine="h5netcdf")
        del group
        release()


# --- its contents -----------------------------------------------------------------------------


def _fewer(posterior: Posterior, draws: int) -> int:
    """As many draws as the random effects leave room for; the fit's own are saved beside them."""
    facts = posterior.model.data_facts()
    effects = sum(len(one.terms) * len(facts.levels[one.name]) for one in posterior.model.factors)
    most = max(2, int(LARGEST_POSTERIOR / (8 * max(1, effects))))
    if draws > most:
        warnings.warn(
            f"{POSTERIOR} has {most} draws instead of {draws}, whose random effects would exceed "
            f"{LARGEST_POSTERIOR / 1e6:.0f} MB",
            UserWarning,
            stacklevel=4,
        )
    return min(draws, most)


def _groups(posterior: Posterior, draws: int) -> list[str]:
    """Groups of the tree that are not too large for the file."""
    effects = [
        len(factor.terms) * len(posterior.model.data_facts().levels[factor.name])
        for factor in posterior.model.factors
    ]
    by_row = ("posterior_predictive", "log_likelihood", "prior_predictive")
    numbers = {**dict.fromkeys(by_row, posterior.data.n_rows), "prior": sum(effects)}
    left_out = [name for name, n in numbers.items() if 8 * draws * n > LARGEST_GROUP]
    if left_out:
        warnings.warn(
            f"{POSTERIOR} is without {', '.join(left_out)}, each of which would exceed "
            f"{LARGEST_GROUP / 1e6:.0f} MB: save fewer draws, or draw them again with "
            f"Fit.load(...).to_datatree(groups={left_out})",
            UserWarning,
            stacklevel=4,
        )
    return [name for name in GROUPS if name not in left_out]


def _refined(
    record: Mapping[str, Any] | None, tensors: Mapping[str, Tensor]
) -> RefinedDraws | None:
    if record is None:
        return None
    start = "refined."
    latents = {name[len(start) :]: one for name, one in tensors.items() if name.startswith(start)}
    return RefinedDraws(record["method"], latents, record["quality"])


def _classifiers(
    model: MixedEffects, records: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor]
) -> Classifiers:
    found = {}
    for number, record in enumerate(records):
        start = f"classifier{number}."
        own = {key[len(start) :]: one for key, one in tensors.items() if key.startswith(start)}
        names = ("factor", "temperature", "pooling", "report")
        settings = {name: record[name] for name in names}
        found[record["factor"]] = ClusterClassifier.restore(model, tensors=own, **settings)
    return Classifiers(found)


def _training(posterior: Posterior) -> dict[str, Any]:
    """How the training ended; the lower bound is that of all rows."""
    history, facts = posterior.history, posterior.model.data_facts()
    games = []
    for place, game in enumerate(posterior.model.adversaries):
        counts = facts.counts[game.factor]
        accuracy = [window[place] for window in history.adversary_accuracy[-1:]]
        games.append(
            {
                "factor": game.factor,
                "accuracy": accuracy[0] if accuracy else None,
                "chance": float(counts.max() / counts.sum()),
            }
        )
    return {
        "converged": posterior.converged,
        "stopped": posterior.stopped,
        "steps": len(history.loss),
        "elbo": float(np.mean(history.elbo[-100:])) * facts.n_rows if history.elbo else None,
        "adversaries": games,
    }


def _describe_data(data: ClusteredData) -> dict[str, Any]:
    """What the tree does not tell of the training rows."""
    try:
        row_dtype = index_to_json(data.row_labels)["dtype"]
    except TypeError:  # a table of a composite index: its labels come back as text
        row_dtype = None
    return {
        "continuous": list(data.continuous),
        "levels": {name: index_to_json(one.levels) for name, one in data.groupings.items()},
        "row_dtype": row_dtype,
        "row_name": data.row_labels.name if isinstance(data.row_labels.name, str) else None,
    }


def _data(path: Path, record: Mapping[str, Any], facts: Facts) -> ClusteredData:
    """The training rows, from the tree's observed and constant data."""
    with (
        xr.open_dataset(path, group="observed_data", engine="h5netcdf") as observed,
        xr.open_dataset(path, group="constant_data", engine="h5netcdf") as constant,
    ):
        outcome = observed[variable_name(facts.outcome_name)].to_numpy()
        values = {str(name): one.to_numpy() for name, one in constant.data_vars.items()}
        labels = pd.Index(observed.indexes["row"])
    groupings = {}
    for name, content in record["levels"].items():
        levels = index_from_json(content)
        codes = pd.Index(label_values(levels)).get_indexer(pd.Index(values[variable_name(name)]))
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
        row_labels=labels.rename(record["row_name"]),
        schema=facts.schema,
    )
