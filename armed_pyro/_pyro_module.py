"""`LocalModule`: a Pyro module without global parameters; and the lock of Pyro's global state."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import pyro
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger

P = ParamSpec("P")
Result = TypeVar("Result")

# Pyro's stack of handlers and its settings, and torch's generator of random numbers, are the same
# for all threads of a process: two threads inside Pyro at once corrupt each other's results. All
# that uses them holds this lock. It is re-entrant, because the functions call each other.
PYRO_LOCK = threading.RLock()


def exclusive(function: Callable[P, Result]) -> Callable[P, Result]:
    """The function, of which, as of all such functions, one call at a time runs in a process.

    >>> exclusive(abs)(-1)
    1
    """

    @wraps(function)
    def alone(*args: P.args, **kwargs: P.kwargs) -> Result:
        with PYRO_LOCK:
            return function(*args, **kwargs)

    return alone


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
        with PYRO_LOCK, pyro.settings.context(module_local_params=True):
            super().__init__(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with PYRO_LOCK:
            with pyro.settings.context(module_local_params=True), _SeenBySVI():
                result = super().__call__(*args, **kwargs)
            # Under this setting Pyro removes the attribute from global parameters, such as those of
            # Pyro's own guides. Reading them from the store restores it.
            list(pyro.get_param_store().values())
        return result
