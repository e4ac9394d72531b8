"""Values of processes in time at cells that training did not see: interpolation and forecasts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from armed_pyro.data.label_matching import match_labels
from armed_pyro.prediction.label_noise import label_noise
from armed_pyro.random_effects.cells import Cells
from armed_pyro.random_effects.covariance import Latents
from armed_pyro.random_effects.grouping_factor import Factor
from armed_pyro.random_effects.process import CellProcess, conditional_draw

__all__ = ["CellDraws"]

# Values of one array in a block of draws, and most values that are kept for later calls.
BLOCK_VALUES, MOST_KEPT = 2**22, 2**27


@dataclass(eq=False)
class CellDraws:
    r"""Joint draws of a process at new cells, given its values at all cells drawn before.

    .. math:: f_{new} \sim p(f_{new} \mid f_{seen}, \theta)

    in every posterior draw. Cells that are drawn in one call are known in the next, so that blocks
    of rows share one path. Clusters without a known cell get a path from the prior, or zeros in the
    mode "population". `labels` and `values` are those of cells drawn before, by factor; they may be
    known at the start. Beyond `MOST_KEPT` values, cells drawn here are forgotten.
    """

    labels: dict[str, pd.Index] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    _given: dict[str, pd.Index] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._given = dict(self.labels)

    def effects(
        self, factor: Factor, labels: pd.Index, latents: Latents, mode: str, seed: int
    ) -> tuple[Float[Tensor, "draws new 1"], list[str]]:
        """Values at these cells, and the mode of each.

        The mode is "adapt" for clusters with cells that were known at the start, "" for others that
        training saw, and `mode` for all others. The noise is a function of the seed and the labels.
        """
        seen, process = latents[factor.effect_site], _process(factor)
        kept = self.labels.get(factor.name, labels[:0])
        modes = self._modes(process, factor.name, labels, mode)
        place = match_labels(labels, kept, f"grouping factor {factor.name!r}")
        fresh = labels[place < 0]
        result = seen.new_zeros(len(seen), len(labels), 1)
        if (place >= 0).any():
            earlier = self.values[factor.name][:, place[place >= 0]]
            result[:, torch.as_tensor(place >= 0)] = earlier
        if len(fresh):
            drawn = self._drawn(factor, fresh, kept, latents, seed)
            if mode == "population":
                drawn = drawn * torch.as_tensor(self._reached(process, fresh, kept))[:, None]
            result[:, torch.as_tensor(place < 0)] = drawn
            self._keep(factor.name, kept, fresh, drawn)
        return result, modes

    def _modes(self, process: CellProcess, name: str, labels: pd.Index, mode: str) -> list[str]:
        given = self._given.get(name, labels[:0])
        adapted = process.cells_of(given)
        cells = Cells.of(labels, name, adapted.clusters)
        modes = np.where(cells.cluster < len(process.cells.clusters), "", mode)
        return np.where(np.isin(cells.cluster, adapted.cluster), "adapt", modes).tolist()

    def _keep(self, name: str, kept: pd.Index, fresh: pd.Index, drawn: Tensor) -> None:
        before = [self.values[name]] if len(kept) else []
        if sum(part.numel() for part in [*before, drawn]) > MOST_KEPT:
            first = len(self._given.get(name, kept[:0]))
            kept, before = kept[:first], [part[:, :first] for part in before]
        self.labels[name], self.values[name] = kept.append(fresh), torch.cat([*before, drawn], 1)

    def _drawn(
        self, factor: Factor, labels: pd.Index, kept: pd.Index, latents: Latents, seed: int
    ) -> Float[Tensor, "draws new 1"]:
        process, seen = _process(factor), latents[factor.effect_site]
        noise = label_noise(seed, factor.name, labels, seen)[..., 0].double()
        earlier = process.cells_of(kept)
        cells = Cells.of(labels, factor.name, earlier.clusters)
        # Only the clusters of the new cells matter.
        near = [np.isin(part.cluster, cells.cluster) for part in (process.cells, earlier)]
        known = process.cells.take(near[0]).joined(earlier.take(near[1]))
        values = seen[:, torch.as_tensor(near[0]), 0]
        if len(kept):
            more = self.values[factor.name][:, torch.as_tensor(near[1]), 0]
            values = torch.cat([values, more], 1)
        n = max(len(seen), 1)
        sd = factor.sd(latents).double().reshape(-1).expand(n)
        parameter = process.parameter(latents).reshape(-1, 1).expand(n, 1)
        size, parts = max(1, BLOCK_VALUES // (len(known) + len(cells))), list[Tensor]()
        for start in range(0, n, size):
            block = slice(start, start + size)
            arrays = (sd[block], parameter[block], values[block].double(), noise[block])
            parts.append(conditional_draw(process, known, cells, *arrays))
        return torch.cat(parts).to(seen)[..., None]

    @staticmethod
    def _reached(process: CellProcess, fresh: pd.Index, kept: pd.Index) -> Bool[np.ndarray, " new"]:
        """Whether the cells' clusters have cells that training saw, or that were given."""
        earlier = process.cells_of(kept)
        cells = Cells.of(fresh, process.cells.factor, earlier.clusters)
        return np.isin(cells.cluster, process.cells.cluster)


def _process(factor: Factor) -> CellProcess:
    assert factor.process is not None  # for mypy
    return factor.process


def new_groups(factors: tuple[Factor, ...], new: Mapping[str, pd.Index]) -> dict[str, pd.Index]:
    """The new clusters by factor, with the new clusters of processes in place of their cells.

    New times of clusters that training saw are no new clusters.
    """
    groups = {f.name: new[f.name] for f in factors if f.process is None and f.name in new}
    for factor in factors:
        outer = factor.name.rpartition(":")[0]
        if factor.process is not None and outer not in groups and factor.name in new:
            cells = factor.process.cells_of(new[factor.name])
            groups[outer] = pd.Index(list(cells.clusters[len(factor.process.cells.clusters) :]))
    return groups
