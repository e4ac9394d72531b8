"""Tuning by validation rows, around any model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.metrics import log_loss

from armed_pyro import ClusteredData
from armed_pyro.analysis.rivals.rival import Rival, Setting, Trained, outcomes

__all__ = ["Tuned"]


@dataclass(frozen=True)
class Tuned(Rival):
    """Of several versions of a model the one with the lowest loss on the validation rows.

    The loss is -log p(y) of a binary outcome, the squared error of another.

    Attributes
    ----------
    candidates : tuple of Rival
        Versions of one model; the first gives the name.
    """

    candidates: tuple[Rival, ...]

    @property
    def name(self) -> str:
        """Of the first version."""
        return self.candidates[0].name

    @property
    def setting(self) -> Setting:
        """Of the first version."""
        return self.candidates[0].setting

    @property
    def clustered(self) -> bool:
        return self.candidates[0].clustered

    def train(self, data: ClusteredData, validation: ClusteredData | None, seed: int) -> Trained:
        if validation is None:
            raise ValueError("tuning needs validation rows: train(data, validation, seed)")
        every = [one.train(data, validation, seed) for one in self.candidates]
        losses = [self._loss(one, validation) for one in every]
        return every[int(np.argmin(losses))]

    def _loss(self, trained: Trained, rows: ClusteredData) -> float:
        y, p = outcomes(rows), trained.predict(rows)
        if self.setting.family == "bernoulli":
            return float(log_loss(y, p, labels=[0, 1]))
        return float(np.square(y - p).mean())
