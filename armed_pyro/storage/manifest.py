"""The manifest of a saved fit: its program and training as JSON, and the program made from it."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import nn

from armed_pyro.engine.checkpoint import VERSION
from armed_pyro.families.distributional import family_with_predictors
from armed_pyro.families.family import Family
from armed_pyro.families.reconstruction import Reconstruction
from armed_pyro.families.registry import FAMILIES
from armed_pyro.inference.posterior import Posterior
from armed_pyro.networks.adversary import Adversary
from armed_pyro.networks.by_name import is_file, network
from armed_pyro.priors import Exponential, HalfNormal, HalfStudentT, Known, Priors, ScalePrior
from armed_pyro.program.fold_networks import FoldNetworks
from armed_pyro.program.model import MixedEffects
from armed_pyro.random_effects.covariance import COVARIANCES, Covariance
from armed_pyro.random_effects.parameter_formula import read_parameters
from armed_pyro.random_effects.smooth import Smooth
from armed_pyro.random_effects.terms import (
    FilterScaleBias,
    Process,
    RandomEffects,
    Slopes,
    Term,
)
from armed_pyro.storage.manifest_schema import check_fields, check_manifest

MANIFEST = "manifest.json"
FORMAT = "armed_pyro fit"

# The classes that a manifest can name. No other class is ever made from a manifest, so that reading
# it executes no foreign code.
TERMS: Mapping[str, type[Term]] = {
    kind.__name__: kind for kind in (RandomEffects, Slopes, FilterScaleBias, Process, Smooth)
}
PRIORS: Mapping[str, type[ScalePrior]] = {
    kind.__name__: kind for kind in (Exponential, HalfNormal, HalfStudentT, Known)
}
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
}

Kind = TypeVar("Kind")


def describe(posterior: Posterior) -> dict[str, Any]:
    """The program, the training and the network's parameters, as JSON values.

    A user-defined family, term or prior, which could not be read again, is a ValueError, and so is
    a precision that is not among `DTYPES`.
    """
    model, net, priors = posterior.model, posterior.model.net, posterior.model.priors
    dtype = str(model.network_reference().dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ValueError(
            f"a network in {dtype} cannot be saved: convert it to one of {list(DTYPES)}"
        )
    sd_priors: dict[str, Any] = {}
    if isinstance(priors.sd, ScalePrior):
        sd_priors["all"] = _entry("kind", priors.sd, PRIORS)
    else:
        sd_priors["factors"] = {k: _entry("kind", v, PRIORS) for k, v in priors.sd.items()}
    base = model.family.without_predictors
    family = _entry("name", base, FAMILIES)
    return {
        "format": FORMAT,
        "version": VERSION,
        "armed_pyro": version("armed_pyro"),
        "model": {
            "random": [_entry("kind", term, TERMS) for term in model.terms],
            # Default settings are left out, as a link was before there was a choice.
            "family": base.name if base == type(base)() else family,
            "priors": {**_fields(priors), "sd": sd_priors},
            "bayesian_head": model.bayesian_head,
            "dtype": str(model.dtype).removeprefix("torch."),
            "fixed_weight": model.fixed_weight,
            "between": model.between,
            "linear_effects": model.linear_effects,
            "output": list(model.output),
            "parameters": model.predictors,
            "adversaries": [adversary.settings() for adversary in model.adversaries],
            "others": [_fields(other) for other in model.others],
        },
        "network": {
            "made_by": getattr(net, "armed_pyro_network", None),
            "dtype": dtype,
            "parameters": {name: list(value.shape) for name, value in net.state_dict().items()},
            "folds": _describe_folds(model),
        },
        "training": {
            "schedule": posterior.schedule.to_json(),
            "history": posterior.history.to_json(),
            "seed": posterior.seed,
            "stopped": posterior.stopped,
        },
        "facts": model.data_facts().to_json(),
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest in a folder, if it is that of a fit in format `VERSION`."""
    if folder.is_file():
        raise ValueError(f"{folder} is a file: expected the folder that a fit was saved to")
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: expected one that a fit was saved to")
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"{folder} holds no fit (no {MANIFEST}): expected the folder of Fit.save or fit --out"
        )
    with reading(path):
        manifest = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path} was not written by armed_pyro: expected the format {FORMAT!r}")
    file_version = manifest.get("version")
    if not isinstance(file_version, int) or file_version > VERSION:
        raise ValueError(
            f"{path} has the format version {file_version!r}, written by armed_pyro "
            f"{manifest.get('armed_pyro')}; this is armed_pyro {version('armed_pyro')}, which "
            f"reads version {VERSION}: update armed_pyro"
        )
    if file_version < VERSION:
        raise ValueError(
            f"{path} has the format version {file_version}, written by an earlier armed_pyro with "
            f"another guide; this armed_pyro reads version {VERSION}: fit the model again"
        )
    check_manifest(manifest, path)
    return manifest


