"""`activations`: outputs and inputs of a trained network's modules for a table's rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.networks.taps import pooled, tapped
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
    pieces: dict[str, list[np.ndarray]] = {layer: [] for layer in layers}
    for part in source.x.to(model.network_reference().dtype).split(1024):
        with tapped(network, outputs, inputs) as record:
            network(part)
        for layer in layers:
            if layer not in record:
                raise ValueError(f"the network never runs its module {layer!r}: nothing to probe")
            pieces[layer].append(pooled(record[layer]).double().cpu().numpy())
    return {layer: np.concatenate(parts) for layer, parts in pieces.items()}
