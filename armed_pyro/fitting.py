"""fit(): bind a program to data, train it, and return a Fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from rich.console import Console

from armed_pyro._messages import INTEGER, check_type
from armed_pyro._pyro_module import exclusive
from armed_pyro.automatic_weight import WeightSearch, with_weights
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.data.own_means import with_own_means
from armed_pyro.engine.checkpoint import Checkpoint
from armed_pyro.engine.compiled_step import CompileMode
from armed_pyro.engine.processes import (
    ALONE,
    DISTRIBUTED_MODES,
    DistributedMode,
    Processes,
    join,
    local_device,
)
from armed_pyro.engine.schedule import Schedule
from armed_pyro.fit_result import Fit
from armed_pyro.guides.crossed import choose_guide
from armed_pyro.inference.network_training import NetworkTraining, TrainingArguments
from armed_pyro.inference.train import GuideFactory, train
from armed_pyro.inference.training_run import TrainingDiverged, TrainingInterrupted
from armed_pyro.inference.warm_start import warm_started
from armed_pyro.program.data_spec import Facts
from armed_pyro.program.linear_effects import with_linear_effects
from armed_pyro.program.model import MixedEffects
from armed_pyro.program.mundlak import with_between
from armed_pyro.rows.source import RowSource
from armed_pyro.streaming.on_disk import StreamedRows
from armed_pyro.streaming.streamed_data import StreamedData

__all__ = ["DivergenceError", "FitInterrupted", "fit"]


class DivergenceError(RuntimeError):
    """The loss or its gradient is no longer finite, or the loss has diverged.

    `fit` is the fit at the start of the window of steps with the lowest mean loss.

    Examples
    --------
    ``except DivergenceError as error: error.fit.summary()``
    """

    def __init__(self, message: str, fit: Fit) -> None:
        super().__init__(message)
        self.fit = fit


class FitInterrupted(KeyboardInterrupt):
    """Training was interrupted, by Ctrl-C or a signal whose handler raises KeyboardInterrupt.

    `fit` is the fit at the end of the last whole window of steps, and the checkpoint holds the same
    state.

    Examples
    --------
    ``except FitInterrupted as error: error.fit.summary()``
    """

    def __init__(self, fit: Fit) -> None:
        super().__init__("training was interrupted; the error's `fit` attribute holds its state")
        self.fit = fit


@exclusive
def fit(
    model: MixedEffects,
    data: ClusteredData | StreamedData,
    *,
    validation: ClusteredData | Literal["auto"] | None = "auto",
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
    clip: float | None = None,
    warm_start: Fit | None = None,
    **training: Unpack[TrainingArguments],
) -> Fit:
    r"""Minimise ``-ELBO + lambda_F (-log p(y | f)) + adversarial loss`` over all parameters.

    The parameters are those of network, guide and adversaries. The model is copied: neither it nor
    its network changes. With ``compile="never"``, the same seed gives the same result to the bit on
    the same CPU and number of threads. Compiled steps differ by rounding errors.

    Pyro's state and torch's random numbers are global to a process, so `fit` and the methods of
    `Fit` wait for each other if several threads call them. Do not draw from torch's global
    generator in another thread meanwhile.

    Parameters
    ----------
    data : ClusteredData or StreamedData
        Of streamed rows the fit keeps a sample of whole clusters, at most 50,000 rows, for checks.
    validation : "auto", ClusteredData or None
        Rows that stop the training of a network; other programs do not need any. Their score is
        the log-likelihood with the random effects integrated out, and decides when to cut the
        learning rates and which weights are kept. The guide is then trained further until it has
        converged.

        With "auto", the rows are divided into `Schedule.folds` parts, by whole clusters of the
        largest factor if it has at least five, else by rows (`Schedule.fold_by`). A network is
        trained for each part, on the other parts, and stopped by the evidence of the part given
        its outputs. The posterior is settled on outputs for rows that their network has not seen
        (cross-fitting; Chernozhukov et al. 2018, Econometrics Journal 21(1)). Variance components
        are therefore those of new rows. Rows of seen clusters keep the network of their part in
        predictions, and rows of new clusters get the mean of all networks.
        If terms, a latent last layer or further outcomes act on hidden layers, a single network
        is trained, and a fifth of the rows stops it; of streamed rows, at most 20,000 rows.
        Nothing is held out with ``Schedule(stages=0)``.

        With None, all rows train the network until its training loss has stopped falling. A
        network that can memorise its rows then fails the verdict on the model.
    schedule : Schedule, optional
        Length and learning rates of the training.
    guide : callable
        Makes the variational family from the bound model and its rows.
    refine : bool
        Whether to weight the guide's draws by importance, if Pareto k-hat allows; see `Fit.refine`.
    seed : int
        Seed of mini-batches and draws, from 0. Torch's global random state is the same afterwards.
    device : str
        "auto" (CUDA if available), "cpu", "cuda", ...
    compile : {"auto", "always", "never"}
        Whether to compile each step to one graph. "auto" compiles if the measured time of the steps
        suggests that it saves time; on a GPU, steps are first recorded as a CUDA graph. A program
        that cannot be compiled runs as ordinary Pyro code, with a warning that gives the reason.
    distributed : {"auto", "never"}
        With "auto", processes started by `torchrun` train the network together. All of them need
        the same data, and all get the same fit; see `armed_pyro.engine.processes`. With "never",
        each process fits by itself.
    checkpoint : path, optional
        File to which the state is written after every window of steps.
    resume : bool
        Continue from `checkpoint` if it exists, with the result of an uninterrupted run: to the
        bit if no step was compiled, else up to rounding errors. A run whose steps ran out goes on
        with a schedule of more steps.
    progress : bool
        Whether to show a progress bar.
    optimizer : callable, optional
        Makes the network's optimizer from its groups of parameters, such as
        ``lambda groups: torch.optim.AdamW(groups, lr=1e-3)``. By default the library's Adam, which
        always trains the guide. Its rates are multiplied by the schedule's cuts. Such steps are not
        compiled. Called once per cross-fitted network.
    scheduler : callable, optional
        Makes a scheduler of torch from that optimizer; it is told of every step.
    parameter_groups : mapping of str to mapping, optional
        Settings of the optimizer by module path, ``{"backbone": {"lr": 1e-5}}``. The other weights
        are the groups "network" and "adversary".
    callbacks : sequence of callable
        Called with a `TrainingRecord` after every window of steps; True ends the phase, at the best
        network.
    precision : {"full", "bf16-mixed"}
        Whether the network is trained in mixed precision; program and predictions are not.
    accumulate : int
        Batches whose mean gradient is one step of the network.
    clip : float, optional
        `Schedule.clip`.
    monitor : {"log_score", "auroc", "accuracy", "rmse", "mae"}
        The measure of held-out rows that decides when a network is best.
    warm_start : Fit, optional
        An earlier fit of the same features, outcome and network, at whose network the training
        begins. Rows and clusters may be new.

    Raises
    ------
    ValueError
        If an adversary's weight is "auto", and rows are streamed or too few to be held out.
        If model and data do not match, before training; or if `checkpoint` belongs to another run.
    DivergenceError
        If training diverges. The error holds the last good fit, whose parameters are finite.
    FitInterrupted
        At Ctrl-C. The error, a KeyboardInterrupt, holds the fit so far.

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
    _check_arguments(model, data, validation, schedule, seed)
    schedule = _clipped(schedule, clip)
    network_training = NetworkTraining(**training)
    target = torch.device(_device(device))
    processes = _joined(distributed, target, data)
    devices = [target] if target.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        # Binding draws the initial weights of the adversaries.
        torch.manual_seed(seed)
        search = WeightSearch(schedule, guide, target, compile, seed, progress)
        model, weights = _weighed(model, data, search, checkpoint if resume else None)
        with _fits_in_errors(), _bound(model, data, target, seed, progress=progress) as placed:
            bound, kept, source = placed
            bound = _started(model, bound, warm_start, target, progress=progress)
            posterior = train(
                bound,
                kept,
                source=source,
                validation=validation,
                schedule=schedule,
                guide=guide,
                refine=refine,
                seed=seed,
                compile=compile,
                processes=processes,
                checkpoint=checkpoint,
                resume=resume,
                progress=progress,
                weights=weights,
                training=network_training,
            )
        return Fit(posterior)


