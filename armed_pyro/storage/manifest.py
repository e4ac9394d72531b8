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

from armed_pyro.families.reconstruction import Reconstruction
from armed_pyro.families.registry import FAMILIES
from armed_pyro.inference.posterior import Posterior
from armed_pyro.networks.adversary import Adversary
from armed_pyro.networks.by_name import is_file, network
from armed_pyro.priors import Exponential, HalfNormal, HalfStudentT, Known, Priors, ScalePrior
from armed_pyro.program.model import MixedEffects
from armed_pyro.random_effects.terms import FilterScaleBias, RandomEffects, Slopes, Term

__all__ = ["MANIFEST", "VERSION", "describe", "program", "read_manifest", "reading"]


MANIFEST = "manifest.json"
FORMAT, VERSION = "armed_pyro fit", 3

# What a manifest can name; nothing else is ever made from one.
TERMS: Mapping[str, type[Term]] = {
    one.__name__: one for one in (RandomEffects, Slopes, FilterScaleBias)
}
PRIORS: Mapping[str, type[ScalePrior]] = {
    one.__name__: one for one in (Exponential, HalfNormal, HalfStudentT, Known)
}
DTYPES = {str(one).removeprefix("torch."): one for one in (torch.float32, torch.float64)}

Kind = TypeVar("Kind")


def describe(posterior: Posterior) -> dict[str, Any]:
    """The program, the training and the network's parameters, as JSON values.

    Raises
    ------
    ValueError
        If the program has a family, term or prior of the user's own, which could not be read, or
        another precision than single or double.
    """
    model, net = posterior.model, posterior.model.net
    family, priors = model.family, model.priors
    if FAMILIES.get(family.name) is not type(family):
        raise _not_saved("family", type(family), FAMILIES)
    dtype = str(model.reference().dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ValueError(f"a network in {dtype} cannot be saved: convert it, to {list(DTYPES)}")
    sd = priors.sd
    each = {"all": _named(sd, PRIORS)} if isinstance(sd, ScalePrior) else {"factors": _map(sd)}
    return {
        "format": FORMAT,
        "version": VERSION,
        "armed_pyro": version("armed_pyro"),
        "model": {
            "random": [_named(term, TERMS) for term in model.terms],
            "family": family.name,
            "priors": {
                "sd": each,
                "cor": priors.cor,
                "fixed_sd": priors.fixed_sd,
                "residual_sd": _named(priors.residual_sd, PRIORS),
            },
            "bayesian_head": model.bayesian_head,
            "fixed_weight": model.fixed_weight,
            "adversaries": [game.settings() for game in model.adversaries],
            "others": [
                {"at": one.at, "name": one.name, "weight": one.weight}
                | {"prior": _named(one.prior, PRIORS)}
                for one in model.others
            ],
        },
        "network": {
            "made_by": getattr(net, "armed_pyro_network", None),
            "dtype": dtype,
            "parameters": {name: list(one.shape) for name, one in net.state_dict().items()},
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
        If there is none, or it is damaged, of another program, or of a newer version.
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
    found = manifest.get("version")
    if not isinstance(found, int) or found > VERSION:
        raise ValueError(
            f"{path} has the format's version {found!r}, written by armed_pyro "
            f"{manifest.get('armed_pyro')}; this is armed_pyro {version('armed_pyro')}, which "
            f"reads version {VERSION}: update armed_pyro"
        )
    if found < VERSION:
        raise ValueError(
            f"{path} has the format's version {found}, of an armed_pyro whose guide was another; "
            f"this one reads version {VERSION}: fit the model again"
        )
    return manifest


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what goes wrong in reading a file's content into a ValueError that names the file."""
    wrong = (SafetensorError, RuntimeError, OSError, ValueError, KeyError, TypeError)
    try:
        yield
    except (*wrong, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged or was changed ({type(error).__name__}: {error}): save the fit "
            "again, or put a copy of the file back"
        ) from error


def program(manifest: Mapping[str, Any], path: Path, net: nn.Module | None) -> MixedEffects:
    """The program, not yet bound, with a copy of the network or the one that the manifest names.

    Parameters
    ----------
    manifest : mapping
        What `describe` made.
    path : Path
        Its file, for messages.
    net : torch.nn.Module or None
        A network of the fit's architecture.

    Raises
    ------
    ValueError
        If the manifest is damaged, no network is given or named, or it has other parameters.
    """
    with reading(path):
        plan, settings = manifest["model"], manifest["network"]
        given, sd = plan["priors"], plan["priors"]["sd"]
        each = {name: _made(one, PRIORS) for name, one in sd.get("factors", {}).items()}
        priors = Priors(
            sd=_made(sd["all"], PRIORS) if "all" in sd else each,
            cor=given["cor"],
            fixed_sd=given["fixed_sd"],
            residual_sd=_made(given["residual_sd"], PRIORS),
        )
        random = [_made(term, TERMS) for term in plan["random"]]
        games = [Adversary(**game) for game in plan["adversaries"]]
        # Of manifests written before there were other outcomes.
        others = [
            Reconstruction(**{**one, "prior": _made(one["prior"], PRIORS)})
            for one in plan.get("others", [])
        ]
        family = FAMILIES[plan["family"]]()
        options = {name: plan[name] for name in ("bayesian_head", "fixed_weight")}
        dtype, shapes = DTYPES[settings["dtype"]], dict(settings["parameters"])
        made_by = settings["made_by"]
    net = _network(made_by) if net is None else copy.deepcopy(net)
    model = MixedEffects(net, random, family, games, priors=priors, others=others, **options)
    own = {name: list(one.shape) for name, one in net.state_dict().items()}
    for name in [*shapes, *own]:
        if own.get(name) != shapes.get(name):
            raise ValueError(
                f"the network is not the fit's: its {name!r} has shape {own.get(name)}, the fit's "
                f"{shapes.get(name)} (None: no such parameter); pass net= of the same architecture"
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
    # A file's name would have the file executed.
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
    """A setting as its kind and its fields."""
    kind = type(value).__name__
    if kinds.get(kind) is not type(value):
        raise _not_saved("term or prior", type(value), kinds)
    fields = {k: dict(v) if isinstance(v, Mapping) else v for k, v in vars(value).items()}
    return {"kind": kind, **fields}


def _map(values: Mapping[str, ScalePrior]) -> dict[str, Any]:
    return {name: _named(value, PRIORS) for name, value in values.items()}


def _made(entry: Mapping[str, Any], kinds: Mapping[str, type[Kind]]) -> Kind:
    """The setting that `_named` took apart."""
    fields = {name: tuple(v) if isinstance(v, list) else v for name, v in entry.items()}
    return kinds[str(fields.pop("kind"))](**fields)


def _not_saved(what: str, kind: type, known: Mapping[str, Any]) -> ValueError:
    return ValueError(
        f"a fit with the {what} {kind.__name__} cannot be saved, as it could not be read again; "
        f"use one of {', '.join(known)}"
    )
