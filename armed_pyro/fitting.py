"""fit(): the training loop, from a model and data to a Fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyro
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from armed_pyro._memory import release
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.engine.checkpoint import Checkpoint, digest
from armed_pyro.engine.compiled_step import COMPILE_MODES, CompileMode
from armed_pyro.engine.processes import (
    ALONE,
    DISTRIBUTED_MODES,
    DistributedMode,
    Processes,
    join,
    local_device,
)
from armed_pyro.engine.schedule import Schedule
from armed_pyro.engine.shards import Share
from armed_pyro.fitted import Fit
from armed_pyro.guides.base import Guide
from armed_pyro.guides.crossed import choose_guide
from armed_pyro.inference.divergence import DivergenceError
from armed_pyro.inference.importance_sampling import importance_draws, refinable
from armed_pyro.inference.training_run import Run
from armed_pyro.program.data_spec import Facts
from armed_pyro.program.model import MixedEffects
from armed_pyro.rows.source import RowSource
from armed_pyro.streaming.streamed_data import StreamedData

__all__ = ["DivergenceError", "fit", "fit_bound"]

# Multiplications a step, as rows times weights, below which one thread is fastest.
SMALL_STEP = 2**24

OTHER_RUN = (
    "the processes that torchrun started were given other rows, schedules or seeds: give all the "
    "same, or let each fit its own with distributed='never'"
)
OTHER_FILE = (
    "only some of the processes find the checkpoint to resume from: put it on a file system that "
    "all their machines share"
)
NOT_FROM_FILES = (
    "rows that are read from a file as they are needed cannot be shared by several processes yet: "
    "read them into memory, as ClusteredData, or start one process"
)

GuideFactory = Callable[[MixedEffects, RowSource], Guide]


def fit(
    model: MixedEffects,
    data: ClusteredData | StreamedData,
    *,
    validation: ClusteredData | None = None,
    schedule: Schedule | None = None,
    guide: GuideFactory = choose_guide,
    refine: bool = True,
    seed: int = 0,
    device: str = "auto",
    compile: CompileMode = "auto",  # noqa: A002
    distributed: DistributedMode = "auto",
    checkpoint: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Fit:
    r"""Minimise ``-ELBO + lambda_F (-log p(y | f)) + game`` over network, guide and adversaries.

    The model is copied: neither it nor its network changes. The same seed gives the same result
    to the bit on the same CPU and number of threads with ``compile="never"``; steps that are
    compiled round differently.

    Parameters
    ----------
    model : MixedEffects
        What to fit.
    data : ClusteredData or StreamedData
        Training rows, in memory or read from a file as they are needed. Of the latter the fit
        keeps a sample, whole clusters of at most 50,000 rows, by which it is checked.
    validation : ClusteredData, optional
        Rows whose loss decides when to cut the learning rates, when to stop training the network
        and which network is kept; the guide is then trained on until it has converged, too.
        Without them, the smoothed training loss decides.
    schedule : Schedule, optional
        Length and rates of training.
    guide : callable
        Makes the variational family from the bound model and its rows.
    refine : bool
        Whether the guide's draws are importance weighted in the end, where its Pareto k-hat
        allows it: `Fit.refine`.
    seed : int
        Seed of mini-batches and draws; torch's global generator is left as it was.
    device : str
        "auto" (CUDA if there is one), "cpu", "cuda", ...
    compile : {"auto", "always", "never"}
        Whether steps are compiled to one graph: "auto" where that is expected to pay, by the
        time that steps take; on a GPU they are recorded as a CUDA graph before that. What cannot
        be compiled runs as ordinary Pyro, and a warning says why.
    distributed : {"auto", "never"}
        With "auto", processes that `torchrun` started train the network together; every one has
        to be given the same data, and gets the same fit. See `armed_pyro.engine.processes`. With
        "never", each fits on its own.
    checkpoint : path, optional
        File to which the state is written after every window of steps.
    resume : bool
        Continue from `checkpoint` if the file exists; the result is that of an unbroken run.
    progress : bool
        Whether to show a progress bar.

    Raises
    ------
    ValueError
        Before training, if model and data do not fit together; or if `checkpoint` belongs to
        another run.
    DivergenceError
        If the loss is no longer finite; it holds the last good state, whose parameters are
        finite.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> site = np.repeat(np.arange(10), 5)
    >>> y = rng.normal(size=10)[site] + rng.normal(size=50)
    >>> data = ClusteredData.from_arrays(np.zeros((50, 0)), y, {"site": site})
    >>> model = MixedEffects(torch.nn.Linear(0, 1), "(1 | site)", bayesian_head=True)
    >>> fit(model, data, schedule=Schedule(steps=20), progress=False).model.terms[0].factor
    'site'
    """
    if distributed not in DISTRIBUTED_MODES:
        modes = ", ".join(DISTRIBUTED_MODES)
        raise ValueError(f"`distributed` is {distributed!r}, but must be one of {modes}")
    target = torch.device(_device(device))
    processes = ALONE if distributed == "never" else join(target)
    devices = [target] if target.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        # Binding draws the adversaries' first weights.
        torch.manual_seed(seed)
        settings: dict[str, Any] = {
            "validation": validation,
            "schedule": schedule,
            "guide": guide,
            "refine": refine,
            "seed": seed,
            "compile": compile,
            "processes": processes,
            "checkpoint": checkpoint,
            "resume": resume,
            "progress": progress,
        }
        if isinstance(data, ClusteredData):
            return fit_bound(model.bind(data).to(target), data, **settings)
        if processes.several:
            raise ValueError(NOT_FROM_FILES)
        with data.encoded(model.factor_names(), seed, progress=progress) as table:
            bound = model.bind(Facts.of_encoded(table, model.family)).to(target)
            sample, source = table.sample(bound.largest_factor()), table.rows(bound.reference())
            return fit_bound(bound, sample, source=source, **settings)


def fit_bound(
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
) -> Fit:
    """`fit` of a program that is laid out already, whose scales and priors stay as they are.

    The program is trained in place, where it is: on data drawn from its own prior, say, or in a
    worker that has its own generator. `source` is where the training rows are, if `data` are only
    those that the fit keeps; `processes` are those that fit together.

    Examples
    --------
    ``fit_bound(model.bind(data), replace(data, outcome=y_drawn_from_the_prior))``
    """
    schedule = Schedule() if schedule is None else schedule
    if compile not in COMPILE_MODES:
        raise ValueError(f"`compile` is {compile!r}, but must be one of {', '.join(COMPILE_MODES)}")
    if resume and checkpoint is None:
        raise ValueError("resume=True needs the file to continue from: checkpoint='...'")
    rows = bound.encode(data) if source is None else source
    held_out = None
    if validation is not None:
        held_out = bound.encode(validation, bound.data_facts().levels_with(validation)).all()
    path = None if checkpoint is None else Path(checkpoint)
    resume = resume and path is not None and path.exists()
    with pyro.validation_enabled(False), processes.together():
        if processes.several:
            given = [digest(rows, bound.data_facts()), schedule, seed]
            processes.check_same(given, OTHER_RUN)
            processes.check_same(resume, OTHER_FILE)
        target = bound.reference().device
        processes.same(bound)
        share = Share.of(processes, bound, rows)
        family = guide(bound, share.rows).to(target)
        run = Run(bound, family, data, rows, held_out, schedule, seed, compile, share)
        if resume and path is not None:
            run.restore(Checkpoint.read(path))
        size = schedule.batch(len(rows)) * sum(p.numel() for p in bound.parameters())
        shown = progress and processes.first
        with _threads(size), _progress_bar(schedule.steps, shown) as report:
            run.train(path, report)
        processes.same(bound, family)
    result, settled = run.result(), run.settled
    # Make room for draws: of its state there are copies.
    del run
    release()
    if not refine or settled is None or not refinable(result, source):
        return result
    # While the rows are at hand.
    vars(result)["importance"] = importance_draws(result, settled)
    # Above 1 the weights have no mean; between 0.7 and 1 they improve on the guide, and the
    # diagnostics warn.
    return result.refine() if result.importance.k_hat < 1 else result


def _device(name: str) -> str:
    if name == "auto" or (name == "cuda" and torch.cuda.is_available()):
        return local_device() if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} was asked for, but torch finds no CUDA device here")
    return name


@contextmanager
def _threads(size: int) -> Iterator[None]:
    """One thread for steps too small to share: waiting for another costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if size < SMALL_STEP else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _progress_bar(total: int, show: bool) -> Iterator[Callable[[int, str], None]]:
    columns = (
        TextColumn("fitting"),
        BarColumn(),
        TextColumn("step {task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, disable=not show) as bar:
        task = bar.add_task("", total=total)
        yield lambda step, text: bar.update(task, completed=step, description=text)
