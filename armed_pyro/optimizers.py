"""Optimizers of a run: of network and guide, and of what a guide keeps of clusters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from armed_pyro.checkpoint import optimizer_tensors, restore_optimizer
from armed_pyro.guides import Guide
from armed_pyro.program import MixedEffects
from armed_pyro.pseudo import PseudoObservations
from armed_pyro.rows import Membership, Rows, RowSource
from armed_pyro.schedule import Schedule

__all__ = ["LazyAdam", "Optimizers"]

BETAS = (0.9, 0.99)


class Optimizers:
    """Adam of the network and of the guide, each at its own rate, with gradients clipped.

    Parameters
    ----------
    model, lazy : MixedEffects, LazyAdam
        The program, and the guide with what it keeps of clusters.
    schedule : Schedule
        Rates, and where gradients are clipped.
    eps : float
        Adam's epsilon for the guide.

    Attributes
    ----------
    factor : float
        Of the scheduled rates, in the last step.
    """

    def __init__(self, model: MixedEffects, lazy: LazyAdam, schedule: Schedule, eps: float) -> None:
        self.lazy, self.schedule, self.factor = lazy, schedule, 1.0
        apart = {id(one) for one in lazy.parameters}
        self._guided = list(lazy.guide.parameters())
        self._networks = list(model.parameters())
        together = [one for one in self._guided if id(one) not in apart]
        self._adam = torch.optim.Adam(
            [
                {"params": together, "base": schedule.learning_rate, "eps": eps},
                {"params": self._networks, "base": schedule.net_learning_rate},
            ],
            lr=schedule.learning_rate,
            betas=BETAS,
            fused=True,
        )

    def step(self, factor: float) -> bool:
        """One step at so many times the scheduled rates; False, and no step, without a gradient.

        A gradient that is not finite is none.
        """
        # Apart, so that a strong adversary does not slow the guide down.
        for parameters in (self._guided, self._networks):
            norm = torch.nn.utils.clip_grad_norm_(parameters, self.schedule.clip)
            if not torch.isfinite(norm):
                return False
        self.factor = factor
        for group in self._adam.param_groups:
            group["lr"] = factor * group["base"]
        self._adam.step()
        self.lazy.step(factor * self.schedule.learning_rate)
        return True

    def state(self) -> dict[str, Tensor]:
        """Moments and numbers of steps, by name."""
        return optimizer_tensors(self._adam) | self.lazy.state()

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `state` gave."""
        restore_optimizer(self._adam, tensors)
        self.lazy.restore(tensors)


