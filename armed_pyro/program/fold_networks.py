"""`FoldNetworks`: cross-fitted networks, each trained without some of the clusters or rows."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from armed_pyro.networks.taps import run
from armed_pyro.rows.batch import Rows
from armed_pyro.rows.inputs import LazyInputs, Structure, mapped

__all__ = ["FoldNetworks"]


class FoldNetworks(nn.Module):
    r"""Networks f_1, ..., f_M, and which of them predicts a row.

    .. math:: f(x_i) = \begin{cases} f_{m}(x_i) & \text{row } i \text{ was left out for } f_m \\
        \frac{1}{M} \sum_m f_m(x_i) & \text{otherwise} \end{cases}

    Of a `factor`, whole clusters are left out, and m follows from the row's cluster, also for its
    new rows: the cluster's random effects were settled with that network's outputs. Rows of new
    clusters, and new rows without a factor, get the mean of all networks.

    Attributes
    ----------
    networks : nn.ModuleList
        The networks, of the class and with the module paths of the program's network.
    factor : str or None
        The factor whose clusters are left out; None if single rows are, whose networks
        `Rows.fold` tells.
    of_cluster : Int[Tensor, "clusters"]
        The network of every cluster of the factor; empty without a factor.
    """

    of_cluster: Int[Tensor, " clusters"]

    def __init__(
        self,
        networks: Sequence[nn.Module],
        factor: str | None,
        of_cluster: Int[Tensor, " clusters"],
    ) -> None:
        super().__init__()
        self.networks, self.factor = nn.ModuleList(networks), factor
        self.register_buffer("of_cluster", of_cluster)
        self.requires_grad_(False)

    @classmethod
    def like(
        cls, network: nn.Module, folds: int, factor: str | None, clusters: int
    ) -> FoldNetworks:
        """Copies of a network, whose tensors are still to be restored."""
        networks = [copy.deepcopy(network) for _ in range(folds)]
        return cls(networks, factor, torch.zeros(clusters, dtype=torch.long))

    def __len__(self) -> int:
        return len(self.networks)

    def weights(self, rows: Rows, instead: int | None = None) -> Float[Tensor, "rows networks"]:
        """The weight of every network in each row's output: 1 and zeros, or equal weights.

        With `instead`, this network alone takes the place of the mean.
        """
        fold = self._folds(rows)
        if instead is not None:
            fold = torch.where(fold < 0, instead, fold)
        known = fold >= 0
        single = nn.functional.one_hot(fold.clamp(min=0), len(self)).to(rows.x.dtype)
        return torch.where(known[:, None], single, 1 / len(self))

    def _folds(self, rows: Rows) -> Int[Tensor, " rows"]:
        """The network that predicts each row; -1 for the mean of all."""
        none = torch.full((len(rows),), -1, dtype=torch.long, device=rows.x.device)
        if self.factor is None:
            return none if rows.fold is None else rows.fold
        if self.factor not in rows.memberships:  # such as rows of the population
            return none
        clusters = rows.memberships[self.factor].clusters()
        seen = clusters < len(self.of_cluster)
        return torch.where(
            seen, self.of_cluster[clusters.clamp(max=len(self.of_cluster) - 1)], none
        )

    def averages(self, rows: Rows) -> bool:
        """Whether any row's output is the mean of the networks."""
        return bool((self._folds(rows) < 0).any())

    def run(
        self,
        rows: Rows,
        x: LazyInputs | Structure,
        instead: int | None = None,
        *,
        like: Tensor | None = None,
        element: Sequence[int | str] = (),
    ) -> Tensor:
        """The output for `rows`, whose inputs are `x`; every network runs on its rows only.

        `instead` is that of `weights`, `like` and `element` are those of `taps.run`.
        """
        weights, output = self.weights(rows, instead), None
        for number, network in enumerate(self.networks):
            index = weights[:, number].nonzero()[:, 0]
            if not len(index):
                continue
            values, _ = run(network, _taken(x, index), element=element, like=like)
            output = values.new_zeros(len(rows), *values.shape[1:]) if output is None else output
            weight = weights[index, number].to(values.dtype)
            weight = weight.reshape(-1, *[1] * (values.dim() - 1))
            output = output.index_add(0, index, weight * values)
        # No rows at all still need the output's shape.
        return run(self.networks[0], x, element=element, like=like)[0] if output is None else output


def _taken(x: LazyInputs | Structure, index: Int[Tensor, " taken"]) -> LazyInputs | Structure:
    """These rows of the inputs."""
    if isinstance(x, LazyInputs):
        return x.take(index)
    return mapped(lambda tensor: tensor[index.to(tensor.device)], x)