@contextmanager
def reading(path: Path, field: str = "") -> Iterator[None]:
    """Turn errors in the content of a file into a ValueError that names the file, and a field."""
    wrong = (
        SafetensorError,
        RuntimeError,
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        MemoryError,
    )
    try:
        yield
    except wrong as error:
        if str(error).startswith(f"{path} is damaged"):
            raise
        where = f"the field {field!r}: " if field else ""
        raise ValueError(
            f"{path} is damaged or was changed ({where}{type(error).__name__}: {error}): save the "
            "fit again, or put a copy of the file back"
        ) from error


def program(manifest: Mapping[str, Any], path: Path, net: nn.Module | None) -> MixedEffects:
    """The unbound program of a manifest, with a copy of `net` or the network that it names.

    `path` is the file of the manifest, for messages. The network must have the fit's parameters.
    """
    plan, settings = manifest["model"], manifest["network"]
    priors = _priors(plan["priors"], path)
    random = []
    for number, term in enumerate(plan["random"]):
        with reading(path, place := f"model.random.{number}"):
            random.append(_made("kind", term, TERMS, path, place))
    with reading(path, "model.adversaries"):
        adversaries = [Adversary(**entry) for entry in plan["adversaries"]]
    with reading(path, "model.others"):
        # Manifests from before there were other outcomes lack the entry.
        others = [
            Reconstruction(**{name: _made_field(value) for name, value in entry.items()})
            for entry in plan.get("others", [])
        ]
    with reading(path, "model.family"):
        family = read_family(plan["family"], path)
    options = {name: plan[name] for name in ("bayesian_head", "fixed_weight")}
    # Earlier programs had no clusters' means, and no linear effects beside a network.
    options["between"] = plan.get("between", False)
    options["linear_effects"] = plan.get("linear_effects", False)
    options["output"] = tuple(plan.get("output", ()))
    with reading(path, "model.parameters"):
        # Earlier programs had no predictors of parameters.
        options["parameters"] = plan.get("parameters", {})
        read = read_parameters(options["parameters"])
        family_with_predictors(family, [formula.name for formula in read])
    with reading(path, "network.dtype"):
        dtype, shapes = DTYPES[settings["dtype"]], dict(settings["parameters"])
    with reading(path, "model.dtype"):
        # Earlier programs had the precision of their networks.
        options["dtype"] = DTYPES[plan.get("dtype", settings["dtype"])]
    made_by = settings["made_by"]
    net = _network(made_by, shapes) if net is None else copy.deepcopy(net)
    _check_shapes(net, shapes)
    model = MixedEffects(net, random, family, adversaries, priors=priors, others=others, **options)
    if model.network_reference().dtype != dtype:
        net.to(dtype)
    return model


def _priors(plan: Mapping[str, Any], path: Path) -> Priors:
    """The priors of a manifest."""
    with reading(path, place := "model.priors.sd"):
        sd = plan["sd"]
        factors = sd.get("factors", {}).items()
        by_factor = {k: _made("kind", v, PRIORS, path, f"{place}.factors.{k}") for k, v in factors}
        scales = (
            _made("kind", sd["all"], PRIORS, path, f"{place}.all") if "all" in sd else by_factor
        )
    with reading(path, "model.priors"):
        names = ("cor", "fixed_sd", "residual_sd")
        return Priors(sd=scales, **{name: _made_field(plan[name]) for name in names})


def _check_shapes(net: nn.Module, shapes: Mapping[str, Any]) -> None:
    """Raise ValueError if the network has other parameters than those of these shapes."""
    actual = {name: list(value.shape) for name, value in net.state_dict().items()}
    for name in [*shapes, *actual]:
        if actual.get(name) != shapes.get(name):
            raise ValueError(
                f"the network is not the fit's: its {name!r} has shape {actual.get(name)}, the "
                f"fit's {shapes.get(name)} (None: no such parameter); pass net= of the same "
                "architecture"
            )


