"""Pyro modules that keep their parameters to themselves."""

from __future__ import annotations

from typing import Any

import pyro
from pyro.nn import PyroModule

__all__ = ["LocalModule"]


class LocalModule(PyroModule):
    """A PyroModule that never writes to Pyro's global parameter store.

    Two models in one process cannot overwrite each other's parameters, and a fitted model can be
    copied, saved and dropped like any torch module.
    """

    def __init__(self, name: str = "") -> None:
        with pyro.settings.context(module_local_params=True):
            super().__init__(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with pyro.settings.context(module_local_params=True):
            return super().__call__(*args, **kwargs)
