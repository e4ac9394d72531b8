"""Shapes of tensors that are combined element by element."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

__all__ = ["broadcast_shape"]


def broadcast_shape(*shapes: Sequence[int]) -> torch.Size:
    """The shape of tensors of these shapes after broadcasting; ValueError if they do not fit.

    `torch.broadcast_shapes` gives the same, but its first call imports sympy, which takes half a
    second.

    Examples
    --------
    >>> broadcast_shape((3, 1), (4,))
    torch.Size([3, 4])
    """
    return torch.Size(np.broadcast_shapes(*(tuple(shape) for shape in shapes)))
