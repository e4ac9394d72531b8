"""Optimizers of a run: of network and guide, and of what a guide keeps of clusters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from armed_pyro.guides import Guide
from armed_pyro.program import MixedEffects
from armed_pyro.pseudo import PseudoObservations
from armed_pyro.rows import Membership, Rows, RowSource
from armed_pyro.schedule import Schedule

__all__ = ["Adam", "LazyAdam", "Optimizers"]

BETAS = (0.9, 0.99)

Gradients = Mapping[str, Tensor | None]


class Optimizers(nn.Module):
    r"""Adam of the network and of the guide, each at its own rate, with gradients clipped.

    .. math:: g \leftarrow g \min(1, c / \lVert g \rVert), \quad
        w \leftarrow w - \rho \, \mathrm{Adam}(g)

    Operations on tensors and nothing else, so that a compiled step holds them too; apart for
    network and guide, so that a strong adversary does not slow the guide down.

    Parameters
    ----------
    model, lazy : MixedEffects, LazyAdam
        The program, and the guide with what it keeps of clusters.
    schedule : Schedule
        Rates, and where gradients are clipped (c).
    eps : float
        Adam's epsilon for the guide.
    """

    def __init__(self, model: MixedEffects, lazy: LazyAdam, schedule: Schedule, eps: float) -> None:
        super().__init__()
        self.clip = schedule.clip
        apart = {name for one in lazy.adams for name in one.names}
        guided = _trained("guide", lazy.guide)
        together = {name: one for name, one in guided.items() if name not in apart}
        self._groups = (
            ([Adam(together, eps=eps), *lazy.adams], schedule.learning_rate),
            ([Adam(_trained("model", model))], schedule.net_learning_rate),
        )
        self.adams = nn.ModuleList(adam for group, _ in self._groups for adam in group)

    @torch.no_grad()
    def forward(
        self, parameters: Mapping[str, Tensor], gradients: Gradients, factor: Float[Tensor, ""]
    ) -> Float[Tensor, ""]:
        """One step at so many times the scheduled rates: the length of the gradient.

        If it is not finite, no parameter changes.

        Parameters
        ----------
        parameters : mapping of str to Tensor
            Those that are trained: "model." or "guide.", and the parameter's name there.
        gradients : mapping of str to Tensor or None
        factor : Float[Tensor, ""]
        """
        joined = [[one.joined(gradients) for one in group] for group, _ in self._groups]
        squares = [torch.stack([one.square().sum() for one in some]).sum() for some in joined]
        norm = torch.stack(squares).sum().sqrt()
        finite = norm.isfinite()
        for (group, rate), some, square in zip(self._groups, joined, squares, strict=True):
            scale = (self.clip / (square.sqrt() + 1e-6)).clamp(max=1.0)
            for adam, one in zip(group, some, strict=True):
                gradient = one.mul_(scale).masked_fill_(~finite, 0.0)
                adam(parameters, gradient, torch.where(finite, rate * factor, 0.0))
        return norm


def _trained(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    named = module.named_parameters(prefix)
    return {name: one for name, one in named if one.requires_grad}


class Adam(nn.Module):
    r"""Adam of some parameters, whose numbers are joined to rows: one row, or one a cluster.

    .. math:: m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
        w \leftarrow w - \rho \, \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    On joined numbers it takes a dozen operations, however many the parameters are.

    Parameters
    ----------
    parameters : mapping of str to Tensor
        By name; their leading dimension has `rows` entries if there are several rows.
    rows : int
        Rows, each with a number t of steps of its own.
    eps : float

    Attributes
    ----------
    state : Float[Tensor, "rows 2*width+1"]
        m, v and t, row by row, so that what a step needs of one is found in one place.

    Examples
    --------
    >>> w = {"w": torch.tensor([1.0, 2.0])}
    >>> adam = Adam(w)
    >>> adam(w, adam.joined({"w": torch.tensor([3.0, -1.0])}), torch.tensor(0.1))
    >>> w["w"]
    tensor([0.9000, 2.1000])
    """

    state: Tensor

    def __init__(self, parameters: Mapping[str, Tensor], rows: int = 1, eps: float = 1e-8) -> None:
        super().__init__()
        self.rows, self.eps = rows, eps
        self.names = tuple(parameters)
        self._widths = [one.numel() // rows for one in parameters.values()]
        like = next(iter(parameters.values()), torch.empty(0)).detach()
        self.register_buffer("state", like.new_zeros(rows, 2 * sum(self._widths) + 1))

    def joined(self, gradients: Gradients) -> Float[Tensor, "rows width"]:
        """Gradients row by row, side by side; zeros where there are none."""
        found = [gradients[name] for name in self.names]
        parts = [
            self.state.new_zeros(self.rows, width) if one is None else one.reshape(self.rows, width)
            for one, width in zip(found, self._widths, strict=True)
        ]
        return torch.cat(parts, 1) if parts else self.state.new_zeros(self.rows, 0)

    @torch.no_grad()
    def forward(
        self,
        parameters: Mapping[str, Tensor],
        gradient: Float[Tensor, "rows width"],
        rate: Float[Tensor, ""],
    ) -> None:
        """Change the parameters, and what is kept of their gradients."""
        width = gradient.shape[1]
        mean, square, steps = self.state.split([width, width, 1], 1)
        # In place: of large networks copies would take much memory.
        mean.lerp_(gradient, 1 - BETAS[0])
        square.lerp_(gradient.square(), 1 - BETAS[1])
        steps.add_(1)
        first, second = (1 - torch.exp(math.log(beta) * steps) for beta in BETAS)
        size = (square / second).sqrt_().add_(self.eps).mul_(first)
        change = (mean / size).mul_(-rate).split(self._widths, 1)
        for name, part in zip(self.names, change, strict=True):
            parameters[name].add_(part.reshape(parameters[name].shape))


class LazyAdam:
    r"""Adam of what a guide keeps of clusters, for the clusters in a mini-batch only.

    What a step needs of its clusters is read into a small guide, whose parameters stay where they
    are in memory; what the step makes of them is written back. Time is O(clusters in the batch),
    whatever their number K; memory stays O(K x terms).

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
    >>> lazy.adams[0].state.shape  # moments of two numbers a cluster, and its number of steps
    torch.Size([5, 5])
    """

    def __init__(self, guide: Guide, sizes: Mapping[str, int], eps: float = 1e-8) -> None:
        self.guide = guide.narrowed(sizes) if sizes else guide
        whole, small = guide.clusterwise(), self.guide.clusterwise()
        names = {id(one): f"guide.{name}" for name, one in self.guide.named_parameters()}
        self._tables = {
            name: _Table(whole[name], small[name], names, eps) for name in sorted(sizes)
        }

    @classmethod
    def of(cls, guide: Guide, source: RowSource, size: int, eps: float) -> LazyAdam:
        """For mini-batches of `size` rows: of the factors whose clusters these do not all draw."""
        narrow = source.sampled(size) & guide.clusterwise().keys()
        return cls(guide, dict.fromkeys(narrow, size), eps)

    @property
    def adams(self) -> list[Adam]:
        """What takes the steps of the small guide's parameters that belong to clusters."""
        return [table.adam for table in self._tables.values()]

    def read(self, rows: Rows) -> Rows:
        """Read the batch's clusters into the small guide; the rows as that guide numbers them."""
        memberships = dict(rows.memberships)
        for name, table in self._tables.items():
            memberships[name] = table.read(rows.memberships[name])
        return replace(rows, memberships=memberships)

    def write(self) -> None:
        """Write back what a step has made of the clusters read last."""
        for table in self._tables.values():
            table.write()

    def state(self) -> dict[str, Tensor]:
        """Moments and numbers of steps, by factor."""
        return {f"lazy.{factor}": table.state for factor, table in self._tables.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave."""
        for name, value in self.state().items():
            value.copy_(tensors[name])


class _Table:
    """One factor's parameters by cluster, those of a batch, and the optimizer's state."""

    def __init__(
        self,
        whole: PseudoObservations,
        small: PseudoObservations,
        names: Mapping[int, str],
        eps: float,
    ) -> None:
        parameters = list(zip(whole.parameters(), small.parameters(), strict=True))
        rows = len(small.location)
        trained = {names[id(mine)]: mine for _, mine in parameters if mine.requires_grad}
        self.adam = Adam(trained, rows, eps)
        clusters, width = len(whole.location), self.adam.state.shape[1]
        self.state = whole.location.detach().new_zeros(clusters, width)
        written = [(one.detach(), mine.detach()) for one, mine in parameters]
        self._written = [*written, (self.state, self.adam.state)]
        self._read = [*self._written, *zip(whole.buffers(), small.buffers(), strict=True)]
        self._places = torch.arange(rows, device=whole.location.device)
        self._present = self._places[:0]

    @torch.no_grad()
    def read(self, membership: Membership) -> Membership:
        self._present = present = membership.index
        for one, mine in self._read:
            torch.index_select(one, 0, present, out=mine[: len(present)])
        # Those beyond the present clusters have no rows, and no weight.
        weight = self.state.new_zeros(len(self._places))
        weight[: len(present)] = 1.0 if membership.weight is None else membership.weight
        labels = membership.clusters()
        return replace(membership, index=self._places, weight=weight, complete=True, labels=labels)

    def write(self) -> None:
        for one, mine in self._written:
            one.index_copy_(0, self._present, mine[: len(self._present)])
