"""Linear fixed effects, the network of a classical mixed model."""

from __future__ import annotations

import warnings

import torch
from torch import nn

__all__ = ["linear"]


def linear(n_features: int, n_outputs: int = 1, *, bias: bool = True) -> nn.Linear:
    r"""f(x) = W x + b in double precision, starting at zero.

    With ``MixedEffects(..., bayesian_head=True)`` the coefficients W and b are latent, and the
    program is a linear mixed model.

    Parameters
    ----------
    n_features : int
        Width of x; with 0 only the intercept remains.
    n_outputs : int
        Width of f(x): 1, or the number of classes.
    bias : bool
        Whether there is an intercept b.

    Examples
    --------
    >>> linear(3)
    Linear(in_features=3, out_features=1, bias=True)
    """
    with warnings.catch_warnings():
        # Without features, torch warns that there is nothing to initialise.
        warnings.simplefilter("ignore")
        net = nn.Linear(n_features, n_outputs, bias=bias, dtype=torch.float64)
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    arguments: dict[str, int] = {"n_features": n_features, "n_outputs": n_outputs}
    if not bias:
        arguments["bias"] = False
    net.armed_pyro_network = {"name": "linear", "arguments": arguments}  # type: ignore[assignment]
    return net
