"""Training of networks that held-out rows stop, and cross-fitting of their outputs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from armed_pyro.engine.checkpoint import Checkpoint, module_tensors, restore_module
from armed_pyro.engine.shards import Share
from armed_pyro.guides.base import Guide
from armed_pyro.inference.evidence import Evidence
from armed_pyro.inference.held_out import HeldOut, StreamedPart
from armed_pyro.inference.phases import NetworkPhase
from armed_pyro.inference.snapshots import Snapshots
from armed_pyro.inference.training_run import Run, TrainingDiverged, TrainingInterrupted
from armed_pyro.inference.training_task import TrainingTask
from armed_pyro.program.fold_networks import FoldNetworks
from armed_pyro.program.model import MixedEffects
from armed_pyro.program.predictor import modulates
from armed_pyro.rows.source import RowSource

__all__ = ["CrossFitting", "comparable"]

# Cuts of the learning rates before a network that is kept at its best is taken as trained: a short
# stretch at a quarter of the rates follows the best look at the held-out rows.
STAGES = 2
# Bytes of all snapshots, which are also in every checkpoint.
MOST_KEPT = 2**25
# Fields of `CrossFitting` that are JSON values.
RECORDED = ("losses", "steps", "stopped", "accuracies", "warmup")

Report = Callable[[int, str], None]


def comparable(model: MixedEffects) -> bool:
    """Whether networks trained on different rows can stand in for each other.

    That holds for their outputs, but not for activations of hidden layers: random effects and
    latent coefficients that act on units of one network have no meaning for those of another.
    """
    layers = [path for term in model.terms for path in term.layers()]
    return not (layers or model.bayesian_head or model.others or modulates(model))


@dataclass
class CrossFitting:
    """Trains a network for each held-out part, and gives the program their outputs.

    Each network is trained until its own part is no longer predicted better, and kept after many
    windows. The length that counts is then that at which the *other* parts were predicted best, on
    average over their networks: the rows of a part, with which the variance components are
    settled, have no say in the network that predicts them. A network too large to keep many of, and
    a single network, are kept at their best.

    Attributes
    ----------
    task : TrainingTask
        The training with all rows.
    make_guide : callable
        Makes the guide of each network.
    held_out : HeldOut
        The parts.
    snapshots : list of Snapshots
        The tensors of network and adversaries, for every part that is finished.
    losses : list of list of float
        Validation losses after every window.
    steps : list of int
        Steps per window.
    stopped : list of str
        Why each training ended.
    accuracies : list of list of float
        Accuracy of the adversaries at its end.
    warmup : list of int
        Steps of the warm-up of each adversary.
    """

    task: TrainingTask
    make_guide: Callable[[MixedEffects, RowSource], Guide]
    held_out: HeldOut | StreamedPart
    snapshots: list[Snapshots] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)
    steps: list[list[int]] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    accuracies: list[list[float]] = field(default_factory=list)
    warmup: list[int] = field(default_factory=list)

    @property
    def pooled(self) -> bool:
        """Whether the parts choose the length of each other's training."""
        size = sum(tensor.nbytes for tensor in self.task.model.network.state_dict().values())
        return self.held_out.folds > 1 and size * Snapshots.MOST * self.held_out.folds <= MOST_KEPT

    def train(
        self, path: Path | None, report: Report, checkpoint: Checkpoint | None
    ) -> Checkpoint | None:
        """Train the networks that are not yet trained, from a checkpoint if there is one.

        Returns the checkpoint if it was of a run that follows.
        """
        folds = self.held_out.folds
        while len(self.snapshots) < folds:
            number = len(self.snapshots)
            run = Run(self._task(number))
            if checkpoint is not None:
                run.restore(checkpoint)
                checkpoint = None
            title = f"network {number + 1} of {folds}, " if folds > 1 else "network, "
            try:
                run.train(path, partial(_titled, report, title), self.completed)
            except (TrainingDiverged, TrainingInterrupted) as error:
                # The copy knew the rows of this part alone.
                error.posterior.model.facts = self.task.model.data_facts()
                raise
            phase, losses = run.phase, _counted(run)
            kept = phase.snapshots if isinstance(phase, NetworkPhase) and self.pooled else None
            best = int(np.argmin(losses))
            self.snapshots.append(kept or Snapshots({best: run.task.learned()}))
            self.losses.append(losses)
            self.steps.append(list(run.history.step))
            self.stopped.append(run.stopped)
            self.accuracies.append(run.history.adversary_accuracy[-1])
            self.warmup = run.history.warmup
        return checkpoint

    def finish(self) -> dict[str, Any]:
        """Give the program the trained networks; fields of the history that describe them.

        The program's single network is the one of median loss. After the training of one network
        alone the guide continues from where it was.
        """
        windows = self._windows()
        chosen = [kept.near(window) for kept, window in zip(self.snapshots, windows, strict=True)]
        losses = [loss[window] for loss, window in zip(self.losses, windows, strict=True)]
        steps = [step[window] for step, window in zip(self.steps, windows, strict=True)]
        model, order = self.task.model, sorted(range(len(losses)), key=losses.__getitem__)
        networks = [self._network(tensors) for tensors in chosen]
        median = order[len(order) // 2]
        self._put(model, chosen[median])
        if len(networks) == 1:
            guide = {k: v for k, v in chosen[0].items() if k.startswith("guide.")}
            restore_module("guide", self.task.guide, guide)
        else:
            of_cluster = self.held_out.of_cluster.to(model.reference().device)
            folds = FoldNetworks(networks, self.held_out.factor, of_cluster)
            model.cross_fit(folds.eval())
        # The adversaries of this network are trained no further.
        accuracy = [self.accuracies[median]] if model.adversaries else []
        return {
            "fold_steps": steps,
            "fold_validation": losses,
            "fold_stopped": list(self.stopped),
            "fold_accuracy": accuracy,
            "warmup": self.warmup,
        }

    def _windows(self) -> list[int]:
        """The window after which each network is kept."""
        own = [int(np.argmin(losses)) for losses in self.losses]
        if not self.pooled:
            return own
        longest = max(map(len, self.losses))
        # Where a training has ended, its last loss stands for those that would have followed.
        curves = np.array(
            [losses + losses[-1:] * (longest - len(losses)) for losses in self.losses]
        )
        sizes = torch.bincount(self.held_out.fold, minlength=len(curves)).numpy()
        windows = []
        for number, losses in enumerate(self.losses):
            others = np.arange(len(curves)) != number
            pooled = np.average(curves[others], 0, weights=sizes[others])
            windows.append(min(int(pooled.argmin()), len(losses) - 1))
        return windows

    def completed(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint of a run, with the networks that are finished."""
        tensors = dict(checkpoint.tensors)
        for number, kept in enumerate(self.snapshots):
            tensors |= kept.tensors(f"trained{number}")
        record = {name: getattr(self, name) for name in RECORDED}
        return Checkpoint(tensors, checkpoint.record | {"folds": record})

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take the finished networks from a checkpoint."""
        record = checkpoint.record.get("folds")
        if record is None:
            return
        for name in RECORDED:
            setattr(self, name, list(record[name]))
        self.snapshots = [
            Snapshots.restored(checkpoint.tensors, f"trained{number}")
            for number in range(len(self.stopped))
        ]

    def _task(self, number: int) -> TrainingTask:
        """The training of the network for one part."""
        task = self.task
        rows, held = self.held_out.split(number, task.source)
        model = copy.deepcopy(task.model)
        facts = model.data_facts()
        model.facts = replace(facts, n_rows=len(rows), counts=rows.counts)
        stages = 1 if self.pooled else min(STAGES, task.schedule.stages)
        evidence = None
        if comparable(model):
            of_held = self.make_guide(model, held).to(model.reference().device)
            evidence = Evidence.of(model, of_held, held)
        share = Share.of(task.share.processes, rows, model.network)
        return replace(
            task,
            model=model,
            guide=self.make_guide(model, share.rows).to(model.reference().device),
            source=rows,
            share=share,
            schedule=replace(task.schedule, stages=stages),
            validation=held,
            network_only=True,
            keeps_snapshots=self.pooled,
            evidence=evidence,
        )

    def _network(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """A copy of the network with these tensors."""
        network = copy.deepcopy(self.task.model.network)
        network.load_state_dict(
            {
                name.removeprefix("model.net."): value
                for name, value in tensors.items()
                if name.startswith("model.net.")
            }
        )
        return network

    @staticmethod
    def _put(model: MixedEffects, tensors: Mapping[str, Tensor]) -> None:
        """Put these tensors into the program in place of its own."""
        trained = {name: value for name, value in tensors.items() if name.startswith("model.")}
        restore_module("model", model, module_tensors("model", model) | trained)


def _counted(run: Run) -> list[float]:
    """Validation losses of the windows; infinite while the adversaries warm up."""
    phase, history = run.phase, run.history
    assert isinstance(phase, NetworkPhase)  # for mypy: the run ends with the network's training
    return [
        math.inf if phase.warms_up(step) else loss
        for step, loss in zip(history.step, history.validation, strict=True)
    ]


def _titled(report: Report, title: str, step: int, text: str) -> None:
    report(step, title + text)