def _describe_folds(model: MixedEffects) -> dict[str, Any] | None:
    """Number of the cross-fitted networks, and the factor whose clusters they leave out."""
    folds = model.fold_networks
    if folds is None:
        return None
    return {"networks": len(folds), "factor": folds.factor, "clusters": len(folds.of_cluster)}


def cross_fit(model: MixedEffects, manifest: Mapping[str, Any]) -> None:
    """Give a bound program room for the cross-fitted networks of a manifest, if there are any."""
    # Manifests from before there were such networks lack the entry.
    folds = manifest["network"].get("folds")
    if folds is not None:
        sizes = folds["networks"], folds["factor"], folds["clusters"]
        model.cross_fit(FoldNetworks.like(model.network, *sizes))


def _network(made_by: Mapping[str, Any] | None, shapes: Mapping[str, Any]) -> nn.Module:
    """The network of a registered function; without memory for one of other shapes."""
    if made_by is None:
        raise ValueError(
            "the fit has a network of your own, which is not saved as code: pass one of the same "
            "architecture, as in Fit.load(folder, net=MyNet())"
        )
    # `network` would execute the file.
    if is_file(str(made_by.get("name"))):
        raise ValueError(f"the manifest names a file, {made_by['name']!r}: it is not executed")
    try:
        with contextlib.suppress(NotImplementedError), torch.device("meta"):
            _check_shapes(network(str(made_by["name"]), **made_by["arguments"]), shapes)
        return network(str(made_by["name"]), **made_by["arguments"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        if str(error).startswith("the network is not the fit's"):
            raise
        raise ValueError(
            f"the fit's network {dict(made_by)} cannot be made ({error}): pass one of the same "
            "architecture, as in Fit.load(folder, net=MyNet())"
        ) from error


def _entry(key: str, value: Any, known: Mapping[str, type]) -> dict[str, Any]:
    """An object as the name of its class, under this key, and its fields as JSON values."""
    name = type(value).__name__ if key == "kind" else value.name
    if known.get(name) is not type(value):
        role = {"kind": "term or prior", "name": "family"}.get(key, key)
        raise ValueError(
            f"a fit with the {role} {type(value).__name__} cannot be saved, as it could not be "
            f"read again; use one of {', '.join(known)}"
        )
    return {key: name, **_fields(value)}


def _fields(value: Any) -> dict[str, Any]:
    """The fields of an object as JSON values."""
    return {name: _plain(content) for name, content in vars(value).items()}


def _plain(value: Any) -> Any:
    """The value of a field as JSON."""
    if isinstance(value, ScalePrior):
        return _entry("kind", value, PRIORS)
    if isinstance(value, Covariance):
        return _entry("covariance", value, COVARIANCES)
    return dict(value) if isinstance(value, Mapping) else value


def _made(
    key: str,
    entry: Mapping[str, Any],
    known: Mapping[str, type[Kind]],
    path: Path | None = None,
    place: str = "",
) -> Kind:
    """The object that `_entry` described, whose fields are checked if it is of the file `path`."""
    if path is not None and str(entry[key]) in known:
        plain = {name: value for name, value in entry.items() if name not in (key, "covariance")}
        check_fields(known[str(entry[key])], plain, path, place)
    fields = {name: _made_field(value) for name, value in entry.items() if name != key}
    return known[str(entry[key])](**fields)


def _made_field(value: Any) -> Any:
    """The value that `_plain` described."""
    if isinstance(value, Mapping) and value.get("kind") in PRIORS:
        return _made("kind", value, PRIORS)
    if isinstance(value, Mapping) and value.get("covariance") in COVARIANCES:
        return _made("covariance", value, COVARIANCES)
    return tuple(value) if isinstance(value, list) else value


def read_family(entry: str | Mapping[str, Any], path: Path | None = None) -> Family:
    """The family of a manifest's entry.

    >>> read_family("poisson").name
    'poisson'
    """
    values = {"name": entry} if isinstance(entry, str) else entry
    return _made("name", values, FAMILIES, path, "model.family")
