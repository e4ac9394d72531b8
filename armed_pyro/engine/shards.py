"""What each of several processes trains a network on, and how their steps become one."""

from __future__ import annotations

import heapq
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from armed_pyro.engine.loss import Loss
from armed_pyro.engine.processes import Processes, mixed
from armed_pyro.rows.batch import Membership, Rows
from armed_pyro.rows.in_memory import HeldRows
from armed_pyro.rows.shuffle import Passes
from armed_pyro.rows.source import RowSource

__all__ = ["Share"]


# The largest share of rows, in equal shares, up to which clusters are kept whole.
MOST_UNEVEN = 1.2


@dataclass(frozen=True, eq=False)
class Share:
    r"""What one of W processes trains a network on: its rows, weighted for an average over all.

    DistributedDataParallel averages gradients, so that a process's loss must be W times its part
    of the objective, a sum over rows and clusters divided by the number N of all rows:

    .. math:: L = \frac{1}{W} \sum_r L_r, \quad L_r = -\frac{1}{N} \Big[ W \frac{N_r}{B_r}
        \sum_{i \in \text{batch}_r} \log p(y_i \mid u, \theta) + \sum_k w_{rk}
        \log \frac{p(u_k \mid \theta)}{q(u_k \mid \theta)}
        + \log \frac{p(\theta)}{q(\theta)} \Big]

    with w_rk = 1 where every process draws all clusters, and else W (N_r / B_r) m_rk / n_k for
    the m_rk of the cluster's n_k rows, in all processes, that are in the batch: either way the
    mean of w_rk over batches and processes is 1, so that clusters with rows in several
    processes are neither missed nor counted twice. Each process makes its own draws of theta and
    u: the expectation of each L_r does not depend on the others' draws, so that the average is
    unbiased, and has less noise than with one draw in common.

    Attributes
    ----------
    processes : Processes
        All W processes, whether or not they share the rows.
    rows : RowSource
        This process's rows, with the sizes that clusters have in all.
    places : tuple of Int[Tensor, "rows"]
        Each process's rows; empty if they are not shared.
    """

    processes: Processes
    rows: RowSource
    places: tuple[Int[Tensor, " rows"], ...]

    @classmethod
    def of(cls, processes: Processes, source: RowSource, network: nn.Module | None) -> Share:
        """What this process gets: whole clusters, of the factor with most of them, if it can be.

        It cannot where one cluster is so large that shares would be uneven, or where batch
        normalisation would take what is common to a process's clusters out of the activations:
        then rows are shared at random. Without a network to train every process keeps all rows.

        Parameters
        ----------
        network : torch.nn.Module, optional
            The network, if it is to be trained.

        Raises
        ------
        ValueError
            If there are fewer rows than processes.
        """
        if network is None or not processes.several:
            return cls(processes, source, ())
        if not isinstance(source, HeldRows):
            raise ValueError("rows in files cannot be shared by several processes: read them first")
        if len(source) < processes.size:
            raise ValueError(
                f"{len(source)} rows cannot be shared by {processes.size} processes: start fewer"
            )
        whole = not any(isinstance(one, _BatchNorm) for one in network.modules())
        places = _places(source, processes.size, whole_clusters=whole)
        own = places[processes.rank].to(source.x.device)
        return cls(processes, replace(source.take(own), reduce=processes.total), places)

    @property
    def several(self) -> bool:
        """Whether the rows are shared."""
        return bool(self.places)

    def batch(self, size: int) -> int:
        """Rows that each process adds to a batch of `size` of all rows."""
        if not self.several:
            return size
        return min([-(-size // len(self.places)), *map(len, self.places)])

    def together(self, size: int) -> int:
        """Rows in a batch of `size` rows, of all processes, whose parts are equal."""
        return max(1, len(self.places)) * self.batch(size)

    def weigh(self, rows: Rows) -> Rows:
        """Rows of this process, so weighted that the average over processes is the objective.

        Every process gets the clusters that any of them draws, in the same places, so that the
        gradients of what belongs to clusters can be averaged like all others.
        """
        if not self.several:
            return rows
        memberships = {
            factor: one if one.complete else self._united(one, len(rows))
            for factor, one in rows.memberships.items()
        }
        return replace(rows, memberships=memberships, scale=len(self.places) * rows.scale)

    def _united(self, membership: Membership, most: int) -> Membership:
        drawn = torch.cat(self.processes.gather(membership.index, most))
        every = drawn[drawn >= 0].unique()
        place = torch.searchsorted(every, membership.index)
        own = membership.weight
        weight = self.rows.like.new_zeros(len(every))
        weight[place] = len(self.places) * (torch.ones_like(weight[place]) if own is None else own)
        return replace(membership, index=every, position=place[membership.position], weight=weight)

    def averaged(
        self, objective: Callable[..., Loss], modules: Mapping[str, nn.Module], games: int
    ) -> Callable[..., Loss]:
        """The objective, its gradients averaged over processes by DistributedDataParallel.

        Parameters
        ----------
        modules : mapping of str to torch.nn.Module
            The modules whose parameters the objective reads.
        games : int
            Number of accuracies in its `Loss`.
        """
        return _Averaged(objective, modules, games) if self.several else objective

    def mean(self, loss: Loss) -> Loss:
        """The loss, after its gradients have been taken, averaged over processes."""
        if not self.several:
            return loss
        parts = [getattr(loss, field.name).detach().reshape(-1) for field in fields(Loss)]
        means = self.processes.total(torch.cat(parts)) / len(self.places)
        total, elbo, fixed, game = means[: len(parts) - 1]
        return Loss(total, elbo, fixed, game, means[len(parts) - 1 :])

    def reshuffled(self, passes: Passes, *seed: int) -> Passes:
        """From here on each process has random numbers of its own, which follow from the seed.

        So the first process's checkpoint is enough to go on from.
        """
        if not self.several:
            return passes
        torch.manual_seed(mixed(*seed, 1 + self.processes.rank))
        return Passes(passes.begin)

    def common_numbers(self, *seed: int) -> AbstractContextManager[None]:
        """Random numbers inside are the same in every process."""
        return self.processes.common_numbers(*seed) if self.several else nullcontext()

    def settle(self, *seed: int) -> None:
        """From here on the processes have the same random numbers."""
        if self.several:
            torch.manual_seed(mixed(*seed, 0))

    def ended(self, rows: RowSource) -> Share:
        """From here on no rows are shared: every process has these."""
        return Share(self.processes, rows, ())

    def average_buffers(self, network: nn.Module) -> None:
        """Average running statistics over processes."""
        if self.several:
            for one in network.buffers():
                if one.is_floating_point():
                    one.copy_(self.processes.total(one) / len(self.places))

    def mean_over_rows(self, log_prob: Callable[[Rows], Tensor], rows: Rows) -> float:
        """Mean over rows that every process has, each of which evaluates some of them."""
        if self.several:
            index = torch.arange(self.processes.rank, len(rows), len(self.places))
            rows, n = _selected(rows, index.to(rows.x.device)), len(rows)
            return float(self.processes.total(log_prob(rows).sum())) / n
        return float(log_prob(rows).mean())

    def compute(self, compute: Callable[[RowSource], RowSource], source: RowSource) -> RowSource:
        """`compute` of all rows, each process computing its own."""
        rows = self.rows
        if not (isinstance(rows, HeldRows) and isinstance(source, HeldRows) and self.several):
            return compute(source)
        done = compute(rows)
        own = done.computed if isinstance(done, HeldRows) else None
        if own is None:
            return source
        most, joined = max(map(len, self.places)), {}
        for name in sorted(own):
            whole = own[name].new_empty(len(source), *own[name].shape[1:])
            for place, piece in zip(
                self.places, self.processes.gather(own[name], most), strict=True
            ):
                whole[place.to(whole.device)] = piece[: len(place)]
            joined[name] = whole
        return replace(source, computed=joined)


def _selected(rows: Rows, index: Tensor) -> Rows:
    def some(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[index]

    memberships = {
        factor: replace(one, position=one.position[index])
        for factor, one in rows.memberships.items()
    }
    x, y = rows.x[index], some(rows.y)
    optional = (some(rows.trials), some(rows.offset), some(rows.weights))
    return Rows(x, y, memberships, rows.scale, *optional)


def _places(source: HeldRows, size: int, *, whole_clusters: bool) -> tuple[Tensor, ...]:
    """Each process's rows, in whole clusters if the shares are then about even."""
    n = len(source)
    if whole_clusters and source.counts:
        factor = max(source.counts, key=lambda name: len(source.counts[name]))
        owners, loads = _balanced(source.counts[factor].tolist(), size)
        if max(loads) <= MOST_UNEVEN * n / size and n / size <= MOST_UNEVEN * min(loads):
            owner = torch.tensor(owners)[source.codes[factor].cpu()]
            return tuple((owner == rank).nonzero()[:, 0] for rank in range(size))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    return tuple(order[rank::size].sort().values for rank in range(size))


def _balanced(counts: list[int], size: int) -> tuple[list[int], list[int]]:
    """An owner of each cluster, the largest first to whoever has fewest rows; and all loads."""
    owners, heap = [0] * len(counts), [(0, rank) for rank in range(size)]
    for cluster in sorted(range(len(counts)), key=lambda one: -counts[one]):
        load, rank = heapq.heappop(heap)
        owners[cluster] = rank
        heapq.heappush(heap, (load + counts[cluster], rank))
    return owners, [load for load, _ in heap]


class _Averaged:
    """An objective run by DistributedDataParallel."""

    def __init__(
        self, objective: Callable[..., Loss], modules: Mapping[str, nn.Module], games: int
    ) -> None:
        with warnings.catch_warnings():
            # The argument's new name is not known to all versions.
            warnings.simplefilter("ignore", FutureWarning)
            self._run = DistributedDataParallel(
                _Module(objective, modules, games), broadcast_buffers=False
            )

    def __call__(self, *inputs: object) -> Loss:
        return Loss(*self._run(*inputs))


class _Module(nn.Module):
    """An objective as a module, from its inputs to the parts of the loss."""

    def __init__(
        self, objective: Callable[..., Loss], modules: Mapping[str, nn.Module], games: int
    ) -> None:
        super().__init__()
        self.objective, self.games = objective, games
        self.parts = nn.ModuleDict(dict(modules))

    def forward(self, *inputs: object) -> tuple[Tensor, ...]:
        # A part for every parameter, as the processes wait for the gradients of all.
        trained = torch.stack([one.sum() for one in self.parameters() if one.requires_grad]).sum()
        try:
            loss = self.objective(*inputs)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            # The others wait, too: no number for an answer, which all of them see.
            nan = torch.full_like(trained.detach(), torch.nan)
            loss = Loss(nan, nan, nan, nan, nan.expand(self.games))
        loss = replace(loss, total=loss.total + 0 * trained)
        return tuple(getattr(loss, field.name) for field in fields(Loss))
