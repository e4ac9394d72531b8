"""Training that begins at the network of an earlier fit, with new rows and clusters."""

from __future__ import annotations

from dataclasses import replace

from armed_pyro.program.model import MixedEffects

__all__ = ["warm_started"]

# Scales of inputs and outcome, to which the weights of the earlier network belong.
SCALES = (
    *("feature_mean", "feature_scale", "feature_average", "feature_spread"),
    *("image_mean", "image_scale", "center", "spread"),
)


def warm_started(model: MixedEffects, bound: MixedEffects, earlier: MixedEffects) -> MixedEffects:
    """The bound program with the network, and the scales, of an earlier one.

    Adversaries with the same clusters keep their classifiers. Random effects and hyperparameters
    are estimated anew from the rows.

    Raises
    ------
    ValueError
        If the earlier fit has other features, another outcome or another network.
    """
    facts, before = bound.data_facts(), earlier.data_facts()
    for name in ("feature_names", "feature_shape", "columns", "classes"):
        if getattr(facts, name) != getattr(before, name):
            raise ValueError(
                f"warm_start= needs rows of the same features and outcome: {name} is "
                f"{getattr(facts, name)}, but was {getattr(before, name)} in the earlier fit. "
                "Encode the new rows with its schema: ClusteredData.encode(table, fit.data.schema)"
            )
    scales = {name: getattr(before, name) for name in SCALES}
    warm = model.with_family(bound.family).bind(replace(facts, **scales))
    try:
        warm.network.load_state_dict(earlier.network.state_dict())
    except RuntimeError as error:
        raise ValueError(f"warm_start= needs the network of the earlier fit: {error}") from error
    for game, known in zip(warm.adversaries, earlier.adversaries, strict=False):
        shapes = {name: tuple(t.shape) for name, t in game.state_dict().items()}
        if shapes == {name: tuple(t.shape) for name, t in known.state_dict().items()}:
            game.load_state_dict(known.state_dict())
    return warm
