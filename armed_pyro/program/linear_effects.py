"""Linear effects of the features beside a network: which features have them."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from armed_pyro.program.data_spec import Facts
from armed_pyro.program.plan import Plan

__all__ = ["MOST_FEATURES", "with_linear_effects"]

# Features beyond which a network has no linear effects by default: the guide's matrix of their
# posterior grows with the square of their number.
MOST_FEATURES = 100


def with_linear_effects(model: Plan, facts: Facts) -> Facts:
    """The facts, with the features whose linear effects are latent beside the network.

    Raises
    ------
    ValueError
        If linear effects are asked for and there is no feature with a name, or the network is
        linear itself.
    """
    choice, tabular = model.linear_effects, bool(facts.feature_names)
    if choice and not tabular:
        raise ValueError(
            "linear_effects=True (command line: --linear-effects) adds linear effects of features "
            "beside a network, but there is no feature with a name: leave it out"
        )
    if choice and isinstance(model.network, nn.Linear):
        raise ValueError(
            "linear_effects=True (command line: --linear-effects) adds linear effects beside a "
            "network, and this one is linear itself: leave it out"
        )
    if choice is None:
        choice = tabular and len(facts.feature_names) <= MOST_FEATURES and _adds_by_default(model)
    return replace(facts, linear_names=facts.feature_names if choice else ())


def _adds_by_default(model: Plan) -> bool:
    """Whether there is a network to train of which the program uses the output only.

    An adversary is to keep clusters out of all that the features say, and linear effects would go
    past it.
    """
    trained = any(parameter.requires_grad for parameter in model.network.parameters())
    inside = model.layers() or model.adversaries or model.bayesian_head
    return trained and not inside and not isinstance(model.network, nn.Linear)
