"""The options of every command, as fields of a frozen dataclass per command."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

__all__ = [
    "DemoOptions",
    "FitOptions",
    "Missing",
    "PredictOptions",
    "Refine",
    "ReportOptions",
    "takes",
]

T = TypeVar("T")
Compile = StrEnum("Compile", ["auto", "always", "never"])
Device = StrEnum("Device", ["auto", "cpu", "cuda"])
Missing = StrEnum("Missing", ["error", "drop"])
Refine = StrEnum("Refine", ["psis", "nuts"])


def takes(options: type[T]) -> Callable[[Callable[[T], None]], Callable[..., None]]:
    """Decorator: a command whose options are the fields of a dataclass.

    Examples
    --------
    >>> @dataclass
    ... class Options:
    ...     steps: int = 5
    >>> command = takes(Options)(print)
    >>> inspect.signature(command)
    <Signature (steps: int = 5)>
    >>> command(steps=6)
    Options(steps=6)
    """
    hints = get_type_hints(options, include_extras=True)
    parameters = [
        parameter.replace(annotation=hints[name])
        for name, parameter in inspect.signature(options).parameters.items()
    ]

    def decorate(command: Callable[[T], None]) -> Callable[..., None]:
        @functools.wraps(command)
        def called(**values: Any) -> None:
            command(options(**values))

        # Typer reads a command's options from its annotations and signature.
        called.__annotations__ = hints
        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return called

    return decorate


def option(text: str, *names: str, metavar: str | None = None) -> Any:
    """An option of the command line, with its help text.

    ``{families}``, ``{modes}`` and ``{steps}`` in the text are filled in when help is shown,
    because the library's lists are slow to import.
    """
    return typer.Option(*names, metavar=metavar, help=text)


def column(text: str) -> Any:
    """An option that names a column."""
    return option(text, metavar="COLUMN")


Data = Annotated[Path, typer.Argument(metavar="DATA", help="CSV or Parquet table: rows.csv")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder that fit wrote: run")]
Probability = Annotated[
    float, option("Probability of the equal-tailed intervals: --prob 0.95", "--prob")
]
UserNetwork = Annotated[
    str | None,
    option("The network, if it is one of your own: --net my_net.py:MyNet", metavar="FILE.py:NAME"),
]


@dataclass(frozen=True)
class FitOptions:
    """Options of ``armed-pyro fit``."""

    data: Data
    outcome: Annotated[str, column("Column of the outcome: --outcome score")]
    random: Annotated[
        list[str],
        option(
            "Random effects in lme4's syntax, repeatable: --random '(1 + age | site)'; "
            "'(1 + age || site)' independent, '(1 | school/class)' nested",
            metavar="TERM",
        ),
    ]
    run: Annotated[Path, option("Folder to write the fit to: --out run", "--out", metavar="RUN")]
    features: Annotated[
        str | None,
        option(
            "Columns, or a formula: --features age,sex or 'age * sex' [default: all other columns]",
            metavar="A,B,C",
        ),
    ] = None
    net: Annotated[
        str,
        option(
            "Fixed effects: linear, dense, or a network (or its class) in a file of yours, "
            "which is executed: --net my_net.py:MyNet",
            metavar="NET",
        ),
    ] = "linear"
    hidden: Annotated[
        str | None,
        option("Widths of dense's hidden layers: --hidden 64,32 [default: 32,32]", metavar="N,N"),
    ] = None
    family: Annotated[str, option("Outcome model, one of {families}: --family bernoulli")] = (
        "gaussian"
    )
    trials: Annotated[str | None, column("Denominators of a binomial outcome: --trials size")] = (
        None
    )
    offset: Annotated[str | None, column("Known term of the predictor: --offset log_days")] = None
    weights: Annotated[str | None, column("Factors of the rows' log-likelihoods: --weights n")] = (
        None
    )
    missing: Annotated[
        Missing, option("Rows with missing values; to leave them out: --missing drop")
    ] = Missing.error
    slopes_on: Annotated[
        list[str] | None,
        option(
            "Nonlinear random slopes of the first grouping factor on a hidden layer's "
            "activations, by module path; repeatable: --slopes-on 3",
            metavar="PATH",
        ),
    ] = None
    bayesian_head: Annotated[
        bool | None,
        option(
            "Whether the last linear layer gets a posterior [default: with --net linear only]",
            "--bayesian-head/--no-bayesian-head",
        ),
    ] = None
    adversary: Annotated[
        str | None,
        option("Factor to keep out of the hidden layers: --adversary site", metavar="FACTOR"),
    ] = None
    adversary_weight: Annotated[
        float | None,
        option("Strength of the adversary: --adversary-weight 5 [default: 1]", metavar="W"),
    ] = None
    validate_rows: Annotated[
        float | None,
        option("Share of rows to stop training by and judge: --validate-rows 0.2", metavar="F"),
    ] = None
    hold_out_clusters: Annotated[
        float | None,
        option(
            "Share of clusters of the first factor to leave out, and judge: --hold-out-clusters .2",
            metavar="F",
        ),
    ] = None
    steps: Annotated[
        int | None,
        option(
            "Most training steps, if it has not converged before: --steps 5000 [default: {steps}]"
        ),
    ] = None
    batch_size: Annotated[
        int | None, option("Rows a step: --batch-size 512 [default: all, or 1024 of over 4096]")
    ] = None
    seed: Annotated[int, option("The same seed gives the same result: --seed 1")] = 0
    device: Annotated[
        Device, option("Where to train; auto takes a GPU if there is one: --device cpu")
    ] = Device.auto
    compiled: Annotated[
        Compile,
        option("Compile training steps; auto where it pays: --compile never", "--compile"),
    ] = Compile.auto
    draws: Annotated[int, option("Posterior draws to save: --draws 2000")] = 1000
    prob: Probability = 0.9
    refine: Annotated[
        Refine,
        option(
            "Posterior draws: the guide's, weighted (psis), or exact but slow ones by NUTS, whose "
            "expected time is told first: --refine nuts"
        ),
    ] = Refine.psis
    strict: Annotated[
        bool,
        option(
            "Exit with code 3, after saving, if the verdict on the computation or on the model is "
            "'fail'",
            "--strict",
        ),
    ] = False
    memory: Annotated[
        str | None,
        option(
            "Memory to stay within: a Parquet table that would take more is streamed from disk "
            "(temporary files beside RUN): --memory 2GB [default: half of the machine's]",
            metavar="SIZE",
        ),
    ] = None
    resume: Annotated[
        bool, option("Continue a killed run: the same command with --resume", "--resume")
    ] = False
    overwrite: Annotated[bool, option("Replace the fit in RUN", "--overwrite")] = False


@dataclass(frozen=True)
class PredictOptions:
    """Options of ``armed-pyro predict``."""

    run: RunFolder
    data: Data
    pred: Annotated[Path, option("Table to write: --out pred.csv", "--out", metavar="PRED")]
    unseen: Annotated[
        str | None,
        option(
            "Assumption on clusters not seen in training, required if there are any: {modes}",
            metavar="MODE",
        ),
    ] = None
    support: Annotated[
        Path | None,
        option(
            "Labelled rows of the new clusters, for --unseen adapt: --support first_rows.csv",
            metavar="FILE",
        ),
    ] = None
    by_row: Annotated[
        bool,
        option("Membership of each row by itself, not of its whole cluster", "--by-row"),
    ] = False
    compare: Annotated[
        bool,
        option(
            "Compare all modes on the new clusters, whose outcomes DATA must have; the table is "
            "printed and written beside PRED, as PRED.modes.csv",
            "--compare",
        ),
    ] = False
    net: UserNetwork = None
    draws: Annotated[int, option("Posterior draws: --draws 2000")] = 1000
    prob: Probability = 0.9
    seed: Annotated[int | None, option("Seed of the draws: --seed 1 [default: the fit's]")] = None


@dataclass(frozen=True)
class ReportOptions:
    """Options of ``armed-pyro report``."""

    run: RunFolder
    html: Annotated[Path, option("Page to write: --out report.html", "--out", metavar="HTML")]
    net: UserNetwork = None
    prob: Probability = 0.9


@dataclass(frozen=True)
class DemoOptions:
    """Options of ``armed-pyro demo``."""

    folder: Annotated[Path, option("Folder to write to: --out demo", "--out", metavar="DIR")] = (
        Path("results/demo")
    )
