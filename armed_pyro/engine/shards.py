"""The share of the rows on which each process trains a network, and the averages over processes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from armed_pyro.engine.compiled_step import Loss, Objective
from armed_pyro.engine.processes import ALONE, Processes, mixed
from armed_pyro.rows.batch import Membership, Rows
from armed_pyro.rows.in_memory import HeldRows
from armed_pyro.rows.passes import Passes
from armed_pyro.rows.source import RowSource

__all__ = ["Share"]

# Largest ratio of a process's rows to the mean, and of the mean to a process's rows, up to which
# clusters are kept whole.
MOST_UNEVEN = 1.2


@dataclass(frozen=True, eq=False)
class Share:
    r"""The rows on which one of W processes trains a network, weighted for an average over W.

    The objective is a sum over rows and clusters, divided by the number N of all rows.
    DistributedDataParallel averages gradients, so a process's loss is W times its part of the
    objective:

    .. math:: L = \frac{1}{W} \sum_r L_r, \quad L_r = -\frac{1}{N} \Big[ W \frac{N_r}{B_r}
        \sum_{i \in \text{batch}_r} \log p(y_i \mid u, \theta) + \sum_k w_{rk}
        \log \frac{p(u_k \mid \theta)}{q(u_k \mid \theta)}
        + \log \frac{p(\theta)}{q(\theta)} \Big]

    with w_rk = 1 if every process draws all clusters. Otherwise w_rk = W (N_r / B_r) m_rk / n_k,
    where the cluster has n_k rows in all processes, and m_rk of them are in the batch of process
    r. In both cases the mean of w_rk over batches and processes is 1, so that clusters with rows
    in several processes are neither missed nor counted twice. Each process makes its own draws of
    theta and u. The expectation of L_r does not depend on the other processes' draws, so the
    average is unbiased, and has less noise than with common draws.

    Without a network to train, and once it is frozen, every process has all rows, and W is 1.
    """

    processes: Processes  # all processes, whether or not they share the rows
    rows: RowSource  # of this process; their `counts` are the numbers of rows in all processes
    places: tuple[Int[Tensor, " rows"], ...] = ()  # numbers of each process's rows, if shared

    @classmethod
    def of(cls, processes: Processes, source: RowSource, network: nn.Module | None) -> Share:
        """The share of this process: whole clusters of the factor with most clusters, if possible.

        Rows are shared at random instead if a large cluster would make the shares uneven, or if
        the network has batch normalisation, which would remove effects common to a process's
        clusters from the activations. `network` is None if it is not to be trained.
        """
        if network is None or not processes.several:
            return cls(processes, source)
        if not isinstance(source, HeldRows):
            raise ValueError("rows in files cannot be shared by several processes: read them first")
        if len(source) < processes.size:
            raise ValueError(
                f"{len(source)} rows cannot be shared by {processes.size} processes: start fewer"
            )
        whole = not any(isinstance(module, _BatchNorm) for module in network.modules())
        places = _places(source, processes.size, whole_clusters=whole)
        rows = source.take(places[processes.rank].to(source.x.device))
        return cls(processes, replace(rows, reduce=processes.total), places)

    @property
    def sharing(self) -> Processes:
        """The W processes that share the rows; one alone if they do not."""
        return self.processes if self.places else ALONE

    @property
    def several(self) -> bool:
        """Whether the rows are shared."""
        return bool(self.places)

    def batch(self, size: int) -> int:
        """Number of rows that each process adds to a batch of `size` rows."""
        return min([-(-size // self.sharing.size), *map(len, self.places)])

    def together(self, size: int) -> int:
        """Number of rows in a batch of about `size` rows to which processes add equal parts."""
        return self.sharing.size * self.batch(size)

    def weigh(self, rows: Rows) -> Rows:
        """Rows of this process, weighted such that the average over processes is the objective.

        Every process gets the clusters that any process draws, in the same order, so that the
        gradients of parameters per cluster can be averaged like all others.
        """
        if not self.several:
            return rows
        memberships = {
            factor: membership if membership.complete else self._united(membership, len(rows))
            for factor, membership in rows.memberships.items()
        }
        return replace(rows, memberships=memberships, scale=self.sharing.size * rows.scale)

    def _united(self, membership: Membership, most: int) -> Membership:
        """The membership with the clusters that other processes draw, at weight 0."""
        drawn = torch.cat(self.processes.gather(membership.index, most))
        united = drawn[drawn >= 0].unique()
        place = torch.searchsorted(united, membership.index)
        weight = self.rows.like.new_zeros(len(united))
        weight[place] = self.sharing.size
        if membership.weight is not None:
            weight[place] *= membership.weight
        return replace(membership, index=united, position=place[membership.position], weight=weight)

    def averaged(
        self, objective: Objective, modules: Mapping[str, nn.Module], adversaries: int
    ) -> Objective:
        """The objective, with gradients that DistributedDataParallel averages over processes.

        The objective reads the parameters of the modules; its loss has an accuracy per adversary.
        """
        if not self.several:
            return objective
        module = _Module(objective, modules, adversaries)
        with warnings.catch_warnings():
            # Older versions of torch do not know the new name of `broadcast_buffers`.
            warnings.simplefilter("ignore", FutureWarning)
            averaged = DistributedDataParallel(module, broadcast_buffers=False)
        return lambda *inputs: Loss(*averaged(*inputs))

    def mean(self, loss: Loss) -> Loss:
        """The loss, without its gradients, averaged over processes."""
        return Loss.of(self._mean(loss.joined())) if self.several else loss

    def _mean(self, values: Tensor) -> Tensor:
        """The mean over the processes that share the rows."""
        return self.sharing.total(values) / self.sharing.size

    def agreed(self, value: float) -> float:
        """The mean of a value that processes compute alike, up to rounding errors."""
        return float(self._mean(self.rows.like.new_tensor(value))) if self.several else value

    def reshuffled(self, passes: Passes, *seed: int) -> Passes:
        """New passes over the rows, after seeding each process's random numbers differently.

        Random numbers follow from the seed and the rank, so that all processes can resume from
        the first process's checkpoint.
        """
        if not self.several:
            return passes
        torch.manual_seed(mixed(*seed, 1 + self.processes.rank))
        return Passes(passes.begin)

    def use_common_numbers(self, *seed: int) -> None:
        """Seed the random numbers of all processes equally, if rows are shared."""
        if self.several:
            torch.manual_seed(mixed(*seed, 0))

    def average_buffers(self, network: nn.Module) -> None:
        """Average the network's running statistics over processes."""
        for buffer in network.buffers():
            if self.several and buffer.is_floating_point():
                buffer.copy_(self._mean(buffer))

    def mean_over_rows(self, log_prob: Callable[[Rows], Tensor], rows: HeldRows) -> float:
        """Mean log-density of rows that every process has; each process evaluates a part."""
        if not self.several:
            return float(log_prob(rows.all()).mean())
        index = torch.arange(self.sharing.rank, len(rows), self.sharing.size)
        part = rows.take(index.to(rows.x.device)).all()
        return float(self.sharing.total(log_prob(part).sum())) / len(rows)

    def compute(self, compute: Callable[[RowSource], RowSource], source: RowSource) -> RowSource:
        """``compute(source)``; each process computes its share, and shares are exchanged."""
        share = compute(self.rows if self.several else source)
        if not (self.several and isinstance(source, HeldRows) and isinstance(share, HeldRows)):
            return share
        most, joined = max(map(len, self.places)), {}
        for name, values in sorted((share.computed or {}).items()):
            joined[name] = values.new_empty(len(source), *values.shape[1:])
            parts = self.processes.gather(values, most)
            for place, part in zip(self.places, parts, strict=True):
                joined[name][place.to(values.device)] = part[: len(place)]
        return replace(source, computed=joined or None)


