"""The command line: fit, predict, report and demo."""

from __future__ import annotations

import signal
import sys
from collections.abc import Collection, Mapping, Sequence
from enum import StrEnum
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from armed_pyro._memory import most_held
from armed_pyro.cli.console import (
    Column,
    OwnNet,
    Prob,
    Run,
    Table,
    column,
    load_run,
    messages,
    option,
    out,
    say,
)
from armed_pyro.cli.predict import predict_command
from armed_pyro.cli.training_data import TrainingTable, byte_size, outputs
from armed_pyro.data.clustered import ClusteredData
from armed_pyro.data.files import write_table
from armed_pyro.engine.processes import first_process
from armed_pyro.engine.schedule import Schedule
from armed_pyro.families.registry import FAMILIES, family_named
from armed_pyro.fitting import DivergenceError, Fit, fit
from armed_pyro.networks.adversary import Adversary
from armed_pyro.networks.by_name import hidden_activations, is_file, network
from armed_pyro.prediction.evaluation import evaluate
from armed_pyro.program.model import MixedEffects
from armed_pyro.random_effects.formula import parse_terms
from armed_pyro.random_effects.terms import Slopes, Term
from armed_pyro.report import text as summary
from armed_pyro.report.html import page
from armed_pyro.streaming.streamed_data import StreamedData

__all__ = ["app"]


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Mixed-effects deep learning: networks with random effects, fitted as a Pyro program.",
)
EVALUATION = "evaluation.csv"
CHECKPOINT = "checkpoint.safetensors"
PARTIAL = "checkpoint.partial"  # what a kill may leave of a checkpoint being written
Compile = StrEnum("Compile", ["auto", "always", "never"])
Device = StrEnum("Device", ["auto", "cpu", "cuda"])
Missing = StrEnum("Missing", ["error", "drop"])


