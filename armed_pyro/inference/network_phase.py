"""The first phase of training: network, adversaries and guide together."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from armed_pyro.engine.loss import Loss
from armed_pyro.engine.schedule import History
from armed_pyro.inference.objective import Objective
from armed_pyro.inference.phase import Phase
from armed_pyro.inference.task import TrainingTask

__all__ = ["NetworkPhase"]


class NetworkPhase(Phase):
    """Trains on mini-batches, one draw per step, until training or validation loss stops falling.

    Attributes
    ----------
    best : dict of str to Tensor
        The state with the lowest validation loss; empty without validation rows.
    """

    trains_network = True

    def __init__(self, task: TrainingTask) -> None:
        super().__init__(task, task.share)
        self.prepare(task.schedule.batch(len(task.source)), 1.0)
        self.best: dict[str, Tensor] = {}
        modules = {"model": task.model, "guide": self.lazy.guide}
        objective = Objective(task.model, self.lazy.guide)
        averaged = self.share.averaged(objective, modules, len(task.model.adversaries))
        self.objective = self.lazy.reading(averaged)

    def window(self) -> int:
        return self.task.schedule.window_steps(len(self.task.source))

    def take(self, step: int) -> tuple[Loss, Tensor]:
        task, steps = self.task, self.task.schedule.steps
        progress = task.source.like.new_full((), step / steps)
        rows = self.share.weigh(self.next_batch())
        rate = self.rate(step)
        loss, norm = self.steps(self.objective, rows, progress, factor=rate, remaining=steps - step)
        return self.share.mean(loss), norm

    def accuracy(self, losses: list[Loss], history: History) -> list[float]:
        values: list[float] = torch.stack([loss.accuracy.cpu() for loss in losses]).mean(0).tolist()
        return values

    def close_window(self, losses: list[Loss], history: History) -> None:
        if self.task.validation is None:
            self.plateau.training(np.array(history.loss[-len(losses) :]))
            return
        best, cut = self.plateau.validation(history.validation[-1])
        if best:
            self.best = self.task.state()
        elif cut:
            self.keep_best()

    def refreshes(self) -> bool:
        return True

    def keep_best(self) -> None:
        if self.best:
            self.task.return_to(self.best)

    def state(self) -> dict[str, Tensor]:
        return super().state() | {f"best.{name}": value for name, value in self.best.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        super().restore(tensors)
        best = {k: v for k, v in tensors.items() if k.startswith("best.")}
        self.best = {k.removeprefix("best."): v for k, v in best.items()}
