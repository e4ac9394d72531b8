"""Packages that only some results need, and that are installed as an extra."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def extra(module: str, what: str, name: str = "analysis") -> ModuleType:
    """A module of the extra `name`; the error names `what` needs it.

    >>> extra("statsmodel", "this")
    Traceback (most recent call last):
    ImportError: this needs statsmodel, which is not installed: pip install 'armed_pyro[analysis]'
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(
            f"{what} needs {package}, which is not installed: pip install 'armed_pyro[{name}]'"
        ) from error
