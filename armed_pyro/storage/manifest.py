"""The manifest of a saved fit: its program and training as JSON, and the program made from it."""

from __future__ import annotations

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
from armed_pyro.families.family import Family
from armed_pyro.families.reconstruction import Reconstruction
from armed_pyro.families.registry import FAMILIES
from armed_pyro.inference.posterior import Posterior
from armed_pyro.networks.adversary import Adversary
from armed_pyro.networks.by_name import is_file, network
from armed_pyro.priors import Exponential, HalfNormal, HalfStudentT, Known, Priors, ScalePrior
from armed_pyro.program.model import MixedEffects
from armed_pyro.random_effects.covariance import COVARIANCES, Covariance
from armed_pyro.random_effects.terms import FilterScaleBias, RandomEffects, Slopes, Term

__all__ = ["MANIFEST", "VERSION", "describe", "program", "read_family", "read_manifest", "reading"]


MANIFEST = "manifest.json"
FORMAT = "armed_pyro fit"

# The classes that a manifest can name. No other class is ever made from a manifest, so that reading
# it executes no foreign code.
TERMS: Mapping[str, type[Term]] = {
    kind.__name__: kind for kind in (RandomEffects, Slopes, FilterScaleBias)
}
PRIORS: Mapping[str, type[ScalePrior]] = {
    kind.__name__: kind for kind in (Exponential, HalfNormal, HalfStudentT, Known)
}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float64)}

Kind = TypeVar("Kind")