def _clipped(schedule: Schedule | None, clip: float | None) -> Schedule | None:
    """The schedule with this limit of gradients, if there is one."""
    return schedule if clip is None else replace(schedule or Schedule(), clip=clip)


def _joined(
    distributed: DistributedMode, target: torch.device, data: ClusteredData | StreamedData
) -> Processes:
    """The processes that train together; ValueError for an unknown mode, or streamed rows."""
    if distributed not in DISTRIBUTED_MODES:
        modes = ", ".join(DISTRIBUTED_MODES)
        raise ValueError(f"`distributed` is {distributed!r}, but must be one of {modes}")
    processes = ALONE if distributed == "never" else join(target)
    if processes.several and not isinstance(data, ClusteredData):
        raise ValueError(
            "several processes cannot yet train on rows that are streamed from a file: read the "
            "rows into memory, as ClusteredData, or start a single process"
        )
    return processes


def _check_arguments(
    model: object, data: object, validation: object, schedule: object, seed: object
) -> None:
    """Raise TypeError for an argument of `fit` of another type, with the way to make it."""
    table = "Encode a table with ClusteredData.from_frame(table, outcome=..., clusters=[...])."
    check_type(model, MixedEffects, "model", "Wrap a network: MixedEffects(net, '(1 | site)').")
    check_type(data, (ClusteredData, StreamedData), "data", table)
    if not (isinstance(validation, str) and validation == "auto"):
        check_type(validation, (ClusteredData, type(None)), "validation", table)
    check_type(schedule, (Schedule, type(None)), "schedule", "Pass Schedule(steps=2000).")
    check_type(seed, INTEGER, "seed")
    if not 0 <= int(seed) < 2**63:  # type: ignore[call-overload]
        raise ValueError(f"`seed` must be at least 0 and below 2^63, not {seed}")


