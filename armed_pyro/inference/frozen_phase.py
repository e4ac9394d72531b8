"""The second phase of training: the network is frozen, and the guide converges."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from armed_pyro.engine.loss import Loss
from armed_pyro.engine.schedule import MOVING, History, Pace, split_r_hat
from armed_pyro.engine.shards import Share
from armed_pyro.inference.marginal_mode import LARGEST_STEP, particles_needed, start_at_mode
from armed_pyro.inference.objective import NestedBound
from armed_pyro.inference.phase import Phase
from armed_pyro.program.predictor import modulates, row_cost
from armed_pyro.rows.batch import Rows
from armed_pyro.rows.in_memory import HeldRows
from armed_pyro.rows.source import RowSource

__all__ = ["FrozenPhase"]

# Multiplications of one draw of all random effects beyond which the guide stays at the mode.
MOST_WORK = 2**27
# Most rows that one step reads from files.
MOST_READ = 2**18


class FrozenPhase(Phase):
    """Trains q(theta) with several draws per step, started at the mode of p(theta | y).

    The constructor freezes the network and computes its outputs once, unless effects inside the
    network change them. Call `start` or `resume` next.

    Parameters
    ----------
    before : Phase
        The phase that has ended.

    Attributes
    ----------
    rows : RowSource
        All training rows with the network's outputs.
    particles : int
        Number of draws of each cluster's random effects per draw of theta.
    iterates : list of ndarray
        Centre of q(theta) after each step since the rates were last cut.
    """

    trains_network = False

    def __init__(self, before: Phase) -> None:
        task = before.task
        before.release()
        # With effects inside the network it still runs in every step, but no longer learns.
        self.frozen = [p for p in task.model.parameters() if p.requires_grad]
        task.model.requires_grad_(False)
        task.guide.settle()
        self.rows: RowSource = before.share.compute(task.model.compute, task.source)
        super().__init__(task, Share(before.share.processes, self.rows))
        self.particles = 1
        self.iterates: list[np.ndarray] = []

    def start(self) -> None:
        """Set the guide to the mode, and choose the number of particles."""
        task = self.task
        start_at_mode(task.model, task.guide, self.rows)
        if task.guide.nested() is not None and not modulates(task.model):
            wanted = task.schedule.particles
            self.particles = wanted or particles_needed(task.model, task.guide, self.rows)
        self._prepare()

    def resume(self, particles: int) -> None:
        """Make optimizers and steps, so that `restore` can fill in the state of a checkpoint."""
        self.particles = particles
        self._prepare()

    def _prepare(self) -> None:
        n, most = len(self.task.source), self._most_rows()
        # Clusters' parameters are trained, in mini-batches, only if no factor is nested.
        batches = self.task.guide.nested() is None and n > most
        rate = self.pace.rate
        if not batches and n > most:
            # The noisy gradient of a sample of clusters must not move the guide from the mode.
            rate *= (most / (2 * n)) ** 0.5
        self.prepare(self.task.schedule.batch(n) if batches else n, rate)

    @property
    def pace(self) -> Pace:
        """Draws per step, steps per window and factor of the learning rate."""
        n = len(self.task.source) * self.particles
        return Pace.of(n, network=modulates(self.task.model))

    def window(self) -> int:
        return self.task.schedule.window_steps(len(self.task.source), self.pace.window)

    def take(self, step: int) -> tuple[Loss, Tensor]:
        task = self.task
        rows = self._step_rows()
        bound = NestedBound(task.model, self.lazy.guide, self.particles)
        draws = max(1, min(self.pace.draws, self._most_rows() // max(1, len(rows))))
        objective, remaining = self.lazy.reading(bound), task.schedule.steps - step
        loss, norm = self.steps(objective, rows, draws, factor=self.rate(step), remaining=remaining)
        self.iterates.append(self._center())
        return loss, norm

    def loss_at_mode(self) -> Loss | None:
        """The loss at the mode if steps would take too long, else None.

        A loss ends the phase: the guide stays at the mode, and importance weights correct it.
        """
        task = self.task
        if task.guide.work() <= MOST_WORK or not task.schedule.stages:
            return None
        with torch.no_grad():
            loss = NestedBound(task.model, task.guide, self.particles)(self._step_rows(), 1)
        self.iterates = [self._center()]
        self.plateau.cuts = task.schedule.stages
        return loss

    def accuracy(self, losses: list[Loss], history: History) -> list[float]:
        # The adversaries are no longer trained, so their last accuracy stays.
        if history.adversary_accuracy:
            return history.adversary_accuracy[-1]
        return [float(value) for value in losses[-1].accuracy.cpu()]

    def close_window(self, losses: list[Loss], history: History) -> None:
        # In posterior sds; the frame alone gives them only near the mode.
        sds = self.task.guide.hyperparameters.log_scale.detach().exp().cpu().numpy()
        r_hat, drift = split_r_hat(np.stack(self.iterates[-2 * len(losses) :]) / sds)
        history.r_hat.append(r_hat)
        history.drift.append(drift)
        # The loss can be flat while the guide still moves.
        window = np.array(history.loss[-len(losses) :])
        if self.plateau.training(window, moving=r_hat >= MOVING):
            self.iterates = []

    def refreshes(self) -> bool:
        return not self.task.guide.exact(self.task.model)

    def keep_best(self) -> None:
        """Keep the last state, because it has converged."""

    def release(self) -> None:
        super().release()
        for parameter in self.frozen:
            parameter.requires_grad_(True)

    def state(self) -> dict[str, Tensor]:
        shape = len(self.iterates), self.task.guide.hyperparameters.size
        iterates = torch.tensor(np.array(self.iterates).reshape(shape))
        return super().state() | {"iterates": iterates}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        super().restore(tensors)
        self.iterates = list(tensors["iterates"].numpy())

    def _center(self) -> np.ndarray:
        return self.task.guide.hyperparameters.shift.detach().cpu().numpy().copy()

    def _most_rows(self) -> int:
        """Most rows of one step."""
        most = LARGEST_STEP // (2 * self.particles * row_cost(self.task.model))
        return most if isinstance(self.rows, HeldRows) else min(most, MOST_READ)

    def _step_rows(self) -> Rows:
        if len(self.rows) <= self._most_rows():
            return self.rows.all()
        return self.next_batch() if self.task.guide.nested() is None else next(self.passes)

    def one_pass(self, generator: torch.Generator) -> Iterator[Rows]:
        nested = self.task.guide.nested_name()
        if nested is None:
            return super().one_pass(generator)
        clusters = len(self.rows.counts[nested])
        size = max(1, clusters * self._most_rows() // (2 * len(self.rows)))
        return self.rows.cluster_batches(nested, size, generator)
