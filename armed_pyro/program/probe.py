"""The network's outputs at fixed inputs, by which another network is recognised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from armed_pyro.program.model import MixedEffects
from armed_pyro.rows.batch import Rows

__all__ = ["check_probe", "probe"]

ROWS, VALUES = 3, 64
GOLDEN = 0.6180339887498949
# Largest differences, relative to the largest output, that other machines' rounding may cause.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6, torch.bfloat16: 0.05, torch.float16: 0.01}


def probe(model: MixedEffects) -> list[float] | None:
    """At most 64 outputs of the network, without random effects, at three fixed rows.

    The rows hold the fractions of multiples of the golden ratio, between -1 and 1. None for a
    network that cannot take them, or whose outputs are random or not finite.
    """
    like = model.reference()
    row = model.data_facts().one_row(like)
    facts = model.data_facts()
    if facts.inputs is None:
        rows = replace(row, x=_fractions((ROWS, *facts.feature_shape)).to(like))
    else:
        rows = replace(row, inputs=facts.example(ROWS, like, _fractions))
    training = model.training
    try:
        outputs = [_outputs(model.eval(), rows, seed) for seed in (0, 1)]
    except (RuntimeError, ValueError, LookupError, TypeError):
        return None
    finally:
        model.train(training)
    first, second = outputs
    return first.tolist() if np.isfinite(first).all() and np.array_equal(first, second) else None


def _fractions(shape: tuple[int, ...]) -> Tensor:
    """Fractions of multiples of the golden ratio, between -1 and 1."""
    steps = torch.arange(1, int(np.prod(shape)) + 1, dtype=torch.float64)
    return (2 * (GOLDEN * steps % 1) - 1).reshape(shape)


def check_probe(model: MixedEffects, expected: Sequence[float] | None, what: str) -> None:
    """Raise ValueError if the network's outputs differ from `expected`, those of the fit."""
    actual = None if expected is None else probe(model)
    if expected is None or actual is None:
        return
    tolerance = TOLERANCE[model.network_reference().dtype] * max(map(abs, expected), default=0)
    same = len(actual) == len(expected) and np.allclose(actual, expected, rtol=0, atol=tolerance)
    if not same:
        raise ValueError(
            f"the network is not that of {what}: with the same weights its outputs at fixed inputs "
            f"start with {[float(f'{v:.6g}') for v in actual[:3]]}, but were "
            f"{[float(f'{v:.6g}') for v in expected[:3]]}. Pass a network with the same layers and "
            "activation functions"
        )


def _outputs(model: MixedEffects, rows: Rows, seed: int) -> np.ndarray:
    # TF32 would round outputs on a GPU to three digits.
    with model.seeded(seed), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        output, _ = model.run_network(rows)
    values = output.double().flatten().cpu().numpy()
    return values[np.linspace(0, len(values) - 1, min(VALUES, len(values))).astype(int)]
