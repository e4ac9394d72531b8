"""The options of every command, as fields of a frozen dataclass per command."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar, final

import typer

from armed_pyro.cli.console import messages

T = TypeVar("T")
Compile = StrEnum("Compile", ["auto", "always", "never"])
Device = StrEnum("Device", ["auto", "cpu", "cuda"])
Weights = StrEnum("Weights", ["frequency", "precision"])
Missing = StrEnum("Missing", ["error", "drop"])
Holes = StrEnum("Holes", ["error", "empty"])
Refine = StrEnum("Refine", ["psis", "nuts"])
NetworkUncertainty = StrEnum("NetworkUncertainty", ["none", "ensemble"])
HeldOutBy = StrEnum("HeldOutBy", ["clusters", "rows"])
Criterion = StrEnum("Criterion", ["log_score", "rmse", "accuracy"])
Between = StrEnum("Between", ["auto", "yes", "no"])


def takes(options: type[T]) -> Callable[[Callable[[T], None]], Callable[..., None]]:
    """Decorator: a command whose options are the fields of a dataclass; see `messages`.

    >>> @dataclass
    ... class Options:
    ...     steps: int = 5
    >>> command = takes(Options)(print)
    >>> inspect.signature(command)
    <Signature (steps: int = 5) -> None>
    >>> command(steps=6)
    Options(steps=6)
    """
    signature = inspect.signature(options, eval_str=True)

    def decorate(command: Callable[[T], None]) -> Callable[..., None]:
        @functools.wraps(command)
        def called(**values: Any) -> None:
            with messages():
                command(options(**values))

        # Typer reads a command's options from its annotations and signature.
        called.__annotations__ = {k: p.annotation for k, p in signature.parameters.items()}
        called.__signature__ = signature  # type: ignore[attr-defined]
        return called

    return decorate


def option(default: Any, text: str, *names: str, metavar: str | None = None) -> Any:
    """An option with its default (... if it is required) and its help text.

    ``{families}``, ``{modes}`` and ``{steps}`` in the text are filled in when help is shown,
    because the library's lists are slow to import.
    """
    return typer.Option(default, *names, metavar=metavar, help=text)


def column(text: str, default: Any = None) -> Any:
    """An option that names a column."""
    return option(default, text, metavar="COLUMN")


DATA = typer.Argument(metavar="DATA", help="CSV or Parquet table: rows.csv")
FORMULA = typer.Argument(
    None,
    metavar="FORMULA",
    help="The model in one formula, in place of --outcome, --random and --features: "
    "'Reaction ~ Days + (Days | Subject)'; functions such as log(x), poly(x, 2), bs(x, df=5), "
    "C(x, Sum), offset(log(x)), and processes in time such as ou(week | id), are in "
    "docs/formulas.md",
)
RUN = typer.Argument(metavar="RUN", help="Folder that fit wrote: run")
INTERVALS = "Probability of the equal-tailed intervals: --prob 0.95"
SAVED_PROB = option(None, f"{INTERVALS} [default: that of the fit]", "--prob")
USER_NETWORK = option(
    None,
    "The network, if it is one of your own: --net my_net.py:MyNet",
    metavar="FILE.py:NAME",
)
VERIFY = option(
    True,
    "Whether the files of RUN must be as fit wrote them; for files changed on purpose: --no-verify",
    "--verify/--no-verify",
)
QUOTE_FORMULAS = option(
    False,
    "Put an apostrophe before texts in CSV files that a spreadsheet would take as formulas (=1+1)",
    "--quote-formulas",
)


@dataclass(frozen=True)
class ProgramOptions:
    """Abstract: the options of the rows and the program, which ``fit`` and ``tune`` share."""

    data: Path = DATA
    formula: str | None = FORMULA
    outcome: str | None = column("Column of the outcome, without FORMULA: --outcome score")
    random: list[str] | None = option(
        None,
        "Random effects in lme4's syntax, repeatable, without FORMULA: "
        "--random '(1 + age | site)'; "
        "'(1 + age || site)' independent, '(1 | school/class)' nested, '(0 + arm | site)' an "
        "effect for every level of arm; slopes need not be features; other names in `backticks`",
        metavar="TERM",
    )
    features: str | None = option(
        None,
        "Columns, or a formula: --features age,sex or 'age * factor(dose)'; 'within(age | site) + "
        "between(age | site)' are deviations from the sites' means, and these means; 1 is an "
        "intercept alone, '0 + age' has none [default: all other columns]",
        metavar="A,B,C",
    )
    categorical: str | None = option(
        None,
        "Numeric columns whose values are categories, as factor() in a formula: "
        "--categorical dose,arm",
        metavar="A,B",
    )
    net: str = option(
        "linear",
        "Fixed effects: linear, dense, or a network (or its class) in a file of yours, "
        "which is executed: --net my_net.py:MyNet",
        metavar="NET",
    )
    hidden: str | None = option(
        None, "Widths of dense's hidden layers: --hidden 64,32 [default: 32,32]", metavar="N,N"
    )
    family: str = option(
        "gaussian",
        "Outcome model, one of {families}: --family bernoulli. Another link follows in "
        "parentheses, or the family inside: --family 'bernoulli(probit)', 'hurdle(gamma)'",
    )
    event: str | None = option(
        None,
        "The label of a two-valued outcome whose probability is modelled: --event case "
        "[default: the second in sorted order]",
        metavar="LABEL",
    )
    trials: str | None = column("Denominators of a binomial outcome: --trials size")
    offset: str | None = column("Known term of the predictor: --offset log_days")
    weights: str | None = column("Weights of the rows: --weights n")
    weights_kind: Weights = option(
        Weights.frequency,
        "Meaning of --weights: how often a row counts, or its precision, by which the residual "
        "variance is divided as in lme4: --weights-kind precision",
    )
    se: str | None = column("Known standard errors of the rows, as in a meta-analysis: --se sei")
    status: str | None = column(
        "Whether the outcome was observed: 1 for an event, 0 if it is only known to be larger "
        "(censored), as event(time, status) in FORMULA: --status died"
    )
    upper: str | None = column(
        "Upper ends of intervals that have the outcome as lower end, as interval(lower, upper) in "
        "FORMULA; open where missing: --upper last_seen"
    )
    entry: str | None = column(
        "Values above which outcomes could be observed (left truncation): --entry age_at_start"
    )
    missing: Missing = option(
        Missing.error, "Rows with missing values; to leave them out: --missing drop"
    )
    slopes_on: list[str] | None = option(
        None,
        "Nonlinear random slopes of the first grouping factor on a hidden layer's "
        "activations, by module path; repeatable: --slopes-on 3",
        metavar="PATH",
    )
    bayesian_head: bool | None = option(
        None,
        "Whether the last linear layer gets a posterior [default: with --net linear only]",
        "--bayesian-head/--no-bayesian-head",
    )
    between: Between | None = option(
        None,
        "Whether means of features in the clusters of a random intercept are fixed effects, so "
        "that slopes within and between clusters may differ; auto where they do: --between yes "
        "[default: auto for networks, no for --net linear]",
    )
    linear_effects: bool | None = option(
        None,
        "Whether linear effects of the features are latent beside a network, which then learns "
        "what is not linear [default: for up to 100 features, without adversary and terms on "
        "layers]",
        "--linear-effects/--no-linear-effects",
    )
    adversary: str | None = option(
        None, "Factor to keep out of the hidden layers: --adversary site", metavar="FACTOR"
    )
    adversary_weight: str | None = option(
        None,
        "Strength of the adversary, or auto, which raises it until the factor cannot be read, as "
        "far as predictions of held-out clusters do not suffer: --adversary-weight auto "
        "[default: 1]",
        metavar="W",
    )
    adversary_taps: str | None = option(
        None,
        "Module paths that the adversary reads: --adversary-taps 1,3 [default: the hidden layers]",
        metavar="A,B",
    )
    adversary_hidden: str | None = option(
        None,
        "Widths of the adversary's own hidden layers: --adversary-hidden 64,32 [default: 32]",
        metavar="N,N",
    )
    adversary_warmup: float | None = option(
        None,
        "Passes over the rows in which the adversary's strength rises: --adversary-warmup 0 "
        "[default: 5]",
        metavar="EPOCHS",
    )
    fixed_weight: float = option(
        0.0,
        "Weight of the likelihood under the fixed effects alone, which helps predictions of new "
        "clusters: --fixed-weight 1",
        metavar="W",
    )


@final
@dataclass(frozen=True)
class FitOptions(ProgramOptions):
    """Options of ``armed-pyro fit``."""

    run: Path = option(..., "Folder to write the fit to: --out run", "--out", metavar="RUN")
    validate_rows: float | None = option(
        None,
        "Share of rows to stop a network's training by, and to judge: --validate-rows 0.2 "
        "[default: cross-fitting, in which every part of the rows stops the network of the others]",
        metavar="F",
    )
    cross_fit: bool = option(
        True,
        "Whether rows are held out from a network's training by default; without, nothing stops "
        "it from learning its rows by heart",
        "--cross-fit/--no-cross-fit",
    )
    folds: int | None = option(
        None,
        "Networks of the cross-fitting, or 1 for a single network and a fifth of the rows held "
        "out: --folds 10 [default: 5]",
    )
    fold_by: HeldOutBy = option(
        HeldOutBy.clusters,
        "What the parts of the cross-fitting are made of: whole clusters, where there are at least "
        "five, for predictions of new clusters, or rows, for new rows of the same clusters: "
        "--fold-by rows",
    )
    weight_decay: float | None = option(
        None,
        "Fraction of the learning rate by which a network's weights shrink per step: "
        "--weight-decay 1 [default: 0.1]",
        metavar="W",
    )
    hold_out_clusters: float | None = option(
        None,
        "Share of clusters of the first factor to leave out, and judge: --hold-out-clusters .2",
        metavar="F",
    )
    steps: int | None = option(
        None, "Most training steps, if it has not converged before: --steps 5000 [default: {steps}]"
    )
    batch_size: int | None = option(
        None,
        "Rows per step: --batch-size 512 [default: all, or 1024 of over 4096; for a network that "
        "held-out rows stop, 32 to 256]",
    )
    seed: int = option(0, "The same seed gives the same result: --seed 1")
    device: Device = option(
        Device.auto, "Where to train; auto takes a GPU if there is one: --device cpu"
    )
    compiled: Compile = option(
        Compile.auto, "Compile training steps; auto where it pays: --compile never", "--compile"
    )
    draws: int = option(1000, "Posterior draws to save: --draws 2000")
    prob: float = option(0.9, INTERVALS)
    refine: Refine = option(
        Refine.psis,
        "Posterior draws: the guide's, weighted (psis), or exact but slow ones by NUTS, whose "
        "expected time is told first: --refine nuts",
    )
    strict: bool = option(
        False,
        "Exit with code 3, after saving, if the verdict on the computation or on the model is "
        "'fail'",
        "--strict",
    )
    quote_formulas: bool = QUOTE_FORMULAS
    memory: str | None = option(
        None,
        "Memory to stay within: a Parquet table that would take more is streamed from disk "
        "(temporary files in RUN): --memory 2GB [default: half of the machine's]",
        metavar="SIZE",
    )
    resume: bool = option(
        False, "Continue a killed run: the same command with --resume", "--resume"
    )
    overwrite: bool = option(False, "Replace the fit in RUN", "--overwrite")


@final
@dataclass(frozen=True)
class TuneOptions(ProgramOptions):
    """Options of ``armed-pyro tune``."""

    over: list[str] = option(
        ...,
        "Values of an option of the program, separated by semicolons, the default first; "
        "repeatable, and all combinations are tried: --over 'fixed-weight = 0; 0.3; 1' "
        "--over 'hidden = 32; 64,32'",
        metavar="NAME=A;B",
    )
    by: HeldOutBy = option(
        HeldOutBy.clusters,
        "What is held out: whole clusters, to choose for new clusters, or rows, to choose for new "
        "rows of the same clusters: --by rows",
    )
    factor: str | None = option(
        None,
        "Grouping factor whose clusters are held out: --factor site [default: that of the first "
        "--random]",
    )
    folds: int = option(5, "Parts that are held out in turn: --folds 10")
    unseen: str = option("marginal", "Assumption on held-out clusters: {modes}", metavar="MODE")
    support: int = option(
        0, "Labelled rows of each held-out cluster to adapt to before it is predicted: --support 3"
    )
    criterion: Criterion = option(
        Criterion.log_score,
        "What to choose by: the log predictive density, or the error of predictive means (rmse) or "
        "classes (accuracy): --criterion rmse",
    )
    table: Path | None = option(
        None, "Table of scores to write: --out scores.csv", "--out", metavar="FILE"
    )
    steps: int | None = option(
        None, "Most training steps of each fit: --steps 5000 [default: {steps}]"
    )
    workers: int | None = option(
        None, "Processes that fit: --workers 2 [default: as many as there are cores]"
    )
    seed: int = option(0, "Seed of folds and fits: --seed 1")


@dataclass(frozen=True)
class PredictOptions:
    """Options of ``armed-pyro predict``."""

    run: Path = RUN
    data: Path = DATA
    pred: Path = option(..., "Table to write: --out pred.csv", "--out", metavar="PRED")
    unseen: str | None = option(
        None,
        "Assumption on clusters not seen in training, required if there are any: {modes}",
        metavar="MODE",
    )
    support: Path | None = option(
        None,
        "Labelled rows of the new clusters, for --unseen adapt: --support first_rows.csv",
        metavar="FILE",
    )
    missing: Holes = option(
        Holes.error,
        "Rows with missing values; to give them empty predictions in their place: --missing empty. "
        "A missing label of a cluster is an unknown identity: membership predicts such a row",
    )
    by_row: bool = option(
        False, "Membership of each row by itself, not of its whole cluster", "--by-row"
    )
    compare: bool = option(
        False,
        "Compare all modes on the new clusters, whose outcomes DATA must have; the table is "
        "printed and written beside PRED, as PRED.modes.csv",
        "--compare",
    )
    net: str | None = USER_NETWORK
    network_uncertainty: NetworkUncertainty = option(
        NetworkUncertainty.none,
        "Network of new clusters: the mean of the cross-fitted ones (none), or one after the other "
        "in the draws, whose disagreement widens the intervals: --network-uncertainty ensemble",
    )
    draws: int = option(1000, "Posterior draws: --draws 2000")
    prob: float | None = SAVED_PROB
    seed: int | None = option(None, "Seed of the draws: --seed 1 [default: the fit's]")
    quote_formulas: bool = QUOTE_FORMULAS
    verify: bool = VERIFY


@dataclass(frozen=True)
class ReportOptions:
    """Options of ``armed-pyro report``."""

    run: Path = RUN
    html: Path = option(
        ...,
        "report to write, HTML or Word: --out report.html, --out report.docx",
        "--out",
        metavar="FILE",
    )
    net: str | None = USER_NETWORK
    prob: float | None = SAVED_PROB
    verify: bool = VERIFY


@dataclass(frozen=True)
class DemoOptions:
    """Options of ``armed-pyro demo``."""

    folder: Path = option(
        Path("results/demo"), "Folder to write to: --out demo", "--out", metavar="DIR"
    )
