"""`LocalModule`: a Pyro module without global parameters."""

from __future__ import annotations

import weakref
from typing import Any

import pyro
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger


class _SeenBySVI(Messenger):
    """Gives module-local parameters the attribute by which `pyro.infer.SVI` recognises them."""

    def _pyro_post_param(self, msg: Any) -> None:
        parameter = msg["value"]
        if not hasattr(parameter, "unconstrained"):
            parameter.unconstrained = weakref.ref(parameter)


class LocalModule(PyroModule):
    """A PyroModule that never writes to Pyro's global parameter store.

    Two models in one process cannot overwrite each other's parameters, and a fitted model can be
    copied, saved and deleted like any torch module.
    """

    def __init__(self, name: str = "") -> None:
        with pyro.settings.context(module_local_params=True):
            super().__init__(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with pyro.settings.context(module_local_params=True), _SeenBySVI():
            result = super().__call__(*args, **kwargs)
        # Under this setting Pyro removes the attribute from global parameters, such as those of
        # Pyro's own guides. Reading them from the store restores it.
        list(pyro.get_param_store().values())
        return result
