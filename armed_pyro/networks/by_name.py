"""Networks by name or from a user's file, and the paths of their hidden layers."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from armed_pyro._messages import listing, unknown

__all__ = ["GROUP", "hidden_activations", "is_file", "made_network", "network"]

# The library never imports a concrete network: it finds networks by this group of entry points.
GROUP = "armed_pyro.models"
_ACTIVATIONS = (
    *(nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Hardtanh),
)


def network(
    name: str, n_features: int, n_outputs: int = 1, *, seed: int = 0, **arguments: Any
) -> nn.Module:
    """The network `name`, for features "rows n_features" and outputs "rows n_outputs".

    `name` is in the entry-point group ``armed_pyro.models``, such as ``linear`` or ``dense``, or it
    is ``FILE.py:NAME``. The file is executed. NAME is a network, or a class or function that
    returns a network when called with ``(n_features, n_outputs)`` or without arguments. Only
    networks with an entry point take further `arguments`. The seed is that of the initial weights;
    the state of torch's global generator does not change.

    Examples
    --------
    >>> network("dense", n_features=3, hidden=(8,))[1]
    ReLU()
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if is_file(name):
            return _from_file(name, n_features, n_outputs)
        registered = {point.name: point for point in entry_points(group=GROUP)}
        if name not in registered:
            raise ValueError(
                f"{unknown('network', name, sorted(registered))} A network of your own is "
                "FILE.py:NAME, such as my_net.py:MyNet."
            )
        make = registered[name].load()
        try:
            return _module(make(n_features, n_outputs, **arguments), name)
        except TypeError as error:
            raise ValueError(f"the network {name!r} cannot be made: {error}") from error


def made_network(
    net: str | nn.Module | Callable[..., nn.Module],
    n_features: int,
    n_outputs: int = 1,
    *,
    seed: int = 0,
    **arguments: Any,
) -> nn.Module:
    """A network as it is, by name as in `network`, or made by a class or function.

    A class or function is told the number of features, and that of outputs if it has a second
    required argument or one called ``n_outputs``.

    >>> made_network(lambda width: nn.Linear(width, 1), 3).in_features
    3
    """
    if isinstance(net, nn.Module):
        return net
    if isinstance(net, str):
        return network(net, n_features, n_outputs, seed=seed, **arguments)
    if not callable(net):
        raise TypeError(
            f"net must be 'linear', 'dense', a torch.nn.Module, or a class or function that makes "
            f"one, found {net!r}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = _sizes(net, "net", n_features, n_outputs)
        return _module(net(**sizes), "net")


def is_file(name: str) -> bool:
    """Whether a network's name is a user's ``FILE.py:NAME``."""
    return name.rpartition(":")[0].endswith(".py") or name.endswith(".py")


def hidden_activations(net: nn.Module) -> tuple[str, ...]:
    """Module paths of a network's hidden activations, in order: taps for an adversary.

    These are the activation modules, such as ReLU. A network without any, because it calls
    functions instead, gives its linear layers except the last.
    """
    modules = dict(net.named_modules())
    linear = [path for path, module in modules.items() if isinstance(module, nn.Linear)]
    hidden = list(modules)
    if linear:  # modules after the last linear layer act on the output and are not hidden
        hidden = hidden[: hidden.index(linear[-1])]
    paths = [path for path in hidden if isinstance(modules[path], _ACTIVATIONS)] or linear[:-1]
    if not paths:
        raise ValueError(
            "an adversary needs a network with hidden layers, whose activations it reads; this "
            f"one ({type(net).__name__}) has none: use --net dense, or leave the adversary out"
        )
    return tuple(paths)


def _from_file(name: str, n_features: int, n_outputs: int) -> nn.Module:
    file, colon, attribute = name.rpartition(":")
    if not colon or not attribute or name.endswith(".py"):
        raise ValueError(
            f"{name!r} names a file but not what to take from it: expected FILE.py:NAME, such as "
            "my_net.py:MyNet"
        )
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"there is no file {file!r} (from {name!r}): check the path")
    module = _execute(path)
    if not hasattr(module, attribute):
        defined = [
            key
            for key, value in vars(module).items()
            if getattr(value, "__module__", None) == module.__name__ or isinstance(value, nn.Module)
        ]
        raise unknown(f"name in {file}", attribute, defined)
    net = getattr(module, attribute)
    if callable(net) and not isinstance(net, nn.Module):
        sizes = _sizes(net, name, n_features, n_outputs)
        with _explained(path, f"calling {name} failed"):
            net = net(**sizes)
    return _module(net, name)


def _execute(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"_armed_pyro_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up in sys.modules, and a file may import files beside it.
    sys.modules[spec.name] = module
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        with _explained(path, f"{path} cannot be loaded"):
            spec.loader.exec_module(module)
    finally:
        sys.path.remove(folder)
    return module


def _sizes(make: Any, name: str, n_features: int, n_outputs: int) -> dict[str, int]:
    """Keyword arguments for a user's class or function."""
    try:
        parameters = inspect.signature(make).parameters
    except (TypeError, ValueError):  # written in C
        return {}
    sizes = {"n_features": n_features, "n_outputs": n_outputs}
    required = [
        key
        for key, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    arguments = {key: value for key, value in sizes.items() if key in parameters}
    if not arguments and len(required) == 1:
        arguments = {required[0]: n_features}
    if not arguments and len(required) == 2:
        arguments = dict(zip(required, sizes.values(), strict=True))
    if missing := [key for key in required if key not in arguments]:
        raise ValueError(
            f"{name} takes the arguments {listing(parameters)}, and {listing(missing)} cannot be "
            "filled in: expected none, or (n_features, n_outputs). Give the others defaults."
        )
    return arguments


def _module(net: Any, name: str) -> nn.Module:
    if not isinstance(net, nn.Module):
        raise ValueError(
            f"{name} gives a {type(net).__name__}, expected a torch.nn.Module, or a class or "
            "function that makes one"
        )
    return net


@contextmanager
def _explained(path: Path, what: str) -> Iterator[None]:
    """Turn any exception of a user's code into a ValueError that names the line."""
    try:
        yield
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        where = f" in line {lines[-1]}" if lines else ""
        raise ValueError(f"{what}{where}: {type(error).__name__}: {error}") from error