def _places(source: HeldRows, size: int, *, whole_clusters: bool) -> tuple[Tensor, ...]:
    """The numbers of each process's rows, in whole clusters if the shares are about equal then."""
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
    """Each cluster's process and each process's rows; the largest clusters are assigned first."""
    owners, loads = [0] * len(counts), [0] * size
    for cluster in sorted(range(len(counts)), key=lambda cluster: -counts[cluster]):
        owners[cluster] = loads.index(min(loads))
        loads[owners[cluster]] += counts[cluster]
    return owners, loads


class _Module(nn.Module):
    """An objective as a module, from its inputs to the parts of the loss."""

    def __init__(
        self, objective: Objective, modules: Mapping[str, nn.Module], adversaries: int
    ) -> None:
        super().__init__()
        self.objective, self.adversaries = objective, adversaries
        self.parts = nn.ModuleDict(dict(modules))

    def forward(self, *inputs: object) -> tuple[Tensor, ...]:
        # Added to the loss times 0, as processes wait for gradients of all trained parameters.
        trained = torch.stack([p.sum() for p in self.parameters() if p.requires_grad]).sum()
        try:
            loss = self.objective(*inputs)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            # An error would leave the other processes waiting. NaN reaches all of them instead.
            nan = torch.full_like(trained.detach(), torch.nan)
            loss = Loss(nan, nan, nan, nan, nan.expand(self.adversaries))
        return loss.total + 0 * trained, loss.elbo, loss.fixed, loss.adversarial, loss.accuracy
