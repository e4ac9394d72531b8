"""Every model that a comparison can have, by name."""

from __future__ import annotations

from collections.abc import Sequence

from armed_pyro._messages import unknown
from armed_pyro.analysis.linearmixed import LinearMixed
from armed_pyro.analysis.lmmnn import LMMNN
from armed_pyro.analysis.menet import MeNet
from armed_pyro.analysis.metalearning import MetaLearning
from armed_pyro.analysis.rivals import Rival, Setting, programs

__all__ = ["NAMES", "contenders"]

NAMES = (
    "conventional",
    "cluster input",
    "domain adversarial",
    "meta-learning",
    "MeNet",
    "LMMNN",
    "linear mixed model",
    "ARMED",
    "without adversary",
)


def contenders(setting: Setting, names: Sequence[str] = NAMES) -> tuple[Rival, ...]:
    """The models with these names, in the given setting.

    Raises
    ------
    ValueError
        If there is no model of a name.

    Examples
    --------
    ``contenders(setting, ["conventional", "ARMED"])``
    """
    others = (MetaLearning(setting), MeNet(setting), LMMNN(setting), LinearMixed(setting))
    every: dict[str, Rival] = {one.name: one for one in (*programs(setting), *others)}
    for name in names:
        if name not in every:
            raise unknown("model called", name, every)
    return tuple(every[name] for name in names)
