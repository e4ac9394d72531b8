"""`Process`: a latent process in time for every cluster, and its values at a factor's cells."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from armed_pyro.distributions.chains import ChainNormal, Chains
from armed_pyro.random_effects.cells import Cells
from armed_pyro.random_effects.covariance import Latents, TermGroup
from armed_pyro.random_effects.process_kernels import Kernel, kernel_named

__all__ = ["CellProcess", "Timeline", "conditional_draw"]

Points = Float[Tensor, "... points"]


@dataclass(frozen=True)
class Timeline:
    """Cells with their cluster, and the time since the cluster's cell before each."""

    chains: Chains
    gap: Float[Tensor, " cells"]  # 0 for a cluster's first cell
    cluster: Int[Tensor, " cells"]

    @classmethod
    def of(cls, cells: Cells, like: Tensor) -> Timeline:
        """The timeline of these cells, in the precision and device of `like`."""
        chains = Chains.of(cells.cluster, cells.time).to(like.device)
        time = torch.as_tensor(cells.time).to(like)
        first = chains.previous == len(cells)
        gap = torch.where(first, 0.0, time - chains.before(time))
        return cls(chains, gap, torch.as_tensor(cells.cluster).to(like.device))

    @property
    def is_first(self) -> Bool[Tensor, " cells"]:
        """Whether no cell of the cluster comes before."""
        return self.chains.previous == len(self.gap)

    def in_order(self) -> Timeline:
        """The same cells in the order of ``chains.steps``."""
        steps = self.chains.steps
        return Timeline(self.chains.in_order(), self.gap[steps], self.cluster[steps])


class CellProcess(nn.Module):
    r"""u = sd z at every cell of a factor, with z a process of a `Kernel` in each cluster.

    Bound to the cells of the training rows. Processes of different clusters are independent.
    """

    _like: Tensor

    def __init__(self, kind: str, label: str, levels: pd.Index, factor: str) -> None:
        super().__init__()
        self.cells = Cells.of(levels, factor)
        # Times are differences in double precision, whatever the program's precision is.
        self.register_buffer("_like", torch.zeros((), dtype=torch.float64), persistent=False)
        self.kernel: Kernel = kernel_named(kind)(
            label, self.cells.shortest_gap(), self.cells.median_gap()
        )
        self._origin = float(self.cells.time.min()) if len(self.cells) else 0.0
        self._check(self.cells)
        self._timeline: Timeline | None = None

    def __len__(self) -> int:
        return len(self.cells)

    @property
    def timeline(self) -> Timeline:
        """The training rows' cells."""
        if self._timeline is None or self._timeline.gap.device != self._like.device:
            self._timeline = Timeline.of(self.cells, self._like)
            self._in_order = self._timeline.in_order()
        return self._timeline

    @property
    def ordered_timeline(self) -> Timeline:
        """The same in the order of its steps."""
        _ = self.timeline
        return self._in_order

    def timeline_of(self, cells: Cells) -> Timeline:
        """Other cells; ValueError for times at which the process is not defined."""
        self._check(cells)
        return Timeline.of(cells, self._like)

    def _check(self, cells: Cells) -> None:
        if problem := self.kernel.problem(cells.time, self._origin):
            raise ValueError(problem)

    def cells_of(self, labels: pd.Index) -> Cells:
        """The cells with these labels; clusters that training saw keep their number."""
        return Cells.of(labels, self.cells.factor, self.cells.clusters)

    def sample(self, like: Tensor) -> dict[str, Tensor]:
        """Sample the sites beside the sd."""
        return self.kernel.sample(like)

    def parameter(self, latents: Latents) -> Float[Tensor, "... 1"]:
        """The parameter beside the sd, in double precision, with a 1 in the place of the cells."""
        site = self.kernel.site
        return self._like.new_ones(1) if site is None else latents[site][..., :1].double()

    def steps(
        self, parameter: Float[Tensor, "... 1"], timeline: Timeline | None = None
    ) -> tuple[Points, Points]:
        """a and q of every cell, for z with sd 1; a is 0 where no cell comes before."""
        timeline = self.timeline if timeline is None else timeline
        gap = timeline.gap
        decay, innovation = self.kernel.step(parameter, torch.where(timeline.is_first, 1.0, gap))
        decay = torch.where(timeline.is_first, 0.0, decay)
        return decay, torch.where(timeline.is_first, self.kernel.first(gap), innovation)

    def prior(self, sd: Float[Tensor, "... 1"], latents: Latents) -> ChainNormal:
        """p(u | sd, kernel) of all cells, given sites "... 1 1" with draws or "1" without."""
        decay, innovation = self.steps(_without_clusters(self.parameter(latents)))
        scale = _without_clusters(sd) * innovation.sqrt()
        return ChainNormal(self.timeline.chains, decay.to(sd), scale.to(sd))

    def root(
        self, sd: Float[Tensor, "... 1"], latents: Latents, labels: pd.Index
    ) -> Float[Tensor, "draws cells cells"]:
        """L of the cells with these labels alone, u = L z: the root of a dense covariance."""
        timeline = self.timeline_of(self.cells_of(labels))
        decay, innovation = self.steps(self.parameter(latents).reshape(-1, 1), timeline)
        scale = sd.double().reshape(-1, 1) * innovation.sqrt()
        noise = torch.eye(len(labels), dtype=scale.dtype, device=scale.device)
        paths = timeline.chains.forwards(decay[:, None], scale[:, None] * noise)
        return paths.mT.to(sd)

    def mean_variance(self, latents: Latents) -> Tensor:
        """Mean of the variances of z over the cells, "... 1"."""
        decay, innovation = self.steps(_without_clusters(self.parameter(latents)))
        variance = self.timeline.chains.forwards(decay.square(), innovation)
        return variance.mean(-1, keepdim=True)

    def quantities(self, latents: Latents, term: str) -> Iterator[tuple[TermGroup, str, Tensor]]:
        """Rows of tables beside the sd."""
        if self.kernel.site is not None and self.kernel.quantity is not None:
            group = TermGroup(self.kernel.label, (0,), (term,))
            yield group, self.kernel.quantity, latents[self.kernel.site].reshape(-1)


