"""Training of networks that held-out rows stop, and cross-fitting of their outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from armed_pyro.engine.checkpoint import Checkpoint, module_tensors, restore_module
from armed_pyro.engine.shards import Share
from armed_pyro.guides.base import Guide
from armed_pyro.inference.held_out import HeldOut
from armed_pyro.inference.phases import TrainingTask
from armed_pyro.inference.training_run import Run, TrainingDiverged
from armed_pyro.program.fold_networks import FoldNetworks
from armed_pyro.program.model import MixedEffects
from armed_pyro.program.predictor import modulates
from armed_pyro.rows.in_memory import HeldRows
from armed_pyro.rows.source import RowSource

__all__ = ["CrossFitting", "comparable"]

# Cuts of the learning rates before a network is taken as trained: a short stretch at a quarter of
# the rates follows the best look at the held-out rows.
STAGES = 2

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

    `trained` holds the tensors of network and adversaries of every part that is finished.
    """

    task: TrainingTask  # of all rows
    make_guide: Callable[[MixedEffects, RowSource], Guide]
    held_out: HeldOut
    trained: list[dict[str, Tensor]] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)

    def train(
        self, path: Path | None, report: Report, checkpoint: Checkpoint | None
    ) -> Checkpoint | None:
        """Train the networks that are not yet trained, from a checkpoint if there is one.

        Returns the checkpoint if it was of a run that follows.
        """
        while len(self.trained) < self.held_out.folds:
            number = len(self.trained)
            run = Run(self._task(number))
            if checkpoint is not None:
                run.restore(checkpoint)
                checkpoint = None
            total = self.held_out.folds
            title = f"network {number + 1} of {total}, " if total > 1 else "network, "
            try:
                run.train(path, partial(_titled, report, title), self.completed)
            except TrainingDiverged as error:
                error.posterior.model.facts = self.task.model.data_facts()
                raise
            self.trained.append(_learned(run.task))
            self.steps.append(run.step)
            self.losses.append(min(run.history.validation))
            self.stopped.append(run.stopped)
        return checkpoint

    def finish(self) -> None:
        """Give the program the trained networks; its single network is the one of median loss.

        After the training of one network alone the guide continues from where it was.
        """
        model = self.task.model
        order = sorted(range(len(self.losses)), key=self.losses.__getitem__)
        networks = [self._restored(tensors).network for tensors in self.trained]
        self._put(model, self.trained[order[len(order) // 2]])
        if len(networks) == 1:
            guide = {k: v for k, v in self.trained[0].items() if k.startswith("guide.")}
            restore_module("guide", self.task.guide, guide)
        else:
            of_cluster = self.held_out.of_cluster.to(model.reference().device)
            folds = FoldNetworks(networks, self.held_out.factor, of_cluster)
            model.cross_fit(folds.eval())

    def completed(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint of a run, with the networks that are finished."""
        tensors = {
            f"trained{number}.{name}": value
            for number, trained in enumerate(self.trained)
            for name, value in trained.items()
        }
        record = {"steps": self.steps, "losses": self.losses, "stopped": self.stopped}
        return Checkpoint(checkpoint.tensors | tensors, checkpoint.record | {"folds": record})

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take the finished networks from a checkpoint."""
        record = checkpoint.record.get("folds")
        if record is None:
            return
        self.steps, self.losses, self.stopped = (
            list(record[name]) for name in ("steps", "losses", "stopped")
        )
        self.trained = [
            _within(checkpoint.tensors, f"trained{number}.") for number in range(len(self.steps))
        ]

    def _task(self, number: int) -> TrainingTask:
        """The training of the network for one part."""
        task = self.task
        assert isinstance(task.source, HeldRows)  # for mypy; see `train`
        rows, held = self.held_out.split(number, task.source)
        model = copy.deepcopy(task.model)
        facts = model.data_facts()
        model.facts = replace(facts, n_rows=len(rows), counts=rows.counts)
        schedule = replace(task.schedule, stages=min(STAGES, task.schedule.stages))
        share = Share(task.share.processes, rows)
        guide = self.make_guide(model, rows).to(model.reference().device)
        return replace(
            task,
            model=model,
            guide=guide,
            source=rows,
            share=share,
            schedule=schedule,
            validation=held,
            network_only=True,
        )

    def _restored(self, tensors: Mapping[str, Tensor]) -> MixedEffects:
        """A copy of the program with these tensors of its network."""
        model = copy.deepcopy(self.task.model)
        self._put(model, tensors)
        return model

    @staticmethod
    def _put(model: MixedEffects, tensors: Mapping[str, Tensor]) -> None:
        """Put these tensors into the program in place of its own."""
        restore_module("model", model, module_tensors("model", model) | dict(tensors))


def _learned(task: TrainingTask) -> dict[str, Tensor]:
    """The tensors of network, adversaries and guide after training."""
    kept = ("model.net.", "model._adversaries.", "guide.")
    return {name: tensor for name, tensor in task.state().items() if name.startswith(kept)}


def _titled(report: Report, title: str, step: int, text: str) -> None:
    report(step, title + text)


def _within(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
