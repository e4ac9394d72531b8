"""Models of the spirals' simulation, trained and scored on one fold."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float

from armed_pyro import ClusteredData
from armed_pyro.analysis.metalearning import MetaLearning
from armed_pyro.analysis.rivals import (
    Rival,
    Setting,
    Trained,
    feature_use,
    outcomes,
    programs,
    shuffled,
)
from armed_pyro.explain.boundaries import plane

__all__ = ["PAPER_ACCURACY", "Score", "rivals", "surface", "train_and_score"]

# Accuracy in the paper's simulation.
PAPER_ACCURACY: Mapping[str, float] = {
    "conventional": 0.764,
    "cluster input": 0.676,
    "meta-learning": 0.633,
    "domain adversarial": 0.753,
    "ARMED": 0.788,
    "without adversary": 0.793,
}


def rivals(setting: Setting) -> tuple[Rival, ...]:
    """The paper's models of the spirals, in its order.

    Examples
    --------
    ``[one.name for one in rivals(setting)]``
    """
    every: dict[str, Rival] = {one.name: one for one in (*programs(setting), MetaLearning(setting))}
    return tuple(every[name] for name in PAPER_ACCURACY)


@dataclass(frozen=True)
class Score:
    """How one fit did on its test rows.

    Attributes
    ----------
    accuracy : float
        Share of test rows whose class has the higher predicted probability.
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
    rival: Rival, train: ClusteredData, test: ClusteredData, seed: int
) -> tuple[Trained, Score]:
    """Train a model on the training rows and score it on the test rows."""
    factor = rival.setting.factor
    start = time.perf_counter()
    trained = rival.train(train, None, seed)
    seconds = time.perf_counter() - start
    moved = shuffled(test, factor, train.grouping(factor).levels, seed)
    score = Score(
        accuracy=_accuracy(trained, test),
        randomised=_accuracy(trained, moved),
        use=feature_use(trained, train.feature_names),
        seconds=seconds,
        steps=trained.steps,
    )
    return trained, score


def surface(
    trained: Trained, levels: pd.Index, extent: float, size: int
) -> Float[np.ndarray, "clusters size size"]:
    """Probability of class 1 on a square grid over (x1, x2) from -extent to extent, by cluster."""
    axis = np.linspace(-extent, extent, size)
    axes = {"x1": axis, "x2": axis}
    rows = plane(axes, dict.fromkeys(axes, 0.0), {"site": levels.to_numpy()})
    return trained.predict(rows).reshape(len(levels), size, size)


def _accuracy(trained: Trained, test: ClusteredData) -> float:
    return float(((trained.predict(test) > 0.5) == outcomes(test)).mean())
