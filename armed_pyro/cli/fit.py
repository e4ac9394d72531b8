"""``armed-pyro fit``: fit a table, and save the fit to a folder."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import pandas as pd
import typer
from torch import nn

from armed_pyro._memory import most_held
from armed_pyro._messages import check_probability
from armed_pyro.cli.console import err, out
from armed_pyro.cli.interrupts import interruptible, resume_command
from armed_pyro.cli.options import Between, FitOptions, Missing, ProgramOptions, Refine
from armed_pyro.cli.saved_run import CHECKPOINT, EVALUATION, PARTIAL, check_run_folder
from armed_pyro.data.cluster_columns import is_call
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.data.files import read_table, write_table
from armed_pyro.engine.processes import first_process, leave
from armed_pyro.engine.schedule import Schedule
from armed_pyro.families.family import Family
from armed_pyro.families.registry import family_named
from armed_pyro.fit_result import Fit
from armed_pyro.fitting import DivergenceError, fit
from armed_pyro.inference.refine import duration, nuts_seconds
from armed_pyro.networks.adversary import Adversary
from armed_pyro.networks.by_name import hidden_activations, is_file, network
from armed_pyro.prediction.scores import evaluate
from armed_pyro.program.between import BetweenChoice
from armed_pyro.program.model import MixedEffects
from armed_pyro.random_effects.formula import parse_terms, slopes_formula
from armed_pyro.random_effects.model_formula import ModelFormula, cluster_columns, time_columns
from armed_pyro.random_effects.terms import Slopes, Term
from armed_pyro.report.text import summarize
from armed_pyro.storage.run_lock import is_temporary, locked
from armed_pyro.streaming.parquet_table import TableBlocks
from armed_pyro.streaming.streamed_data import StreamedData

T = TypeVar("T", bound=ProgramOptions)
# Bytes of memory of the process without a table, and of one value of the table in all its copies.
BASE, BYTES_HELD = 500_000_000, 64
UNITS = {"": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}


@dataclass(frozen=True, eq=False)
class SplitRows:
    """Rows to train on, to stop training by, and to evaluate predictions on (by name)."""

    training: ClusteredData | StreamedData
    validation: ClusteredData | None = None
    held_out: dict[str, ClusteredData] = field(default_factory=dict)


def fit_table(options: FitOptions) -> None:
    """Fit a program to a table, save it to a folder, and print its summary.

    The command exits with code 1 if the loss diverged, with 130 after Ctrl-C and with 143 after
    SIGTERM; a message says which state was saved. With `strict` it exits with 3, after saving, if
    either verdict is "fail".
    """
    options = with_formula(options)
    _check_options(options)
    with ExitStack() as run:
        run.enter_context(interruptible(options.run / CHECKPOINT))
        if first_process():
            check_run_folder(options.run, resume=options.resume, overwrite=options.overwrite)
            run.enter_context(locked(options.run))
        _fit_and_save(options)


def with_formula(options: T) -> T:
    """The options with the parts of the formula in their places."""
    if options.formula is None:
        for value, name in ((options.outcome, "outcome Y"), (options.random, "random TERM")):
            if value is None:
                raise ValueError(
                    f"--{name} is missing: give it, or the model in one formula, such as "
                    "armed-pyro fit rows.csv 'y ~ x + (x | site)' --out run"
                )
        return options
    for name in ("outcome", "random", "features"):
        if getattr(options, name):
            raise ValueError(f"--{name} stands beside a formula, which says it: leave one out")
    read = ModelFormula.read(options.formula)
    for role, column in read.roles.items():
        if getattr(options, role) is not None:
            raise ValueError(f"--{role} stands beside {role}({column}) in the formula")
    parts: dict[str, Any] = {**read.roles, "outcome": read.outcome, "random": list(read.random)}
    return replace(options, features=read.features, **parts)


def _check_options(options: FitOptions) -> None:
    """Raise ValueError for options that are wrong whatever the table holds."""
    if options.draws < 2:
        raise ValueError(f"--draws must be at least 2, not {options.draws}")
    if not 0 <= options.seed < 2**63:
        raise ValueError(f"--seed must be at least 0 and below 2^63, not {options.seed}")
    check_probability(options.prob, "--prob")
    for share, name in [
        (options.validate_rows, "--validate-rows"),
        (options.hold_out_clusters, "--hold-out-clusters"),
    ]:
        if share is not None:
            check_probability(share, name)
    if options.hold_out_clusters is not None and not options.random:
        raise ValueError("--hold-out-clusters needs a random effect, such as (1 | site)")
    check_program(options)


def check_program(options: ProgramOptions) -> None:
    """Raise ValueError for options of an adversary, or of layers, that others do not go with."""
    if options.adversary is None:
        for name in ("weight", "taps", "hidden", "warmup"):
            if getattr(options, f"adversary_{name}") is not None:
                raise ValueError(f"--adversary-{name} needs --adversary FACTOR")
    if options.adversary_weight is not None:
        _weight(options.adversary_weight)
    if options.slopes_on and not options.random:
        raise ValueError("--slopes-on needs a random effect, such as (1 | site)")


def _fit_and_save(options: FitOptions) -> None:
    """Train, and save to a folder that is locked. All is written before anything is printed."""
    steps = Schedule.steps if options.steps is None else options.steps
    training = {"folds": options.folds, "weight_decay": options.weight_decay}
    changed: Any = {name: value for name, value in training.items() if value is not None}
    changed |= {"batch_size": options.batch_size, "fold_by": options.fold_by.value}
    schedule = Schedule(steps=steps, **changed)
    terms = terms_of(options)
    family = family_named(options.family)
    split = _rows(options, terms, family)
    model = program(options, terms, family, split.training, options.seed)
    result = _train(options, model, split, schedule)
    leave()
    if not first_process():
        return
    run = options.run
    if options.refine is Refine.nuts:
        result = _by_nuts(result)
    scores = (
        evaluate(result.posterior, split.held_out, prob=options.prob) if split.held_out else None
    )
    _save(result, scores, options)
    _print_fit(result, scores, run, options.prob)
    if isinstance(split.training, StreamedData):
        out.print(f"Most memory held: {most_held() / 1e9:.2f} GB")
    if options.strict and result.diagnostics().failed:
        raise typer.Exit(3)


def terms_of(options: ProgramOptions) -> tuple[Term, ...]:
    """The random effects of the options."""
    terms = parse_terms(options.random or ())
    return terms + tuple(Slopes(terms[0].factor, on=path) for path in options.slopes_on or ())


def _save(result: Fit, scores: pd.DataFrame | None, options: FitOptions) -> None:
    """Write the fit and the scores of held-out rows; keep the checkpoint if that fails."""
    run = options.run
    try:
        result.save(
            run, draws=options.draws, prob=options.prob, quote_formulas=options.quote_formulas
        )
        (run / EVALUATION).unlink(missing_ok=True)
        if scores is not None:
            write_table(scores, run / EVALUATION, quote_formulas=options.quote_formulas)
    except (OSError, ValueError) as error:
        kept = ""
        if (run / CHECKPOINT).exists():
            kept = (
                f"\nIts state is kept in {run / CHECKPOINT}. Mend the cause, then go on with: "
                f"{resume_command()}"
            )
        raise OSError(f"the fit could not be saved: {error}{kept}") from error
    for name in (CHECKPOINT, PARTIAL):
        (run / name).unlink(missing_ok=True)


def _by_nuts(result: Fit) -> Fit:
    """The fit with draws by NUTS, after saying how long they will take."""
    seconds = nuts_seconds(result.posterior)
    err.print(f"Drawing by NUTS, which will take about {duration(seconds)}")
    return result.refine("nuts")


def _rows(options: FitOptions, terms: Sequence[Term], family: Family) -> SplitRows:
    """The table's rows, split as the options say; a streamed table cannot be split."""
    table = opened(options, terms)
    rows = table_rows(options, terms, table, byte_size(options.memory), options.run)
    if isinstance(rows, ClusteredData):
        family.check(rows)
        return _split(options, rows, terms)
    if options.hold_out_clusters is not None or options.validate_rows is not None:
        raise ValueError(
            f"rows cannot be held out of {options.data}, which is streamed: it would take about "
            f"{bytes_needed(table) / 1e9:.1f} GB of memory. Keep them in a file of their own, or "
            "raise --memory"
        )
    return SplitRows(rows)


