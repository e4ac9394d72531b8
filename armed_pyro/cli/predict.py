"""``armed-pyro predict``: predict the rows of a table, and write the predictions to a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
from rich.progress import Progress, TaskID

from armed_pyro.cli.console import err, out
from armed_pyro.cli.options import PredictOptions
from armed_pyro.cli.prediction_file import write_predictions
from armed_pyro.cli.saved_run import load_run
from armed_pyro.data.files import read_table, write_table
from armed_pyro.fit_result import Fit
from armed_pyro.prediction.predict import predict_table
from armed_pyro.prediction.result import Prediction
from armed_pyro.streaming.parquet_table import TableBlocks

__all__ = ["predict_to_file"]

Report = Callable[[str, int, int], None]


def predict_to_file(options: PredictOptions) -> None:
    """Predict the rows of a table, write the predictions, and print the path of the file.

    Raises
    ------
    ValueError
        Before anything is written, if an option does not fit the table, the fit or another option.
    """
    _check(options)
    table = TableBlocks.open(options.data)
    support = None if options.support is None else read_table(options.support)
    fitted = load_run(options.run, options.net)
    with _progress() as report:
        parts, membership = predict_table(
            fitted.posterior,
            table,
            unseen=options.unseen,
            support=support,
            pooled=not options.by_row,
            draws=options.draws,
            prob=options.prob,
            seed=options.seed,
            classifiers=fitted.classifiers,
            report=report,
        )
        # The comparison comes before the writing, so that its errors leave no file.
        modes = _compared(fitted, table, support, options) if options.compare else None
        _write(parts, options.pred, report, table.n_rows)
    out.print(f"{table.n_rows} predictions are in {options.pred}")
    for name, extra_table in {"membership": membership, "modes": modes}.items():
        if extra_table is not None:
            path = options.pred.with_name(f"{options.pred.name}.{name}.csv")
            write_table(extra_table, path)
            _print_table(name, extra_table, path)
    _print_calibration(fitted)


def _check(options: PredictOptions) -> None:
    if not options.pred.name.lower().endswith((".csv", ".csv.gz", ".parquet", ".pq")):
        raise ValueError(f"--out must end in .csv or .parquet, found {str(options.pred)!r}")
    if options.by_row and options.unseen not in ("membership", "nearest"):
        raise ValueError("--by-row is for --unseen membership and --unseen nearest")


@contextmanager
def _progress() -> Iterator[Report]:
    """A progress bar for each task on a terminal, updated by ``report(task, done, total)``."""
    with Progress(console=err, disable=not err.is_terminal) as bar:
        tasks: dict[str, TaskID] = {}

        def report(task: str, done: int, total: int) -> None:
            if task not in tasks:
                tasks[task] = bar.add_task(task, total=total)
            bar.update(tasks[task], completed=done)

        yield report


def _write(parts: Iterator[Prediction], pred: Path, report: Report, total: int) -> None:
    done = 0
    for rows in write_predictions(parts, pred):
        done += rows
        report("predicting", done, total)


def _compared(
    fit: Fit, table: TableBlocks, support: pd.DataFrame | None, options: PredictOptions
) -> pd.DataFrame:
    frame = pd.concat(table.blocks(2**18)) if table.frame is None else table.frame
    return fit.compare_modes(
        frame,
        support=support,
        draws=options.draws,
        prob=options.prob,
        seed=options.seed,
    )


def _print_table(name: str, table: pd.DataFrame, path: Path) -> None:
    if name == "modes":
        out.print("\nModes compared on the new clusters' outcomes:")
        out.print(table.to_string(index=False, float_format="{:.4g}".format))
    else:
        probability = table["probability"].median()
        out.print(
            f"Membership of {len(table)} new clusters: median probability of the nearest "
            f"{probability:.2f}, {int(table['alien'].sum())} like no seen cluster"
        )
    out.print(f"That table is in {path}")


def _print_calibration(fit: Fit) -> None:
    for name, classifier in fit.classifiers.items():
        report = classifier.report
        out.print(
            f"Classifier of {name!r}, on {report['rows']:.0f} rows kept for that: accuracy "
            f"{report['accuracy']:.2f} (chance {report['chance']:.2f}), calibration error "
            f"{report['ece']:.3f}"
        )
