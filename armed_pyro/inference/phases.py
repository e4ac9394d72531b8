"""The two phases of a training run: their rows, objectives, steps and stopping rules."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from armed_pyro.engine.checkpoint import module_tensors, restore_module
from armed_pyro.engine.compiled_step import CompileMode, Loss, Steps
from armed_pyro.engine.schedule import MOVING, History, Pace, split_r_hat
from armed_pyro.engine.shards import Share
from armed_pyro.guides.closed_form import MarginalLikelihood, cost
from armed_pyro.inference.averaged_weights import AveragedWeights
from armed_pyro.inference.importance_sampling import efficient
from armed_pyro.inference.marginal_mode import LARGEST_STEP, particles_needed, start_at_mode
from armed_pyro.inference.marginal_weights import MarginalBound, exact_likelihood
from armed_pyro.inference.objective import NestedBound, Objective
from armed_pyro.inference.optimizers import LazyAdam, Optimizers
from armed_pyro.inference.snapshots import Snapshots
from armed_pyro.inference.training_task import TrainingTask
from armed_pyro.program.predictor import modulates, row_cost
from armed_pyro.rows.batch import Rows
from armed_pyro.rows.in_memory import HeldRows
from armed_pyro.rows.passes import Passes
from armed_pyro.rows.source import RowSource

__all__ = ["FrozenPhase", "NetworkPhase", "Phase", "warmup_steps"]

# Multiplications of one draw of all random effects beyond which the guide stays at the mode.
MOST_WORK = 2**27
# The same for one draw without random effects, from sums of the rows. With a matrix of 150 random
# effects, steps would take longer than the search for the mode and 4,000 weighted draws together.
MOST_CLOSED_WORK = 2**20
# Draws of the bound at the mode, and most multiplications of all of them.
BOUND_DRAWS, BOUND_WORK = 256, 2**31
# Most rows that one step reads from files.
MOST_READ = 2**18
# Steps without a better look at held-out rows before the rates of a network are first cut. Its
# residual sd and sds settle in the first 100 steps, in which the loss may rise.
LONG_WAIT = 150


class Phase(ABC):
    """Abstract phase: `NetworkPhase` trains network and guide, `FrozenPhase` the guide alone."""

    trains_network: bool
    frozen_rows: RowSource | None = None  # all rows with the frozen network's outputs
    closed: MarginalLikelihood | None = None  # log p(y | theta), if it has a closed form

    def __init__(self, task: TrainingTask, share: Share) -> None:
        self.task, self.share, self.passes = task, share, Passes(self.one_pass)
        self.plateau = task.schedule.plateau(len(task.source))

    def prepare(self, batch_size: int, rate: float) -> None:
        """Make optimizers and steps of `batch_size` rows; `rate` multiplies the guide's rate."""
        task = self.task
        # The gradient's noise vanishes if the guide is exact. A gradient below a hundredth of a nat
        # per unit is no reason to move then, and Adam must not scale it up.
        eps = 0.01 / len(task.source)
        self.lazy = LazyAdam.of(task.guide, task.source, self.share.together(batch_size), eps)
        mode: CompileMode = "never" if self.share.several else task.compile
        schedule = replace(task.schedule, learning_rate=rate * task.schedule.learning_rate)
        self.optimizers = Optimizers(task.model, self.lazy, schedule, eps, task.training)
        if self.optimizers.of_user is not None:
            mode = "never"  # torch's optimizers are no operations of a graph
        self.modules = {"model": task.model, "guide": self.lazy.guide}
        self.steps = Steps(self.modules, self.optimizers, mode)

    def rate(self, step: int) -> float:
        """Factor of the learning rates at this step."""
        schedule = self.task.schedule
        return schedule.rate(step) * schedule.decay**self.plateau.cuts

    @property
    def finished(self) -> bool:
        """Whether the rates have been cut as often as the schedule asks for."""
        return 0 < self.task.schedule.stages <= self.plateau.cuts

    def batch_size(self) -> int:
        """Rows of one step."""
        return self.task.schedule.batch(len(self.task.source))

    @abstractmethod
    def window(self) -> int:
        """Steps of one window."""

    @abstractmethod
    def take(self, step: int) -> tuple[Loss, Tensor]:
        """Take a step; return its loss and the norm of its gradient."""

    @abstractmethod
    def close_window(self, losses: list[Loss], history: History) -> None:
        """Record the adversaries' accuracy, and cut the rates if the window did not improve."""

    def refresh(self, step: int) -> None:
        """Refresh the guide from all rows, unless it is exact or falling rates let it converge."""
        task = self.task
        if self.plateau.cuts or task.schedule.rate(step) != 1:
            return
        if self.trains_network or not task.guide.exact(task.model):
            with self.share.sharing.common_numbers(task.seed, step):
                task.guide.refresh(task.model, self.share.rows)

    def held_out_loss(self) -> float | None:
        """The loss of the rows that decide when the training ends; None without any."""
        task = self.task
        return (
            None if task.validation is None else task.validation_loss(task.validation, self.share)
        )

    @abstractmethod
    def keep_best(self) -> None:
        """Return to the best state, if the phase records it."""

    def release(self) -> None:
        """Return all parameters to the guide, and put the program into evaluation mode."""
        self.lazy.release()
        self.task.model.eval()

    def next_batch(self) -> Rows:
        """The next mini-batch, or all rows if one batch holds them."""
        rows = self.share.rows
        reads = isinstance(rows, HeldRows) and rows.inputs is not None and rows.computed is None
        whole = self.batch_size() == len(self.task.source) and not reads
        return rows.all() if whole else next(self.passes)

    def one_pass(self, generator: torch.Generator) -> Iterator[Rows]:
        """One pass over the rows in mini-batches, in an order drawn from `generator`."""
        task, source = self.task, self.share.rows
        n = len(task.source)
        size = self.batch_size()
        # `prepare` makes room for this many clusters, unless a step looks them up itself.
        sampled = source.sampled(self.share.together(size))
        whole = self.lazy.tables.keys() >= sampled and not self.share.several
        dense = n if whole or task.guide.every_cluster() else 4 * self.share.together(size)
        return source.batches(self.share.batch(size), generator, dense_up_to=dense)

    def state(self) -> dict[str, Tensor]:
        """Optimizers, clusters' moments and position in the pass, for a checkpoint."""
        tensors = module_tensors("optimizers", self.optimizers) | self.lazy.state()
        of_user = self.optimizers.of_user
        tensors |= {} if of_user is None else of_user.state()
        return tensors | self.passes.state()

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Put back the tensors of `state`."""
        restore_module("optimizers", self.optimizers, tensors)
        if self.optimizers.of_user is not None:
            self.optimizers.of_user.restore(tensors)
        self.lazy.restore(tensors)
        self.passes.restore(tensors)


class NetworkPhase(Phase):
    """Trains on mini-batches, one draw per step, until training or validation loss stops falling.

    `best` is the state with the lowest validation loss; empty without validation rows. Windows
    that end before the adversaries' warm-up are neither the best nor a reason to cut the rates.
    `warmups` has the steps of the warm-up of each adversary.
    """

    trains_network = True

    def __init__(self, task: TrainingTask) -> None:
        super().__init__(task, task.share)
        self.prepare(self.batch_size(), 1.0)
        self.best: dict[str, Tensor] = {}
        self.snapshots = Snapshots()
        self.averaged = AveragedWeights(task.model.network) if task.keeps_snapshots else None
        schedule = task.schedule
        if task.by_epochs and schedule.window is None:  # for the first cut; later ones come sooner
            self.plateau.patience = max(schedule.patience, -(-LONG_WAIT // self.window()))
        self.warmups = warmup_steps(task)
        objective = Objective(task.model, self.lazy.guide)
        averaged = self.share.averaged(objective, self.modules, len(task.model.adversaries))
        self.objective = self.lazy.reading(averaged)

    def batch_size(self) -> int:
        return self.task.network_batch

    def window(self) -> int:
        schedule, n = self.task.schedule, len(self.task.source)
        return schedule.stopped_window(n) if self.task.by_epochs else schedule.window_steps(n)

    def warms_up(self, step: int) -> bool:
        """Whether a window that ends at this step does not count; the last one always does."""
        return step <= max(self.warmups, default=0) and step < self.task.schedule.steps

    def take(self, step: int) -> tuple[Loss, Tensor]:
        task, steps = self.task, self.task.schedule.steps
        shares = [min(1.0, step / most) if most else 1.0 for most in self.warmups]
        progress = task.source.like.new_tensor(shares)
        rows = self.share.weigh(self.next_batch())
        rate = self.rate(step)
        task.model.mixed_precision = task.training.precision == "bf16-mixed"
        loss, norm = self.steps(self.objective, rows, progress, factor=rate, remaining=steps - step)
        task.model.mixed_precision = False
        if self.averaged is not None:
            self.averaged.add()
        return self.share.mean(loss), norm

    def held_out_loss(self) -> float | None:
        with self._scored_weights():
            by_evidence = self.task.training.monitor == "log_score"
            if self.task.evidence is not None and by_evidence:
                return self.share.agreed(self.task.evidence.loss(self.task.seed))
            return super().held_out_loss()

    def _scored_weights(self) -> AbstractContextManager[None]:
        """The network with the weights that are scored and kept."""
        return nullcontext() if self.averaged is None else self.averaged.in_place()

    def close_window(self, losses: list[Loss], history: History) -> None:
        accuracies = torch.stack([loss.accuracy.cpu() for loss in losses])
        history.adversary_accuracy.append(accuracies.mean(0).tolist())
        if self.warms_up(history.step[-1]):
            return
        if self.task.validation is None:
            self.plateau.training(np.array(history.loss[-len(losses) :]))
            return
        if self.task.keeps_snapshots:
            with self._scored_weights():
                self.snapshots.add(len(history.validation) - 1, self.task.learned())
        best, cut = self.plateau.validation(history.validation[-1])
        if cut:
            self.plateau.patience = self.task.schedule.patience
        if best:
            self.best = self.task.state()
        elif cut:
            self.keep_best()

    def keep_best(self) -> None:
        if self.best and not self.task.keeps_snapshots:
            self.task.return_to(self.best)

    def state(self) -> dict[str, Tensor]:
        best = {f"best.{name}": value for name, value in self.best.items()}
        scored = {} if self.task.evidence is None else self.task.evidence.state()
        averaged = {} if self.averaged is None else self.averaged.state()
        return super().state() | best | scored | averaged | self.snapshots.tensors("snapshot")

    def restore(self, tensors: dict[str, Tensor]) -> None:
        super().restore(tensors)
        best = {k: v for k, v in tensors.items() if k.startswith("best.")}
        self.best = {k.removeprefix("best."): v for k, v in best.items()}
        self.snapshots = Snapshots.restored(tensors, "snapshot")
        if self.task.evidence is not None:
            self.task.evidence.restore(tensors)
        if self.averaged is not None:
            self.averaged.restore(tensors)


def warmup_steps(task: TrainingTask) -> list[int]:
    """Steps of the warm-up of each adversary."""
    n, schedule = len(task.source), task.schedule
    epoch = math.ceil(n / task.network_batch)
    return [game.warmup_steps(epoch, schedule.steps) for game in task.model.adversaries]


class FrozenPhase(Phase):
    """Trains q(theta) with several draws per step, started at the mode of p(theta | y).

    The constructor ends the phase before, freezes the network, and computes its outputs once,
    unless effects inside the network change them. The guide is then set to the mode. A checkpoint
    gives the number of particles (draws of each cluster's random effects per draw of theta) in
    place of the search for the mode, and `restore` fills in the state.
    """

    trains_network = False
    frozen_rows: RowSource

    def __init__(self, before: Phase, particles: int | None = None) -> None:
        task = before.task
        before.release()
        # With effects inside the network it still runs in every step, but no longer learns.
        self.frozen = [p for p in task.model.parameters() if p.requires_grad]
        task.model.requires_grad_(False)
        task.guide.settle()
        self.frozen_rows = before.share.compute(task.model.compute, task.source)
        super().__init__(task, Share(before.share.processes, self.frozen_rows))
        # Centre of q(theta) after each step since the rates were last cut.
        self.iterates: list[np.ndarray] = []
        self._at_mode = particles is None  # no step has been taken
        self.closed = exact_likelihood(task.model, task.guide, self.frozen_rows)
        self.particles = self._start() if particles is None else particles
        if self.closed is not None:
            self.prepare(len(task.source), self.pace.rate)
            return
        n, most = len(task.source), self._most_rows()
        # Clusters' parameters are trained, in mini-batches, only if no factor is nested.
        whole = task.guide.particles() is not None
        batches = task.guide.nested() is None and n > most and not whole
        rate = self.pace.rate
        if not batches and n > most:
            # The noisy gradient of a sample of clusters must not move the guide from the mode.
            rate *= (most / (2 * n)) ** 0.5
        self.prepare(task.schedule.batch(n) if batches else n, rate)

    def _start(self) -> int:
        """Set the guide to the mode; the number of particles that the bound needs there."""
        task = self.task
        start_at_mode(task.model, task.guide, self.frozen_rows, self.closed)
        several = task.guide.nested() is not None or task.guide.particles() is not None
        if self.closed is not None or not several or modulates(task.model):
            return 1
        return task.schedule.particles or particles_needed(task.model, task.guide, self.frozen_rows)

    @property
    def pace(self) -> Pace:
        """Draws per step, steps per window and factor of the learning rate."""
        if self.closed is not None:
            # Without draws of effects, the gradient has little noise.
            return replace(Pace.of(self.closed.size, network=False), window=12, rate=2.0)
        n = len(self.task.source) * self.particles
        return Pace.of(n, network=modulates(self.task.model))

    def window(self) -> int:
        return self.task.schedule.window_steps(len(self.task.source), self.pace.window)

    def take(self, step: int) -> tuple[Loss, Tensor]:
        task, remaining = self.task, self.task.schedule.steps - step
        self._at_mode = False
        if self.closed is not None:
            exact = MarginalBound(task.model, task.guide, self.closed)
            loss, norm = self.steps(
                exact, self.pace.draws, factor=self.rate(step), remaining=remaining
            )
            self.iterates.append(self._center())
            return loss, norm
        rows = self._step_rows().loaded()
        bound = NestedBound(task.model, self.lazy.guide, self.particles)
        draws = max(1, min(self.pace.draws, self._most_rows() // max(1, len(rows))))
        objective = self.lazy.reading(bound)
        loss, norm = self.steps(objective, rows, draws, factor=self.rate(step), remaining=remaining)
        self.iterates.append(self._center())
        return loss, norm

    def loss_at_mode(self) -> Loss | None:
        """The loss at the mode if steps would take too long or gain nothing, else None.

        A loss ends the phase: the guide stays at the mode, and importance weights correct it.
        """
        task = self.task
        if not (task.schedule.stages and self._at_mode):
            return None
        with torch.no_grad():
            if self.closed is not None:
                dear = self.closed.work > MOST_CLOSED_WORK or cost(self.closed) > MOST_WORK
                good = task.weighed and not task.schedule.sets_guide
                if not (dear or (good and efficient(task.model, task.guide, self.closed))):
                    return None
                draws = max(1, min(BOUND_DRAWS, BOUND_WORK // cost(self.closed)))
                loss = MarginalBound(task.model, task.guide, self.closed)(draws)
            elif task.guide.work() > MOST_WORK:
                loss = NestedBound(task.model, task.guide, self.particles)(self._step_rows(), 1)
            else:
                return None
        self.iterates = [self._center()]
        self.plateau.cuts = task.schedule.stages
        return loss

    def close_window(self, losses: list[Loss], history: History) -> None:
        # The adversaries are no longer trained, so their last accuracy stays.
        last = history.adversary_accuracy[-1:] or history.fold_accuracy or [[]]
        history.adversary_accuracy += last
        # In posterior sds; the frame alone gives them only near the mode.
        sds = self.task.guide.hyperparameters.log_scale.detach().exp().cpu().numpy()
        r_hat, drift = split_r_hat(np.stack(self.iterates[-2 * len(losses) :]) / sds)
        history.r_hat.append(r_hat)
        history.drift.append(drift)
        # The loss can be flat while the guide still moves.
        window = np.array(history.loss[-len(losses) :])
        if self.plateau.training(window, moving=r_hat >= MOVING):
            self.iterates = []

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
        return most if isinstance(self.frozen_rows, HeldRows) else min(most, MOST_READ)

    def _step_rows(self) -> Rows:
        whole = self.task.guide.particles() is not None
        if whole or len(self.frozen_rows) <= self._most_rows():
            return self.frozen_rows.all()
        return self.next_batch() if self.task.guide.nested() is None else next(self.passes)

    def one_pass(self, generator: torch.Generator) -> Iterator[Rows]:
        nested = self.task.guide.nested_name()
        if nested is None:
            return super().one_pass(generator)
        clusters = len(self.frozen_rows.counts[nested])
        size = max(1, clusters * self._most_rows() // (2 * len(self.frozen_rows)))
        return self.frozen_rows.cluster_batches(nested, size, generator)