def opened(options: ProgramOptions, terms: Sequence[Term]) -> TableBlocks:
    """The table, with the labels of clusters as they are written."""
    factors = [term.factor for term in terms] + ([options.adversary] if options.adversary else [])
    return TableBlocks.open(
        options.data, {part for name in factors for part in (name, *name.split(":"))}
    )


def table_rows(
    options: ProgramOptions, terms: Sequence[Term], table: TableBlocks, memory: int, folder: Path
) -> ClusteredData | StreamedData:
    """The table's rows in the roles that the options give its columns; see `training_rows`."""
    features: list[str] | str | None = options.features
    if options.formula is None:
        features = _features(options.features, table.columns)
    watched = [options.adversary] if options.adversary else []
    return training_rows(
        table,
        memory,
        folder,
        outcome=str(options.outcome),
        clusters=cluster_columns(terms, features or [], table.columns, *watched),
        features=features,
        slopes=slopes_formula(options.random or (), table.columns) or (),
        categorical=_listed(options.categorical or ""),
        trials=options.trials,
        offset=options.offset,
        weights=options.weights,
        event=options.event,
        weights_kind=options.weights_kind.value,
        se=options.se,
        times=time_columns(terms),
        status=options.status,
        upper=options.upper,
        entry=options.entry,
        missing="drop" if options.missing is Missing.drop else "error",
    )


