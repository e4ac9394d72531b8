"""The command line ``armed-pyro``, with the commands fit, tune, predict, report and demo.

Each command imports its work when it runs. Torch, pyro and pandas take seconds to import, and
``--help`` or a mistyped option should not wait for them.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any, final

import typer
from typer.core import TyperCommand

from armed_pyro.cli.options import (
    DemoOptions,
    FitOptions,
    PredictOptions,
    ReportOptions,
    TuneOptions,
    takes,
)
from armed_pyro.cli.process import loading

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Mixed-effects deep learning: networks with random effects, fitted as a Pyro program.",
)


@final
class FilledInCommand(TyperCommand):
    """A command whose help names families, modes or the number of steps; see `option`."""

    def get_help(self, ctx: Any) -> str:
        """The help text, with these names filled in."""
        from armed_pyro.engine.schedule import Schedule
        from armed_pyro.families.registry import FAMILIES
        from armed_pyro.prediction.unseen import MODES

        modes = "; ".join(f"{name}, {meaning}" for name, meaning in MODES.items())
        parameters: list[Any] = self.params
        for parameter in parameters:
            parameter.help = parameter.help.format(
                families=", ".join(FAMILIES), modes=modes, steps=Schedule.steps
            )
        return super().get_help(ctx)


@app.command("fit", cls=FilledInCommand)
@takes(FitOptions)
def fit_command(options: FitOptions) -> None:
    """Fit a network with random effects to a table.

    armed-pyro fit sleep.csv "Reaction ~ Days + (Days | Subject)" --out run

    armed-pyro fit sleep.csv --outcome Reaction --random "(1 + Days | Subject)" --out run

    Several processes: torchrun --nproc-per-node 4 -m armed_pyro.cli fit ...
    """
    with loading():
        from armed_pyro.cli.fit import fit_table

    fit_table(options)


@app.command("tune", cls=FilledInCommand)
@takes(TuneOptions)
def tune_command(options: TuneOptions) -> None:
    """Choose options of fit by cross-validation on held-out clusters or rows.

    armed-pyro tune wages.csv --outcome lwage --random "(1 | id)" --net dense
    --over "between = auto; yes" --over "fixed-weight = 0; 0.3"

    Prints scores with standard errors over clusters, and the options that fit should have: among
    those within one standard error of the best, those nearest to the first values.
    """
    with loading():
        from armed_pyro.cli.tune import tune_table

    tune_table(options)


@app.command("predict", cls=FilledInCommand)
@takes(PredictOptions)
def predict_command(options: PredictOptions) -> None:
    """Predict the expected outcome of new rows, in their order, with its uncertainty.

    armed-pyro predict run new.csv --unseen marginal --out pred.csv

    Parquet tables are read and written block by block, whatever their size.
    """
    with loading():
        from armed_pyro.cli.predict import predict_to_file

    predict_to_file(options)


@app.command("report")
@takes(ReportOptions)
def report_command(options: ReportOptions) -> None:
    """Write a report for readers: one HTML page, or a document of Word.

    armed-pyro report run --out report.html

    It has the question, the verdicts and what was not checked, effects, variance components,
    predictive and residual plots, a methods text with references, versions and the seed.
    """
    with loading():
        from armed_pyro.cli.saved_run import write_report

    write_report(options)


@app.command("demo")
@takes(DemoOptions)
def demo_command(options: DemoOptions) -> None:
    """Fit, report and predict on demonstration data.

    armed-pyro demo --out demo
    """
    registered = list(entry_points(group="armed_pyro.demos", name="fertility"))
    if not registered:
        raise ValueError("the demonstration is not installed: install armed_pyro again")
    try:
        main = registered[0].load()
    except ModuleNotFoundError as error:
        raise ValueError(f"the demo needs {error.name}: see armed_pyro[analysis]") from error
    main(["--out", str(options.folder)])
