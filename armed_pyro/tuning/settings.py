"""Settings of a program: which it has, and the same program with other settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from armed_pyro._messages import check_type, listing
from armed_pyro.networks.adversary import Adversary
from armed_pyro.program.model import MixedEffects

__all__ = ["Grid", "Maker", "Settings", "changed", "distances", "grid_of", "setting_names"]

Settings = Mapping[str, Any]
Grid = Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Sequence[Any]]]
Maker = Callable[[Settings], MixedEffects]
OF_ADVERSARY = "adversary_"


def setting_names(model: MixedEffects) -> tuple[str, ...]:
    """Arguments of `MixedEffects` except the network, and of its adversaries with a prefix."""
    arguments = [name for name in _arguments(model) if name != "net"]
    own = model.adversaries[0].settings() if model.adversaries else {}
    return (*arguments, *(f"{OF_ADVERSARY}{name}" for name in own))


def changed(model: MixedEffects, settings: Settings) -> MixedEffects:
    """The same program with other settings, not bound to data.

    ValueError names a setting that the program does not have, and lists those that it has.
    """
    known = setting_names(model)
    for name in settings:
        if name not in known:
            hint = "" if model.adversaries else "; as it has no adversary, none of an adversary's"
            raise ValueError(
                f"the model has no setting {name!r}: it has {listing(known, 30)}{hint}. Settings "
                "of other kinds need a function: tune(lambda settings: MixedEffects(...), ...)"
            )
    arguments = _arguments(model)
    game = {
        name.removeprefix(OF_ADVERSARY): value
        for name, value in settings.items()
        if name not in arguments
    }
    if game:
        arguments["adversary"] = [
            Adversary(**{**adversary.settings(), **game}) for adversary in model.adversaries
        ]
    return MixedEffects(**{**arguments, **{k: v for k, v in settings.items() if k in arguments}})


def _arguments(model: MixedEffects) -> dict[str, Any]:
    """The arguments with which this program can be made again."""
    renamed = {
        "net": model.network,
        "random": model.terms,
        "adversary": model.adversaries,
        "parameters": model.predictors,
    }
    names = inspect.signature(MixedEffects).parameters
    return {name: renamed[name] if name in renamed else getattr(model, name) for name in names}


def grid_of(over: Grid) -> list[dict[str, Any]]:
    """Every combination of the listed values, once; ValueError if there are fewer than two."""
    from sklearn.model_selection import ParameterGrid  # slow to import

    check_type(over, (Mapping, Sequence), "over", "Pass {'fixed_weight': [0, 0.3, 1]}.")
    for part in [over] if isinstance(over, Mapping) else over:
        for name, values in part.items():
            if isinstance(values, str) or not isinstance(values, Sequence | np.ndarray):
                raise TypeError(
                    f"`over` lists the values of each setting, but {name!r} has {values!r}: write "
                    f"{{{name!r}: [{values!r}, ...]}}"
                )
    combinations: list[dict[str, Any]] = []
    for settings in ParameterGrid(over):
        if settings not in combinations:
            combinations.append(settings)
    if len(combinations) < 2:
        raise ValueError(
            f"`over` has {len(combinations)} combination(s) of settings, and a choice needs at "
            "least 2: list several values of a setting"
        )
    return combinations


def distances(grid: Sequence[Settings], model: MixedEffects | None) -> list[int]:
    """Steps between each combination and the default, summed over the settings.

    The values of a setting are numbered in the order in which they are listed. The default is the
    model's present value if it is listed, and the first value otherwise.
    """
    names = dict.fromkeys(name for settings in grid for name in settings)
    total = [0] * len(grid)
    for name in names:
        values: list[Any] = []
        for settings in grid:
            if name in settings and settings[name] not in values:
                values.append(settings[name])
        present = _present(model, name)
        start = values.index(present) if present in values else 0
        for place, settings in enumerate(grid):
            if name in settings:
                total[place] += abs(values.index(settings[name]) - start)
    return total


def _present(model: MixedEffects | None, name: str) -> Any:
    """The model's value of a setting; None if it is not known."""
    if model is None:
        return None
    if name.startswith(OF_ADVERSARY):
        return model.adversaries[0].settings()[name.removeprefix(OF_ADVERSARY)]
    return getattr(model, name, None)