def _split(options: FitOptions, rows: ClusteredData, terms: Sequence[Term]) -> SplitRows:
    validation, held_out = None, {}
    if options.hold_out_clusters is not None:
        rows, held_out["clusters"] = rows.hold_out_clusters(
            terms[0].factor, fraction=options.hold_out_clusters, seed=options.seed
        )
    if options.validate_rows is not None:
        rows, validation = rows.split_rows(options.validate_rows, seed=options.seed)
        held_out = {"rows": validation, **held_out}
    return SplitRows(rows, validation, held_out)


def program(
    options: ProgramOptions,
    terms: Sequence[Term],
    family: Family,
    rows: ClusteredData | StreamedData,
    seed: int,
) -> MixedEffects:
    """The program of the options for these rows; the seed is that of the network's weights."""
    arguments, n_outputs = _widths(options.hidden, options.net), outputs(rows, family)
    if options.net == "linear" and isinstance(rows, ClusteredData) and not rows.intercept:
        arguments["bias"] = False
    net = network(options.net, rows.n_features, n_outputs, seed=seed, **arguments)
    head = options.net == "linear" if options.bayesian_head is None else options.bayesian_head
    choices: dict[Between, BetweenChoice] = {Between.yes: True, Between.no: False}
    between = None if options.between is None else choices.get(options.between, "auto")
    return MixedEffects(
        net,
        terms,
        family,
        _adversaries(options, net),
        bayesian_head=head,
        fixed_weight=options.fixed_weight,
        between=between,
        linear_effects=options.linear_effects,
    )


def _adversaries(options: ProgramOptions, net: nn.Module) -> list[Adversary]:
    """The adversary of the options, if there is one."""
    if options.adversary is None:
        return []
    given: dict[str, Any] = {}
    if options.adversary_weight is not None:
        given["weight"] = _weight(options.adversary_weight)
    if options.adversary_hidden is not None:
        given["hidden"] = _numbers(options.adversary_hidden, "--adversary-hidden")
    if options.adversary_warmup is not None:
        given["warmup_epochs"] = options.adversary_warmup
    taps = _listed(options.adversary_taps or "") or hidden_activations(net)
    return [Adversary(options.adversary, taps, **given)]


def _weight(text: str) -> float | str:
    """A weight as a number, or "auto"."""
    if text == "auto":
        return text
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise ValueError(f"--adversary-weight must be a number such as 1, or auto, found {text!r}")
    return weight


def _train(options: FitOptions, model: MixedEffects, split: SplitRows, schedule: Schedule) -> Fit:
    """Fit with a checkpoint in the run's folder; if training ends early, say what was saved."""
    run, checkpoint = options.run, options.run / CHECKPOINT
    if first_process() and not options.resume:
        checkpoint.unlink(missing_ok=True)
    try:
        return fit(
            model,
            split.training,
            validation=_stopping(options, split),
            schedule=schedule,
            seed=options.seed,
            device=options.device.value,
            compile=cast(Any, options.compiled.value),
            checkpoint=checkpoint,
            resume=options.resume,
            progress=err.is_terminal,
        )
    except DivergenceError as error:
        if not first_process():
            raise typer.Exit(1) from error
        error.fit.save(run)
        checkpoint.unlink(missing_ok=True)
        err.print(f"Error: {error}\nThat state is in {run}, marked as diverged.", style="red")
        raise typer.Exit(1) from error


