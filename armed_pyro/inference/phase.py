"""A phase of a training run: its rows, objective, steps and stopping rule."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from armed_pyro.engine.checkpoint import module_tensors, restore_module
from armed_pyro.engine.compiled_step import CompileMode, Steps
from armed_pyro.engine.loss import Loss
from armed_pyro.engine.schedule import History
from armed_pyro.engine.shards import Share
from armed_pyro.inference.cluster_adam import LazyAdam
from armed_pyro.inference.optimizers import Optimizers
from armed_pyro.inference.task import TrainingTask
from armed_pyro.rows.batch import Rows
from armed_pyro.rows.passes import Passes

__all__ = ["Phase"]


class Phase(ABC):
    """Abstract phase: `NetworkPhase` trains network and guide, `FrozenPhase` the guide alone.

    Attributes
    ----------
    task : TrainingTask
        Program, guide, rows and settings of the run.
    share : Share
        The rows from which this process draws its batches.
    passes : Passes
        The mini-batches, pass after pass.
    plateau : Plateau
        The stopping rule.
    lazy : LazyAdam
        The guide restricted to the parameters of a batch's clusters, and their optimizer.
    optimizers : Optimizers
        Optimizers of all trained parameters.
    steps : Steps
        Eager or compiled optimisation steps.
    """

    trains_network: bool

    def __init__(self, task: TrainingTask, share: Share) -> None:
        self.task, self.share, self.passes = task, share, Passes(self.one_pass)
        self.plateau = task.schedule.plateau(len(task.source))

    def prepare(self, batch_size: int, rate: float) -> None:
        """Make optimizers and steps.

        Parameters
        ----------
        batch_size : int
            Rows in a step.
        rate : float
            Factor of the guide's learning rate.
        """
        task = self.task
        # The gradient's noise vanishes if the guide is exact. A gradient below a hundredth of a nat
        # per unit is no reason to move then, and Adam must not scale it up.
        eps = 0.01 / len(task.source)
        self.lazy = LazyAdam.of(task.guide, task.source, self.share.together(batch_size), eps)
        mode: CompileMode = "never" if self.share.several else task.compile
        schedule = replace(task.schedule, learning_rate=rate * task.schedule.learning_rate)
        self.optimizers = Optimizers(task.model, self.lazy, schedule, eps)
        modules = {"model": task.model, "guide": self.lazy.guide}
        self.steps = Steps(modules, self.optimizers, mode)

    def rate(self, step: int) -> float:
        """Factor of the learning rates at this step."""
        schedule = self.task.schedule
        return schedule.rate(step) * schedule.decay**self.plateau.cuts

    @property
    def finished(self) -> bool:
        """Whether the rates have been cut as often as the schedule asks for."""
        stages = self.task.schedule.stages
        return stages > 0 and self.plateau.cuts >= stages

    @abstractmethod
    def window(self) -> int:
        """Steps of one window."""

    @abstractmethod
    def take(self, step: int) -> tuple[Loss, Tensor]:
        """Take a step; return its loss and the norm of its gradient."""

    @abstractmethod
    def accuracy(self, losses: list[Loss], history: History) -> list[float]:
        """Accuracy of each adversary in a window."""

    @abstractmethod
    def close_window(self, losses: list[Loss], history: History) -> None:
        """Record a window, and cut the rates if it brought no improvement."""

    @abstractmethod
    def refreshes(self) -> bool:
        """Whether `Guide.refresh` still improves the guide between steps."""

    def refresh(self, step: int) -> None:
        """Refresh the guide from all rows, unless falling rates already let it converge."""
        if self.plateau.cuts or self.task.schedule.rate(step) != 1 or not self.refreshes():
            return
        with self.share.sharing.common_numbers(self.task.seed, step):
            self.task.guide.refresh(self.task.model, self.share.rows)

    @abstractmethod
    def keep_best(self) -> None:
        """Return to the best state, if the phase records it."""

    def release(self) -> None:
        """Return all parameters to the guide, and put the program into evaluation mode."""
        self.lazy.release()
        self.task.model.eval()

    def next_batch(self) -> Rows:
        """The next mini-batch, or all rows if one batch holds them."""
        n = len(self.task.source)
        whole = self.task.schedule.batch(n) == n
        return self.share.rows.all() if whole else next(self.passes)

    def one_pass(self, generator: torch.Generator) -> Iterator[Rows]:
        """One pass over the rows in mini-batches, in an order drawn from `generator`."""
        task, source = self.task, self.share.rows
        n = len(task.source)
        size = task.schedule.batch(n)
        # `prepare` makes room for this many clusters, unless a step looks them up itself.
        sampled = source.sampled(self.share.together(size))
        whole = self.lazy.tables.keys() >= sampled and not self.share.several
        dense = n if whole or task.guide.every_cluster() else 4 * self.share.together(size)
        return source.batches(self.share.batch(size), generator, dense_up_to=dense)

    def state(self) -> dict[str, Tensor]:
        """Optimizers, clusters' moments and position in the pass, for a checkpoint."""
        tensors = module_tensors("optimizers", self.optimizers) | self.lazy.state()
        return tensors | self.passes.state()

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Put back the tensors of `state`."""
        restore_module("optimizers", self.optimizers, tensors)
        self.lazy.restore(tensors)
        self.passes.restore(tensors)
