"""Folds of cross-validation by clusters or rows, and the scores of one fold's test rows."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd

from armed_pyro._messages import cause
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.data.stratify import cluster_folds
from armed_pyro.fitting import DivergenceError, fit
from armed_pyro.inference.train import threads
from armed_pyro.prediction.row_scores import row_scores
from armed_pyro.program.model import MixedEffects

__all__ = ["By", "Fold", "Task", "make_folds"]

By = Literal["clusters", "rows"]


@dataclass(frozen=True, eq=False)
class Fold:
    """Training rows, test rows, and labelled rows of the test's clusters, if there are any."""

    train: ClusteredData
    test: ClusteredData
    support: ClusteredData | None = None


def make_folds(
    data: ClusteredData, by: By, factor: str | None, n: int, *, support: int, seed: int
) -> Iterator[Fold]:
    """The folds; by clusters, every row of a held-out cluster of the factor is a test row.

    With crossed factors, clusters of the other factors may be in both parts. Those all of whose
    rows belong to held-out clusters, such as classes in held-out schools, are new in the test rows.
    """
    if by == "rows" or factor is None:
        for train, test in data.folds(n, seed=seed):
            yield Fold(train, test)
        return
    codes = data.grouping(factor).codes.numpy()
    fold = cluster_folds(codes, n, seed)
    rng = np.random.default_rng([seed, 3])
    for k in range(n):
        train, held = data.take(fold != k), data.take(fold == k)
        if not support:
            yield Fold(train, held)
            continue
        labelled = _first_rows(held.grouping(factor).codes.numpy(), support, rng)
        if labelled.all():
            raise ValueError(
                f"support={support} leaves no row of the held-out clusters of {factor!r} to "
                "predict: take fewer labelled rows"
            )
        yield Fold(train, held.take(~labelled), held.take(labelled))


def _first_rows(clusters: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    """Which rows are among `most` random rows of their cluster."""
    shuffled = rng.permutation(len(clusters))
    place = pd.Series(clusters[shuffled]).groupby(clusters[shuffled]).cumcount().to_numpy()
    chosen = np.zeros(len(clusters), dtype=bool)
    chosen[shuffled] = place < most
    return chosen


@dataclass(frozen=True, eq=False)
class Task:
    """One fit: a program with one combination of settings, and one fold."""

    setting: int
    model: MixedEffects
    fold: Fold
    factor: str | None
    unseen: str
    draws: int
    seed: int
    options: Mapping[str, Any] = field(default_factory=dict)  # of `fit`

    @threads(1)  # rounding of sums depends on the number of threads
    def run(self) -> tuple[int, pd.DataFrame | str]:
        """The setting's number, with sums of scores by cluster or the error of a diverged fit."""
        test, support = self.fold.test, self.fold.support
        with warnings.catch_warnings():
            # A fit to all rows gives the same warnings, once.
            warnings.simplefilter("ignore")
            try:
                options = {"refine": False, **self.options, "progress": False, "seed": self.seed}
                posterior = fit(self.model, self.fold.train, **options).posterior
            except DivergenceError as error:
                return self.setting, cause(error)
            except ValueError as error:
                raise ValueError(
                    f"the training rows of a fold cannot be fitted: {cause(error)} If only few "
                    "clusters have a value of a feature, raise `folds`, so that each leaves out "
                    "fewer clusters, or leave the feature out"
                ) from error
            scores = row_scores(posterior, test, self.unseen, support=support, draws=self.draws)
        if self.factor is None:
            unit = np.array([str(label) for label in test.row_labels], dtype=object)
        else:
            unit = test.grouping(self.factor).labels()
        frame = pd.DataFrame({"rows": 1.0, "log_score": scores.log_score, "loss": scores.loss})
        return self.setting, frame.groupby(pd.Index(unit, name="unit"), sort=False).sum()