@app.command("fit")
def fit_command(
    data: Table,
    outcome: Annotated[str, column("Column of the outcome: --outcome score")],
    random: Annotated[
        list[str],
        option(
            "Random effects in lme4's syntax, repeatable: --random '(1 + age | site)'; "
            "'(1 + age || site)' independent, '(1 | school/class)' nested",
            metavar="TERM",
        ),
    ],
    run: Annotated[Path, option("Folder to write the fit to: --out run", "--out", metavar="RUN")],
    features: Annotated[
        str | None,
        option(
            "Columns, or a formula: --features age,sex or 'age * sex' [default: all other columns]",
            metavar="A,B,C",
        ),
    ] = None,
    net: Annotated[
        str,
        option(
            "Fixed effects: linear, dense, or a network (or what makes it) in a file of yours, "
            "which is executed: --net my_net.py:MyNet",
            metavar="NET",
        ),
    ] = "linear",
    hidden: Annotated[
        str | None,
        option("Widths of dense's hidden layers: --hidden 64,32 [default: 32,32]", metavar="N,N"),
    ] = None,
    family: Annotated[
        str, option(f"Outcome model, one of {', '.join(FAMILIES)}: --family bernoulli")
    ] = "gaussian",
    trials: Annotated[Column, column("Denominators of a binomial outcome: --trials size")] = None,
    offset: Annotated[Column, column("Known term of the predictor: --offset log_days")] = None,
    weights: Annotated[Column, column("Factors of the rows' log-likelihoods: --weights n")] = None,
    missing: Annotated[
        Missing, option("Rows with missing values; to leave them out: --missing drop")
    ] = Missing.error,
    slopes_on: Annotated[
        list[str] | None,
        option(
            "Nonlinear random slopes of the first grouping factor on a hidden layer's "
            "activations, by module path; repeatable: --slopes-on 3",
            metavar="PATH",
        ),
    ] = None,
    bayesian_head: Annotated[
        bool | None,
        option(
            "Whether the last linear layer gets a posterior [default: with --net linear only]",
            "--bayesian-head/--no-bayesian-head",
        ),
    ] = None,
    adversary: Annotated[
        str | None,
        option("Factor to keep out of the hidden layers: --adversary site", metavar="FACTOR"),
    ] = None,
    adversary_weight: Annotated[
        float | None,
        option("Strength of the adversary: --adversary-weight 5 [default: 1]", metavar="W"),
    ] = None,
    validate_rows: Annotated[
        float | None,
        option("Share of rows to stop training by and judge: --validate-rows 0.2", metavar="F"),
    ] = None,
    hold_out_clusters: Annotated[
        float | None,
        option(
            "Share of clusters of the first factor to leave out, and judge: --hold-out-clusters .2",
            metavar="F",
        ),
    ] = None,
    steps: Annotated[
        int, option("Most training steps, if it has not converged before: --steps 5000")
    ] = Schedule.steps,
    batch_size: Annotated[
        int | None, option("Rows a step: --batch-size 512 [default: all, or 1024 of over 4096]")
    ] = None,
    seed: Annotated[int, option("The same seed gives the same result: --seed 1")] = 0,
    device: Annotated[
        Device, option("Where to train; auto takes a GPU if there is one: --device cpu")
    ] = Device.auto,
    compiled: Annotated[
        Compile,
        option("Compile training steps; auto where it pays: --compile never", "--compile"),
    ] = Compile.auto,
    draws: Annotated[int, option("Posterior draws to save: --draws 2000")] = 1000,
    prob: Prob = 0.9,
    memory: Annotated[
        str | None,
        option(
            "Memory to stay within: a Parquet table that would take more is streamed from disk "
            "(temporary files beside RUN): --memory 2GB [default: half of what there is]",
            metavar="SIZE",
        ),
    ] = None,
    resume: Annotated[
        bool, option("Continue a killed run: the same command with --resume", "--resume")
    ] = False,
    overwrite: Annotated[bool, option("Replace the fit in RUN", "--overwrite")] = False,
) -> None:
    """Fit a network with random effects to a table.

    armed-pyro fit sleep.csv --outcome Reaction --random "(1 + Days | Subject)" --out run

    Several processes: torchrun --nproc-per-node 4 -m armed_pyro.cli.app fit ...
    """
    with messages():
        if first_process():
            _check_run(run, resume, overwrite)
        if not 0 < prob < 1:
            raise ValueError(f"--prob must lie between 0 and 1, not {prob}")
        if adversary_weight is not None and adversary is None:
            raise ValueError("--adversary-weight needs --adversary FACTOR")
        schedule = Schedule(steps=steps, batch_size=batch_size)
        terms = parse_terms(random)
        terms += tuple(Slopes(terms[0].factor, on=path) for path in slopes_on or ())
        likelihood = family_named(family)
        table = TrainingTable.open(data, byte_size(memory))
        rows = table.rows(
            run.parent,
            outcome=outcome,
            clusters=_cluster_columns(terms, adversary, table.columns),
            features=_features(features, table.columns),
            trials=trials,
            offset=offset,
            weights=weights,
            missing="drop" if missing is Missing.drop else "error",
        )
        seen = unseen = None
        if isinstance(rows, ClusteredData):
            likelihood.check(rows)
            if hold_out_clusters is not None:
                factor = terms[0].factor
                rows, unseen = rows.hold_out_clusters(factor, fraction=hold_out_clusters, seed=seed)
            if validate_rows is not None:
                rows, seen = rows.split_rows(validate_rows, seed=seed)
        elif hold_out_clusters is None and validate_rows is None:
            # Unwinds a run that is told to end, so that its temporary files go with it.
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        else:
            raise ValueError(
                f"rows cannot be held out of {data}, which is streamed: it would take about "
                f"{table.need / 1e9:.1f} GB of memory. Keep them in a file of their own, or raise "
                "--memory"
            )
        n_outputs = outputs(rows, likelihood)
        module = network(net, rows.n_features, n_outputs, seed=seed, **_widths(hidden, net))
        games = []
        if adversary is not None:
            weight = 1.0 if adversary_weight is None else adversary_weight
            games = [Adversary(adversary, hidden_activations(module), weight=weight)]
        head = net == "linear" if bayesian_head is None else bayesian_head
        model = MixedEffects(module, terms, likelihood, games, bayesian_head=head)
        settings = {"schedule": schedule, "seed": seed, "device": device.value, "resume": resume}
        settings["compile"] = compiled.value
        result = _train(run, model, rows, validation=seen, **settings)
        if not first_process():
            return
        result.save(run, draws=draws, prob=prob)
        held_out = {"rows": seen, "clusters": unseen}
        _print_fit(result, {k: v for k, v in held_out.items() if v is not None}, run, prob)
        if not isinstance(rows, ClusteredData):
            out.print(f"Most memory held: {most_held() / 1e9:.2f} GB", markup=False)
        (run / CHECKPOINT).unlink(missing_ok=True)
        (run / PARTIAL).unlink(missing_ok=True)


app.command("predict")(predict_command)


@app.command("report")
def report_command(
    run: Run,
    html: Annotated[Path, option("Page to write: --out report.html", "--out", metavar="HTML")],
    net: OwnNet = None,
    prob: Prob = 0.9,
) -> None:
    """Write a fit's results as one HTML page with tables and plots.

    armed-pyro report run --out report.html
    """
    with messages():
        evaluation = run / EVALUATION
        held_out = pd.read_csv(evaluation) if evaluation.is_file() else None
        text = page(load_run(run, net), title=run.resolve().name, prob=prob, evaluation=held_out)
        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_text(text, encoding="utf-8")
        out.print(f"The report is in {html}", markup=False)


