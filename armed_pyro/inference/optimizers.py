"""Adam of the network, of the guide, and of what the guide keeps of the clusters in a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from armed_pyro.engine.adam import Adam, Gradients, Update, adam_change
from armed_pyro.engine.compiled_step import Loss
from armed_pyro.engine.schedule import Schedule
from armed_pyro.guides.base import Guide
from armed_pyro.guides.pseudo_observations import PseudoObservations
from armed_pyro.inference.network_training import NetworkTraining
from armed_pyro.inference.torch_update import TorchUpdate
from armed_pyro.program.model import MixedEffects, can_overfit
from armed_pyro.rows.batch import Membership, Rows
from armed_pyro.rows.source import RowSource

__all__ = ["ClusterTable", "LazyAdam", "Optimizers"]


class Optimizers(nn.Module):
    r"""Adam of the network and of the guide, each at its own rate, with gradients clipped.

    .. math:: g \leftarrow g \min(1, c / \lVert g \rVert), \quad
        w \leftarrow w - \rho \, \mathrm{Adam}(g)

    The norm is taken for the network and for the guide separately, so that a strong adversary
    does not slow the guide down. All of it are operations on tensors, which a captured step holds.
    `eps` is Adam's for the guide. A user's optimizer takes the place of the network's Adam.
    """

    def __init__(
        self,
        model: MixedEffects,
        lazy: LazyAdam,
        schedule: Schedule,
        eps: float,
        training: NetworkTraining | None = None,
    ) -> None:
        super().__init__()
        self.clip = schedule.clip
        by_cluster = {name for table in lazy.tables.values() for name in table.names}
        guided = _trained("guide", lazy.guide)
        shared = {name: p for name, p in guided.items() if name not in by_cluster}
        of_guide: list[Update] = [Adam(shared, eps=eps), *lazy.tables.values()]
        trained, decay = _trained("model", model), schedule.weight_decay
        self.of_user: TorchUpdate | None = None
        if training is not None and training.of_user and trained:
            parts = (trained, model, model.network, training, schedule)
            self.of_user = TorchUpdate(*parts)
        adam = Adam(trained, decay=decay, decayed=_decayed(model, trained))
        of_network: list[Update] = [adam if self.of_user is None else self.of_user]
        rates = schedule.learning_rate, 1.0 if self.of_user else schedule.net_learning_rate
        self._groups = tuple(zip((of_guide, of_network), rates, strict=True))
        self.updates = nn.ModuleList([*of_guide, *of_network])
        self.updates.to(model.reference().device)  # also where nothing is trained

    @torch.no_grad()
    def forward(
        self, parameters: Mapping[str, Tensor], gradients: Gradients, factor: Float[Tensor, ""]
    ) -> Float[Tensor, ""]:
        """One step: the norm of the gradient. If it is not finite, no parameter changes.

        Parameters and gradients are named "model..." and "guide...". `factor` multiplies the rates.
        """
        joined = [[update.joined(gradients) for update in group] for group, _ in self._groups]
        squares = [torch.stack([part.square().sum() for part in parts]).sum() for parts in joined]
        norm = torch.stack(squares).sum().sqrt()
        finite = norm.isfinite()
        for (group, rate), parts, square in zip(self._groups, joined, squares, strict=True):
            scale = (self.clip / (square.sqrt() + 1e-6)).clamp(max=1.0)
            for update, part in zip(group, parts, strict=True):
                gradient = part.mul_(scale).masked_fill_(~finite, 0.0)
                update(parameters, gradient, torch.where(finite, rate * factor, 0.0))
        return norm


class LazyAdam:
    r"""Adam of what a guide keeps of clusters, for the clusters in a mini-batch only.

    A step reads the clusters of its batch into a small guide, whose parameters stay where they
    are in memory, and writes its result back. Reading and writing are operations on tensors whose
    shapes are the same in all batches, so a compiled step holds them, too. Time is O(clusters in
    the batch), whatever their number K; memory is O(K x terms).

    A cluster's moments m_k and v_k, and the number t_k of steps by which their bias is corrected,
    change only when the cluster is in the batch:

    .. math:: m_k \leftarrow \beta_1 m_k + (1 - \beta_1) g_k, \quad
        v_k \leftarrow \beta_2 v_k + (1 - \beta_2) g_k^2, \quad
        w_k \leftarrow w_k - \rho \, \frac{m_k / (1 - \beta_1^{t_k})}
        {\sqrt{v_k / (1 - \beta_2^{t_k})} + \epsilon}

    So each cluster sees the Adam of its own gradients. With every cluster in every batch this is
    Adam. Otherwise Adam itself would go on moving absent clusters by their momentum, and would
    average the zeros of their gradients into v, which makes its steps longer by about
    1 / sqrt(share of batches with the cluster). `torch.optim.SparseAdam` corrects all clusters'
    bias by one common number of steps.

    `counts` are the rows in each cluster of the factors whose clusters are read batch by batch, and
    `room` the rows of a batch. `guide` is the small guide, and `tables` has an entry per factor.

    Examples
    --------
    >>> from torch import nn
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
    >>> lazy.guide.clusterwise()["g"].location.shape  # one effect for each row of the batch
    torch.Size([5, 1])
    """

    def __init__(
        self, guide: Guide, counts: Mapping[str, Tensor], room: int, eps: float = 1e-8
    ) -> None:
        self.guide = guide.narrowed(dict.fromkeys(counts, room)) if counts else guide
        whole, small = guide.clusterwise(), self.guide.clusterwise()
        names = {id(p): f"guide.{name}" for name, p in self.guide.named_parameters()}
        self.tables = {
            name: ClusterTable(whole[name], small[name], names, counts[name], eps)
            for name in sorted(counts)
        }

    @classmethod
    def of(cls, guide: Guide, source: RowSource, size: int, eps: float) -> LazyAdam:
        """For mini-batches of `size` rows: the factors whose clusters these do not all draw."""
        narrow = source.sampled(size) & guide.clusterwise().keys()
        return cls(guide, {name: source.counts[name] for name in narrow}, size, eps)

    def reading(self, objective: Callable[..., Loss]) -> Callable[..., Loss]:
        """The small guide's objective, which reads the clusters of its rows first."""
        return _Reading(self, objective) if self.tables else objective

    def read(self, rows: Rows) -> Rows:
        """Read the clusters of the rows; the rows as the small guide numbers them.

        The rows come with all clusters, or with those that they draw, at most as many as `room`.
        """
        memberships = dict(rows.memberships)
        for name, table in self.tables.items():
            memberships[name] = table.read(rows.memberships[name], rows.scale)
        return replace(rows, memberships=memberships)

    def state(self) -> dict[str, Tensor]:
        """Moments and numbers of steps, by factor."""
        return {
            f"lazy.{factor}.{name}": value
            for factor, table in self.tables.items()
            for name, value in table.state.items()
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state` returned."""
        for name, value in self.state().items():
            value.copy_(tensors[name])

    def release(self) -> None:
        """Give the whole guide its own memory again; afterwards the tables are of no use."""
        for tensor in [tensor for table in self.tables.values() for tensor in table.whole]:
            tensor.data = tensor.detach().clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class _Reading:
    """An objective that reads the clusters it needs."""

    # Equal for equal objectives, which are not compiled anew.
    lazy: LazyAdam
    objective: Callable[..., Loss]

    def __call__(self, rows: Rows, *rest: Any) -> Loss:
        return self.objective(self.lazy.read(rows), *rest)


class ClusterTable(Update):
    """One factor's parameters and moments, one row per cluster, and the clusters of a batch.

    A cluster's row holds its place in the batch, its number of data rows, the guide's fixed
    numbers, its trained ones, their moments, and the number of steps. One row is one place of
    memory: spread over a dozen tensors, a million clusters would take several times as long to
    read as a hundred.

    `names` maps the identity of the small guide's parameters to their names; afterwards it holds
    those of the trained ones. `whole` are the whole guide's parameters and buffers, and `state` the
    moments and numbers of steps of all clusters: views of the table.
    """

    values: Tensor
    targets: Tensor

    def __init__(
        self,
        whole: PseudoObservations,
        small: PseudoObservations,
        names: Mapping[int, str],
        counts: Int[Tensor, " clusters"],
        eps: float,
    ) -> None:
        trained = [p for p in small.parameters() if p.requires_grad]
        widths, room = [p.shape[1:].numel() for p in trained], len(small.location)
        super().__init__([names[id(p)] for p in trained], widths, (room,))
        self._small, self.eps = (small,), eps  # in a tuple: it is the guide's part, not this one's
        self._trained = [p.requires_grad for p in small.parameters()]
        self.whole = self._fixed_first(whole)
        self._shapes = [tensor.shape[1:] for tensor in self.whole]
        self._widths = [shape.numel() for shape in self._shapes]
        n, like, width = len(counts), whole.location.detach(), sum(widths)
        self._fixed = sum(self._widths) - width
        # Unused places of a batch are written to a dummy last row.
        values = like.new_zeros(n + 1, 2 + self._fixed + 3 * width + 1)
        columns = values[:n].split([1, 1, *self._widths, width, width, 1], 1)
        _, sizes, *views, mean, square, count = columns
        sizes[:, 0] = counts
        self.state = {"mean": mean, "square": square, "count": count}
        for tensor, shape, view in zip(self.whole, self._shapes, views, strict=True):
            tensor.data = view.unflatten(1, shape).copy_(tensor.detach())
        self.register_buffer("values", values, persistent=False)
        self.register_buffer("targets", counts.new_zeros(room), persistent=False)

    def _fixed_first(self, pseudo: PseudoObservations) -> list[Tensor]:
        """Parameters and buffers, the trained ones last."""
        parameters = list(zip(pseudo.parameters(), self._trained, strict=True))
        fixed = [p for p, trained in parameters if not trained]
        return [*pseudo.buffers(), *fixed, *(p for p, trained in parameters if trained)]

    @torch.no_grad()
    def read(self, membership: Membership, scale: float) -> Membership:
        """Read the clusters of a batch into the small guide; the batch's places there."""
        room = len(self.targets)
        places = torch.arange(room, device=self.targets.device)
        if membership.complete:
            # Every row has a place. Of several rows of a cluster, the last stands for it.
            index = labels = membership.position
            numbers = places.to(self.values)
            if index.is_cuda:  # a GPU writes in any order
                first = self.values[:, 0]
                first.scatter_reduce_(0, index, numbers, "amax", include_self=False)
            else:
                self.values.index_put_((index, torch.zeros_like(index)), numbers)
            rows = self.values.index_select(0, index)
            position = rows[:, 0].long()
            stands = position == places
        else:
            position, labels = membership.position, membership.clusters()
            known = len(membership.index)
            index = torch.cat([membership.index, membership.index[:1].expand(room - known)])
            rows = self.values.index_select(0, index)
            stands = places < known
        self.targets.copy_(torch.where(stands, index, len(self.values) - 1))
        columns = rows[:, 2 : 2 + sum(self._widths)].split(self._widths, 1)
        small = self._fixed_first(self._small[0])
        for target, shape, part in zip(small, self._shapes, columns, strict=True):
            target.copy_(part.unflatten(1, shape))
        ones = self.values.new_ones(len(position))
        in_batch = self.values.new_zeros(room).index_add(0, position, ones)
        weight = scale * in_batch / rows[:, 1]
        return Membership(places, position, weight, complete=True, labels=labels)

    @torch.no_grad()
    def forward(
        self,
        parameters: Mapping[str, Tensor],
        gradient: Float[Tensor, "room width"],
        rate: Float[Tensor, ""],
    ) -> None:
        # Whole rows: to write into some of its columns, the compiler would copy the table.
        rows, width = self.values.index_select(0, self.targets), gradient.shape[1]
        # Copies and one join: for changes within one tensor, the compiler would work out every
        # column.
        fixed, trained, *moments = rows.split([2 + self._fixed, width, width, width, 1], 1)
        mean, square, count = (moment.clone() for moment in moments)
        moved = trained + adam_change(gradient, mean, square, count, rate, self.eps)
        rows = torch.cat([fixed, moved, mean, square, count], 1)
        self.values.index_copy_(0, self.targets, rows)


def _decayed(model: MixedEffects, trained: Mapping[str, Tensor]) -> list[str]:
    """Names of the weights, but not the biases, of a network that can overfit."""
    if not can_overfit(model):
        return []
    return [name for name, p in trained.items() if name.startswith("model.net.") and p.dim() > 1]


def _trained(prefix: str, module: nn.Module) -> dict[str, nn.Parameter]:
    named = module.named_parameters(prefix)
    return {name: p for name, p in named if p.requires_grad}
