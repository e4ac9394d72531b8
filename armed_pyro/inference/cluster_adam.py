"""Adam of what a guide keeps of clusters, whose cost does not grow with their number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from armed_pyro.engine.adam import Adam
from armed_pyro.engine.loss import Loss
from armed_pyro.guides.base import Guide
from armed_pyro.guides.pseudo_observations import PseudoObservations
from armed_pyro.rows.batch import Membership, Rows
from armed_pyro.rows.source import RowSource

__all__ = ["LazyAdam"]


class LazyAdam:
    r"""Adam of what a guide keeps of clusters, for the clusters in a mini-batch only.

    What a step needs of its clusters is read into a small guide, whose parameters stay where they
    are in memory; what the step makes of them is written back. Reading and writing are operations
    on tensors, of one shape in all batches, so that a compiled step holds them too. Time is
    O(clusters in the batch), whatever their number K; memory stays O(K x terms).

    A cluster's moments m_k, v_k, and the number of steps t_k by which their bias is corrected,
    change only when it is in the batch:

    .. math:: m_k \leftarrow \beta_1 m_k + (1 - \beta_1) g_k, \quad
        v_k \leftarrow \beta_2 v_k + (1 - \beta_2) g_k^2, \quad
        w_k \leftarrow w_k - \rho \, \frac{m_k / (1 - \beta_1^{t_k})}
        {\sqrt{v_k / (1 - \beta_2^{t_k})} + \epsilon}

    So each cluster sees the Adam of its own gradients. With every cluster in every batch this is
    Adam; otherwise Adam itself would go on moving absent clusters by their momentum, and would
    average the zeros of their gradients into v, which makes its steps longer by about
    1 / sqrt(share of batches with the cluster).

    Parameters
    ----------
    guide : Guide
        The whole guide.
    counts : mapping of str to Int[Tensor, "clusters"]
        Rows in each cluster, of the factors of which a batch's clusters are read.
    room : int
        Rows of a batch.
    eps : float
        Adam's; its betas are 0.9 and 0.99.

    Examples
    --------
    >>> from armed_pyro import ClusteredData, MixedEffects, StructuredGuide
    >>> groups = [row % 20 for row in range(40)]
    >>> data = ClusteredData.from_arrays([[0.0], [1.0]] * 20, [0.0, 1.0] * 20, {"g": groups})
    >>> model = MixedEffects(nn.Linear(1, 1).double(), "(1 | g)").bind(data)
    >>> source = model.encode(data)
    >>> lazy = LazyAdam(StructuredGuide(model, source), source.counts, room=5)
    >>> batch = source.batch(torch.tensor([0, 1, 20, 21, 2]), dense_up_to=40)
    >>> batch.memberships["g"].position  # in these five rows there are three clusters
    tensor([0, 1, 0, 1, 2])
    >>> lazy.read(batch).memberships["g"].weight  # the last row of a cluster stands for it
    tensor([0., 0., 8., 8., 4.], dtype=torch.float64)
    >>> lazy.adams[0].mean.shape  # of two numbers a cluster
    torch.Size([2, 5])
    """

    def __init__(
        self, guide: Guide, counts: Mapping[str, Tensor], room: int, eps: float = 1e-8
    ) -> None:
        self.guide = guide.narrowed(dict.fromkeys(counts, room)) if counts else guide
        whole, small = guide.clusterwise(), self.guide.clusterwise()
        names = {id(one): f"guide.{name}" for name, one in self.guide.named_parameters()}
        self.tables = nn.ModuleDict(
            {
                name: _Table(whole[name], small[name], names, counts[name], eps)
                for name in sorted(counts)
            }
        )

    @classmethod
    def of(cls, guide: Guide, source: RowSource, size: int, eps: float) -> LazyAdam:
        """For mini-batches of `size` rows: of the factors whose clusters these do not all draw."""
        narrow = source.sampled(size) & guide.clusterwise().keys()
        return cls(guide, {name: source.counts[name] for name in narrow}, size, eps)

    @property
    def adams(self) -> list[Adam]:
        """What takes the steps of the small guide's parameters that belong to clusters."""
        return [table.adam for table in self._named().values()]

    def reading(self, objective: Callable[..., Loss]) -> Callable[..., Loss]:
        """The small guide's objective, as one of the rows of a batch."""
        return _Reading(self, objective) if self._named() else objective

    def read(self, rows: Rows) -> Rows:
        """Read the clusters of some rows; the rows as the small guide numbers them.

        They may be given with all clusters, or with those that they draw, no more than there is
        room for.
        """
        memberships = dict(rows.memberships)
        for name, table in self._named().items():
            memberships[name] = table.read(rows.memberships[name], rows.scale)
        return replace(rows, memberships=memberships)

    def write(self) -> None:
        """Write back what a step has made of the clusters read last."""
        for table in self._named().values():
            table.write()

    def state(self) -> dict[str, Tensor]:
        """Moments and numbers of steps, by factor."""
        return {
            f"lazy.{factor}.{name}": value
            for factor, table in self._named().items()
            for name, value in table.state.items()
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave."""
        for name, value in self.state().items():
            value.copy_(tensors[name])

    def release(self) -> None:
        """Give the whole guide memory of its own again; of no use from then on."""
        for table in self._named().values():
            table.release()

    def _named(self) -> Mapping[str, _Table]:
        return cast("Mapping[str, _Table]", self.tables)


@dataclass(frozen=True)
class _Reading:
    """An objective that reads the clusters it needs."""

    lazy: LazyAdam
    objective: Callable[..., Loss]

    def __call__(self, rows: Rows, *rest: Any) -> Loss:
        return self.objective(self.lazy.read(rows), *rest)


class _Table(nn.Module):
    """One factor's parameters by cluster, those of a batch, and the optimizer's state.

    All that is kept of a cluster is one row of one tensor, so that it is found in one place: first
    its number in the batch. Until `release` the whole guide's parameters and buffers are views.
    """

    values: Tensor
    rows: Tensor
    place: Tensor
    targets: Tensor

    def __init__(
        self,
        whole: PseudoObservations,
        small: PseudoObservations,
        names: Mapping[int, str],
        counts: Int[Tensor, " clusters"],
        eps: float,
    ) -> None:
        super().__init__()
        room, like = len(small.location), whole.location.detach()
        trained = {names[id(one)]: one for one in small.parameters() if one.requires_grad}
        # Not parts of this module: they belong to the optimizers and the guide.
        self._batch = Adam(trained, room, eps), small
        for name in ("place", "rows"):
            self.register_buffer(name, like.new_ones(1, room), persistent=False)
        self._whole = [*whole.parameters(), *whole.buffers()]
        self._widths = [len(one) for one in self._small()]
        values = like.new_zeros(len(like) + 1, sum(self._widths))
        _, rows, mean, square, count, *views = values[:-1].split(self._widths, 1)
        self.state = {"mean": mean, "square": square, "count": count}
        rows[:, 0] = counts
        for one, view in zip(self._whole, views, strict=True):
            one.data = view.unflatten(1, one.shape[1:]).copy_(one.detach())
        self.register_buffer("values", values, persistent=False)
        self.register_buffer("targets", counts.new_zeros(room), persistent=False)

    @property
    def adam(self) -> Adam:
        return self._batch[0]

    def _small(self) -> list[Float[Tensor, "width room"]]:
        adam, small = self._batch
        kept = [*small.parameters(), *small.buffers()]
        moments = [adam.mean, adam.square, adam.count]
        return [self.place, self.rows, *moments, *(one.detach().flatten(1).T for one in kept)]

    @torch.no_grad()
    def read(self, membership: Membership, scale: float) -> Membership:
        room = len(self.targets)
        places = torch.arange(room, device=self.targets.device)
        if membership.complete:
            # A place for each row; of several rows of a cluster, one place stands for it.
            index = labels = membership.position
            numbers = places.to(self.values)
            if index.is_cuda:  # where any of several rows could be the last
                first = self.values[:, 0]
                first.scatter_reduce_(0, index, numbers, "amax", include_self=False)
            else:
                self.values.index_put_((index, torch.zeros_like(index)), numbers)
            rows = _kept(self.values.index_select(0, index))
            position = rows[:, 0].long()
            stands = position == places
        else:
            position, labels = membership.position, membership.clusters()
            known = len(membership.index)
            index = torch.cat([membership.index, membership.index[:1].expand(room - known)])
            stands = places < known
            rows = _kept(self.values.index_select(0, index))
        # All other places are written to where nobody looks.
        targets = _kept(torch.where(stands, index, len(self.values) - 1))
        self.targets.copy_(targets)
        # Row by row first, then as the small guide has it, clusters last.
        columns = _kept(rows.T).split(self._widths)
        for mine, part in zip(self._small(), columns, strict=True):
            mine.copy_(part)
        found = self.rows.new_zeros(room).index_add(0, position, self.rows.new_ones(len(position)))
        weight = scale * found / self.rows[0]
        return Membership(places, position, weight, complete=True, labels=labels)

    @torch.no_grad()
    def write(self) -> None:
        self.values.index_copy_(0, self.targets, _kept(torch.cat(self._small()).T))

    def release(self) -> None:
        for one in self._whole:
            one.data = one.detach().clone(memory_format=torch.contiguous_format)


def _kept(value: Tensor) -> Tensor:
    """A copy that a compiled step keeps in memory as it is, for all that reads it."""
    return value.clone(memory_format=torch.contiguous_format)
