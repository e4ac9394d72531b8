"""`activations`: outputs and inputs of a trained network's modules for a table's rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.networks.taps import pooled, run
from armed_pyro.program.model import MixedEffects

__all__ = ["activations"]


@torch.no_grad()
def activations(
    model: MixedEffects,
    data: ClusteredData,
    layers: Sequence[str],
    network: nn.Module | None = None,
) -> dict[str, Float[np.ndarray, "rows width"]]:
    """Outputs of modules for the rows, by path; inputs of modules under ``"<path"``.

    Feature maps are averaged over space. `network` takes the place of the program's.
    """
    network = model.network if network is None else network
    source = model.encode(data, model.data_facts().levels_with(data))
    inputs = [layer[1:] for layer in layers if layer.startswith("<")]
    outputs = [layer for layer in layers if not layer.startswith("<")]
    x = source.x if source.inputs is None else source.inputs
    _, record = run(network, x, outputs, inputs, like=model.network_reference())
    for layer in layers:
        if layer not in record:
            raise ValueError(f"the network never runs its module {layer!r}: nothing to probe")
    return {layer: pooled(record[layer]).double().cpu().numpy() for layer in layers}