def _stopping(options: FitOptions, split: SplitRows) -> ClusteredData | Literal["auto"] | None:
    """The rows by which the training of a network is stopped."""
    if split.validation is not None:
        return split.validation
    return "auto" if options.cross_fit else None


def _listed(text: str) -> list[str]:
    """Names from a list with commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def _features(text: str | None, table: Collection[str]) -> list[str] | str | None:
    """Columns from a list with commas, or a formula."""
    if text is None:
        return None
    names = _listed(text)
    unknown = [name for name in names if name not in table]
    if "," in text and all(is_call(name) for name in unknown):
        return names
    formula = unknown and (len(names) == 1 or any(character in text for character in "+:*^`()~|"))
    return text if formula else names


def _widths(hidden: str | None, net: str) -> dict[str, Any]:
    """The network's arguments for --hidden."""
    if hidden is None:
        return {}
    if net == "linear" or is_file(net):
        raise ValueError(f"--hidden is for --net dense, not for --net {net}")
    return {"hidden": _numbers(hidden, "--hidden")}


def _numbers(text: str, option: str) -> list[int]:
    """Widths of layers from a list with commas."""
    if not all(width.strip().isdigit() for width in text.split(",")):
        raise ValueError(f"{option} must be widths such as 32,32, found {text!r}")
    return [int(width) for width in text.split(",")]


def _print_fit(result: Fit, scores: pd.DataFrame | None, run: Path, prob: float) -> None:
    """Print the summary, the evaluation and the files."""
    out.print(summarize(result.results(prob=prob)))
    if scores is not None:
        out.print("\nPredictions of held-out rows:")
        out.print(scores.to_string(index=False, float_format="{:.4g}".format))
    files = sorted(path.name for path in run.iterdir() if not is_temporary(path.name))
    out.print(f"\nIn {run}: {', '.join(files)}")
    out.print(f"Next: armed-pyro report {run} --out report.html")


def bytes_needed(table: TableBlocks) -> int:
    """Estimated bytes of memory for the table in memory, with those of the process."""
    return BASE + BYTES_HELD * table.n_rows * len(table.columns)


def training_rows(
    table: TableBlocks, memory: int, folder: Path, *, slopes: Any = (), **roles: Any
) -> ClusteredData | StreamedData:
    """The rows; those of a Parquet table that needs more memory (in bytes) are streamed.

    `folder` gets the temporary files of a streamed table. The roles of columns, and the errors,
    are those of `ClusteredData.from_frame`; streamed rows have slopes on features only.
    """
    if table.frame is None and bytes_needed(table) > memory:
        folder.mkdir(parents=True, exist_ok=True)
        return StreamedData.scan(table.path, memory=memory, folder=folder, **roles)
    frame = read_table(table.path) if table.frame is None else table.frame
    return ClusteredData.from_frame(frame, slopes=slopes, **roles)


def outputs(rows: ClusteredData | StreamedData, family: Family) -> int:
    """Number of outputs that a network needs for the outcome of these rows."""
    if isinstance(rows, ClusteredData):
        return family.outputs(len(family.columns(rows)))
    if not family.multiclass:
        return family.outputs(1)
    classes = rows.scanned.schema.classes
    if classes is None:
        raise ValueError(
            "the classes of a streamed outcome must be text or categories, not numbers: write "
            "them to the table as text"
        )
    return family.outputs(len(classes) - 1)


def byte_size(text: str | None) -> int:
    """Number of bytes in text such as 2GB or 500 MB; half of the machine's memory for None.

    >>> byte_size("1.5 GB")
    1500000000
    """
    if text is None:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    match = re.fullmatch(r"\s*([0-9.]+)\s*([kmgt]?b?)\s*", text.lower())
    unit = match and (match[2] if match[2] in UNITS else match[2] + "b")
    if not match or unit not in UNITS or match[1].count(".") > 1 or not float(match[1]) > 0:
        raise ValueError(f"--memory: expected a size such as 2GB or 500MB, found {text!r}")
    return int(float(match[1]) * UNITS[unit])
