"""Training: from a bound program and its rows to a `Posterior`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pyro
import torch
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from armed_pyro._memory import release
from armed_pyro._messages import progress_console
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.engine.checkpoint import Checkpoint, digest
from armed_pyro.engine.compiled_step import COMPILE_MODES, CompileMode
from armed_pyro.engine.processes import ALONE, Processes
from armed_pyro.engine.schedule import Schedule
from armed_pyro.engine.shards import Share
from armed_pyro.guides.base import Guide
from armed_pyro.guides.closed_form import MarginalLikelihood
from armed_pyro.guides.crossed import choose_guide
from armed_pyro.inference.cross_fitting import CrossFitting, comparable
from armed_pyro.inference.held_out import HeldOut, StreamedPart
from armed_pyro.inference.importance_sampling import importance_draws, n_effects, refinable
from armed_pyro.inference.network_training import NetworkTraining
from armed_pyro.inference.out_of_sample import out_of_sample
from armed_pyro.inference.posterior import Posterior
from armed_pyro.inference.probing import record_probes
from armed_pyro.inference.refine import refine as refined_by
from armed_pyro.inference.training_run import Run, TrainingInterrupted
from armed_pyro.inference.training_task import TrainingTask
from armed_pyro.program.model import MixedEffects, can_overfit, trains_network
from armed_pyro.rows.in_memory import HeldRows
from armed_pyro.rows.source import RowSource
from armed_pyro.streaming.on_disk import StreamedRows

__all__ = ["GuideFactory", "progress_bar", "threads", "train"]

# Fewest rows of which some are held out by default.
FEWEST_ROWS = 10
# Fewest draws of random effects that are kept, and values of all draws.
FEWEST_KEPT, KEPT_VALUES = 1000, 2**22
# Rows times parameters of one step below which one thread is fastest.
SMALL_STEP = 2**24

OTHER_RUN = (
    "the processes that torchrun started have different rows, schedules or seeds: give all of them "
    "the same, or let each process fit its model alone with distributed='never'"
)
OTHER_FILE = (
    "only some of the processes find the checkpoint to resume from: put it on a file system that "
    "all their machines share"
)
GuideFactory = Callable[[MixedEffects, RowSource], Guide]


def train(
    bound: MixedEffects,
    data: ClusteredData,
    *,
    source: RowSource | None = None,
    validation: ClusteredData | Literal["auto"] | None = None,
    schedule: Schedule | None = None,
    guide: GuideFactory = choose_guide,
    refine: bool = True,
    seed: int = 0,
    compile: CompileMode = "auto",  # noqa: A002
    processes: Processes = ALONE,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    weights: Sequence[dict[str, Any]] = (),
    training: NetworkTraining | None = None,
) -> Posterior:
    """Train a bound program in place, and weigh the draws of its guide.

    The scales and priors of the program stay fixed, so it can also be trained on data drawn from
    its prior. `source` holds all training rows if `data` is only a sample of them, for the
    posterior to keep. `weights` are those tried for the adversaries, for the history. At the end,
    fresh probes read the adversaries' clusters from the rows held out of the training; without
    any, from the rows of the posterior. `armed_pyro.fit` documents the other parameters.

    Raises `TrainingDiverged`; and ValueError if `compile` is unknown, `resume` comes without
    `checkpoint`, the checkpoint belongs to another run, or the processes differ in their rows,
    schedules or seeds.
    """
    schedule = Schedule() if schedule is None else schedule
    _check_settings(compile, resume, checkpoint)
    bound.cross_fit(None)  # an earlier fit may have such networks
    rows = bound.encode(data) if source is None else source
    stopping = held_out = None
    if isinstance(validation, ClusteredData):
        stopping = bound.encode(validation, bound.data_facts().levels_with(validation))
    elif validation == "auto":
        held_out = _held_out(bound, rows, schedule, seed)
    if isinstance(held_out, HeldOut) and held_out.factor is None and isinstance(rows, HeldRows):
        rows = replace(rows, fold=held_out.fold.to(rows.x.device))
        data = replace(data, fold=held_out.fold)
    path = Path(checkpoint) if checkpoint is not None else None
    resume = resume and path is not None and path.exists()
    with pyro.validation_enabled(False), processes.together():
        if processes.several:
            _check_same(processes, bound, rows, [schedule, seed], resume)
        target = bound.reference().device
        processes.same(bound)
        share = Share.of(processes, rows, bound.network if trains_network(bound) else None)
        bound_guide = guide(bound, share.rows).to(target)
        task = TrainingTask(
            bound, bound_guide, data, rows, share, schedule, stopping, seed, compile, weights
        )
        task = replace(task, training=training or NetworkTraining())
        size = schedule.batch(len(rows)) * sum(p.numel() for p in bound.parameters())
        # In small steps, synchronising threads costs more than it saves.
        count = 1 if size < SMALL_STEP else torch.get_num_threads()
        with threads(count), _training_bar(schedule, progress and processes.first) as report:
            saved = Checkpoint.read(path) if resume and path is not None else None
            run = _trained(replace(task, weighed=refine), guide, held_out, path, report, saved)
        processes.same(bound, bound_guide)
    posterior, frozen_rows, closed = run.result(), run.phase.frozen_rows, run.phase.closed
    record_probes(posterior, validation if isinstance(validation, ClusteredData) else held_out)
    # The run holds copies of the state, and the draws need their memory.
    del run
    release()
    if refine:
        posterior = _weighted(posterior, frozen_rows, source, closed)
    _score_held_out(posterior, held_out, frozen_rows, stopping)
    return posterior


def _check_settings(mode: str, resume: bool, checkpoint: str | Path | None) -> None:
    """Raise ValueError for an unknown `compile`, or `resume` without a checkpoint."""
    if mode not in COMPILE_MODES:
        raise ValueError(f"`compile` is {mode!r}, but must be one of {', '.join(COMPILE_MODES)}")
    if resume and checkpoint is None:
        raise ValueError("resume=True needs the file to continue from: checkpoint='...'")


def _score_held_out(
    posterior: Posterior,
    held_out: HeldOut | StreamedPart | None,
    frozen_rows: RowSource | None,
    stopping: HeldRows | None,
) -> None:
    """Record in the history how well rows that the network was not trained on are predicted."""
    if not can_overfit(posterior.model):
        return
    try:
        if stopping is not None:
            scored = out_of_sample(posterior, stopping, settled_on=False)
        elif isinstance(held_out, StreamedPart):
            rows = posterior.model.compute(held_out.held)
            scored = out_of_sample(posterior, rows, settled_on=True)
        elif held_out is not None and isinstance(frozen_rows, HeldRows):
            rows = frozen_rows
            if held_out.folds == 1:
                rows = rows.take((held_out.fold == 0).nonzero()[:, 0].to(rows.x.device))
            scored = out_of_sample(posterior, rows, settled_on=True)
        else:
            return
    except (ArithmeticError, ValueError, RuntimeError):
        return  # the check of the model says that nothing was scored
    posterior.history.held_out.update(scored)


def _held_out(
    bound: MixedEffects, rows: RowSource, schedule: Schedule, seed: int
) -> HeldOut | StreamedPart | None:
    """The rows to hold out by default: none unless a network can overfit.

    Without cuts of the rates (`stages`), there is no rule that held-out rows could stop.
    """
    if not (can_overfit(bound) and schedule.stages) or len(rows) < FEWEST_ROWS:
        return None
    if isinstance(rows, StreamedRows):
        return StreamedPart.of(bound, rows)
    if not isinstance(rows, HeldRows):
        return None
    folds = schedule.folds if comparable(bound) else 1
    by_rows = schedule.fold_by == "rows"
    return HeldOut.of(bound, rows, folds=folds, seed=seed, by_rows=by_rows)


def _trained(
    task: TrainingTask,
    guide: GuideFactory,
    held_out: HeldOut | StreamedPart | None,
    path: Path | None,
    report: Callable[[int, str], None],
    saved: Checkpoint | None,
) -> Run:
    """The run after its last step: networks that held-out rows stop come first, if there are."""
    if held_out is None:
        run = Run(task)
        if saved is not None:
            run.restore(saved)
        run.train(path, report)
        return run
    networks = CrossFitting(task, guide, held_out)
    if saved is not None:
        networks.restore(saved)
    saved = networks.train(path, report, saved)
    found = networks.finish()
    run = Run(replace(task, network_trained=True))
    run.history = replace(run.history, **found)
    if saved is not None:
        run.restore(saved)
    run.train(path, report, networks.completed)
    if run.stopped == "converged":
        run.stopped = "steps" if "steps" in networks.stopped else "validation"
    return run


def _weighted(
    posterior: Posterior,
    frozen_rows: RowSource | None,
    source: RowSource | None,
    closed: MarginalLikelihood | None,
) -> Posterior:
    """The posterior with importance weights where they can be computed, and draws by these."""
    if frozen_rows is None or not (closed is not None or refinable(posterior, source)):
        return posterior
    try:
        weights = importance_draws(posterior, frozen_rows, closed)
        posterior = replace(posterior, importance=weights)
        # With k-hat above 1 the weights have no mean. Between 0.7 and 1 they improve on the guide,
        # and the diagnostics warn.
        return refined_by(posterior, joint=_joint(posterior)) if weights.k_hat < 1 else posterior
    except KeyboardInterrupt as error:
        raise TrainingInterrupted(posterior) from error


def _joint(posterior: Posterior) -> int:
    """Draws of all random effects that are kept."""
    return max(FEWEST_KEPT, KEPT_VALUES // max(1, n_effects(posterior.model)))


def _check_same(
    processes: Processes,
    bound: MixedEffects,
    rows: RowSource,
    settings: Sequence[object],
    resume: bool,
) -> None:
    """Raise ValueError if processes differ in rows, adversaries, settings or resumption."""
    games = [adversary.settings() for adversary in bound.adversaries]
    inputs = [digest(rows, bound.data_facts().to_json()), games, *settings]
    processes.check_same(inputs, OTHER_RUN)
    processes.check_same(resume, OTHER_FILE)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch with this number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _training_bar(
    schedule: Schedule, show: bool
) -> AbstractContextManager[Callable[[int, str], None]]:
    # Otherwise training ends when the loss has stopped improving, mostly long before `steps`.
    return progress_bar("fitting", "step", schedule.steps, show, fixed=schedule.stages == 0)


@contextmanager
def progress_bar(
    title: str, unit: str, total: int, show: bool, *, fixed: bool = True
) -> Iterator[Callable[[int, str], None]]:
    """A bar that is told how many units are completed, and a text.

    Without a `fixed` number of units, `total` is only the most, and no time left is shown.
    """
    count = f"{unit} {{task.completed}}/{{task.total}}"
    columns = (
        TextColumn(title),
        BarColumn() if fixed else SpinnerColumn(),
        TextColumn(count if fixed else f"{count} at most"),
        TimeElapsedColumn(),
        *([TimeRemainingColumn()] if fixed else []),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=progress_console(), disable=not show) as bar:
        task = bar.add_task("", total=total)
        yield lambda step, text: bar.update(task, completed=step, description=text)