def describe(posterior: Posterior) -> dict[str, Any]:
    """The program, the training and the network's parameters, as JSON values.

    Raises
    ------
    ValueError
        If the program has a user-defined family, term or prior, which could not be read again, or
        a precision other than single or double.

    Examples
    --------
    ``describe(fit.posterior)["training"]["seed"]``
    """
    model, net, priors = posterior.model, posterior.model.net, posterior.model.priors
    dtype = str(model.reference().dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ValueError(
            f"a network in {dtype} cannot be saved: convert it to one of {list(DTYPES)}"
        )
    sd = priors.sd
    sd_priors = (
        {"all": _named(sd, PRIORS)} if isinstance(sd, ScalePrior) else {"factors": _by_factor(sd)}
    )
    return {
        "format": FORMAT,
        "version": VERSION,
        "armed_pyro": version("armed_pyro"),
        "model": {
            "random": [_named(term, TERMS) for term in model.terms],
            "family": _family(model.family),
            "priors": {
                "sd": sd_priors,
                "cor": priors.cor,
                "fixed_sd": priors.fixed_sd,
                "residual_sd": _named(priors.residual_sd, PRIORS),
            },
            "bayesian_head": model.bayesian_head,
            "fixed_weight": model.fixed_weight,
            "adversaries": [adversary.settings() for adversary in model.adversaries],
            "others": [
                {"at": other.at, "name": other.name, "weight": other.weight}
                | {"prior": _named(other.prior, PRIORS)}
                for other in model.others
            ],
        },
        "network": {
            "made_by": getattr(net, "armed_pyro_network", None),
            "dtype": dtype,
            "parameters": {name: list(value.shape) for name, value in net.state_dict().items()},
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
    """The manifest in a folder.

    Raises
    ------
    ValueError
        If there is none, it is damaged, another program wrote it, or its version is not `VERSION`.

    Examples
    --------
    ``read_manifest(Path("run"))["model"]["family"]``
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: expected one that a fit was saved to")
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} holds no fit (no {MANIFEST}): expected a folder of Fit.save")
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
    return manifest


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn errors in the content of a file into a ValueError that names the file.

    Examples
    --------
    ``with reading(path): values = json.loads(path.read_text())``
    """
    wrong = (SafetensorError, RuntimeError, OSError, ValueError, KeyError, TypeError)
    try:
        yield
    except (*wrong, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged or was changed ({type(error).__name__}: {error}): save the fit "
            "again, or put a copy of the file back"
        ) from error


def program(manifest: Mapping[str, Any], path: Path, net: nn.Module | None) -> MixedEffects:
    """The unbound program of a manifest, with a copy of `net` or the network that it names.

    Parameters
    ----------
    manifest : mapping
        Result of `read_manifest`.
    path : Path
        File of the manifest, for error messages.
    net : torch.nn.Module or None
        A network of the fit's architecture.

    Raises
    ------
    ValueError
        If the manifest is damaged, there is no network, or its parameters are not those of the fit.

    Examples
    --------
    ``program(read_manifest(folder), folder / MANIFEST, None).bind(data)``
    """
    with reading(path):
        plan, settings = manifest["model"], manifest["network"]
        fields, sd = plan["priors"], plan["priors"]["sd"]
        by_factor = {name: _made(prior, PRIORS) for name, prior in sd.get("factors", {}).items()}
        priors = Priors(
            sd=_made(sd["all"], PRIORS) if "all" in sd else by_factor,
            cor=fields["cor"],
            fixed_sd=fields["fixed_sd"],
            residual_sd=_made(fields["residual_sd"], PRIORS),
        )
        random = [_made(term, TERMS) for term in plan["random"]]
        adversaries = [Adversary(**entry) for entry in plan["adversaries"]]
        # Manifests from before there were other outcomes lack the entry.
        others = [
            Reconstruction(**{**entry, "prior": _made(entry["prior"], PRIORS)})
            for entry in plan.get("others", [])
        ]
        family = read_family(plan["family"])
        options = {name: plan[name] for name in ("bayesian_head", "fixed_weight")}
        dtype, shapes = DTYPES[settings["dtype"]], dict(settings["parameters"])
        made_by = settings["made_by"]
    net = _network(made_by) if net is None else copy.deepcopy(net)
    model = MixedEffects(net, random, family, adversaries, priors=priors, others=others, **options)
    actual = {name: list(value.shape) for name, value in net.state_dict().items()}
    for name in [*shapes, *actual]:
        if actual.get(name) != shapes.get(name):
            raise ValueError(
                f"the network is not the fit's: its {name!r} has shape {actual.get(name)}, the "
                f"fit's {shapes.get(name)} (None: no such parameter); pass net= of the same "
                "architecture"
            )
    if model.reference().dtype != dtype:
        net.to(dtype)
    return model


def _network(made_by: Mapping[str, Any] | None) -> nn.Module:
    """The network of a registered function."""
    if made_by is None:
        raise ValueError(
            "the fit has a network of your own, which is not saved as code: pass one of the same "
            "architecture, as in Fit.load(folder, net=MyNet())"
        )
    # `network` would execute the file.
    if is_file(str(made_by.get("name"))):
        raise ValueError(f"the manifest names a file, {made_by['name']!r}: it is not executed")
    try:
        return network(str(made_by["name"]), **made_by["arguments"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"the fit's network {dict(made_by)} cannot be made ({error}): pass one of the same "
            "architecture, as in Fit.load(folder, net=MyNet())"
        ) from error


def _named(value: Any, kinds: Mapping[str, type]) -> dict[str, Any]:
    """A term or prior as the name of its class and its fields."""
    kind = type(value).__name__
    if kinds.get(kind) is not type(value):
        raise _not_saved("term or prior", type(value), kinds)
    return {"kind": kind, **_fields(value)}


def _fields(value: Any) -> dict[str, Any]:
    """The fields of an object as JSON values."""
    return {name: _plain(field) for name, field in vars(value).items()}


def _plain(value: Any) -> Any:
    """The value of a field as JSON."""
    if isinstance(value, ScalePrior):
        return _named(value, PRIORS)
    if isinstance(value, Covariance):
        if COVARIANCES.get(value.name) is not type(value):
            raise _not_saved("covariance", type(value), COVARIANCES)
        return {"covariance": value.name, **_fields(value)}
    return dict(value) if isinstance(value, Mapping) else value


def _family(family: Family) -> str | dict[str, Any]:
    """The name of a family, or its name and fields if it has fields."""
    if FAMILIES.get(family.name) is not type(family):
        raise _not_saved("family", type(family), FAMILIES)
    fields = _fields(family)
    return {"name": family.name, **fields} if fields else family.name


def read_family(entry: str | Mapping[str, Any]) -> Family:
    """The family of a manifest's entry.

    Raises
    ------
    KeyError
        If there is no such family.

    Examples
    --------
    >>> read_family("poisson").name
    'poisson'
    """
    if isinstance(entry, str):
        return FAMILIES[entry]()
    fields = {name: _made_field(value) for name, value in entry.items() if name != "name"}
    return FAMILIES[str(entry["name"])](**fields)


def _by_factor(values: Mapping[str, ScalePrior]) -> dict[str, Any]:
    return {name: _named(value, PRIORS) for name, value in values.items()}


def _made(entry: Mapping[str, Any], kinds: Mapping[str, type[Kind]]) -> Kind:
    """The term or prior that `_named` described."""
    fields = {name: _made_field(value) for name, value in entry.items() if name != "kind"}
    return kinds[str(entry["kind"])](**fields)


def _made_field(value: Any) -> Any:
    """The value that `_plain` described."""
    if isinstance(value, Mapping) and value.get("kind") in PRIORS:
        return _made(value, PRIORS)
    if isinstance(value, Mapping) and value.get("covariance") in COVARIANCES:
        fields = {name: _made_field(field) for name, field in value.items() if name != "covariance"}
        return COVARIANCES[value["covariance"]](**fields)
    return tuple(value) if isinstance(value, list) else value


def _not_saved(role: str, kind: type, known: Mapping[str, Any]) -> ValueError:
    return ValueError(
        f"a fit with the {role} {kind.__name__} cannot be saved, as it could not be read again; "
        f"use one of {', '.join(known)}"
    )
