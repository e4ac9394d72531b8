"""The models that the spirals' simulation compares, each fitted and scored in the same way."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import nn

from armed_pyro import Adversary, ClusteredData, Fit, MixedEffects, Schedule, Slopes, fit
from armed_pyro.boundaries import plane

__all__ = ["RIVALS", "Rival", "Score", "Setting", "outcomes", "surface", "train_and_score"]

DRAWS = 200


@dataclass(frozen=True)
class Rival:
    """One of the models compared; all are `MixedEffects` around the same network.

    Attributes
    ----------
    name : str
    paper : float
        Accuracy in the paper's simulation.
    random : bool
        Whether clusters have random effects: an intercept, and slopes on the last hidden layer.
    adversary : bool
        Whether an adversary reads all hidden layers.
    cluster_input : bool
        Whether the cluster, as a row of 0 and 1, is appended to the features.
    """

    name: str
    paper: float
    random: bool = False
    adversary: bool = False
    cluster_input: bool = False


RIVALS = (
    Rival("conventional", 0.764),
    Rival("cluster input", 0.676, cluster_input=True),
    Rival("domain adversarial", 0.753, adversary=True),
    Rival("ARMED", 0.788, random=True, adversary=True),
    Rival("without adversary", 0.793, random=True),
)


@dataclass(frozen=True)
class Setting:
    """Network and training that all models share.

    Attributes
    ----------
    name, title : str
        In files, and in tables and figures.
    width : int
        Units in each of the three hidden layers.
    schedule : Schedule
        Length and rates.
    adversary_weight, fixed_weight : float
        lambda_A, of the models with an adversary; lambda_F, of those with random effects.
    """

    name: str
    title: str
    width: int
    schedule: Schedule
    adversary_weight: float = 0.1
    fixed_weight: float = 1.0

    def network(self, n_features: int, seed: int) -> nn.Sequential:
        """Three hidden layers of ELU units and one output; hidden layers are "1", "3", "5"."""
        sizes = [n_features, self.width, self.width, self.width]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(sizes):
            layers += [nn.Linear(before, after), nn.ELU()]
        net = nn.Sequential(*layers, nn.Linear(self.width, 1))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for layer in net:
                if isinstance(layer, nn.Linear):
                    # Glorot's weights and no biases.
                    nn.init.xavier_uniform_(layer.weight)
                    nn.init.zeros_(layer.bias)
        return net

    def model(self, rival: Rival, n_features: int, seed: int) -> MixedEffects:
        """The program of one of the models compared."""
        game = Adversary("site", taps=["1", "3", "5"], weight=self.adversary_weight)
        return MixedEffects(
            self.network(n_features, seed),
            random=["(1 | site)", Slopes("site", on="5")] if rival.random else (),
            family="bernoulli",
            adversary=game if rival.adversary else (),
            fixed_weight=self.fixed_weight if rival.random else 0.0,
        )


@dataclass(frozen=True)
class Score:
    """How one fit did on its test rows.

    Attributes
    ----------
    accuracy : float
        Share of test rows whose class has the higher posterior predictive probability.
    randomised : float
        The same after every test row got the label of a random cluster.
    use : mapping of str to float
        |d f / d x_j| at the mean input, per standard deviation of the feature, of the fixed
        effects f.
    seconds : float
        Duration of the fit.
    steps : int
        Steps taken.
    """

    accuracy: float
    randomised: float
    use: Mapping[str, float]
    seconds: float
    steps: int


def train_and_score(
    rival: Rival, setting: Setting, train: ClusteredData, test: ClusteredData, seed: int
) -> tuple[Fit, Score]:
    """Fit a model to the training rows and score it on the test rows."""
    levels = train.grouping("site").levels
    data = _with_clusters(train, levels) if rival.cluster_input else train
    start = time.perf_counter()
    model = setting.model(rival, data.n_features, seed)
    result = fit(model, data, schedule=setting.schedule, seed=seed, progress=False)
    seconds = time.perf_counter() - start
    score = Score(
        accuracy=_accuracy(result, rival, test, levels),
        randomised=_accuracy(result, rival, _shuffled(test, levels, seed), levels),
        use=_feature_use(result, train.feature_names),
        seconds=seconds,
        steps=len(result.history.loss),
    )
    return result, score


def surface(
    result: Fit, rival: Rival, levels: pd.Index, extent: float, size: int
) -> Float[np.ndarray, "clusters size size"]:
    """Probability of class 1 on a square grid over (x1, x2) from -extent to extent, by cluster."""
    axis = np.linspace(-extent, extent, size)
    axes = {"x1": axis, "x2": axis}
    rows = plane(axes, dict.fromkeys(axes, 0.0), {"site": levels.to_numpy()})
    rows = _with_clusters(rows, levels) if rival.cluster_input else rows
    return result.predict(rows, draws=DRAWS).mean.reshape(len(levels), size, size)


def outcomes(data: ClusteredData) -> Float[np.ndarray, " rows"]:
    """The rows' classes, 0 or 1."""
    if data.outcome is None:
        raise ValueError("the rows have no outcome to compare predictions with")
    return data.outcome.numpy()


def _accuracy(result: Fit, rival: Rival, test: ClusteredData, levels: pd.Index) -> float:
    rows = _with_clusters(test, levels) if rival.cluster_input else test
    chosen = result.predict(rows, draws=DRAWS).mean > 0.5
    return float((chosen == outcomes(test)).mean())


def _feature_use(result: Fit, names: tuple[str, ...]) -> dict[str, float]:
    use = result.attribution(draws=2).posterior["importance"]
    # Columns of the cluster are left out.
    return {name: float(use.sel(feature=name)) for name in names}


def _with_clusters(data: ClusteredData, levels: pd.Index) -> ClusteredData:
    """The rows with a column of 0 and 1 for every cluster appended to the features."""
    labels = data.grouping("site").labels()
    columns = (labels[:, None] == levels.to_numpy()).astype(float)
    return ClusteredData.from_arrays(
        np.hstack([data.features.numpy(), columns]),
        data.outcome,
        {"site": labels},
        feature_names=[*data.feature_names, *(f"site[{level}]" for level in levels)],
        outcome_name=data.outcome_name,
    )


def _shuffled(data: ClusteredData, levels: pd.Index, seed: int) -> ClusteredData:
    """The rows with clusters drawn at random, each equally likely."""
    labels = np.random.default_rng(seed).choice(levels.to_numpy(), data.n_rows)
    return ClusteredData.from_arrays(
        data.features,
        data.outcome,
        {"site": labels},
        feature_names=data.feature_names,
        outcome_name=data.outcome_name,
    )
