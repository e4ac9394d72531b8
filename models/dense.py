"""Dense networks: nonlinear fixed effects of tabular features."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import nn

__all__ = ["dense"]


def dense(n_features: int, n_outputs: int = 1, hidden: Sequence[int] = (32, 32)) -> nn.Sequential:
    r"""f(x) = W_L h_{L-1} + b_L with h_l = max(0, W_l h_{l-1} + b_l), h_0 = x.

    The hidden activations are the modules ``"1"``, ``"3"``, ..., paths for `Adversary` taps and
    for `Slopes`.

    Parameters
    ----------
    n_features : int
        Width of x.
    n_outputs : int
        Width of f(x): 1, or the number of classes.
    hidden : sequence of int
        Widths of the hidden layers.

    Raises
    ------
    ValueError
        If there are no features, or a width is not positive.

    Examples
    --------
    >>> net = dense(3, hidden=(8, 8))
    >>> [name for name, module in net.named_children() if isinstance(module, nn.ReLU)]
    ['1', '3']
    """
    if n_features < 1:
        raise ValueError("a dense network needs at least one feature; without any, use linear")
    if not hidden or any(width < 1 for width in hidden):
        raise ValueError(
            f"`hidden` must be one or more positive widths such as (32, 32), not {tuple(hidden)}; "
            "a network without hidden layers is linear"
        )
    layers: list[nn.Module] = []
    for width, next_width in itertools.pairwise([n_features, *hidden, n_outputs]):
        layers += [nn.Linear(width, next_width), nn.ReLU()]
    net = nn.Sequential(*layers[:-1])
    arguments = {"n_features": n_features, "n_outputs": n_outputs, "hidden": list(hidden)}
    net.armed_pyro_network = {"name": "dense", "arguments": arguments}  # type: ignore[assignment]
    return net