def _without_clusters(value: Float[Tensor, "... 1"]) -> Float[Tensor, "... 1"]:
    """A site's value "... 1 1", whose dimension of clusters becomes that of the cells."""
    return value.squeeze(-2) if value.dim() > 1 else value


def conditional_draw(
    process: CellProcess,
    known: Cells,
    new: Cells,
    sd: Float[Tensor, " draws"],
    parameter: Float[Tensor, "draws 1"],
    values: Float[Tensor, "draws known"],
    noise: Float[Tensor, "draws new"],
) -> Float[Tensor, "draws new"]:
    r"""Values at new cells given the `values` at known cells: interpolation and forecasts.

    Backwards in time, a new cell is normal given the next cell and all known cells before it; a
    known cell is an observation without noise.
    """
    both = known.joined(new)
    timeline = process.timeline_of(both)
    decay, innovation = process.steps(parameter, timeline)
    decay, innovation = (part.expand(len(values), -1) for part in (decay, innovation))
    padding = values.new_zeros(len(values), len(new))
    fixed = torch.arange(len(both), device=values.device) < len(known)
    observed = torch.cat([values / sd[:, None], padding], -1)
    # Mean and variance of z given the cells before and at the cell.
    variance = _filtered(timeline.chains, decay, innovation, fixed)
    kept = torch.where(fixed, 0.0, decay)
    mean = timeline.chains.forwards(kept, torch.where(fixed, observed, 0.0))
    next_decay, next_innovation = (timeline.chains.after(p) for p in (decay, innovation))
    total = next_decay.square() * variance + next_innovation
    has_next = timeline.chains.following < len(both)
    gain = torch.where(has_next, next_decay * variance / total.clamp(min=1e-300), 0.0)
    base = mean - gain * next_decay * mean
    left = torch.where(has_next, variance * next_innovation / total.clamp(min=1e-300), variance)
    noise = torch.cat([padding.new_zeros(len(values), len(known)), noise], -1)
    addend = torch.where(fixed, observed, base + left.clamp(min=0).sqrt() * noise)
    z = timeline.chains.backwards(torch.where(fixed, 0.0, gain), addend)
    return sd[:, None] * z[:, len(known) :]


def _filtered(chains: Chains, decay: Points, innovation: Points, fixed: Tensor) -> Points:
    """Variance of each cell given the fixed cells up to it."""
    free = (~fixed).to(decay)
    return chains.forwards(free * decay.square(), free * innovation)