@contextmanager
def _fits_in_errors() -> Iterator[None]:
    """Errors of a training run hold the fit so far."""
    try:
        yield
    except TrainingDiverged as error:
        raise DivergenceError(str(error), Fit(error.posterior)) from error
    except TrainingInterrupted as error:
        raise FitInterrupted(Fit(error.posterior)) from error


def _started(
    model: MixedEffects,
    bound: MixedEffects,
    warm_start: Fit | None,
    target: torch.device,
    *,
    progress: bool,
) -> MixedEffects:
    """The bound program at the network of an earlier fit; a line tells the means "auto" added."""
    if warm_start is not None:
        bound = warm_started(model, bound, warm_start.model).to(target)
    between = bound.data_facts().between
    if progress and between is not None:
        Console(stderr=True).print(f"Clusters' means: {between.note}", markup=False)
    return bound


def _weighed(
    model: MixedEffects,
    data: ClusteredData | StreamedData,
    search: WeightSearch,
    resumed: str | Path | None,
) -> tuple[MixedEffects, list[dict[str, Any]]]:
    """The program with all weights of adversaries as numbers, and the weights that were tried."""
    places = [n for n, game in enumerate(model.adversaries) if game.weight == "auto"]
    if not places:
        return model, []
    if resumed is not None and Path(resumed).exists():
        # Rounding errors, as of compiled steps, could lead to another choice.
        record = Checkpoint.read(Path(resumed)).record
        games = record["run"].get("adversary", [])
        if len(games) == len(model.adversaries):
            weights = {n: games[n]["weight"] for n in places}
            return with_weights(model, weights), record["history"].get("weights", [])
    if not isinstance(data, ClusteredData):
        raise ValueError(
            "an adversary's automatic weight needs rows in memory, and these are streamed: find "
            "the weight on a sample of whole clusters, and give it as Adversary(..., weight=1.0)"
        )
    return search.choose(model, data)


@contextmanager
def _bound(
    model: MixedEffects,
    data: ClusteredData | StreamedData,
    target: torch.device,
    seed: int,
    *,
    progress: bool,
) -> Iterator[tuple[MixedEffects, ClusteredData, RowSource | None]]:
    """A copy of the model bound to the rows, the rows to keep, and all rows if these are fewer."""
    if isinstance(data, ClusteredData):
        data = with_own_means(data)
        yield model.bind(data).to(target), data, None
        return
    with data.encoded(model.factor_names(), seed, progress=progress) as table:
        model = model.with_family(model.family.bound(table.outcomes()))
        bound = model.bind(with_linear_effects(model, Facts.of_encoded(table, model.family)))
        sample = table.sample(bound.largest_factor())
        facts = with_between(bound, sample, table.cluster_sums)
        bound = (bound if facts.between is None else model.bind(facts)).to(target)
        means = {} if facts.between is None else facts.between.by_cluster(facts.levels)
        yield bound, sample, StreamedRows(table, bound.reference(), means)


def _device(name: str) -> str:
    """The device of this process."""
    if name == "auto" or (name == "cuda" and torch.cuda.is_available()):
        return local_device() if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} is not available: torch finds no CUDA device")
    return name
