"""One training run: its phases, its last good state, and its checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from armed_pyro.engine.checkpoint import Checkpoint
from armed_pyro.engine.compiled_step import Loss
from armed_pyro.engine.schedule import History, Plateau
from armed_pyro.inference.network_training import TrainingRecord
from armed_pyro.inference.phases import (
    FrozenPhase,
    NetworkPhase,
    Phase,
    warmup_steps,
)
from armed_pyro.inference.posterior import Posterior
from armed_pyro.inference.training_task import TrainingTask
from armed_pyro.program.model import trains_network
from armed_pyro.program.probe import check_probe, probe

__all__ = ["Run", "TrainingDiverged", "TrainingInterrupted"]


class TrainingDiverged(RuntimeError):  # noqa: N818
    """The loss or its gradient is no longer finite, or the loss grew beyond all bounds.

    `posterior` is that at the start of the window of steps with the lowest mean loss.
    """

    def __init__(self, message: str, posterior: Posterior) -> None:
        super().__init__(message)
        self.posterior = posterior


class TrainingInterrupted(KeyboardInterrupt):
    """The training was interrupted; `posterior` is that at the end of the last whole window."""

    def __init__(self, posterior: Posterior) -> None:
        super().__init__("the training was interrupted")
        self.posterior = posterior


class Run:
    """A training run with its history and last good state; its phases take the steps.

    `phase` is a `NetworkPhase`, then a `FrozenPhase`. `stopped` says why training ended, and is
    empty until then.
    """

    def __init__(self, task: TrainingTask) -> None:
        self.task = task
        self.history, self.stopped = History(), ""
        # Evaluated before the network is frozen, because a frozen network never counts as trained.
        self._trains_network = trains_network(task.model) and not task.network_trained
        self._rate = 1.0  # of the last step
        # The state to return to after divergence, and the mean loss of the window that follows it.
        self._good, self._good_loss = task.state(), math.inf
        self._window_start = self._good
        self._games = [(a.factor, float(a.strength(1.0))) for a in task.model.adversaries]
        self.phase: Phase = NetworkPhase(task)
        self.history.warmup = warmup_steps(task)
        self.history.weights = list(task.weights)

    @property
    def step(self) -> int:
        """Steps taken."""
        return len(self.history.loss)

    def train(
        self,
        path: Path | None,
        report: Callable[[int, str], None],
        completed: Callable[[Checkpoint], Checkpoint] = lambda checkpoint: checkpoint,
    ) -> None:
        """Take steps until convergence or until they run out.

        After each window the checkpoint is written to `path`, after `completed` has added what
        belongs to it, and `report` is called with the number of steps and the state in words. An
        interrupt raises `TrainingInterrupted`.
        """
        path = path if self.task.share.processes.first else None
        if not self.step and not self._trains_network:
            self.freeze()
        try:
            self._take_windows(path, report, completed)
        except KeyboardInterrupt as error:
            raise self._interruption() from error
        self.phase.keep_best()
        self.phase.release()

    def _take_windows(
        self,
        path: Path | None,
        report: Callable[[int, str], None],
        completed: Callable[[Checkpoint], Checkpoint],
    ) -> None:
        """Take steps, window after window, until convergence or until they run out."""
        task = self.task
        while not self.stopped and not self._stops_at_mode():
            phase = self.phase
            task.model.train(phase.trains_network)
            phase.passes = phase.share.reshuffled(phase.passes, task.seed, self.step)
            before, steps = task.state(), min(phase.window(), task.schedule.steps - self.step)
            self._window_start = before
            losses = [self.take_step() for _ in range(steps)]
            self.close_window(losses)
            mean = float(np.mean(self.history.loss[-len(losses) :]))
            if mean < self._good_loss:
                self._good, self._good_loss = before, mean
            report(self.step, self.history.status(self._games))
            if path is not None:
                completed(self.save()).write(path)

    def take_step(self) -> Loss:
        """Take one step; return its loss before the parameters changed, or raise the divergence."""
        self._rate = self.phase.rate(self.step)
        try:
            loss, norm = self.phase.take(self.step)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise self._divergence("a covariance matrix is degenerate") from error
        total = float(loss.total.detach())
        if not math.isfinite(total):
            raise self._divergence(_blame(loss))
        if not math.isfinite(norm):
            raise self._divergence("its gradient is not finite")
        self._record(loss)
        first, last = self.history.loss[0], self.history.loss[-1]
        if last > first + 1e4 * (1 + abs(first)):
            raise self._divergence(f"it grew from {first:.4g} to {last:.4g}")
        return loss

    def close_window(self, losses: list[Loss]) -> None:
        """Record a window of steps; at the end of a phase, start the next phase or stop."""
        task, phase, history = self.task, self.phase, self.history
        history.rate.append(self._rate)
        history.step.append(self.step)
        history.compiled.append(phase.steps.compiled)
        history.seconds.append(phase.steps.seconds)
        phase.share.average_buffers(task.model.network)
        held_out = phase.held_out_loss()
        if held_out is not None:
            history.validation.append(held_out)
        phase.close_window(losses, history)
        phase.refresh(self.step)
        asked = [callback(self._observed(losses)) for callback in task.training.callbacks]
        if phase.finished or any(asked):
            if phase.trains_network and task.network_only:
                self.stopped = "validation"
            elif phase.trains_network:
                self.freeze()
            else:
                by_validation = task.validation is not None and self._trains_network
                self.stopped = "validation" if by_validation else "converged"
        if self.step >= task.schedule.steps and not self.stopped:
            self.stopped = "steps"

    def _observed(self, losses: list[Loss]) -> TrainingRecord:
        """The record of the last window for callbacks."""
        history, model = self.history, self.task.model
        counts = [self.task.source.counts[game.factor] for game in model.adversaries]
        validation = history.validation[-1] if history.validation else None
        return TrainingRecord(
            step=self.step,
            phase="network" if self.phase.trains_network else "guide",
            loss=float(np.mean(history.loss[-len(losses) :])),
            elbo=float(np.mean(history.elbo[-len(losses) :])),
            rate=history.rate[-1],
            validation=validation if self.phase.trains_network else None,
            adversary_accuracy=tuple(history.adversary_accuracy[-1]),
            adversary_chance=tuple(float(count.max() / count.sum()) for count in counts),
        )

    def result(self) -> Posterior:
        """The posterior at the present state."""
        task, schedule, seed = self.task, self.task.schedule, self.task.seed
        return Posterior(
            task.model, task.guide, task.data, self.history, schedule, seed, self.stopped
        )

    def save(self) -> Checkpoint:
        """A checkpoint from which training continues exactly as without interruption."""
        tensors = self.task.state() | self.phase.state() | {"random": torch.get_rng_state()}
        device = self.task.source.like.device
        if device.type == "cuda":
            tensors["random_cuda"] = torch.cuda.get_rng_state(device)
        record = {
            "run": self.task.identity(),
            "history": self.history.to_json(),
            "plateau": asdict(self.phase.plateau),
            "stopped": self.stopped,
            "probe": probe(self.task.model),
        }
        return Checkpoint(tensors, record)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint of the same run; ValueError for one of another run."""
        tensors, record = checkpoint.tensors, checkpoint.record
        identity = self.task.identity()
        saved = {"training": identity["training"], **record["run"]}  # earlier runs had no choice
        saved["schedule"] = {k: v for k, v in saved["schedule"].items() if k != "steps"}
        changed = sorted(name for name in identity if identity[name] != saved.get(name))
        if changed:
            raise ValueError(
                f"the checkpoint belongs to another run (different {', '.join(changed)}): resume "
                "with the same data, model, schedule and seed, or delete the checkpoint"
            )
        self.history = History(**record["history"])
        self.task.return_to(tensors)
        check_probe(self.task.model, record.get("probe"), "the checkpoint")
        if self.history.settled is not None:
            self.phase = FrozenPhase(self.phase, self.history.particles)
        self._good = self.task.state()
        self.phase.restore(tensors)
        torch.set_rng_state(tensors["random"])
        if "random_cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random_cuda"], self.task.source.like.device)
        self.phase.plateau = Plateau(**record["plateau"])
        self.stopped = record["stopped"]
        if self.stopped == "steps" and self.step < self.task.schedule.steps:
            self.stopped = ""  # the schedule is longer than that of the finished run

    def freeze(self) -> None:
        """Freeze the network at its best, and start the second phase."""
        self.phase.keep_best()
        self.phase.share.use_common_numbers(self.task.seed, self.step)
        self.phase = FrozenPhase(self.phase)
        self.history.particles, self.history.settled = self.phase.particles, self.step
        self._good, self._good_loss = self.task.state(), math.inf

    def _stops_at_mode(self) -> bool:
        """If steps would take too long, record the loss at the mode as the only step and stop."""
        loss = self.phase.loss_at_mode() if isinstance(self.phase, FrozenPhase) else None
        if loss is None:
            return False
        self._record(loss)
        self.close_window([loss])
        return True

    def _record(self, loss: Loss) -> None:
        self.history.loss.append(float(loss.total.detach()))
        self.history.elbo.append(float(loss.elbo))

    def _interruption(self) -> TrainingInterrupted:
        """Go back to the end of the last whole window, and make the error to raise."""
        history = self.history
        whole = history.step[-1] if history.step else 0
        for trace in (history.loss, history.elbo):
            del trace[whole:]
        self.task.return_to(self._window_start)
        self.phase.keep_best()
        self.phase.release()
        self.stopped = "interrupted"
        return TrainingInterrupted(self.result())

    def _divergence(self, cause: str) -> TrainingDiverged:
        """Go back to the last good state, and make the error to raise."""
        schedule = self.task.schedule
        bad = [name for name, value in self.task.state().items() if not value.isfinite().all()]
        if bad:
            cause += f"; parameters not finite: {', '.join(bad[:3])}"
        extremes = "features and outcome"
        data = self.task.data
        if data.offset is not None:
            schema = data.schema
            name = "" if schema is None else f" {(schema.offset or schema.offset_call)!r}"
            largest = f"up to {float(data.offset.abs().max()):.4g}; take logs of exposures"
            extremes = f"features, outcome and offset{name} ({largest})"
        self.task.return_to(self._good)
        self.phase.keep_best()
        self.phase.release()
        self.stopped = "diverged"
        return TrainingDiverged(
            f"the loss diverged at step {self.step + 1}: {cause}. Try a lower learning rate "
            f"(now {schedule.learning_rate} for the guide, {schedule.net_learning_rate} for the "
            f"network), and look for extreme values in {extremes}. The error's `fit` attribute "
            "holds the last good state.",
            self.result(),
        )


def _blame(loss: Loss) -> str:
    """Name the parts of a loss that are not finite."""
    parts = {
        "the evidence lower bound": loss.elbo,
        "the likelihood under fixed effects alone": loss.fixed,
        "the adversaries' cross-entropy": loss.adversarial,
    }
    bad = [name for name, value in parts.items() if not math.isfinite(float(value))]
    return f"{' and '.join(bad) or 'the total'} is not finite"
