"""The interface of rivals: the setting that they share, and the trained model that each returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from armed_pyro import ClusteredData, Schedule
from armed_pyro.analysis.rivals.architectures import Architecture

__all__ = [
    "Rival",
    "Setting",
    "Trained",
    "cluster_shifts",
    "feature_use",
    "in_clusters",
    "outcomes",
    "run_to_layer",
    "shuffled",
]


@dataclass(frozen=True)
class Setting:
    """Network, outcome and training that all models share.

    Attributes
    ----------
    name, title : str
        The setting's name in files, and in tables and figures.
    architecture : Architecture
        The network.
    schedule : Schedule
        Length and learning rates of the training.
    factor : str
        Grouping factor.
    family : str
        Family of the outcome.
    slopes : bool
        Whether random effects include slopes on the penultimate layer beside the intercept.
    adversary_weight, fixed_weight : float
        lambda_A of models with an adversary; lambda_F of models with random effects.
    unseen : str
        Mode in which programs with random effects predict clusters not seen in training.
    """

    name: str
    title: str
    architecture: Architecture
    schedule: Schedule
    factor: str = "site"
    family: str = "bernoulli"
    slopes: bool = True
    adversary_weight: float = 0.1
    fixed_weight: float = 1.0
    unseen: str = "marginal"

    def network(self, feature_shape: Sequence[int], seed: int) -> nn.Module:
        """The network, with weights drawn from this seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.architecture.build(feature_shape)


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained model.

    Attributes
    ----------
    predict : callable
        E[y | x, cluster] of every row; P(y = 1) for a binary outcome. The rows' outcomes are not
        used. The model's `Rival` says how it predicts clusters that were not in training.
    net : torch.nn.Module
        Fixed effects: standardised features to the linear predictor.
    data : ClusteredData
        Training rows as the network takes them.
    standardise : callable
        Features as in `data` to standardised features.
    steps : int
        Training steps taken.
    rebuild : callable or None
        The features of every row as the model rebuilds them; None if the model does not.
    """

    predict: Callable[[ClusteredData], Float[np.ndarray, " rows"]]
    net: nn.Module
    data: ClusteredData
    standardise: Callable[[Tensor], Tensor]
    steps: int
    rebuild: Callable[[ClusteredData], Float[np.ndarray, "rows ..."]] | None = None


class Rival(ABC):
    """A model that is compared with others.

    Attributes
    ----------
    name : str
    setting : Setting
        Network, outcome and training that it shares with the others.
    """

    name: str
    setting: Setting

    @property
    @abstractmethod
    def clustered(self) -> bool:
        """Whether its predictions depend on a row's cluster."""

    @abstractmethod
    def train(self, data: ClusteredData, validation: ClusteredData | None, seed: int) -> Trained:
        """Train on these rows; validation rows, if there are any, decide when to stop."""


def outcomes(data: ClusteredData) -> Float[np.ndarray, " rows"]:
    """The rows' outcomes, with classes as 0 and 1.

    Raises
    ------
    ValueError
        If the rows have no outcome.
    """
    if data.outcome is None:
        raise ValueError("the rows have no outcome to compare predictions with")
    return data.outcome.numpy()


def run_to_layer(
    net: nn.Module, x: Float[Tensor, "rows ..."], path: str
) -> tuple[Tensor, Float[Tensor, "rows units"]]:
    """The network's output, and the activations of the module at a path.

    Feature maps are averaged over space.
    """
    seen: list[Tensor] = []
    hook = net.get_submodule(path).register_forward_hook(lambda *call: seen.append(call[2]))
    try:
        output = net(x)
    finally:
        hook.remove()
    layer = seen[-1]
    return output, layer if layer.dim() == 2 else layer.flatten(2).mean(-1)


def feature_use(trained: Trained, names: Sequence[str]) -> dict[str, float]:
    """|d f / d x_j| at the mean input, per standard deviation of the feature.

    Parameters
    ----------
    trained : Trained
        The model whose fixed effects are f.
    names : sequence of str
        The features to report, so that columns that encode the cluster can be left out.
    """
    like = next(trained.net.parameters())
    standardised = trained.standardise(trained.data.features).to(like)
    x = standardised.mean(0, keepdim=True).requires_grad_(True)
    (gradient,) = torch.autograd.grad(trained.net.eval()(x).sum(), x)
    use = gradient[0].abs() * standardised.std(0)
    return {name: float(use[trained.data.feature_names.index(name)]) for name in names}


def cluster_shifts(trained: Trained, data: ClusteredData, factor: str) -> pd.Series:
    r"""Mean shift of the linear predictor by each cluster, over all rows.

    .. math:: \hat b_k = \frac{1}{n} \sum_i logit \, p(y = 1 | x_i, k)
              - \frac{1}{n K} \sum_{i, l} logit \, p(y = 1 | x_i, l)

    Every row is predicted as if it were in each of the clusters, so the shift is the effect of the
    random intercept and of the slopes together.

    Parameters
    ----------
    trained : Trained
        A model trained on these rows, which have a binary outcome.
    data : ClusteredData
        Rows of the clusters.
    factor : str
        Grouping factor.
    """
    levels = data.grouping(factor).levels
    shifts = []
    for level in levels:
        moved = in_clusters(data, factor, np.full(data.n_rows, level))
        chance = trained.predict(moved).clip(1e-6, 1 - 1e-6)
        shifts.append(np.log(chance / (1 - chance)).mean())
    return pd.Series(np.array(shifts) - np.mean(shifts), index=levels)


def shuffled(data: ClusteredData, factor: str, levels: pd.Index, seed: int) -> ClusteredData:
    """The rows with clusters drawn at random from the levels, each equally likely."""
    labels = np.random.default_rng(seed).choice(levels.to_numpy(), data.n_rows)
    return in_clusters(data, factor, labels)


def in_clusters(data: ClusteredData, factor: str, labels: Any) -> ClusteredData:
    """The same rows, moved to the clusters with these labels."""
    moved = ClusteredData.from_arrays(np.zeros((data.n_rows, 1)), None, {factor: labels})
    return replace(data, groupings={**data.groupings, **moved.groupings})