@app.command("demo")
def demo_command(
    folder: Annotated[
        Path, option("Folder to write to: --out demo", "--out", metavar="DIR")
    ] = Path("results/demo"),
) -> None:
    """Fit, report and predict on demonstration data.

    armed-pyro demo --out demo
    """
    with messages():
        found = list(entry_points(group="armed_pyro.demos", name="fertility"))
        if not found:
            raise ValueError("the demonstration is not installed: install armed_pyro again")
        try:
            main = found[0].load()
        except ModuleNotFoundError as error:
            raise ValueError(f"the demo needs {error.name}: see armed_pyro[analysis]") from error
        main(["--out", str(folder)])


def _check_run(run: Path, resume: bool, overwrite: bool) -> None:
    """Raise ValueError if a fit cannot be written to this folder."""
    if run.exists() and not run.is_dir():
        raise ValueError(f"--out {run} is a file, expected a folder to write the fit to")
    held = {path.name for path in run.iterdir()} - {PARTIAL} if run.exists() else set()
    if not held or (resume and CHECKPOINT in held):
        return
    if not held & {CHECKPOINT, "manifest.json"}:
        raise ValueError(f"--out {run} is a folder with other files: choose a new one")
    if not overwrite:
        if CHECKPOINT in held:
            raise ValueError(f"{run} holds an unfinished run: add --resume, or --overwrite")
        what = "nothing to resume, as the run in it is finished" if resume else "a fit"
        raise ValueError(f"{run} holds {what}: choose another folder, or replace it: --overwrite")


def _train(
    run: Path, model: MixedEffects, rows: ClusteredData | StreamedData, **settings: Any
) -> Fit:
    """Fit with a checkpoint in the run's folder; say what is left if it ends early."""
    checkpoint = run / CHECKPOINT
    if first_process() and not settings["resume"]:
        checkpoint.unlink(missing_ok=True)
    try:
        return fit(model, rows, checkpoint=checkpoint, **settings)
    except DivergenceError as error:
        if not first_process():
            raise typer.Exit(1) from error
        error.fit.save(run)
        checkpoint.unlink(missing_ok=True)
        say(f"Error: {error}\nThat state is in {run}, marked as diverged.", "red")
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        kept = "nothing was kept, as the first window of steps was not over"
        if checkpoint.exists():
            kept = f"the state is kept in {checkpoint}: continue with the same command and --resume"
        say(f"Interrupted; {kept}", "yellow")
        raise typer.Exit(130) from error


def _cluster_columns(
    terms: Sequence[Term], adversary: str | None, table: Collection[str]
) -> list[str]:
    """Columns of the grouping factors; the factor ``a:b`` needs the columns a and b."""
    factors = [term.factor for term in terms] + ([adversary] if adversary else [])
    columns = [[name] if name in table else name.split(":") for name in factors]
    return list(dict.fromkeys(name for names in columns for name in names))


def _features(text: str | None, table: Collection[str]) -> list[str] | str | None:
    """Columns listed with commas, or a formula."""
    names = [name.strip() for name in (text or "").split(",") if name.strip()]
    formula = len(names) == 1 and names[0] not in table and any(c in names[0] for c in "+:*^`")
    return None if text is None else names[0] if formula else names


def _widths(hidden: str | None, net: str) -> dict[str, list[int]]:
    """Arguments of the network for --hidden."""
    if hidden is None:
        return {}
    if net == "linear" or is_file(net):
        raise ValueError(f"--hidden is for --net dense, not for --net {net}")
    if not all(width.strip().isdigit() for width in hidden.split(",")):
        raise ValueError(f"--hidden must be widths such as 32,32, found {hidden!r}")
    return {"hidden": [int(width) for width in hidden.split(",")]}


def _print_fit(result: Fit, held_out: Mapping[str, ClusteredData], run: Path, prob: float) -> None:
    """Print the summary, the evaluation and the files."""
    out.print(summary.text(result, prob=prob), markup=False)
    (run / EVALUATION).unlink(missing_ok=True)
    if held_out:
        table = evaluate(result.posterior, held_out, prob=prob)
        write_table(table, run / EVALUATION)
        out.print("\nPredictions of held-out rows:")
        out.print(table.to_string(index=False, float_format="{:.4g}".format), markup=False)
    files = sorted(path.name for path in run.iterdir() if path.name not in (CHECKPOINT, PARTIAL))
    out.print(f"\nIn {run}: {', '.join(files)}", markup=False)
    out.print(f"Next: armed-pyro report {run} --out report.html", markup=False)


if __name__ == "__main__":
    app()