class LazyAdam:
    r"""Adam of what a guide keeps of clusters, for the clusters in a mini-batch only.

    A step reads its clusters' rows into a small guide, whose parameters stay where they are in
    memory, and writes back what Adam makes of them. Time is O(clusters in the batch), whatever
    their number K; memory stays O(K x terms).

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
    sizes : mapping of str to int
        By factor, the most clusters that a batch holds.
    eps : float
        Adam's; its betas are 0.9 and 0.99.

    Examples
    --------
    >>> from armed_pyro import ClusteredData, MixedEffects, StructuredGuide
    >>> groups = [row % 20 for row in range(40)]
    >>> data = ClusteredData.from_arrays([[0.0], [1.0]] * 20, [0.0, 1.0] * 20, {"g": groups})
    >>> model = MixedEffects(nn.Linear(1, 1).double(), "(1 | g)").bind(data)
    >>> source = model.encode(data)
    >>> lazy = LazyAdam(StructuredGuide(model, source), {"g": 5})
    >>> batch = source.batch(torch.arange(5), dense_up_to=0)
    >>> lazy.read(batch).memberships["g"].index  # rows of the small guide, not clusters
    tensor([0, 1, 2, 3, 4])
    >>> sum(one.numel() for one in lazy.parameters)
    10
    """

    def __init__(self, guide: Guide, sizes: Mapping[str, int], eps: float = 1e-8) -> None:
        self.eps = eps
        self.guide = guide.narrowed(sizes) if sizes else guide
        whole, small = guide.clusterwise(), self.guide.clusterwise()
        self._tables = {name: _Table(whole[name], small[name]) for name in sizes}

    @classmethod
    def of(cls, guide: Guide, source: RowSource, size: int, eps: float) -> LazyAdam:
        """For mini-batches of `size` rows: of the factors whose clusters these do not all draw."""
        narrow = source.sampled(size) & guide.clusterwise().keys()
        return cls(guide, dict.fromkeys(sorted(narrow), size), eps)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The small guide's parameters that belong to clusters."""
        return [one for table in self._tables.values() for one in table.small.parameters()]

    def read(self, rows: Rows) -> Rows:
        """Read the batch's clusters into the small guide; the rows as that guide numbers them."""
        memberships = dict(rows.memberships)
        for name, table in self._tables.items():
            memberships[name] = table.read(rows.memberships[name])
        return replace(rows, memberships=memberships)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Change the clusters read last by the gradients of the small guide's parameters."""
        for table in self._tables.values():
            table.step(rate, self.eps)

    def state(self) -> dict[str, Tensor]:
        """Moments and numbers of steps, by factor."""
        return {f"lazy.{factor}": table.state for factor, table in self._tables.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave."""
        for name, value in self.state().items():
            value.copy_(tensors[name])


class _Table:
    """One factor's parameters by cluster, those of a batch, and the optimizer's state."""

    def __init__(self, whole: PseudoObservations, small: PseudoObservations) -> None:
        self.whole, self.small = whole, small
        pairs = list(zip(whole.parameters(), small.parameters(), strict=True))
        self._parameters = [(one.detach(), mine) for one, mine in pairs]
        buffers = zip(whole.buffers(), small.buffers(), strict=True)
        self._tensors = [*((one, mine.detach()) for one, mine in self._parameters), *buffers]
        self._widths = [one[0].numel() for one, _ in pairs]
        # Cluster by cluster, so that what a step needs of one is found in one place.
        clusters, width = len(whole.location), sum(self._widths)
        self.state = whole.location.new_zeros(clusters, 2 * width + 1)
        self._places = torch.arange(len(small.location), device=whole.location.device)
        self._present = self._places[:0]

    @torch.no_grad()
    def read(self, membership: Membership) -> Membership:
        self._present = present = membership.index
        for one, mine in self._tensors:
            torch.index_select(one, 0, present, out=mine[: len(present)])
        # Those beyond the present clusters have no rows, and no weight.
        weight = self.state.new_zeros(len(self._places))
        weight[: len(present)] = 1.0 if membership.weight is None else membership.weight
        labels = membership.clusters()
        return replace(membership, index=self._places, weight=weight, complete=True, labels=labels)

    def step(self, rate: float, eps: float) -> None:
        n, width = len(self._present), sum(self._widths)
        gradient = self._joined([mine.grad for _, mine in self._parameters])
        state = self.state.index_select(0, self._present)
        mean, square, steps = state.split([width, width, 1], 1)
        mean.lerp_(gradient, 1 - BETAS[0])
        square.lerp_(gradient.square_(), 1 - BETAS[1])
        steps += 1
        self.state.index_copy_(0, self._present, state)
        first, second = (1 - beta**steps for beta in BETAS)
        size = (square / second).sqrt_().add_(eps).mul_(first)
        change = (mean / size).mul_(-rate).split(self._widths, 1)
        for (one, _), part in zip(self._parameters, change, strict=True):
            one.index_add_(0, self._present, part.reshape(n, *one.shape[1:]))

    def _joined(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """Gradients by cluster, side by side; zeros where there are none."""
        n = len(self._present)
        parts = [
            self.state.new_zeros(n, width) if one is None else one[:n].reshape(n, width)
            for one, width in zip(gradients, self._widths, strict=True)
        ]
        return torch.cat(parts, 1)
