"""Training: from a bound program and its rows to a `Posterior`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from armed_pyro.guides.crossed import choose_guide
from armed_pyro.inference.importance_sampling import importance_draws, refinable
from armed_pyro.inference.phases import TrainingTask
from armed_pyro.inference.posterior import Posterior
from armed_pyro.inference.probing import record_probes
from armed_pyro.inference.refine import refine as refined_by
from armed_pyro.inference.training_run import Run, TrainingInterrupted
from armed_pyro.program.model import MixedEffects, trains_network
from armed_pyro.rows.source import RowSource

__all__ = ["GuideFactory", "progress_bar", "threads", "train"]

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
    validation: ClusteredData | None = None,
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
) -> Posterior:
    """Train a bound program in place, and weigh the draws of its guide.

    The scales and priors of the program stay fixed, so it can also be trained on data drawn from
    its prior. `source` holds all training rows if `data` is only a sample of them, for the
    posterior to keep. `weights` are those tried for the adversaries, for the history. At the end,
    fresh probes read the adversaries' clusters from the validation rows; without any, from the
    rows of the posterior. `armed_pyro.fit` documents the other parameters.

    Raises `TrainingDiverged`; and ValueError if `compile` is unknown, `resume` comes without
    `checkpoint`, the checkpoint belongs to another run, or the processes differ in their rows,
    schedules or seeds.
    """
    schedule = Schedule() if schedule is None else schedule
    if compile not in COMPILE_MODES:
        raise ValueError(f"`compile` is {compile!r}, but must be one of {', '.join(COMPILE_MODES)}")
    if resume and checkpoint is None:
        raise ValueError("resume=True needs the file to continue from: checkpoint='...'")
    rows = bound.encode(data) if source is None else source
    held_out = None
    if validation is not None:
        held_out = bound.encode(validation, bound.data_facts().levels_with(validation))
    path = None if checkpoint is None else Path(checkpoint)
    resume = resume and path is not None and path.exists()
    with pyro.validation_enabled(False), processes.together():
        if processes.several:
            _check_same(processes, bound, rows, [schedule, seed], resume)
        target = bound.reference().device
        processes.same(bound)
        share = Share.of(processes, rows, bound.network if trains_network(bound) else None)
        bound_guide = guide(bound, share.rows).to(target)
        task = TrainingTask(
            bound, bound_guide, data, rows, share, schedule, held_out, seed, compile, weights
        )
        run = Run(task)
        if resume and path is not None:
            run.restore(Checkpoint.read(path))
        size = schedule.batch(len(rows)) * sum(p.numel() for p in bound.parameters())
        # In small steps, synchronising threads costs more than it saves.
        count = 1 if size < SMALL_STEP else torch.get_num_threads()
        shown = progress and processes.first
        with threads(count), _training_bar(schedule, shown) as report:
            run.train(path, report)
        processes.same(bound, bound_guide)
    posterior, frozen_rows = run.result(), run.phase.frozen_rows
    record_probes(posterior, validation)
    # The run holds copies of the state, and the draws need their memory.
    del run
    release()
    if not refine or frozen_rows is None or not refinable(posterior, source):
        return posterior
    return _with_weights(posterior, frozen_rows)


def _with_weights(posterior: Posterior, rows: RowSource) -> Posterior:
    """The posterior with weighted draws of its guide, and resampled ones if these are better."""
    try:
        weighted = importance_draws(posterior, rows)
        posterior = replace(posterior, importance=weighted)
        # With k-hat above 1 the weights have no mean. Between 0.7 and 1 they improve on the guide,
        # and the diagnostics warn.
        return refined_by(posterior) if weighted.k_hat < 1 else posterior
    except KeyboardInterrupt as error:
        raise TrainingInterrupted(posterior) from error


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
